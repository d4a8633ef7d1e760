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

    Rungs take about as long as each other, so each has its share of the time: some come to the last one. Where a recipe
    takes nearly as long on a few windows as on all, as where its solver takes most of it, there are no rungs; without a
    limit of time there always are, so that the same recipes are measured whatever the machine.

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
        if share < 1 and (len(alive) <= kept or not _saves(trials, alive[0], share)):
            continue
        end = until if share == 1 else begun + (until - begun) * rung / len(SHARES)
        ranked = sorted(trials.measure(alive, share, end), key=lambda trial: trial.loss)
        alive = [trial.recipe for trial in ranked[: max(kept, -(-len(ranked) // 2))]]
    return ranked


def _saves(trials: TrialLog[Asked], recipe: Asked, share: float) -> bool:
    """Whether a share of the windows saves enough, as far as it is known of recipes of this kind."""
    return trials.deadline.minutes is None or trials.expected(recipe, share) <= _CHEAP * trials.expected(recipe, 1.0)
