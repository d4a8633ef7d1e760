"""How `gpmetric allocate --minutes` shares its wall time: what calibration and validation leave is the search's."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from gpmetric.allocation.levels import Levels
from gpmetric.session.deadline import Deadline

__all__ = ["FIRST_IN_USE", "TimePlan"]

_PASSES = 60  # on validation: a front of 24 to 30, five rules at five sparsities, the pick
_BONE = 6  # on validation that a result takes: a few of the front, and the pick
_LEAST = 1e-3  # seconds of a search
_CAUTION = 1.3  # times what a step took before
_IN_USE = 0.25  # of the time at most, for allocations in use
FIRST_IN_USE = 0.1  # of the time at most, for the first of them, by which the others are planned


@dataclass
class TimePlan:
    """What steps of this run took, and what they leave.

    Attributes:
        deadline: of the whole command.
        calibration: seconds of the statistics, which an allocation between levels takes again.
        validation: seconds of a pass over the validation text.
        survivors: passes that a last population takes on the search text.
        use: seconds of one allocation in use, pruned block after block.
        uses: how many of them are measured behind validation.
        cut: what was left out, in words.
    """

    deadline: Deadline
    calibration: float = 0.0
    validation: float = 0.0
    survivors: float = 0.0
    use: float = 0.0
    uses: int = 0
    cut: list[str] = field(default_factory=list)

    def search_minutes(self) -> float | None:
        """Of the search: what validation leaves of the time, and at least half of all, but for the bone of a result."""
        if self.deadline.minutes is None:
            return None
        left, half = self.deadline.left, self.deadline.seconds / 2
        least = self.calibration + (self.use if self.uses else 0.0)
        whole = _CAUTION * (self.calibration + (_PASSES + self.survivors) * self.validation) + self.in_use
        bone = _CAUTION * (least + _BONE * self.validation)
        return max(left - whole, min(half, left - bone), _LEAST) / 60

    @property
    def in_use(self) -> float:
        """Seconds that are kept for allocations in use: of what is left, half at most, so that validation has some."""
        if not self.uses:
            return 0.0
        return min(_CAUTION * self.uses * self.use, _IN_USE * self.deadline.seconds, self.deadline.left / 2)

    @property
    def affordable_uses(self) -> int:
        """How many allocations can be measured in use in the time that is left; a large number without a limit."""
        if self.deadline.minutes is None:
            return sys.maxsize
        return int(max(0.0, self.deadline.left) / max(1e-9, _CAUTION * self.use))

    def fitting(self, found: Sequence[Levels]) -> list[Levels]:
        """As many of a front, evenly over it, as half of the time that is left to validation allows; at least two."""
        if self.deadline.minutes is None:
            return list(found)
        seconds = (self.deadline.left - _CAUTION * self.calibration - self.in_use) / 2
        count = max(2, int(seconds / max(1e-9, _CAUTION * self.validation)))
        if count >= len(found):
            return list(found)
        self.cut.append(f"front on validation: {count} of {len(found)} members")
        places = (round(place * (len(found) - 1) / (count - 1)) for place in range(count))
        return [found[place] for place in dict.fromkeys(places)]

    def affords(self, seconds: float) -> bool:
        """Whether so many seconds are left, with caution."""
        return _CAUTION * seconds <= self.deadline.left

    def affords_beside_use(self, seconds: float) -> bool:
        """The same, with what is kept for allocations in use left to them."""
        return _CAUTION * seconds <= self.deadline.left - self.in_use
