"""Recipes for models that lose channels, heads and layers: what they are made of, and what one is without a part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from typing import Any

from gpmetric.session.inputs import Inputs
from gpmetric.structured.repair import DAMPINGS
from gpmetric.structured.request import BUDGETS, FORMATS, UNIT_KINDS, UNIT_RULES, SlimRequest
from gpmetric.structured.starts import started_from
from gpmetric.tuning.request import TuneRequest

__all__ = [
    "UnitRecipe", "dampings", "every_kind", "left_out", "published", "shapes", "slim_request", "starts_and_repairs",
]  # fmt: skip

_SIMPLE = "wanda_sp"  # the start that others are held against
_FIT = "least-squares"
_BLOCK = "block"  # the kind of units that goes alone
_DAMPING = DAMPINGS[-2]  # what `slim` compares starts with
# repair, and biases where there are none, that a published rule comes with; the others have none
_REPAIRED = {"flap": ("bias", True), "taylor2": (_FIT, False)}


@dataclass(frozen=True)
class UnitRecipe:
    """Which units go, and what is done for those that stay; the fields are options of `slim`, but for the last two.

    Attributes:
        damping: of the fit, where the repair is one.
        steps: of the search that the units come from; 0 is the start.
    """

    start: str
    granularity: tuple[str, ...]
    format: str
    budget: str = "global"
    repair: str = "none"
    add_bias: bool = False
    damping: float | None = None
    steps: int = 0

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"granularity": list(self.granularity)}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> UnitRecipe:
        """The recipe of a document."""
        known = {one.name: document[one.name] for one in fields(cls)}
        return cls(**known | {"granularity": tuple(known["granularity"])})

    @property
    def begun(self) -> UnitRecipe:
        """The recipe without the search."""
        return replace(self, steps=0)

    def repaired(self, repair: str, *, add_bias: bool = False) -> UnitRecipe:
        """The recipe with another repair, in the middle of its dampings."""
        return replace(self, repair=repair, add_bias=add_bias, damping=_DAMPING if repair == _FIT else None)


def slim_request(request: TuneRequest, recipe: UnitRecipe) -> SlimRequest:
    """What `gpmetric slim` would be asked for."""
    shared = [one.name for one in fields(Inputs)] + ["output", "search", "validation", "windows", "search_windows"]
    chosen = ("start", "granularity", "format", "budget", "repair", "add_bias")
    return SlimRequest(
        **{name: getattr(request, name) for name in shared} | {name: getattr(recipe, name) for name in chosen},
        sparsity=float(request.target),
    )


def every_kind(*, layers: bool) -> tuple[str, ...]:
    """All kinds of units: of each sublayer the first, and whole layers if they may go."""
    return tuple(names[0] for sublayer, names in _kinds().items() if sublayer is not None or layers)


def published(form: str) -> list[UnitRecipe]:
    """What the choice must not be worse than: published rules, each with its own placing and repair.

    All remove channels and heads, so that all meet the budget: a rule of blocks takes the last of them in part.
    """
    equal = FORMATS[form].equal
    found = []
    for name in _rules(layers=not equal):
        rule = UNIT_RULES[name]
        budget = "block" if rule.placing == "uniform" and not equal else "global"
        repair, add_bias = _REPAIRED.get(name, ("none", False))
        plain = UnitRecipe(name, every_kind(layers=False), form, budget)
        found.append(plain.repaired(repair, add_bias=add_bias))
    return found


def starts_and_repairs(form: str, *, biased: bool, may: bool) -> list[UnitRecipe]:
    """Every start that tells units apart with every repair.

    Args:
        form: a key of FORMATS.
        biased: whether all outputs have a bias.
        may: whether the format can hold biases of those that have none.
    """
    repairs = [("none", False), (_FIT, False)] + [("bias", False)] * biased
    repairs += [("bias", True), (_FIT, True)] * (may and not biased)
    kinds = every_kind(layers=False)
    return [
        UnitRecipe(name, kinds, form).repaired(repair, add_bias=add_bias)
        for repair, add_bias in repairs
        for name in _rules(layers=False)
    ]


def shapes(best: UnitRecipe, forms: Sequence[str]) -> list[UnitRecipe]:
    """A recipe with everything that may be removed as one, under every budget, in every format.

    Where whole layers can go, from rules of blocks, too; whole blocks alone from these and whatever tells blocks apart.
    """
    found = []
    several = product(*([*((name,) for name in names), ()] for names in _kinds().values()))
    for chosen, form, budget in product(several, forms, BUDGETS):
        kinds = tuple(name for one in chosen for name in one)
        inner = [name for name in kinds if UNIT_KINDS[name].sublayer]
        layers = len(inner) < len(kinds)
        alike = FORMATS[form].equal or budget != "global"
        if not kinds or (layers and alike) or (budget != "global" and FORMATS[form].equal):
            continue
        if budget == "kind" and len(inner) == 1:  # as good as global
            continue
        rules = [name for name in _rules(layers=True) if layers and UNIT_RULES[name].blocks]
        changed = replace(best, granularity=kinds, format=form, budget=budget)
        found += [replace(changed, start=start) for start in (best.start, *rules)]
    whole = replace(best, granularity=(_BLOCK,), format=forms[0], budget="global").repaired("none")
    found += [replace(whole, start=start) for start in started_from(SlimRequest(granularity=(_BLOCK,)))]
    return list(dict.fromkeys(found))


def _rules(*, layers: bool) -> tuple[str, ...]:
    """Names of all rules that tell units apart, and whole layers if they may go."""
    return started_from(SlimRequest(granularity=every_kind(layers=layers)))


def dampings(best: UnitRecipe) -> list[UnitRecipe]:
    """A recipe whose repair is a fit with every damping; none for another."""
    return [replace(best, damping=damping) for damping in DAMPINGS] if best.repair == _FIT else []


def left_out(best: UnitRecipe) -> Iterator[tuple[str, UnitRecipe]]:
    """By part, the recipe without it; what a search would begin from is replaced without the search."""
    begun, before = best.begun, ", before the search" * bool(best.steps)
    if best.steps:
        yield "search (its start)", begun
    if best.repair != "none":
        yield "repair", best.repaired("none")
    if best.add_bias:
        yield "biases for the repair", replace(best, add_bias=False)
    if best.start != _SIMPLE:
        yield f"start ({_SIMPLE} in its place{before})", replace(begun, start=_SIMPLE)
    for kind in best.granularity if len(best.granularity) > 1 else ():
        others = tuple(name for name in best.granularity if name != kind)
        yield f"granularity {kind} ({','.join(others)} alone{before})", replace(begun, granularity=others)
    inner = tuple(name for name in best.granularity if UNIT_KINDS[name].sublayer)
    if inner and best.budget != "block" and not FORMATS[best.format].equal:
        yield f"widths of their own (all blocks alike{before})", replace(begun, budget="block", granularity=inner)


def _kinds() -> dict[str | None, list[str]]:
    """Kinds of units that may go together, by the sublayer that they are parts of; None for whole layers."""
    found: dict[str | None, list[str]] = {}
    for name, kind in UNIT_KINDS.items():
        if kind.alone:
            continue
        found.setdefault(kind.sublayer, []).append(name)
    return found
