"""Budgets to the weight: what a uniform mask removes, and allocations that remove just as much."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gpmetric.allocation.levels import Ladder, Levels
from gpmetric.pruning.allocation import Allocation, group_count, layer_target, removed_weights
from gpmetric.pruning.target import BLOCK, Granularity, Target

__all__ = ["allocated", "exact_allocation", "slack", "uniform_budget"]


def uniform_budget(ladder: Ladder, sparsity: float) -> int:
    """Weights that the uniform mask of a ladder's granularity removes; under N:M, that share of all, rounded down."""
    if ladder.granularity == "n:m":
        return int(ladder.entries * sparsity)
    target = Target(str(sparsity), ladder.granularity, sparsity)
    return sum(removed_weights(shape, target) for shape in ladder.shapes)


def exact_allocation(ladder: Ladder, levels: Levels, budget: int) -> Allocation:
    """The allocation of a candidate, with a weight more or less per comparison group where that is nearer to a budget.

    Under N:M it is the candidate's: its patterns have no finer steps.
    """
    targets = ladder.targets_of(levels)
    if ladder.granularity != "n:m":
        gap = budget - ladder.removes(levels)
        while (step := _best_step(ladder.granularity, ladder.shapes, targets, gap)) is not None:
            layer, target, moved = step
            targets[layer] = target
            gap -= moved
    return Allocation(ladder.granularity, dict(zip(ladder.layers, targets, strict=True)))


def allocated(ladder: Ladder, allocation: Allocation) -> int:
    """Weights that an allocation removes."""
    shapes = zip(ladder.layers, ladder.shapes, strict=True)
    return sum(removed_weights(shape, allocation.targets[name]) for name, shape in shapes)


def slack(ladder: Ladder) -> int:
    """How far an allocation may be from its budget: a weight per comparison group of the matrix with most of them."""
    finest = [min(targets, key=lambda target: target.group or math.inf) for targets in ladder.targets]  # M under N:M
    return max(group_count(shape, target) for shape, target in zip(ladder.shapes, finest, strict=True))


def _best_step(
    granularity: Granularity, shapes: Sequence[tuple[int, int]], targets: Sequence[Target], gap: int
) -> tuple[int, Target, int] | None:
    """The layer whose next target, a weight per group further, leaves the least gap; None where all leave more."""
    best: tuple[int, Target, int] | None = None
    for layer, (shape, target) in enumerate(zip(shapes, targets, strict=True)):
        size = target.group_size((shape[0], min(BLOCK, shape[1])) if granularity == "block" else shape)
        removed = target.removed(size) + (1 if gap > 0 else -1)
        if not 0 <= removed < size:
            continue
        changed = layer_target(granularity, shape, removed)
        moved = removed_weights(shape, changed) - removed_weights(shape, target)
        if abs(gap - moved) < abs(gap if best is None else gap - best[2]):
            best = layer, changed, moved
    return best
