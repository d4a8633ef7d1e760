"""What a sparsity means for a model: costs of its units, budgets of a search and of what stays at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gpmetric.errors import InputError
from gpmetric.structured.groups import Groups, Sublayer
from gpmetric.structured.mixtures import experts_kept
from gpmetric.structured.request import FORMATS, UNIT_KINDS, SlimRequest
from gpmetric.structured.unit_space import Pool, UnitSpace

__all__ = ["accepted_heads", "expert_pools", "find_pools", "macs", "pools_of", "uniform_counts", "uniform_pools"]


def macs(groups: Groups, length: int) -> Tensor:
    """Multiply-accumulates of each unit per token of a window of so many tokens, [units], fp64.

    Its weights, and for a head the scores and the mixing of values, each over half of the window on average.
    """
    # mixing: 2 * features * length / 2
    mixing = [one.columns.shape[1] * length if one.kind.attends else 0 for one in groups.sublayers]
    each = [_weights(one) + more for one, more in zip(groups.sublayers, mixing, strict=True)]
    return torch.tensor(each, dtype=torch.float64)[groups.sublayer_of]


def find_pools(request: SlimRequest, groups: Groups, space: UnitSpace, cost: Tensor, config: Any) -> list[Pool]:
    """The budgets that a request means.

    Args:
        cost: of each unit, [units].
        config: of the dense model.

    Raises:
        InputError: the sparsity is out of reach.
    """
    if groups.mixtures:
        return expert_pools(groups, space, request.sparsity)
    equal = FORMATS[request.form].equal
    if (equal and not request.blocks) or request.budget == "block":
        accepted = accepted_heads(groups, config) if equal else list(range(groups.sublayers[0].units + 1))
        counts = uniform_counts(groups, request.sparsity, request.kinds, accepted, request.multiple_of)
        return uniform_pools(groups, space, counts)
    return pools_of(groups, space, request.sparsity, cost, by_kind=request.budget == "kind")


def pools_of(groups: Groups, space: UnitSpace, sparsity: float, cost: Tensor, *, by_kind: bool = False) -> list[Pool]:
    """Budgets that remove a share of what the blocks cost.

    Args:
        cost: of each unit, [units]; the blocks' own parameters where it is theirs.
        by_kind: the same share of the units of each kind, instead of one budget.

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
    for kind in groups.kinds:
        mine = torch.tensor([one.unit == kind for one in groups.sublayers])[groups.sublayer_of]
        atoms: Tensor = torch.unique(space.atom[mine])
        atoms = atoms[atoms >= 0]
        if len(atoms):
            theirs = float(space.cost[atoms].sum())
            found.append(Pool(atoms, theirs - target * theirs / most))
    return found


def uniform_counts(
    groups: Groups, sparsity: float, kinds: Sequence[str], heads: Sequence[int], multiple_of: int = 1
) -> dict[str, int]:
    """By sublayer, the units that every block keeps: of the attention in proportion, of the MLP to meet the budget.

    Args:
        kinds: of the units that may go.
        heads: counts of units of an attention that are possible, rising; the last is all.
        multiple_of: what the units of an MLP that stay are a multiple of, the next above.

    Raises:
        InputError: blocks differ already, or no counts remove that much.
    """
    attention, mlp = (groups.sublayers[index] for index in groups.by_block[0])
    if len({(one.name, one.units, one.cost) for one in groups.sublayers}) > 2:
        raise InputError("--format uniform and --budget block need blocks that are alike")
    blocks, target = len(groups.by_block), sparsity * groups.parameters
    kept = attention.units
    if attention.unit in kinds and mlp.unit in kinds:
        kept = next(count for count in heads if count >= (1 - sparsity) * attention.units - 1e-9)
    elif attention.unit in kinds:
        kept = min(heads, key=lambda count: abs(blocks * (attention.units - count) * attention.cost - target))
    left = target - blocks * (attention.units - kept) * attention.cost
    gone = max(0, int(left / (blocks * mlp.cost) + 1e-9)) if mlp.unit in kinds else 0
    if gone >= mlp.units:
        raise InputError(f"--sparsity {sparsity:g} is out of reach of equal widths: no {mlp.unit} would be left")
    stays = min(mlp.units, -(-(mlp.units - gone) // multiple_of) * multiple_of)
    if gone and stays == mlp.units:
        raise InputError(
            f"--sparsity {sparsity:g} removes {gone} of {mlp.units} {mlp.unit}s, none if what stays is a multiple of "
            f"{multiple_of} (--multiple-of)"
        )
    return {attention.name: kept, mlp.name: stays}


def uniform_pools(groups: Groups, space: UnitSpace, counts: Mapping[str, int]) -> list[Pool]:
    """Budgets that keep so many units of each sublayer in every block."""
    return [
        Pool(atoms, counts[one.name] * float(space.cost[atoms[0]]))
        for one, atoms in zip(groups.sublayers, groups.split(space.atom), strict=True)
        if (atoms >= 0).all()
    ]


def expert_pools(groups: Groups, space: UnitSpace, sparsity: float) -> list[Pool]:
    """Budgets that keep as many experts in every block, and in each group that its router chooses among.

    Source: Lasby et al. 2025 (REAP the Experts), who remove the same share of every layer.

    Raises:
        InputError: no expert would go, or too few would stay.
    """
    kept = experts_kept(groups.mixtures, sparsity)
    pairs = zip(groups.mixtures, groups.split(space.atom), strict=True)
    pools = [atoms for one, mine in pairs for atoms in mine.chunk(one.groups)]
    return [Pool(atoms, kept * float(space.cost[atoms[0]])) for atoms in pools]


def accepted_heads(groups: Groups, config: Any) -> list[int]:
    """Counts of units of an attention that a stock config takes, rising."""
    attention = groups.sublayers[0]
    if config.model_type == "gpt2":  # its heads span the hidden size
        return [attention.units]
    counts = range(1, attention.units + 1)
    if config.model_type != "llama":
        return list(counts)
    per_unit = UNIT_KINDS[attention.unit].together * config.num_attention_heads // config.num_key_value_heads
    return [count for count in counts if config.hidden_size % (count * per_unit) == 0]  # LlamaConfig asks for it


def _weights(sublayer: Sublayer) -> int:
    """Weights of a unit, without biases."""
    biased = [rows for name, rows in sublayer.rows.items() if getattr(sublayer.module, name).bias is not None]
    return sublayer.cost - sum(rows.shape[0] * rows.shape[2] for rows in biased)
