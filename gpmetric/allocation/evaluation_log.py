"""Everything that a search measured, so that nothing is measured twice and a killed search goes on where it was.

A search asks the log for every figure, which measures what it does not hold. Since all else depends on the seed, a
resumed search first goes again through what it did, at no cost, and ends at the same front.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gpmetric.allocation.candidate_objective import Objective, Slopes
from gpmetric.allocation.levels import Levels, LevelTable
from gpmetric.allocation.search_budget import Budget, Clock
from gpmetric.journal import Journal
from gpmetric.session.listeners import Progress, silent

__all__ = ["BACKWARD", "BARREN", "RADIUS", "EvaluationLog", "Measured"]

RADIUS = 16  # levels around a candidate's that slopes are kept for: they are first order
BARREN = 20  # generations without a new candidate that end a search: a few genes of a few levels have no more

_FORMAT = 1
BACKWARD = 3  # tokens that a token of a backward pass counts for: forward, and about twice that back
_FLOOR, _CEILING = 1e-6, 50.0  # of an objective whose logarithm is taken: nothing is pruned, the model is dead


@dataclass
class Measured:
    """A candidate with what was measured of it: the objective on the first batches, in nats per prediction."""

    levels: Levels
    sparsity: float
    values: list[float] = field(default_factory=list)

    def value(self, batches: int) -> float:
        """Mean objective over the first batches, in nats per prediction; above 0, and finite."""
        # in this order NaN is the ceiling, too
        return max(_FLOOR, min(_CEILING, math.fsum(self.values[:batches]) / batches))

    def log(self, batches: int) -> float:
        """Its logarithm: fronts are straighter in it."""
        return math.log(self.value(batches))


class EvaluationLog(Journal):
    """Measures candidates, each once, and writes down what it measured.

    Args:
        table: of the candidates' levels.
        objective: measures what is not in the file.
        path, resume: as of `Journal`.
        settings: JSON values, all that determines the search but its budget and focus.
        progress: told of candidates that are measured.
        focus: sparsity that the search pays attention to; where the file has one already, that one.
    """

    def __init__(
        self,
        table: LevelTable,
        objective: Objective,
        path: Path | None = None,
        settings: Mapping[str, Any] | None = None,
        *,
        focus: float | None = None,
        resume: bool = False,
        progress: Progress = silent,
    ) -> None:
        self.table, self._progress = table, progress
        self.candidates: dict[Levels, Measured] = {}
        self.tokens = 0
        self._objective = objective
        self._values: dict[tuple[Levels, int, int], list[float]] = {}
        self._slopes: dict[tuple[Levels, int], Slopes] = {}
        self._sloped: set[tuple[Levels, int]] = set()  # paid for since the search began
        self._times: list[float] = []
        self._planned: dict[float, float] = {}  # minutes of the search, by those of the command
        head = {"format": _FORMAT, "focus": focus} | dict(settings or {})
        super().__init__(path, "allocate", head, adopted=("focus",), resume=resume)
        self.focus: float | None = self.settings["focus"]
        self._clock = Clock(self._times, lambda seconds: self.write({"seconds": seconds}))

    @property
    def batches(self) -> int:
        """Batches of windows in all."""
        return len(self._objective)

    @property
    def evaluations(self) -> int:
        """Candidates measured."""
        return len(self.candidates)

    @property
    def seconds(self) -> float:
        """Since the search began, interruptions left out."""
        return self._clock.seconds

    def tokens_of(self, batches: int) -> int:
        """Tokens of the first batches."""
        return sum(self._objective.tokens[:batches])

    def measure(self, levels: Levels, batches: int) -> Measured:
        """The candidate, measured on at least so many batches."""
        return next(self.measure_all([levels], batches))

    def measure_all(self, candidates: Sequence[Levels], batches: int) -> Iterator[Measured]:
        """Each candidate, measured on at least so many batches; nothing else is measured before the last one is there.

        What the objective measures together is written down one by one, in the order of the candidates.
        """
        new = [(levels, self._measured_on(levels), batches) for levels in dict.fromkeys(candidates)]
        missing, done = [one for one in new if one[1] < batches and one not in self._values], 0
        figures = self._objective.measure_all(missing)
        if missing:
            self._progress("candidates", 0, len(missing))
        for levels in candidates:
            one = self.candidates.setdefault(levels, Measured(levels, self.table.sparsity(levels)))
            first = len(one.values)
            if first < batches:
                self.tokens += sum(self._objective.tokens[first:batches])
                known = self._values.get((levels, first, batches))
                if known is None:
                    known, done = next(figures), done + 1
                    self._progress("candidates", done, len(missing))
                    told = [value if math.isfinite(value) else None for value in known]
                    self.write({"levels": levels, "first": first, "values": told})
                one.values += known
            yield one

    def slopes(self, levels: Levels, batches: int) -> Slopes:
        """`CandidateObjective.slopes` of a candidate on the first batches, NaN more than RADIUS levels away."""
        if (levels, batches) not in self._sloped:
            self._sloped.add((levels, batches))
            self.tokens += BACKWARD * self.tokens_of(batches)
        found = self._slopes.get((levels, batches))
        if found is None:
            near = [
                [float(f"{value:.5g}") for value in slopes[max(0, level - RADIUS) : level + RADIUS + 1]]
                for slopes, level in zip(self._objective.slopes(levels, batches), levels, strict=True)
            ]
            self.write({"levels": levels, "batches": batches, "slopes": near})
            found = self._slopes[levels, batches] = self._expanded(levels, near)
        return found

    def spent(self, budget: Budget) -> float:
        """Share of a budget that is used up by now; a resumed search is told the same times as before."""
        return budget.share(self.evaluations, self.tokens, self._clock.look())

    def _measured_on(self, levels: Levels) -> int:
        """Batches that a candidate was measured on."""
        return len(self.candidates[levels].values) if levels in self.candidates else 0

    def planned(self, minutes: float | None, search: float | None) -> float | None:
        """Minutes of the search of a command that has some, as they were planned when it was run first."""
        if minutes is None or search is None:
            return None
        if minutes not in self._planned:
            self._planned[minutes] = search
            self.write({"minutes": minutes, "search": search})
        return self._planned[minutes]

    def _expanded(self, levels: Levels, near: Sequence[Sequence[float]]) -> Slopes:
        found = []
        for removed, level, values in zip(self.table.removed, levels, near, strict=True):
            slopes = np.full(len(removed), np.nan)
            first = max(0, level - RADIUS)
            slopes[first : first + len(values)] = values
            found.append(slopes)
        return found

    def take(self, record: dict[str, Any]) -> bool:
        """One record of the file; a search can go on behind any."""
        if "seconds" in record:
            self._times.append(_duration(record["seconds"]))
            return True
        if "minutes" in record:
            self._planned[_duration(record["minutes"])] = _duration(record["search"])
            return True
        levels = tuple(map(int, record["levels"]))
        if "slopes" in record:
            self._slopes[levels, int(record["batches"])] = self._expanded(levels, record["slopes"])
        else:
            values = [math.inf if value is None else float(value) for value in record["values"]]
            self._values[levels, int(record["first"]), int(record["first"]) + len(values)] = values
        return True


def _duration(value: Any) -> float:
    if not 0 <= (found := float(value)) < math.inf:
        raise ValueError(f"a time of {found}")
    return found
