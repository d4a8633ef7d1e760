"""Pareto dominance between points whose every coordinate is to be small."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["pareto_front"]


def pareto_front(points: Sequence[Sequence[float]]) -> list[int]:
    """Indices, ascending, of the points no other point dominates; of equal points only the first.

    O(n * front) comparisons: in lexicographic order whatever dominates a point comes before it. Points must be finite.
    """
    if not points:
        return []
    table = np.asarray(points, dtype=float)  # [points, coordinates]
    front: list[int] = []
    for index in np.lexsort(table.T[::-1]):  # stable: of equal points the first
        if not (table[front] <= table[index]).all(axis=1).any():
            front.append(int(index))
    return sorted(front)
