"""`gpmetric list`: the names that options and formulas know, with what each means, from the tables themselves."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from gpmetric.allocation.request import ALLOCATORS, GENES
from gpmetric.discovered import CATALOGUE, PREFIX
from gpmetric.evaluation.objectives import OBJECTIVES
from gpmetric.expression import PRIMITIVES
from gpmetric.extensible import Extensible
from gpmetric.formats import FORMATS
from gpmetric.functions import as_function
from gpmetric.metrics import BASELINES
from gpmetric.operands import OPERANDS
from gpmetric.options import Common, Option
from gpmetric.plugins import installed
from gpmetric.pruning.published import PUBLISHED
from gpmetric.pruning.updaters import FITS, UPDATERS
from gpmetric.session.inputs import PRESETS
from gpmetric.structured.request import ESTIMATORS, REPAIRS, UNIT_KINDS, UNIT_RULES
from gpmetric.structured.request import FORMATS as MODEL_FORMATS
from gpmetric.targets import GRANULARITIES
from gpmetric.tracking.table import TRACKERS

__all__ = ["KINDS", "ListRequest", "list_names", "run_list"]


def _meanings(table: Any) -> dict[str, str]:
    return {name: getattr(row, "meaning", row) for name, row in table.items()}


def _metrics() -> dict[str, str]:
    published = {name: f"{_short(row.balanced(128, 2048))}; {row.source}" for name, row in BASELINES.items()}
    return published | {f"{PREFIX}:{name}": f"{row.formula}; {row.found}" for name, row in CATALOGUE.items()}


def _short(formula: str) -> str:
    """A formula with four digits of its constants: those of GBLM's balance are of its sample."""
    return re.sub(r"\d+\.\d+", lambda found: f"{float(found[0]):.4g}", formula)


def _operands() -> dict[str, str]:
    return {name: f"[{row.axes.replace(',', ', ')}] {row.meaning}" for name, row in OPERANDS.items()}


def _primitives() -> dict[str, str]:
    return {name: _written(name, row) for name, row in PRIMITIVES.items()}


def _written(name: str, row: Any) -> str:
    """How a primitive is written, and what its guards are."""
    letters = ("a", "b")[: row.arity]
    call = f"{name}({', '.join(letters)})"
    form = call if not row.infix else f"{row.infix}a" if row.arity == 1 else f"a{row.infix}b"
    told = (row.torch.__doc__ or "").strip().splitlines()
    return f"{form}: {told[0]}" if told else form


def _targets() -> dict[str, str]:
    spelled = {name: "2:4" if row.counted else f"{name}:0.5" for name, row in GRANULARITIES.items()}
    where = {spelled[name]: f"scores compete within {row.meaning}" for name, row in GRANULARITIES.items()}
    return {"0.5": "half of the weights, where the metric says; within rows where it says nothing"} | where


def _presets() -> dict[str, str]:
    def told(options: dict[str, Any]) -> str:
        shown = (f"--{name.replace('_', '-')} {value}" for name, value in options.items() if value is not None)
        return " ".join(shown)

    return {name: told(options) for name, options in PRESETS.items()}


def _published() -> dict[str, str]:
    return {name: row.source for name, row in PUBLISHED.items()}


# kind -> its names with what each means
KINDS: dict[str, Callable[[], dict[str, str]]] = {
    "metrics": _metrics,
    "operands": _operands,
    "primitives": _primitives,
    "targets": _targets,
    "updates": lambda: _meanings(UPDATERS),
    "fits": lambda: dict(FITS),
    "allocators": lambda: _meanings(ALLOCATORS),
    "genes": lambda: _meanings(GENES),
    "objectives": lambda: _meanings(OBJECTIVES),
    "presets": _presets,
    "units": lambda: _meanings(UNIT_KINDS),
    "starts": lambda: {name: row.source for name, row in UNIT_RULES.items()},
    "estimators": lambda: _meanings(ESTIMATORS),
    "repairs": lambda: dict(REPAIRS),
    "formats": lambda: _meanings(MODEL_FORMATS),
    "exports": lambda: _meanings(FORMATS),
    "trackers": lambda: {name: f"needs gpmetric[{row.library}]" for name, row in TRACKERS.items()},
    "studies": _published,
    "plugins": lambda: {one["name"]: f"{one['place']}, {one.get('package', '')}" for one in installed()},
}


@dataclass(frozen=True, kw_only=True)
class ListRequest(Extensible, Common):
    """Everything `gpmetric list` can be asked for."""

    kind: Annotated[str | None, Option("{choices}; all by default.", metavar="KIND", choices=KINDS, argument=True)] = (
        None
    )


def run_list(request: ListRequest) -> dict[str, Any]:
    """The names that options and formulas know: `gpmetric.list_names("metrics")`.

    Args:
        request: which kind of names; all of them without one.

    Returns:
        The JSON document of `gpmetric list`: by kind, each name with what it means.
    """
    kinds: Iterable[str] = KINDS if request.kind is None else (request.kind,)
    return {kind: KINDS[kind]() for kind in kinds}


list_names = as_function("list_names", ListRequest, run_list, "kind")
