"""Pareto dominance between points whose every coordinate is to be small."""

from __future__ import annotations

from collections.abc import Sequence

import moocore
import numpy as np

__all__ = ["pareto_front"]


def pareto_front(points: Sequence[Sequence[float]]) -> list[int]:
    """Indices, ascending, of the points no other point dominates; of equal points only the first. Points are finite."""
    if not points:
        return []
    front: list[int] = np.flatnonzero(moocore.is_nondominated(np.asarray(points, dtype=float))).tolist()
    return front
