"""When a search ends, and the clock that tells a resumed search the same times as before."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Budget", "Clock"]


@dataclass(frozen=True)
class Budget:
    """When a search ends: whichever comes first, None being no limit."""

    evaluations: int | None = None
    tokens: int | None = None
    minutes: float | None = None

    def share(self, evaluations: int, tokens: int, seconds: float) -> float:
        """How much of it is used up."""
        used = ((evaluations, self.evaluations), (tokens, self.tokens), (seconds / 60, self.minutes))
        return max(amount / limit for amount, limit in used if limit is not None)


class Clock:
    """Seconds since a search began, interruptions left out.

    A search whose budget is minutes depends on the times that it saw, so they are kept and told again.

    Args:
        seen: seconds at each look before the search was resumed.
        on_look: told of every new one.
    """

    def __init__(self, seen: list[float], on_look: Callable[[float], None]) -> None:
        self._seen, self._on_look = seen, on_look
        self._looks = 0
        self._before = seen[-1] if seen else 0.0
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """By now."""
        return self._before + time.monotonic() - self._started

    def look(self) -> float:
        """Seconds as they were at this look of the first run, or else by now."""
        if self._looks == len(self._seen):
            self._seen.append(self.seconds)
            self._on_look(self._seen[-1])
        self._looks += 1
        return self._seen[self._looks - 1]
