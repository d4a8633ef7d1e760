"""When a command is to be over: --minutes of wall time from its beginning."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from gpmetric.errors import TimeOverError
from gpmetric.interrupts import check_stop
from gpmetric.session.listeners import Progress

__all__ = ["Deadline"]

# Seconds, or a share of all of them if that is less, to start Python, write results and leave: 4.6 s on two cores with
# eight busy processes.
_PARTING = (5.0, 0.08)
_TOLD = 0.1  # of the time, after which the end of a calibration is foreseen


@dataclass(frozen=True)
class Deadline:
    """Wall time of one command.

    Attributes:
        minutes: that it may take; None is no limit.
        began: when it began, by `now`.
        now: seconds of a clock that only goes forward.
    """

    minutes: float | None
    began: float
    now: Callable[[], float] = time.monotonic

    @classmethod
    def starting(
        cls, minutes: float | None, started: float | None = None, now: Callable[[], float] = time.monotonic
    ) -> Deadline:
        """The deadline of a command that began at `started`, or begins now."""
        return cls(minutes, now() if started is None else started, now)

    @property
    def seconds(self) -> float:
        """That the command may take; infinite without a limit."""
        return math.inf if self.minutes is None else 60 * self.minutes

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return self.now() - self.began

    @property
    def end(self) -> float:
        """By `now`, when the work must be done, so that what was found is written in time."""
        longest, share = _PARTING
        return self.began + self.seconds - (min(longest, share * self.seconds) if self.minutes else 0.0)

    @property
    def left(self) -> float:
        """Seconds until `end`."""
        return self.end - self.now()

    def until(self, end: float) -> Deadline:
        """That of a part of the work, from now until `end`, by `now`; infinite is no limit but that there is."""
        if math.isinf(end):
            return self
        began = self.now()
        return Deadline(max(0.0, end - began) / 60, began, self.now)

    @property
    def refusal(self) -> str:
        """Why something was not measured."""
        return f"not measured: there was no time left (--minutes {self.minutes or 0:g})"

    def watching(self, progress: Progress) -> Progress:
        """The same progress, which gives a step up as soon as it is seen that it cannot end in time.

        It raises a TimeOverError then, which says how long the step would take, and KeyboardInterrupt where a signal
        asked to stop.
        """
        if self.minutes is None:

            def pass_on(what: str, done: int, total: int) -> None:
                check_stop()
                progress(what, done, total)

            return pass_on
        first: dict[str, tuple[float, int]] = {}
        latest: dict[str, int] = {}

        def tell(what: str, done: int, total: int) -> None:
            check_stop()
            progress(what, done, total)
            if done <= latest.get(what, done):  # it begins, maybe again
                first[what] = self.now(), done
            latest[what] = done
            start, before = first[what]
            taken = self.now() - start
            if done <= before or done >= total or taken < _TOLD * self.seconds:
                return
            whole = taken * total / (done - before)
            if start + whole > self.end:
                raise TimeOverError(
                    f"--minutes {self.minutes:g} are too few: the {what} alone takes about {whole / 60:.2g} minutes; "
                    "allow more, or take fewer --samples, a shorter --sequence-length or metrics of fewer operands"
                )

        return tell
