"""What structured pruning removes as one: channels, heads with their key/value group, experts.

A sublayer is the attention or the MLP of one block. Its units are removed by taking rows out of the layers that write
its inner features, and columns out of the layer that reads them. Experts are in `mixtures`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from gpmetric.blockwise.families import (
    FAMILIES,
    Family,
    Features,
    Place,
    attention_features,
    mlp_features,
    read_features,
)
from gpmetric.errors import InputError, ModelError
from gpmetric.models import Model
from gpmetric.structured.mixtures import ROUTERS, Mixture, find_mixtures
from gpmetric.structured.request import UNIT_KINDS

__all__ = ["SUBLAYERS", "Groups", "Sublayer", "SublayerKind", "find_groups"]


@dataclass(frozen=True)
class SublayerKind:
    """What adds to the residual stream in every block."""

    width: str  # what `widths` of a slim config call its heads or channels,
    bias: str  # and whether its output has a bias that it had not
    features: Callable[[Family, Any], Features]  # (family, its module) -> rows and columns of its heads or channels
    attends: bool = False  # mixes tokens: its scores have a cost, its place in the cache stays, FLAP squares its scores


# in the order in which a block computes them
SUBLAYERS: dict[str, SublayerKind] = {
    "attention": SublayerKind("heads", "attention_bias", attention_features, attends=True),
    "mlp": SublayerKind("channels", "mlp_bias", mlp_features),
}


@dataclass(frozen=True)
class Sublayer:
    """The attention or the MLP of a block, cut into units."""

    block: int
    name: str  # a key of SUBLAYERS
    unit: str  # what it is cut into, a key of UNIT_KINDS
    place: Place
    module: Any
    rows: Mapping[str, Tensor]  # by attribute of `module`, features that it writes, [segments, units, features]
    columns: Tensor  # features that its output layer reads, [units, features]
    cost: int  # parameters of a unit
    rest: int  # parameters that go with the last unit only: norm, output bias, norms of queries and keys

    @property
    def units(self) -> int:
        return len(self.columns)

    @property
    def kind(self) -> SublayerKind:
        return SUBLAYERS[self.name]

    @property
    def output(self) -> Any:
        """The layer that reads its inner features."""
        return getattr(self.module, self.place.output)

    @property
    def weight(self) -> Tensor:
        """[out, features] of that layer, a view of what is stored."""
        weight: Tensor = self.output.weight.data
        return weight if isinstance(self.output, nn.Linear) else weight.t()

    def width(self, units: int) -> int:
        """Heads or channels of so many units."""
        return units * UNIT_KINDS[self.unit].together


@dataclass(frozen=True)
class Groups:
    """Every unit of a model, sublayer by sublayer, the attention of a block before its MLP; or its experts."""

    sublayers: tuple[Sublayer, ...]
    parameters: int  # inside the blocks
    cost: Tensor  # parameters of each unit, [units], fp64
    sublayer_of: Tensor  # index of each unit's sublayer or mixture, [units]
    blocks: int
    mixtures: tuple[Mixture, ...] = ()  # where units are experts; there are no sublayers then

    @property
    def units(self) -> int:
        return len(self.cost)

    @property
    def parts(self) -> tuple[Sublayer | Mixture, ...]:
        """What units are parts of: sublayers, or mixtures."""
        return self.mixtures or self.sublayers

    @property
    def outputs(self) -> list[Any]:
        """The layers that read inner features: one of each sublayer, or one of each expert."""
        return [one.output for one in self.sublayers] + [output for one in self.mixtures for output in one.outputs]

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(one.unit for one in self.parts))

    @cached_property
    def by_block(self) -> list[list[int]]:
        """Indices of the parts of each block."""
        blocks = range(self.blocks)
        return [[index for index, one in enumerate(self.parts) if one.block == block] for block in blocks]

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """Values [units] by part."""
        found: tuple[Tensor, ...] = torch.split(values, [one.units for one in self.parts])
        return found

    def removed(self, kept: Tensor) -> int:
        """Parameters that go with the units [units] that are not kept."""
        gone = sum(one.rest for one, mine in zip(self.parts, self.split(kept), strict=True) if not mine.any())
        return gone + int(self.cost[~kept].sum())


def find_groups(model: Model, kinds: Sequence[str] = ()) -> Groups:
    """The units of a model as it came.

    Args:
        kinds: keys of UNIT_KINDS; a sublayer that none is of is cut into the first kind that there is. Experts go
            alone.

    Raises:
        ModelError: an architecture that is not in FAMILIES, or for experts not in `mixtures.ROUTERS`.
        InputError: a sublayer cannot be cut into units of a kind.
    """
    if "expert" in kinds:
        mixtures = find_mixtures(model)
        return _grouped(model, (), mixtures)
    architecture = model.module.config.model_type
    if architecture not in FAMILIES:
        others = "; its experts can go (--granularity expert)" if architecture in ROUTERS else ""
        raise ModelError(
            f"{model.name!r} is a {architecture} model, whose channels and heads cannot be removed yet: accepted are "
            + ", ".join(FAMILIES)
            + others
        )
    family = FAMILIES[architecture]
    units = {UNIT_KINDS[unit].sublayer: unit for unit in [*reversed(UNIT_KINDS), *kinds]}
    sublayers = [
        _sublayer(family, index, block.module, name, units[name])
        for index, block in enumerate(model.blocks)
        for name in SUBLAYERS
        if name in family.places
    ]
    return _grouped(model, tuple(sublayers), ())


def _grouped(model: Model, sublayers: tuple[Sublayer, ...], mixtures: tuple[Mixture, ...]) -> Groups:
    parts: tuple[Sublayer | Mixture, ...] = mixtures or sublayers
    return Groups(
        sublayers,
        sum(parameter.numel() for block in model.blocks for parameter in block.module.parameters()),
        torch.cat([torch.full((one.units,), float(one.cost), dtype=torch.float64) for one in parts]),
        torch.cat([torch.full((one.units,), index) for index, one in enumerate(parts)]),
        len(model.blocks),
        mixtures,
    )


def _sublayer(family: Family, index: int, block: Any, name: str, unit: str) -> Sublayer:
    place, together = family.places[name], UNIT_KINDS[unit].together
    module = getattr(block, place.module)
    rows, columns = SUBLAYERS[name].features(family, module)
    if len(columns) % together:
        width = SUBLAYERS[name].width
        told = f"{len(columns)} {width} (block {index}) are not divisible by {together}"
        raise InputError(f"--granularity {unit}: {told}")
    rows = {layer: one.reshape(len(one), -1, together * one.shape[2]) for layer, one in rows.items()}
    columns = columns.reshape(-1, together * columns.shape[1])
    output = getattr(module, place.output)
    cost = columns.shape[1] * output.weight.numel() // read_features(output)
    for attribute, features in rows.items():
        layer = getattr(module, attribute)
        cost += features.shape[0] * features.shape[2] * (read_features(layer) + (layer.bias is not None))
    whole = sum(one.numel() for owner in (module, getattr(block, place.norm)) for one in owner.parameters())
    return Sublayer(index, name, unit, place, module, rows, columns, cost, whole - len(columns) * cost)
