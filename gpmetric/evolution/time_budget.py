"""How the wall time of a campaign is shared: at least half of it is the search's, on any machine.

What comes before and after the search (baselines, finalists, test, draws) has at most the other half, together with
opening and calibration. It is cut to what fits, by what was measured on this machine: first of all the windows of
held-out text, then the metrics measured there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gpmetric.evolution.held_out import HeldOut, Measured
from gpmetric.evolution.request import DiscoverRequest
from gpmetric.executors import TaskClock
from gpmetric.metrics import Metric
from gpmetric.session.deadline import Deadline

__all__ = ["FINALISTS", "CampaignPlan", "TimeBudget"]

FINALISTS = 12  # front members compared on validation
_SEARCH = 0.52  # of the time: half, and what a last task is not begun for
_MORE = 0.1  # of the time, for finalists beyond the first ones
_DRAWS = 1 / 6  # of the time at most, for draws of the calibration
_ROWS = 10  # metrics that are to fit beside the search on all windows of held-out text: else fewer windows
_FEWEST = 4  # windows that are left
_BEFORE = 0.3  # of the time beside the search, for baselines on validation
_BONE = 2  # rows that a verdict takes: a finalist on validation, the winner on test
_CAUTION = 1.2  # times what a row is expected to take


@dataclass(frozen=True)
class CampaignPlan:
    """How the time of a campaign is shared, in seconds.

    Attributes:
        minutes: of the whole command.
        opening: texts, models, workers.
        calibration: statistics, 0 where the cache has them.
        baselines: on validation.
        search: at least.
        after: finalists on validation, test, and draws of the calibration.
    """

    minutes: float
    opening: float
    calibration: float
    baselines: float
    search: float
    after: float

    def __str__(self) -> str:
        before = f"opening {self.opening:.0f} s, calibration {self.calibration:.0f} s, baselines {self.baselines:.0f} s"
        later = f"search {self.search:.0f} s at least, finalists and test {self.after:.0f} s"
        return f"plan: {self.minutes:g} minutes: {before}, {later}"


@dataclass
class TimeBudget:
    """Shares out the time of a campaign; without a limit, everything is done.

    Attributes:
        deadline: of the whole command.
        clock: that the executor asks.
        cut: what was left out, in words.
    """

    deadline: Deadline
    clock: TaskClock = field(init=False)
    cut: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clock = TaskClock(self.deadline.now, self.deadline.end)

    @property
    def limited(self) -> bool:
        """Whether there is an end."""
        return self.deadline.minutes is not None

    @property
    def room(self) -> float:
        """Seconds that are left to what is not the search, if it is to have half of the time."""
        return self.deadline.left - _SEARCH * self.deadline.seconds

    def fit_windows(self, held_out: HeldOut, metric: Metric) -> None:
        """Cuts the windows of held-out text and of its statistics, to a half, a quarter..., until some rows fit.

        One target of a metric is measured on few windows, then on as many as that lets expect to fit.
        """
        if not self.limited:
            return
        most = 2 ** max(0, int(math.log2(max(1, held_out.fewest_windows / _FEWEST))))
        held_out.part = most
        while held_out.part > 1:
            part = held_out.part
            row = held_out.measure_again(metric) * held_out.rounds
            wanted = math.inf if self.room <= 0 else part * row * _ROWS / self.room
            held_out.part = min(part, next((2**n for n in range(10) if 2**n >= wanted), most))
            if held_out.part == part:
                break
        if held_out.part > 1:
            self.cut.append(f"held-out text and its statistics: 1/{held_out.part} of the windows")

    def measure_baselines(self, held_out: HeldOut, request: DiscoverRequest) -> Measured:
        """The baselines on validation that there is time for, the most important first; none where not one ends."""
        if not self.limited:
            return held_out.measure(request.baselines, "validation")
        first, *others = request.baselines_by_importance
        until = self.deadline.now() + _BEFORE * self.room
        found = self.measure(held_out, [first], "validation")
        found |= self.measure(held_out, others, "validation", until) if found else {}
        left_out = [one.name for one in others if one not in found]
        self.note("baselines on validation", left_out, 1 + len(others))
        return found

    def measure(
        self, held_out: HeldOut, metrics: Sequence[Metric], split: str, until: float = math.inf, what: str = ""
    ) -> Measured:
        """Those of the metrics that can be measured until a time, in order; `what` names them where some are cut."""
        if not self.limited:
            return held_out.measure(metrics, split)
        found: Measured = {}
        for metric in metrics:
            if self.deadline.now() + _CAUTION * held_out.expected(metric, split) <= min(until, self.deadline.end):
                found |= held_out.measure([metric], split)
        self.note(what, [metric.name for metric in metrics if metric not in found], len(metrics))
        return found

    def note(self, what: str, left_out: Sequence[str], count: int) -> None:
        """Takes up what was left out of so many."""
        if what and left_out:
            self.cut.append(f"{what}: {count - len(left_out)} of {count}, without {', '.join(left_out)}")

    def plan_search(
        self, held_out: HeldOut, tested: int, draws: int, spent: Mapping[str, float]
    ) -> CampaignPlan | None:
        """The plan, by which the executor's clock ends the search; None without a limit.

        Args:
            tested: baselines that are measured on the test text.
            draws: of the calibration.
            spent: seconds by step until now.
        """
        if self.deadline.minutes is None:
            return None
        row, total, left = _CAUTION * held_out.row_seconds(), self.deadline.seconds, self.deadline.left
        drawn = min(self.draw_seconds(held_out) * draws, _DRAWS * total)
        wanted = row * (FINALISTS + _BONE + tested) + _MORE * total + drawn
        bone = _BONE * row if _BONE * row <= left / 2 else 0.0
        after = min(wanted, self.room if self.room > 0 else bone)
        self.clock.last_start = self.deadline.end - after
        self.clock.end = self.deadline.end - row * min(_BONE, after // row if row else 0)
        if left - after < total / 2:
            took = spent["load"] + spent["calibration"]
            self.cut.append(f"search: {left - after:.0f} s, less than half: to open and calibrate took {took:.0f} s")
        opening = spent["load"] + spent["opening"]
        return CampaignPlan(
            self.deadline.minutes, opening, spent["calibration"], spent["baselines"], left - after, after
        )

    def end_search(self) -> None:
        """What comes after it may use all of the time."""
        self.clock.last_start, self.clock.end = math.inf, self.deadline.end

    def draw_seconds(self, held_out: HeldOut) -> float:
        """That a winner and its rival on another draw of the calibration are thought to take: gradients are new."""
        return 4 * held_out.row_seconds()

    def finalists_until(self, held_out: HeldOut, tested: int) -> float:
        """When finalists must be measured, so that the test has its time: half of what is left at most, or a row."""
        row, left = _CAUTION * held_out.row_seconds(), self.deadline.left
        return self.deadline.end - min(row * (tested + _BONE), max(left / 2, row))

    @property
    def more_until(self) -> float:
        """When finalists beyond the first ones must be measured; without a limit there are none."""
        return self.deadline.now() + _MORE * self.deadline.seconds if self.limited else -math.inf
