"""Points of an allocation search's document, as its table and its page read them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gpmetric.pareto import pareto_front

__all__ = ["Pair", "Point", "against", "baselines_of", "genes_of", "measured", "undominated"]

Point = Mapping[str, Any]
Pair = tuple[float, float]  # sparsity and excess

_BEYOND = 0.1  # of a curve's range: how far outside it a point is still compared with it


def measured(points: Iterable[Point]) -> list[Pair]:
    """(sparsity, excess) of the points that have both, rising in sparsity."""
    pairs = [(point.get("sparsity"), point.get("excess")) for point in points]
    return sorted((sparsity, excess) for sparsity, excess in pairs if sparsity is not None and excess is not None)


def undominated(pairs: Sequence[Pair]) -> list[Pair]:
    """Those than which no other removes as much at a lower excess, or more at the same."""
    return [pairs[index] for index in pareto_front([(-sparsity, excess) for sparsity, excess in pairs])]


def against(pairs: Sequence[Pair], curve: Sequence[Pair]) -> list[Pair]:
    """(sparsity, excess over that of a curve there - 1), without points far outside of the curve.

    Between its points, and a tenth of its range beyond, the curve is taken to be straight in the logarithm of excess:
    of uniform's five points for the demo model and Wanda (0.4 to 0.8, 8 windows), each of the inner ones left out is
    told within 12 % by its neighbours, by a straight line within 48 %. Only where its excess is above 0 is there
    anything to compare with.
    """
    known = [(sparsity, math.log(excess)) for sparsity, excess in curve if excess > 0]
    if len({sparsity for sparsity, _ in known}) < 2:
        return [(sparsity, excess / curve[0][1] - 1) for sparsity, excess in pairs if known and sparsity == curve[0][0]]
    places, logs = np.array(known).T
    room = _BEYOND * (places[-1] - places[0])
    found = []
    for sparsity, excess in pairs:
        if places[0] - room <= sparsity <= places[-1] + room:
            at = min(max(int(np.searchsorted(places, sparsity)), 1), len(places) - 1)
            slope = (logs[at] - logs[at - 1]) / (places[at] - places[at - 1])
            there = math.exp(logs[at - 1] + slope * (sparsity - places[at - 1]))
            found.append((sparsity, excess / there - 1))
    return found


def baselines_of(document: Mapping[str, Any]) -> list[tuple[str, Sequence[Point]]]:
    """What each rule gave, by name; without rules that gave nothing."""
    return [(name, points) for name, points in (document.get("baselines") or {}).items() if points]


def genes_of(point: Point) -> Mapping[str, float | None]:
    """The sparsity of each gene."""
    return point.get("genes") or {}
