"""What a sparsity means for a model: the budgets of its search, and of the units that stay at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpmetric.errors import InputError
from gpmetric.structured.budget import Pool, Space
from gpmetric.structured.groups import Groups, Kind, Part

__all__ = ["accepted_heads", "kinds_of", "macs", "pools_of", "uniform_counts", "uniform_pools"]


def kinds_of(granularity: Sequence[str]) -> tuple[Kind, ...]:
    """The kinds of units that are told apart."""
    found: list[Kind] = []
    for kind, name in (("head", "head"), ("channel", "channel")):
        if name in granularity:
            found.append("head" if kind == "head" else "channel")
    return tuple(found)


def macs(groups: Groups, length: int) -> Tensor:
    """Multiply-accumulates of each unit per token of a window of so many tokens, [units], fp64.

    Its weights, and for a head the scores and the mixing of values, each over half of the window on average.
    """
    found = []
    for part in groups.parts:
        features = part.columns.shape[1]
        attention = features * length if part.kind == "head" else 0  # 2 * features * length / 2
        found += [float(_weights(part) + attention)] * part.units
    return torch.tensor(found, dtype=torch.float64)


def pools_of(groups: Groups, space: Space, sparsity: float, cost: Tensor, *, by_kind: bool = False) -> list[Pool]:
    """Budgets that remove a share of what the blocks cost.

    Args:
        cost: of each unit, [units]; the blocks' own parameters where it is theirs.
        by_kind: the same share of the heads and of the channels, instead of one budget.

    Raises:
        InputError: more than all that may go.
    """
    whole = groups.parameters if cost is groups.cost else float(cost.sum())
    target, most = sparsity * whole, float(space.cost.sum())
    if target > most:
        raise InputError(f"--sparsity {sparsity:g} is out of reach: all that --granularity names is {most / whole:.4f}")
    if not by_kind:
        return [Pool(torch.arange(len(space.cost)), most - target)]
    found = []
    for kind in ("head", "channel"):
        places = [unit for unit, part in enumerate(groups.part.tolist()) if groups.parts[part].kind == kind]
        atoms = space.atom[torch.tensor(places)].unique()
        atoms = atoms[atoms >= 0]
        if len(atoms):
            mine = float(space.cost[atoms].sum())
            found.append(Pool(atoms, mine - target * mine / most))
    return found


def uniform_counts(groups: Groups, sparsity: float, kinds: Sequence[Kind], heads: Sequence[int]) -> tuple[int, int]:
    """Heads (key/value groups) and channels that every block keeps: heads in proportion, channels to meet the budget.

    Args:
        heads: counts that are possible, rising; the last is all.

    Raises:
        InputError: blocks differ already, or no counts remove that much.
    """
    attention, mlp = groups.parts[0], groups.parts[1]
    if any((one.units, one.cost) != (groups.parts[place % 2].units, groups.parts[place % 2].cost)
           for place, one in enumerate(groups.parts)):  # fmt: skip
        raise InputError("--format uniform needs blocks that are alike")
    blocks, target = len(groups.parts) // 2, sparsity * groups.parameters
    kept_heads = attention.units
    if "head" in kinds:
        if "channel" in kinds:
            kept_heads = next(count for count in heads if count >= (1 - sparsity) * attention.units - 1e-9)
        else:
            kept_heads = _nearest(heads, attention, blocks, target)
    left = target - blocks * (attention.units - kept_heads) * attention.cost
    gone = max(0, int(left / (blocks * mlp.cost) + 1e-9)) if "channel" in kinds else 0
    if gone >= mlp.units:
        raise InputError(f"--sparsity {sparsity:g} is out of reach of --format uniform: no channel would be left")
    return kept_heads, mlp.units - gone


def uniform_pools(groups: Groups, space: Space, counts: tuple[int, int]) -> list[Pool]:
    """Budgets that keep so many heads and channels in every block."""
    found = []
    for part, places in zip(groups.parts, groups.split(torch.arange(groups.units)), strict=True):
        atoms = space.atom[places]
        if (atoms >= 0).all():
            found.append(Pool(atoms, counts[part.kind == "channel"] * float(space.cost[atoms[0]])))
    return found


def accepted_heads(groups: Groups, config: Any) -> list[int]:
    """Counts of key/value groups that a stock config takes, rising."""
    whole = groups.parts[0].units
    if config.model_type == "gpt2":  # its heads span the hidden size
        return [whole]
    counts = range(1, whole + 1)
    if config.model_type != "llama":
        return list(counts)
    per_group = config.num_attention_heads // config.num_key_value_heads
    return [count for count in counts if config.hidden_size % (count * per_group) == 0]  # LlamaConfig asks for it


def _nearest(heads: Sequence[int], attention: Part, blocks: int, target: float) -> int:
    return min(heads, key=lambda count: abs(blocks * (attention.units - count) * attention.cost - target))


def _weights(part: Part) -> int:
    """Weights of a unit, without biases."""
    biases = sum(
        features.shape[0] * features.shape[2]
        for name, features in part.rows.items()
        if getattr(part.module, name).bias is not None
    )
    return part.cost - biases
