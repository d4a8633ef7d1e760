"""Allocations: a target for every layer, as files that `gpmetric allocate` writes and `gpmetric prune` reads.

    {"version": 1, "granularity": "row", "sparsity": {"model.layers.0.mlp.up_proj": 0.71, ...}}

Under N:M, `pattern` says which each layer has: `2:4`, `4:8`, ..., or `dense`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from gpmetric.errors import InputError
from gpmetric.targets import GRANULARITIES, Target, parse_target

if TYPE_CHECKING:
    from gpmetric.models import Layer

__all__ = [
    "Allocation",
    "GranularityName",
    "allocation_of",
    "check_allocation",
    "group_count",
    "layer_target",
    "mean_sparsity",
    "read_allocation",
]

_CLOSE = 1e-6  # of a sparsity that is written beside its N:M pattern
_DENSE = Target("0.0", "row", 0.0)  # removes nothing, whatever the width


def _known(name: str) -> str:
    if name not in GRANULARITIES:
        raise ValueError(f"accepted are {', '.join(GRANULARITIES)}")
    return name


GranularityName = Annotated[str, AfterValidator(_known)]  # in a file, read by pydantic
_Version = Annotated[int, Field(ge=1, le=1)]  # Literal[1] would take true
_Sparsity = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


@dataclass(frozen=True)
class Allocation:
    """What each layer is pruned to.

    Attributes:
        granularity: of all layers; a metric's own comparison group does not matter.
        targets: by layer name; under N:M a plain 0 is a dense layer.
        file: where it was read.
        digest: sha256 of that file, in hexadecimal.
        made_for: formula, update and fit that it was measured with, where weights were updated.
    """

    granularity: str
    targets: Mapping[str, Target]
    file: str | None = field(default=None, compare=False)
    digest: str | None = field(default=None, compare=False)
    made_for: Mapping[str, str] = field(default_factory=dict, compare=False)

    def document(self) -> dict[str, Any]:
        """The JSON that `read_allocation` reads."""
        made: dict[str, Any] = {"version": 1, "granularity": self.granularity}
        made["sparsity"] = {name: target.sparsity for name, target in self.targets.items()}
        if self.granularity == "n:m":
            made["pattern"] = {name: target.text if target.group else "dense" for name, target in self.targets.items()}
        return made | ({"made_for": dict(self.made_for)} if self.made_for else {})


class _MadeFor(BaseModel):
    formula: str = ""
    update: str = ""
    fit: str = ""


class _File(BaseModel):
    """What is read of a file; other keys may stand beside it."""

    made_for: _MadeFor = _MadeFor()
    version: _Version
    granularity: GranularityName
    sparsity: Annotated[dict[str, _Sparsity], Field(min_length=1)]


class _PatternFile(BaseModel):
    made_for: _MadeFor = _MadeFor()
    version: _Version
    granularity: Literal["n:m"]
    sparsity: dict[str, _Sparsity] = {}
    pattern: Annotated[dict[str, str], Field(min_length=1)]


def read_allocation(path: str | Path, option: str = "--allocation") -> Allocation:
    """The allocation in a file that an option names.

    Raises:
        InputError: naming the file, and the key, its value and what is accepted, or why it cannot be read.
    """
    where = f"{option} {str(path)!r}"
    try:
        raw = Path(path).read_bytes()
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number)
    except OSError as error:
        raise InputError(f"{where} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise InputError(f"{where} is no allocation: {error}") from error
    return replace(allocation_of(content, where), file=str(path), digest=hashlib.sha256(raw).hexdigest())


def allocation_of(content: object, where: str) -> Allocation:
    """The allocation of a document.

    Raises:
        InputError: naming where it stands, and the key, its value and what is accepted.
    """
    kind = _PatternFile if isinstance(content, dict) and content.get("granularity") == "n:m" else _File
    try:
        said = kind.model_validate(content, strict=True)
    except ValidationError as error:
        raise InputError(f"{where}: {_told(error)}") from error
    if isinstance(said, _PatternFile):
        targets = _pattern_targets(where, said)
    else:
        assert isinstance(said, _File)
        targets = {name: _plain_target(said.granularity, sparsity) for name, sparsity in said.sparsity.items()}
    made_for = said.made_for.model_dump(exclude_unset=True)
    return Allocation(said.granularity, targets, made_for=made_for)


def layer_target(granularity: str, shape: Sequence[int], removed_per_group: int) -> Target:
    """The target that removes exactly so many weights of every comparison group of a weight [out, in].

    Args:
        granularity: row, layer or block; N:M has targets of its own, `parse_target("2:4")`.
        shape: of the weight.
        removed_per_group: at least 0 and below the size of a group; of a block, that of a whole one: a last one that is
            narrower loses its share.
    """
    target = Target("", granularity, 0.0)
    size = target.groups(shape)[0][1]
    assert 0 <= removed_per_group < size
    sparsity = removed_per_group / size
    while int(size * sparsity) < removed_per_group:  # 1 / 49 * 49 is below 1
        sparsity = math.nextafter(sparsity, 1)
    return _plain_target(granularity, sparsity)


def mean_sparsity(layers: Sequence[Layer], targets: Mapping[str, Target]) -> float:
    """Fraction of the weights of all layers that their targets remove."""
    return _removed(layers, targets) / sum(layer.weight.numel() for layer in layers)


def check_allocation(layers: Sequence[Layer], allocation: Allocation, target: Target | None) -> None:
    """Refuses an allocation that is not one of these layers, or that does not have the budget of a target.

    The budget is the number of weights that the uniform mask of the target removes, to within one weight per
    comparison group of one matrix, the one with most groups.

    Args:
        layers: those that are pruned.
        allocation: to be checked.
        target: with the comparison group that its scores compete in; None checks no budget.

    Raises:
        InputError: naming the layer, or both numbers of weights.
    """
    where = "--allocation" if allocation.file is None else f"--allocation {allocation.file!r}"
    _check_names(where, layers, allocation)
    for layer in layers:
        _check_width(where, layer, allocation.targets[layer.name])
    if target is None:
        return
    if target.granularity != allocation.granularity:
        raise InputError(
            f"{where} has granularity {allocation.granularity!r}, but --target {target.text!r} with this metric has "
            f"{target.granularity!r} ({GRANULARITIES[target.granularity or 'row'].meaning}); accepted: the same, or no "
            "--target"
        )
    for layer in layers:
        _check_width(f"--target {target.text!r}", layer, target)
    removed = _removed(layers, allocation.targets)
    budget = _removed(layers, {layer.name: target for layer in layers})
    slack = max(group_count(layer.weight.shape, target) for layer in layers)
    if abs(removed - budget) > slack:
        mean = mean_sparsity(layers, allocation.targets)
        raise InputError(
            f"{where} removes {removed:,} weights, a mean sparsity of {mean:.4f}, but --target {target.text!r} removes "
            f"{budget:,}; accepted: that, to within {slack:,}"
        )


def _plain_target(granularity: str, sparsity: float) -> Target:
    """A target spelled so that `parse_target` gives it back, within rows as a plain number."""
    text = repr(sparsity + 0.0)  # no -0.0
    return parse_target(text if granularity == "row" else f"{granularity}:{text}").resolved(granularity)


def _pattern_targets(where: str, said: _PatternFile) -> dict[str, Target]:
    """The targets of an N:M file, whose patterns and sparsities must agree."""
    for name, sparsity in said.sparsity.items():
        if sparsity and name not in said.pattern:
            raise InputError(f"{where}: sparsity.{name!r:.200} is {sparsity}, but no pattern says which N:M")
    targets = dict.fromkeys(said.sparsity, _DENSE)
    targets |= {name: _pattern(where, name, text) for name, text in said.pattern.items()}
    for name, target in targets.items():
        sparsity = said.sparsity.get(name, target.sparsity)
        if abs(sparsity - target.sparsity) > _CLOSE:
            raise InputError(
                f"{where}: sparsity.{name!r:.200} is {sparsity}, but its pattern {said.pattern[name]!r} removes "
                f"{target.sparsity}"
            )
    return targets


def _pattern(where: str, name: str, text: str) -> Target:
    if text == "dense":
        return _DENSE
    wrong = f"{where}: pattern.{name!r:.200} is {text!r:.60}; accepted: dense, or N:M with 0 < N < M (N kept of each M)"
    try:
        target = parse_target(text)
    except InputError as error:
        raise InputError(wrong) from error
    if not target.group:
        raise InputError(wrong)
    return target


def _removed(layers: Sequence[Layer], targets: Mapping[str, Target]) -> int:
    return sum(targets[layer.name].removes(layer.weight.shape) for layer in layers)


def group_count(shape: Sequence[int], target: Target) -> int:
    """Comparison groups of a weight [out, in]."""
    return sum(count for count, _ in target.groups(shape))


def _check_names(where: str, layers: Sequence[Layer], allocation: Allocation) -> None:
    names = {layer.name for layer in layers}
    missing = next((layer.name for layer in layers if layer.name not in allocation.targets), None)
    foreign = next((name for name in allocation.targets if name not in names), None)
    told = [f"it lacks layer {missing!r}"] if missing is not None else []
    if foreign is not None:
        told.append(f"it names layer {foreign!r:.200}, which is not pruned here")
    if told:
        raise InputError(
            f"{where} is not one of this model's {len(names)} layers: {' and '.join(told)}; --include and --exclude "
            "must choose the layers it was made for"
        )


def _check_width(where: str, layer: Layer, target: Target) -> None:
    width = layer.weight.shape[1]
    if not target.fits(width):
        raise InputError(
            f"{where}: in = {width} of layer {layer.name} is not divisible by {target.group} (target {target.text})"
        )


def _told(error: ValidationError) -> str:
    """The first thing wrong: its key, its value, what is accepted."""
    first = error.errors()[0]
    place = ".".join(str(part) if part in _PatternFile.model_fields else f"{part!r:.200}" for part in first["loc"])
    if first["type"] == "missing":
        return f"{place} is missing"
    return f"{place or 'the file'} is {first['input']!r:.60}: {first['msg']}"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a JSON text, none of its keys twice."""
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"the key {key!r:.200} stands there twice")
        made[key] = value
    return made


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number that JSON has")
