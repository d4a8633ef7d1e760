"""Published metrics among the formulas that a search has measured, in the same split and unit as all others."""

from __future__ import annotations

from collections.abc import Iterable

from gpmetric.evolution.selection import Individual
from gpmetric.metrics import BASELINES, masks_only, resolve_metric

__all__ = ["baselines_among"]


def baselines_among(first: Iterable[Individual], update: str) -> dict[str, Individual]:
    """Baselines by name; constants of theirs that depend on the calibration's size may be any.

    Where one group is set for all formulas, theirs is that one.
    """
    shapes: dict[tuple[str, ...], Individual] = {}
    for one in first:
        shapes.setdefault(one.shape, one)
        shapes.setdefault(("", *one.shape[1:]), one)
    found: dict[str, Individual] = {}
    for name in BASELINES:
        if masks_only(name) or BASELINES[name].update == update:
            wanted = Individual(resolve_metric(name), {"": 0.0}, {"": 0.0}).shape
            match = shapes.get(wanted) or shapes.get(("", *wanted[1:]))
            found |= {name: match} if match else {}
    return found
