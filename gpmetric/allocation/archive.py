"""The archive: everything that a search measured, so that a killed one goes on where it was.

A search takes each figure from the archive where it is there and measures it otherwise. Since all else depends on the
seed, a resumed search first goes again through what it did, at no cost, and ends at the same front. The file is JSON
Lines: the settings, then one record a line; a line cut short by a kill is dropped.
"""

from __future__ import annotations

import json
import math
import textwrap
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np

from gpmetric.allocation.levels import Ladder, Levels
from gpmetric.allocation.meter import Meter
from gpmetric.errors import GpmetricError, InputError

__all__ = ["BARREN", "RADIUS", "Archive", "Budget", "Candidate"]

RADIUS = 16  # levels around a candidate's that slopes are kept for: they are first order

BARREN = 20  # generations without a new candidate that end a search: a few genes of a few levels have no more

_FORMAT = 1
_WINDOWS = "--sequence-length, --shuffle, --seed"
_OPTIONS = {  # setting -> the options that it comes from, where they are called otherwise
    "calibration": f"--calibration, --samples, {_WINDOWS}",
    "search": f"--calibration, --search, --search-windows, {_WINDOWS}",
    "layers": "--include, --exclude",
    "searched": "--sparsity",
}
_BACKWARD = 3  # tokens that a token of a backward pass counts for: forward, and about twice that back
_FLOOR, _CEILING = 1e-6, 50.0  # of an objective whose logarithm is taken: nothing is pruned, the model is dead


@dataclass
class Candidate:
    """An allocation with what was measured of it: the objective on the first batches, in nats per prediction."""

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


@dataclass(frozen=True)
class Budget:
    """When a search ends: whichever comes first, None being no limit."""

    evaluations: int | None = None
    tokens: int | None = None
    minutes: float | None = None


class Archive(AbstractContextManager["Archive"]):
    """Measures candidates, each once, and writes down what it measured.

    Args:
        ladder: of the candidates.
        meter: measures what is not in the file.
        path: the file; None keeps everything in memory.
        settings: JSON values, all that determines the search but its budget and focus.
        focus: sparsity that the search pays attention to; where the file has one already, that one.
        resume: go on with the file if it is there.

    Raises:
        InputError: the file is there without `resume`, cannot be read, or is another search's.
    """

    def __init__(
        self,
        ladder: Ladder,
        meter: Meter,
        path: Path | None = None,
        settings: Mapping[str, Any] | None = None,
        *,
        focus: float | None = None,
        resume: bool = False,
    ) -> None:
        self.ladder = ladder
        self.focus = focus
        self.candidates: dict[Levels, Candidate] = {}
        self.tokens = 0
        self._meter = meter
        self._values: dict[tuple[Levels, int, int], list[float]] = {}
        self._slopes: dict[tuple[Levels, int], list[np.ndarray]] = {}
        self._sloped: set[tuple[Levels, int]] = set()  # paid for since the search began
        self._clocks: list[float] = []  # seconds each time that the budget was looked at
        self._looks = 0
        self._file: TextIO | None = None
        if path is not None:
            head = {"format": _FORMAT, "focus": focus} | dict(settings or {})
            self._file = self._open(path, json.dumps(head, sort_keys=True), resume)
        self._before = self._clocks[-1] if self._clocks else 0.0
        self._started = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def batches(self) -> int:
        """Batches of windows in all."""
        return len(self._meter)

    @property
    def evaluations(self) -> int:
        """Candidates measured."""
        return len(self.candidates)

    @property
    def seconds(self) -> float:
        """Since the search began, interruptions left out."""
        return self._before + time.monotonic() - self._started

    def tokens_of(self, batches: int) -> int:
        """Tokens of the first batches."""
        return sum(self._meter.tokens[:batches])

    def measure(self, levels: Levels, batches: int) -> Candidate:
        """The candidate, measured on at least so many batches."""
        one = self.candidates.setdefault(levels, Candidate(levels, self.ladder.sparsity(levels)))
        first = len(one.values)
        if first < batches:
            self.tokens += sum(self._meter.tokens[first:batches])
            known = self._values.get((levels, first, batches))
            if known is None:
                known = self._meter.measure(levels, first, batches)
                told = [value if math.isfinite(value) else None for value in known]
                self._write({"levels": levels, "first": first, "values": told})
            one.values += known
        return one

    def slopes(self, levels: Levels, batches: int) -> list[np.ndarray]:
        """`Meter.slopes` of a candidate on the first batches, NaN more than RADIUS levels away."""
        if (levels, batches) not in self._sloped:
            self._sloped.add((levels, batches))
            self.tokens += _BACKWARD * self.tokens_of(batches)
        found = self._slopes.get((levels, batches))
        if found is None:
            near = [
                [float(f"{value:.5g}") for value in table[max(0, level - RADIUS) : level + RADIUS + 1]]
                for table, level in zip(self._meter.slopes(levels, batches), levels, strict=True)
            ]
            self._write({"levels": levels, "batches": batches, "slopes": near})
            found = self._slopes[levels, batches] = self._expanded(levels, near)
        return found

    def spent(self, budget: Budget) -> float:
        """Share of a budget that is used up by now; a resumed search is told the same times as before."""
        if self._looks == len(self._clocks):
            self._clocks.append(self.seconds)
            self._write({"seconds": self._clocks[-1]})
        seconds = self._clocks[self._looks]
        self._looks += 1
        used = (
            (self.evaluations, budget.evaluations),
            (self.tokens, budget.tokens),
            (seconds / 60, budget.minutes),
        )
        return max(amount / limit for amount, limit in used if limit is not None)

    def _expanded(self, levels: Levels, near: Sequence[Sequence[float]]) -> list[np.ndarray]:
        found = []
        for table, level, values in zip(self.ladder.removed, levels, near, strict=True):
            slopes = np.full(len(table), np.nan)
            first = max(0, level - RADIUS)
            slopes[first : first + len(values)] = values
            found.append(slopes)
        return found

    def _open(self, path: Path, head: str, resume: bool) -> TextIO:
        """The file, read as far as it is whole, for more to be written behind."""
        where = f"--archive {str(path)!r}"
        try:
            content = path.read_bytes() if path.exists() else b""
            if content and not resume:
                raise InputError(f"{where} exists: go on with --resume, or name another")
            lines = content.split(b"\n")[:-1]  # what follows the last line end was cut short
            if lines or not f"{head}\n".encode().startswith(content):  # not another file's only line
                self._check_head(where, content.split(b"\n")[0], head)
            for number, line in enumerate(lines[1:], start=2):
                self._take(where, number, line)
            file = path.open("r+" if content else "w", encoding="utf-8", newline="\n")
            file.seek(sum(len(line) + 1 for line in lines))
            file.truncate()
        except OSError as error:
            raise InputError(f"{where} cannot be used: {error.strerror or error}") from error
        if not lines:
            print(head, file=file, flush=True)
        return file

    def _check_head(self, where: str, line: bytes, head: str) -> None:
        try:
            found, wanted = dict(json.loads(line)), json.loads(head)
            self.focus = wanted["focus"] = found.get("focus")
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{where} is no archive of gpmetric allocate") from error
        for key in sorted(found.keys() | wanted.keys()):
            if found.get(key) != wanted.get(key):
                there, here = (textwrap.shorten(repr(one.get(key)), 60, placeholder=" ...") for one in (found, wanted))
                options = f" ({_OPTIONS[key]})" if key in _OPTIONS else ""
                raise InputError(f"{where} is another search's: {key} is {there} there, {here} here{options}")

    def _take(self, where: str, number: int, line: bytes) -> None:
        """One record of the file."""
        try:
            record = json.loads(line)
            if "seconds" in record:
                self._clocks.append(float(record["seconds"]))
                return
            levels = tuple(map(int, record["levels"]))
            if "slopes" in record:
                self._slopes[levels, int(record["batches"])] = self._expanded(levels, record["slopes"])
            else:
                values = [math.inf if value is None else float(value) for value in record["values"]]
                self._values[levels, int(record["first"]), int(record["first"]) + len(values)] = values
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise InputError(f"{where} is damaged at line {number}") from error

    def _write(self, record: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        try:
            print(json.dumps(record), file=self._file, flush=True)
        except OSError as error:
            raise GpmetricError(f"--archive {self._file.name!r} cannot be written: {error.strerror}") from error
