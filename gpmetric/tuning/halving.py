"""Successive halving: all on a few windows, the better half on more, what is left on all.

Source: Jamieson and Talwalkar 2016.
"""

from __future__ import annotations

from collections.abc import Sequence

from gpmetric.tuning.trial_log import SHARES, Asked, Measurement, TrialLog

__all__ = ["halve"]

_CHEAP = 0.5  # of what a recipe takes on all windows, that it may take on a few; with more, rungs save nothing


def halve(trials: TrialLog[Asked], recipes: Sequence[Asked], until: float, kept: int = 1) -> list[Measurement[Asked]]:
    """Trials on all windows of those that came so far, the best first; none where time was over before.

    Rungs take about as long as each other, so each has its share of the time: some come to the last one. Where there is
    no time for all on all windows, and a recipe takes nearly as long on a few of them, where its solver takes most of
    it, there are no rungs.

    Args:
        trials: measures.
        recipes: at least one.
        until: when to be done, by the deadline's clock.
        kept: that are measured on all windows at least, if there is time.
    """
    alive = list({trials.key(recipe): recipe for recipe in recipes}.values())
    ranked: list[Measurement[Asked]] = []
    begun = trials.deadline.now()
    for rung, share in enumerate(SHARES, start=1):
        if share < 1 and (len(alive) <= kept or not _saves(trials, alive, share, until)):
            continue
        end = until if share == 1 else begun + (until - begun) * rung / len(SHARES)
        ranked = sorted(trials.measure(alive, share, end), key=lambda trial: trial.loss)
        alive = [trial.recipe for trial in ranked[: max(kept, -(-len(ranked) // 2))]]
    return ranked


def _saves(trials: TrialLog[Asked], recipes: Sequence[Asked], share: float, until: float) -> bool:
    """Whether a share of the windows saves enough, by what is known of such recipes, or time is not short."""
    whole = sum(trials.expected(recipe, 1.0) for recipe in recipes)
    if trials.deadline.now() + whole <= until:
        return True
    return trials.expected(recipes[0], share) <= _CHEAP * trials.expected(recipes[0], 1.0)
