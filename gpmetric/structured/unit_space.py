"""How much may stay: probabilities brought to a budget, and what is kept at the end.

Source: Gao et al. 2025 (Bypass Back-propagation), section 3.3, whose budget counts units and is met on one side only;
here units have costs, layers can go as a whole, and the budget is met on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpmetric.structured.groups import Groups

__all__ = ["Pool", "UnitSpace", "find_space", "project", "top_units"]

_STEPS = 60  # bisections: to the last bit of fp64


@dataclass(frozen=True)
class UnitSpace:
    """What a policy has a probability for: atoms, and gates that close a whole sublayer or block.

    An atom is a unit, or a whole sublayer or block where its units are not told apart. It stays if it and its gates are
    drawn. Probabilities and draws are vectors [entries]: atoms first, then gates.
    """

    atom: Tensor  # index of each unit's atom, [units]; -1 where the unit always stays
    cost: Tensor  # of each atom, [atoms], fp64
    gates: Tensor  # indices of each atom's two gates, [2, atoms]; `entries` where it has none
    entries: int  # atoms and gates

    def stays(self, values: Tensor) -> Tensor:
        """Probability, or draw, of each atom [atoms] with its gates."""
        if self.entries == len(self.cost):
            return values
        padded = torch.cat([values, torch.ones(1, dtype=values.dtype)])
        return padded[: len(self.cost)] * padded[self.gates[0]] * padded[self.gates[1]]

    def slopes(self, values: Tensor, cost: Tensor) -> Tensor:
        """Change of the expected cost with each entry, [entries]."""
        padded = torch.cat([values, torch.ones(1, dtype=values.dtype)])
        mine, sublayer, block = padded[: len(cost)], padded[self.gates[0]], padded[self.gates[1]]
        found = torch.zeros(self.entries + 1, dtype=values.dtype)
        found[: len(cost)] = cost * sublayer * block
        found.index_add_(0, self.gates[0], cost * mine * block)
        found.index_add_(0, self.gates[1], cost * mine * sublayer)
        return found[: self.entries]

    def kept(self, stays: Tensor) -> Tensor:
        """Which units stay, [units], of the atoms [atoms] that do."""
        return torch.cat([stays.bool(), torch.ones(1, dtype=torch.bool)])[self.atom]


@dataclass(frozen=True)
class Pool:
    """Atoms that share a budget."""

    atoms: Tensor  # indices, [n]
    kept: float  # the sum of their costs that stays


def find_space(
    groups: Groups, kinds: Sequence[str], *, layers: bool, blocks: bool = False, cost: Tensor | None = None
) -> UnitSpace:
    """The space of a model.

    Args:
        kinds: of the units that are told apart.
        layers: whether sublayers and blocks can go as a whole.
        blocks: whether blocks go as a whole, each an atom, and nothing else.
        cost: of each unit, [units]; its parameters by default.
    """
    cost = groups.cost if cost is None else cost
    if blocks:
        atom = torch.tensor([one.block for one in groups.parts])[groups.sublayer_of]
        count = len(groups.by_block)
        sums = torch.zeros(count, dtype=torch.float64).index_add_(0, atom, cost)
        return UnitSpace(atom, sums, torch.full((2, count), count), count)
    atom = torch.full((groups.units,), -1)
    sublayer_of: list[int] = []
    for index, (one, places) in enumerate(zip(groups.parts, groups.split(torch.arange(groups.units)), strict=True)):
        if one.unit in kinds:
            atom[places] = len(sublayer_of) + torch.arange(one.units)
            sublayer_of += [index] * one.units
        elif layers:
            atom[places] = len(sublayer_of)
            sublayer_of.append(index)
    atoms = len(sublayer_of)
    sums = torch.zeros(atoms, dtype=torch.float64).index_add_(0, atom[atom >= 0], cost[atom >= 0])
    gates = torch.full((2, atoms), atoms)
    if not layers:
        return UnitSpace(atom, sums, gates, atoms)
    split = [index for index, one in enumerate(groups.parts) if one.unit in kinds]  # with a gate of their own
    entries = atoms + len(split) + len(groups.by_block)
    for place, index in enumerate(sublayer_of):
        gates[0, place] = atoms + split.index(index) if index in split else entries
        gates[1, place] = atoms + len(split) + groups.parts[index].block
    return UnitSpace(atom, sums, gates, entries)


def project(values: Tensor, space: UnitSpace, pools: Sequence[Pool], weights: Tensor | None = None) -> Tensor:
    """Probabilities [entries] whose expected cost is each pool's budget: clip(values - shift * weights, 0, 1).

    Args:
        weights: [entries], positive; all alike by default. Without gates, the result is the nearest one where distances
            count as cost / weights. (In plain distance, weights being the costs, whatever is dear would pay for the
            rest, heads for channels: gpt2-3m at 0.2, excess of the start 0.043 instead of 0.025.)
    """
    weights = torch.ones_like(values) if weights is None else weights
    found = values.clamp(0, 1)
    for pool in pools:
        cost = torch.zeros_like(space.cost)
        cost[pool.atoms] = space.cost[pool.atoms]
        moved = space.slopes(torch.ones_like(found), cost) > 0
        start, shifts = torch.where(moved, values, found), weights * moved
        low, high = ((start - 1) / weights)[moved].min(), (start / weights)[moved].max()
        for _ in range(_STEPS):
            middle = (low + high) / 2
            expected = (cost * space.stays((start - middle * shifts).clamp(0, 1))).sum()
            if expected > pool.kept:
                low = middle
            else:
                high = middle
        found = (start - high * shifts).clamp(0, 1)
    return found


def top_units(stays: Tensor, space: UnitSpace, pools: Sequence[Pool]) -> Tensor:
    """Which units [units] stay when the atoms least likely to stay go, bool: budgets met to less than the least cost.

    Of equals the first goes. An atom that would take too much with it is passed over.
    """
    kept = torch.ones(len(space.cost), dtype=torch.bool)
    for pool in pools:
        cost = space.cost[pool.atoms]
        room = float(cost.sum()) - pool.kept
        gone = []
        order = torch.argsort(stays[pool.atoms], stable=True)
        for place, price in zip(order.tolist(), cost[order].tolist(), strict=True):
            if price <= room + 1e-6:
                room -= price
                gone.append(place)
        kept[pool.atoms[gone]] = False
    return space.kept(kept)
