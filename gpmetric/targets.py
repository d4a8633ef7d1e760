"""Sparsity targets as users write them, and the groups within which scores compete for them, one row each.

`0.5` (where the metric says), `row:0.5`, `layer:0.5` (whole matrix), `block:0.5` (SparseGPT's 128-column blocks), `2:4`
(2 kept of each 4 inputs). No tensor library is needed here, so that a wrong target is refused before anything heavy is
imported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gpmetric.errors import InputError

__all__ = ["BLOCK", "GRANULARITIES", "Granularity", "Target", "parse_target", "plain_granularities"]

BLOCK = 128  # columns that SparseGPT's threshold is taken over


@dataclass(frozen=True)
class Granularity:
    """A way of cutting a weight [out, in] into comparison groups.

    Attributes:
        meaning: the group, in a few words.
        columns: consecutive inputs that a group spans, the last group maybe fewer; None for all.
        across_rows: whether it spans all outputs, too.
        counted: N:M, whose width and number of kept entries are the target's own.
    """

    meaning: str
    columns: int | None = None
    across_rows: bool = False
    counted: bool = False

    @property
    def sentence(self) -> str:
        """Where scores compete, as exported files say it; "" for rows, which is what is meant where nothing is said."""
        if not self.columns:
            return "Scores compete within the whole matrix." if self.across_rows else ""
        rows = "over all rows" if self.across_rows else "row by row"
        return f"Scores compete within each {self.columns} consecutive columns, {rows}."


GRANULARITIES: dict[str, Granularity] = {
    "row": Granularity("the weights of one output"),
    "layer": Granularity("the whole matrix", across_rows=True),
    "block": Granularity("each 128 consecutive inputs over all outputs, the last of them maybe fewer", BLOCK, True),
    "n:m": Granularity("each M consecutive inputs of one output", counted=True),
}


def plain_granularities() -> tuple[str, ...]:
    """Those that a target written as a number can have."""
    return tuple(name for name, row in GRANULARITIES.items() if not row.counted)


@dataclass(frozen=True)
class Target:
    """What a mask must reach; `text` is the user's own spelling, which results are keyed by.

    Attributes:
        granularity: a key of GRANULARITIES; None where a plain number leaves it to the metric.
        sparsity: share of every comparison group that is removed, rounded down to whole entries.
        keep, group: under N:M, `keep` of each `group` consecutive inputs stay; both are 0 otherwise.
    """

    text: str
    granularity: str | None
    sparsity: float
    keep: int = 0
    group: int = 0

    @property
    def across_rows(self) -> bool:
        """Whether a comparison group spans all outputs; rows are what is meant where nothing is said."""
        return GRANULARITIES[self.granularity or "row"].across_rows

    def width(self, columns: int) -> int:
        """Inputs that a comparison group spans, of a weight that has so many."""
        return min(columns, self.group or GRANULARITIES[self.granularity or "row"].columns or columns)

    def fits(self, columns: int) -> bool:
        """Whether N:M leaves no remainder (the published codes prune all of it)."""
        return not self.group or columns % self.group == 0

    def groups(self, shape: Sequence[int]) -> list[tuple[int, int]]:
        """(how many, of which size) comparison groups of a weight [out, in], those of full width first."""
        rows, columns = shape
        width = max(1, self.width(columns))
        count, size = (1, rows) if self.across_rows else (rows, 1)
        parts = [(count * (columns // width), size * width), (count, size * (columns % width))]
        return [(number, entries) for number, entries in parts if number and entries]

    def removed(self, size: int) -> int:
        """How many entries of a comparison group of that size go."""
        return self.group - self.keep if self.group else int(size * self.sparsity)

    def removes(self, shape: Sequence[int]) -> int:
        """How many entries of a weight [out, in] go."""
        return sum(count * self.removed(size) for count, size in self.groups(shape))

    def within(self, granularity: str) -> Target:
        """This sparsity in another comparison group."""
        return replace(self, granularity=granularity, keep=0, group=0)

    def resolved(self, granularity: str) -> Target:
        """This target with a comparison group where it is a plain number."""
        return self if self.granularity else self.within(granularity)


def parse_target(text: str | float) -> Target:
    """Reads a target; a number is a sparsity.

    Raises:
        InputError: naming the text and what is accepted.
    """
    text = str(text)
    pattern = re.fullmatch(r"\s*(\d{1,4}):(\d{1,4})\s*", text, re.ASCII)
    if pattern:
        keep, group = int(pattern[1]), int(pattern[2])
        if not 0 < keep < group:
            raise InputError(f"--target {text!r:.60} keeps {keep} of each {group}; accepted: {_accepted()}")
        return Target(text, "n:m", 1 - keep / group, keep, group)
    number = re.fullmatch(r"\s*(?:([a-z-]+):)?([0-9.eE+-]+)\s*", text)
    try:
        sparsity = float(number[2]) if number else math.nan
    except ValueError:
        sparsity = math.nan
    if not number or number[1] not in (None, *plain_granularities()) or not 0 <= sparsity < 1:
        raise InputError(f"--target {text!r:.60} is not a target; accepted: {_accepted()}")
    return Target(text, number[1], sparsity)


def _accepted() -> str:
    named = ", ".join(f"{name}:0.5" for name in plain_granularities())
    return f"a sparsity in [0, 1) such as 0.5, {named}, or N:M with 0 < N < M (N kept of each M inputs), as 2:4"
