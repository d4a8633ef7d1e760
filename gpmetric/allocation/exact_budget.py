"""Budgets to the weight: what a uniform mask removes, and allocations that remove just as much."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gpmetric.allocation.levels import Levels, LevelTable
from gpmetric.pruning.allocation import Allocation, group_count, layer_target
from gpmetric.targets import Target

__all__ = ["allocated", "exact_allocation", "slack", "uniform_budget"]


def uniform_budget(table: LevelTable, sparsity: float) -> int:
    """Weights that the uniform mask of a table's granularity removes; under N:M, that share of all, rounded down."""
    if not table.nested:
        return int(table.entries * sparsity)
    target = Target(str(sparsity), table.granularity, sparsity)
    return sum(target.removes(shape) for shape in table.shapes)


def exact_allocation(table: LevelTable, levels: Levels, budget: int) -> Allocation:
    """The allocation of a candidate, with a weight more or less per comparison group where that is nearer to a budget.

    Under N:M it is the candidate's: its patterns have no finer steps.
    """
    targets = table.targets_of(levels)
    if table.nested:
        gap = budget - table.removes(levels)
        while (step := _best_step(table, targets, gap)) is not None:
            layer, target, moved = step
            targets[layer] = target
            gap -= moved
    return Allocation(table.granularity, dict(zip(table.layers, targets, strict=True)))


def allocated(table: LevelTable, allocation: Allocation) -> int:
    """Weights that an allocation removes."""
    return sum(allocation.targets[name].removes(shape) for name, shape in zip(table.layers, table.shapes, strict=True))


def slack(table: LevelTable) -> int:
    """How far an allocation may be from its budget: a weight per comparison group of the matrix with most of them."""
    finest = [min(targets, key=lambda target: target.group or math.inf) for targets in table.targets]  # M under N:M
    return max(group_count(shape, target) for shape, target in zip(table.shapes, finest, strict=True))


def _best_step(table: LevelTable, targets: Sequence[Target], gap: int) -> tuple[int, Target, int] | None:
    """The layer whose next target, a weight per group further, leaves the least gap; None where all leave more."""
    best: tuple[int, Target, int] | None = None
    for layer, (shape, target) in enumerate(zip(table.shapes, targets, strict=True)):
        size = target.groups(shape)[0][1]
        removed = target.removed(size) + (1 if gap > 0 else -1)
        if not 0 <= removed < size:
            continue
        changed = layer_target(table.granularity, shape, removed)
        moved = changed.removes(shape) - target.removes(shape)
        if abs(gap - moved) < abs(gap if best is None else gap - best[2]):
            best = layer, changed, moved
    return best
