"""Successive halving: all on a few windows, the better half on more, what is left on all.

Source: Jamieson and Talwalkar 2016.
"""

from __future__ import annotations

from collections.abc import Sequence

from gpmetric.pruning.recipe import Recipe
from gpmetric.tuning.trials import SHARES, Trial, Trials, key_of

__all__ = ["halve"]


def halve(trials: Trials, recipes: Sequence[Recipe], until: float, kept: int = 1) -> list[Trial]:
    """Trials on all windows of those that came so far, the best first; none where time was over before.

    Args:
        trials: measures.
        recipes: at least one.
        until: when to be done, by the deadline's clock.
        kept: that are measured on all windows at least, if there is time.
    """
    alive = list({key_of(recipe): recipe for recipe in recipes}.values())
    ranked: list[Trial] = []
    for share in SHARES:
        if share < 1 and len(alive) <= kept:
            continue
        ranked = sorted(trials.measure(alive, share, until), key=lambda trial: trial.loss)
        alive = [trial.recipe for trial in ranked[: max(kept, -(-len(ranked) // 2))]]
    return ranked
