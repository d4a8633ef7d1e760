"""How long a search may go on, so that what comes after it ends in time."""

from __future__ import annotations

import time
from dataclasses import dataclass

__all__ = ["FINALISTS", "TimeBudget"]

FINALISTS = 12  # front members compared on validation
_SHARE = 0.1  # of --minutes, for more of them


@dataclass(frozen=True)
class TimeBudget:
    """Wall time of a campaign, which began at a time.monotonic(), and what it knows of its steps."""

    began: float
    minutes: float | None  # that it may take; None is no limit
    opening: float  # seconds that workers take to start anew
    per_metric: float  # seconds of one metric under the sequential protocol
    baselines: int  # measured on the test text beside the winner
    draws: int  # of the calibration windows, each of which takes gradients anew

    @property
    def for_more(self) -> float:
        """Seconds for finalists beyond the first ones."""
        return _SHARE * 60 * (self.minutes or 0)

    @property
    def per_draw(self) -> float:
        """Seconds that winner and rival on another draw of the calibration are thought to take."""
        return 4 * self.per_metric

    def is_over(self, finalists: int, besides: float = 0) -> bool:
        """Whether so many finalists, then winner, baselines and draws, and other seconds would no longer fit."""
        for_draws = min(self.per_draw * self.draws, 10 * (self.minutes or 0))  # a sixth of the time at most
        measured = finalists + 3 + self.baselines
        return self.ends_within(self.opening + 1.2 * self.per_metric * measured + for_draws + besides)

    def ends_within(self, seconds: float) -> bool:
        """Whether the end comes sooner than in so many seconds."""
        return self.minutes is not None and time.monotonic() > self.began + 60 * self.minutes - seconds
