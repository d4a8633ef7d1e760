"""Allocations searched in use: every candidate is pruned block after block with the recipe's own update and fit.

A few numbers say how far an allocation goes in each direction that rules and the shape of the model give, so that few
candidates are enough, and little can be learned by heart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from gpmetric.allocation.by_rule import Directions
from gpmetric.pruning.recipe import Recipe
from gpmetric.tuning.trials import Trial, Trials

__all__ = ["Shares", "climb", "mixtures"]

_STRIDES = (1.0, 0.5, 0.25)
_MIXED = {"global": (1.0, 0.5, 1.5), "owl": (1.0,), "dlp": (1.0, 0.5)}  # by rule, how far it is gone with alone

Shares = dict[str, float]


def mixtures(directions: Directions, recipe: Recipe) -> list[tuple[Shares, Recipe]]:
    """The recipe with the allocations that rules give alone, also half of the way and beyond."""
    shares = [{name: share} for name, tried in _MIXED.items() if name in directions.moves for share in tried]
    return [(one, replace(recipe, allocation=directions.allocation(one))) for one in shares]


def climb(
    trials: Trials, directions: Directions, recipe: Recipe, starts: Sequence[Shares], share: float, until: float
) -> tuple[Shares, bool]:
    """How far to go in each direction, by a pattern search: a step is kept where it is better.

    Args:
        trials: whose validation windows are those to search on.
        directions: tried in their order, on and back, by smaller and smaller steps.
        recipe: whose allocation is searched.
        starts: the best of which it begins at; at least one.
        share: of the windows.
        until: when to be done, by the deadline's clock.

    Returns:
        The best of all that were measured, and whether time left the search whole.

    Source: Hooke and Jeeves 1961, exploratory moves alone.
    """

    def loss(shares: Shares) -> float:
        moved = replace(recipe, allocation=directions.allocation(shares) if shares else None)
        found: Sequence[Trial] = trials.measure([moved], share, until)
        return found[0].loss if found else math.nan

    here, least = starts[0], math.inf
    for start in starts:
        reached = loss(start)
        if math.isnan(reached):  # time is over
            return here, False
        if reached < least:
            here, least = start, reached
    for stride in _STRIDES:
        for name in directions.moves:
            for moved in _steps(here, name, stride):
                reached = loss(moved)
                if math.isnan(reached):
                    return here, False
                if reached < least:
                    here, least = moved, reached
                    break
    return here, True


def _steps(here: Shares, name: str, stride: float) -> Iterator[Shares]:
    """A step on, and one back."""
    for step in (stride, -stride):
        yield {key: value for key, value in (here | {name: here.get(name, 0.0) + step}).items() if value}
