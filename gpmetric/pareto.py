"""Pareto dominance between points whose every coordinate is to be small."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["dominates", "pareto_front"]


def dominates(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether `first` is nowhere above `second` and somewhere below it."""
    pairs = list(zip(first, second, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def pareto_front(points: Sequence[Sequence[float]]) -> list[int]:
    """Indices, ascending, of the points no other point dominates; of equal points only the first.

    O(n^2) comparisons. Points must be finite: NaN compares false with everything and would stay on the front.
    """
    front: list[int] = []
    for index, point in enumerate(points):
        equal_before = any(tuple(points[other]) == tuple(point) for other in front)
        if not equal_before and not any(dominates(other, point) for other in points):
            front.append(index)
    return front
