"""What tasks take by their kind, and whether another one may be begun: an executor begins none that would end late."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["OutOfTime", "TaskClock"]

_SAFETY = 1.5  # times what tasks of a kind took: two campaigns of five minutes differed by so much on a busy machine


class OutOfTime(Exception):
    """A task was not begun, or was given up, since it would end too late."""


@dataclass
class TaskClock:
    """The time that tasks have.

    A task may have an `effort`: its kind, and an amount of work that others of the kind can be scaled by.

    Attributes:
        now: seconds of a clock that only goes forward.
        end: when every task must have ended.
        last_start: when the last one may be begun.
    """

    now: Callable[[], float] = time.monotonic
    end: float = math.inf
    last_start: float = math.inf
    _seconds: dict[str, dict[float, float]] = field(default_factory=dict)  # by kind and amount

    @property
    def limited(self) -> bool:
        """Whether there is an end."""
        return self.end < math.inf

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.end - self.now()

    def admits(self, task: Any) -> bool:
        """Whether a task may be begun now."""
        now = self.now()
        return now < self.last_start and now + _SAFETY * self.expected(task) < self.end

    def expected(self, task: Any) -> float:
        """Seconds that a task is thought to take: as others of its kind, 0 before the first."""
        kind, amount = getattr(task, "effort", ("", 1.0))
        known = self._seconds.get(kind)
        if not known:
            return 0.0
        nearest = min(known, key=lambda one: abs(math.log(one / amount)))
        return known[nearest] * amount / nearest

    def note(self, task: Any, seconds: float) -> None:
        """Takes up what a task took; what is slow counts at once, what is fast by and by."""
        kind, amount = getattr(task, "effort", ("", 1.0))
        known = self._seconds.setdefault(kind, {})
        known[amount] = max(seconds, (known.get(amount, seconds) + seconds) / 2)
