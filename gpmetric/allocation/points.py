"""Allocations on held-out text: points of a front, its knee, and the one allocation that is asked for."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from gpmetric.allocation.allocators import Problem
from gpmetric.allocation.exact import allocated, exact_allocation, slack
from gpmetric.allocation.levels import Levels
from gpmetric.allocation.prepare import Prepared
from gpmetric.allocation.request import Request
from gpmetric.allocation.variation import repair
from gpmetric.errors import GpmetricError
from gpmetric.evaluation.perplexity import mean_loss, perplexity
from gpmetric.pareto import pareto_front
from gpmetric.pruning.allocation import Allocation, removed_weights

__all__ = ["NEAREST", "Point", "Scored", "Scorer", "at_sparsity", "held_out_front", "knee", "pick"]

Point = dict[str, Any]
Scored = tuple[Point, Levels]

NEAREST = 4  # members of the front that are brought to the budget of a pick
_GRID = 0.01  # of the sparsities that a loss ratio is tried at


class Scorer:
    """Scores allocations on the validation windows.

    Args:
        prepared: with the dense model.

    Raises:
        GpmetricError: the dense model's loss is not finite.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._tokens = prepared.splits["validation"].tokens
        prepared.pruned.dense()
        self.dense = mean_loss(prepared.model, self._tokens)
        if not np.isfinite(self.dense):
            raise GpmetricError(
                f"the dense model's loss on validation is not finite in {prepared.model.dtype} (--dtype)"
            )
        self.total = sum(parameter.numel() for parameter in prepared.model.module.parameters())
        self._losses: dict[Levels, float] = {}

    def point(self, levels: Levels) -> Point:
        """A candidate with its loss."""
        if levels not in self._losses:
            self._prepared.pruned.set(levels)
            self._losses[levels] = mean_loss(self._prepared.model, self._tokens)
        return self._told(self._prepared.ladder.allocation(levels), self._losses[levels])

    def point_of(self, allocation: Allocation, levels: Levels) -> Point:
        """An allocation that may lie between a candidate's levels; those that do not are scored as they are."""
        ladder = self._prepared.ladder
        if all(allocation.targets[name] == target for name, target in ladder.allocation(levels).targets.items()):
            return self.point(levels)
        with self._prepared.exactly(allocation):
            return self._told(allocation, mean_loss(self._prepared.model, self._tokens))

    def _told(self, allocation: Allocation, loss: float) -> Point:
        ladder = self._prepared.ladder
        shapes = dict(zip(ladder.layers, ladder.shapes, strict=True))
        by_layer = [removed_weights(shapes[name], allocation.targets[name]) for name in ladder.layers]
        removed = sum(by_layer)
        genes = {
            name: sum(by_layer[layer] for layer in members) / int(size)
            for name, members, size in zip(ladder.names, ladder.genes, ladder.sizes, strict=True)
        }
        return {
            "sparsity": removed / ladder.entries,
            "sparsity_total": removed / self.total,
            "removed": removed,
            "kept_prunable": ladder.entries - removed,
            "kept_total": self.total - removed,
            "loss": loss,
            "perplexity": perplexity(loss),
            "excess": loss - self.dense,
            "genes": genes,
        }


def held_out_front(scored: Iterable[Scored]) -> list[Scored]:
    """Those that no other beats in validation loss and sparsity, the least sparse first."""
    known = [one for one in scored if np.isfinite(one[0]["loss"])]
    chosen = pareto_front([(point["loss"], -point["sparsity"]) for point, _ in known])
    return sorted((known[index] for index in chosen), key=lambda one: one[0]["sparsity"])


def knee(points: Sequence[Point]) -> int | None:
    """Index of the point farthest below the straight line between the ends of the front; None below three points."""
    if len(points) < 3:
        return None
    places = np.array([(point["sparsity"], point["excess"]) for point in points])
    span = places[-1] - places[0]
    if not (span > 0).all():
        return None
    across, up = ((places - places[0]) / span).T
    return int((across - up).argmax())


def pick(
    request: Request,
    problem: Problem,
    scorer: Scorer,
    near: Callable[[float], Sequence[Levels]],
    front: Sequence[Scored],
) -> tuple[Allocation, Point]:
    """(allocation, its point): at the asked sparsity, the sparsest within the asked loss ratio, or at the knee.

    Args:
        near: candidates to make the allocation at a sparsity of.
        front: the least sparse first, at least one.

    Raises:
        GpmetricError: no allocation has that sparsity, or none of the front keeps the loss within the ratio.
    """
    if request.sparsity is not None:
        allocation, levels = at_sparsity(problem, near(request.sparsity), request.sparsity)
        return allocation, scorer.point_of(allocation, levels)
    if request.max_loss_ratio is None:
        index = knee([point for point, _ in front])
        return _as_it_is(problem, front[len(front) // 2 if index is None else index])
    limit = request.max_loss_ratio * scorer.dense
    within = [one for one in front if one[0]["loss"] <= limit]
    reached = within[-1][0]["sparsity"] if within else 0.0

    def at(step: int) -> tuple[Allocation, Levels]:
        sparsity = round(request.lowest + step * _GRID, 6)
        return _brought(problem, near(sparsity), problem.budget(sparsity))

    first = max(0, int((reached - request.lowest) / _GRID) + 1) if within else 0
    low, high = first, int((request.highest - request.lowest) / _GRID + 1e-6) + 1
    while low < high:  # the loss rises with the sparsity
        middle = (low + high) // 2
        if scorer.point(at(middle)[1])["loss"] <= limit:
            low = middle + 1
        else:
            high = middle
    for step in range(low - 1, first - 1, -1):  # between levels the loss is another by a hair
        allocation, levels = at(step)
        point = scorer.point_of(allocation, levels)
        if point["loss"] <= limit and point["sparsity"] > reached:
            return allocation, point
    if within:
        return _as_it_is(problem, within[-1])
    least = front[0][0]
    raise GpmetricError(
        f"--max-loss-ratio {request.max_loss_ratio}: the loss is {least['loss'] / scorer.dense:.4f} times the "
        f"dense model's already at sparsity {least['sparsity']:.4f}, the lowest of the front (--lowest)"
    )


def _as_it_is(problem: Problem, one: Scored) -> tuple[Allocation, Point]:
    return problem.ladder.allocation(one[1]), one[0]


def at_sparsity(problem: Problem, found: Sequence[Levels], sparsity: float) -> tuple[Allocation, Levels]:
    """The allocation at the budget of a sparsity that is best on the search text, and the levels nearest to it.

    Args:
        found: what a search found; its members next to the sparsity are brought there and measured.

    Raises:
        GpmetricError: no levels have that budget, to within a weight per comparison group of one matrix.
    """
    budget = problem.budget(sparsity)
    allocation, levels = _brought(problem, found, budget)
    removed = allocated(problem.ladder, allocation)
    if abs(removed - budget) > slack(problem.ladder):
        reached = removed / problem.ladder.entries
        raise GpmetricError(f"no allocation has sparsity {sparsity:g}: the nearest reaches {reached:.4f}")
    return allocation, levels


def _brought(problem: Problem, found: Sequence[Levels], budget: int) -> tuple[Allocation, Levels]:
    """The best on the search text of the few candidates nearest to a budget, all brought there."""
    archive, ladder = problem.archive, problem.ladder
    near = sorted(found, key=lambda levels: (abs(ladder.removes(levels) - budget), levels))[:NEAREST]
    repaired = dict.fromkeys(repair(ladder, levels, budget, random.Random(0)) for levels in near)
    measured = [archive.measure(levels, archive.batches) for levels in repaired]
    best = min(measured, key=lambda one: one.value(archive.batches))
    return exact_allocation(ladder, best.levels, budget), best.levels
