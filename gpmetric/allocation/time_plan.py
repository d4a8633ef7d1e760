"""How `gpmetric allocate --minutes` shares its wall time: what calibration and validation leave is the search's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gpmetric.allocation.levels import Levels
from gpmetric.session.deadline import Deadline

__all__ = ["TimePlan"]

_PASSES = 60  # on validation: a front of 24 to 30, five rules at five sparsities, the pick
_BONE = 6  # on validation that a result takes: a few of the front, and the pick
_LEAST = 1e-3  # seconds of a search
_CAUTION = 1.3  # times what a step took before


@dataclass
class TimePlan:
    """What steps of this run took, and what they leave.

    Attributes:
        deadline: of the whole command.
        calibration: seconds of the statistics, which an allocation between levels takes again.
        validation: seconds of a pass over the validation text.
        survivors: passes that a last population takes on the search text.
        used: how many times calibration takes what comes behind validation.
        cut: what was left out, in words.
    """

    deadline: Deadline
    calibration: float = 0.0
    validation: float = 0.0
    survivors: float = 0.0
    used: int = 0
    cut: list[str] = field(default_factory=list)

    def search_minutes(self) -> float | None:
        """Of the search: what validation leaves of the time, and at least half of all, but for the bone of a result."""
        if self.deadline.minutes is None:
            return None
        left, half = self.deadline.left, self.deadline.seconds / 2
        counts = (_PASSES + self.survivors, _BONE)
        whole, bone = (_CAUTION * ((1 + self.used) * self.calibration + passes * self.validation) for passes in counts)
        return max(left - whole, min(half, left - bone), _LEAST) / 60

    def fitting(self, found: Sequence[Levels]) -> list[Levels]:
        """As many of a front, evenly over it, as half of the time that is left to validation allows; at least two."""
        if self.deadline.minutes is None:
            return list(found)
        seconds = (self.deadline.left - _CAUTION * (1 + self.used) * self.calibration) / 2
        count = max(2, int(seconds / max(1e-9, _CAUTION * self.validation)))
        if count >= len(found):
            return list(found)
        self.cut.append(f"front on validation: {count} of {len(found)} members")
        places = (round(place * (len(found) - 1) / (count - 1)) for place in range(count))
        return [found[place] for place in dict.fromkeys(places)]

    def affords(self, seconds: float) -> bool:
        """Whether so many seconds are left, with caution."""
        return _CAUTION * seconds <= self.deadline.left
