"""Allocations on held-out text: points of a front, its knee, and the one allocation that is asked for."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from gpmetric.allocation.allocators import Problem
from gpmetric.allocation.candidate_losses import candidate_losses
from gpmetric.allocation.exact_budget import allocated, exact_allocation, slack
from gpmetric.allocation.levels import Levels
from gpmetric.allocation.prepare import CalibratedModel
from gpmetric.allocation.request import ALLOCATORS, AllocateRequest
from gpmetric.allocation.variation import repair
from gpmetric.errors import GpmetricError
from gpmetric.evaluation.perplexity import mean_loss, perplexity
from gpmetric.pareto import pareto_front
from gpmetric.pruning.allocation import Allocation

__all__ = ["NEAREST", "Point", "Scored", "Scorer", "at_sparsity", "held_out_front", "knee", "pick", "rules_beside"]

Point = dict[str, Any]
Scored = tuple[Point, Levels]

NEAREST = 4  # members of the front that are brought to the budget of a pick
_GRID = 0.01  # of the sparsities that a loss ratio is tried at


class Scorer:
    """Scores allocations on the validation windows.

    Raises:
        GpmetricError: the dense model's loss is not finite.
    """

    def __init__(self, calibrated: CalibratedModel) -> None:
        self._calibrated, model = calibrated, calibrated.session.model
        self._tokens = calibrated.session.windows["validation"].tokens
        calibrated.pruned.dense()
        self.dense = mean_loss(model, self._tokens, told=partial(calibrated.progress, "perplexity"))
        if not np.isfinite(self.dense):
            raise GpmetricError(f"the dense model's loss on validation is not finite in {model.dtype} (--dtype)")
        self.total = sum(parameter.numel() for parameter in model.module.parameters())
        self._losses: dict[Levels, float] = {}

    def point(self, levels: Levels) -> Point:
        """A candidate with its loss."""
        return next(self.points([levels]))

    def points(self, found: Sequence[Levels]) -> Iterator[Point]:
        """Candidates with their losses, as soon as they are known."""
        new = [levels for levels in dict.fromkeys(found) if levels not in self._losses]
        losses = candidate_losses(self._calibrated.pruned, new, self._tokens)
        for levels in found:
            if levels not in self._losses:
                self._losses[levels] = next(losses)
            yield self.told(self._calibrated.table.allocation(levels), self._losses[levels])

    def point_of(self, allocation: Allocation, levels: Levels) -> Point:
        """An allocation that may lie between a candidate's levels; those that do not are scored as they are."""
        table = self._calibrated.table
        if all(allocation.targets[name] == target for name, target in table.allocation(levels).targets.items()):
            return self.point(levels)
        with self._calibrated.exactly(allocation) as at_hand:
            return self.told(allocation, mean_loss(self._calibrated.session.model, self._tokens, at_hand))

    def told(self, allocation: Allocation, loss: float) -> Point:
        """The point of an allocation whose loss is known."""
        table = self._calibrated.table
        shapes = dict(zip(table.layers, table.shapes, strict=True))
        by_layer = [allocation.targets[name].removes(shapes[name]) for name in table.layers]
        removed = sum(by_layer)
        genes = {
            name: sum(by_layer[layer] for layer in members) / int(size)
            for name, members, size in zip(table.names, table.genes, table.sizes, strict=True)
        }
        return {
            "sparsity": removed / table.entries,
            "sparsity_total": removed / self.total,
            "removed": removed,
            "kept_prunable": table.entries - removed,
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
    request: AllocateRequest,
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
        rivals = rules_beside(request, problem, request.sparsity)
        allocation, levels = at_sparsity(problem, near(request.sparsity), request.sparsity, rivals)
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
    return problem.table.allocation(one[1]), one[0]


def rules_beside(request: AllocateRequest, problem: Problem, sparsity: float) -> list[Levels]:
    """What a search with an update must not be worse than: the rules that measure no candidate.

    It begins with them, but on few windows, where one that is good on all may be lost.
    """
    if not request.solves or ALLOCATORS[request.allocator].rule is not None:
        return []
    free = [row.rule for row in problem.rules.values() if row.measures == "nothing"]
    return [rule(problem, sparsity) for rule in free if rule is not None]


def at_sparsity(
    problem: Problem, found: Sequence[Levels], sparsity: float, rivals: Sequence[Levels] = ()
) -> tuple[Allocation, Levels]:
    """The allocation at the budget of a sparsity that is best on the search text, and the levels nearest to it.

    Args:
        found: what a search found; its members next to the sparsity are brought there and measured.
        rivals: others at that budget, which are measured, too.

    Raises:
        GpmetricError: no levels have that budget, to within a weight per comparison group of one matrix.
    """
    budget = problem.budget(sparsity)
    allocation, levels = _brought(problem, found, budget, rivals)
    removed = allocated(problem.table, allocation)
    if abs(removed - budget) > slack(problem.table):
        reached = removed / problem.table.entries
        raise GpmetricError(f"no allocation has sparsity {sparsity:g}: the nearest reaches {reached:.4f}")
    return allocation, levels


def _brought(
    problem: Problem, found: Sequence[Levels], budget: int, rivals: Sequence[Levels] = ()
) -> tuple[Allocation, Levels]:
    """The best on the search text of the few candidates nearest to a budget, all brought there, and of rivals."""
    log, table = problem.log, problem.table
    near = sorted(found, key=lambda levels: (abs(table.removes(levels) - budget), levels))[:NEAREST]
    repaired = dict.fromkeys(repair(table, levels, budget, random.Random(0)) for levels in near)
    measured = log.measure_all(list(dict.fromkeys([*repaired, *rivals])), log.batches)
    best = min(measured, key=lambda one: one.value(log.batches))
    return exact_allocation(table, best.levels, budget), best.levels
