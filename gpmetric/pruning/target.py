"""Sparsity targets as users write them: `0.5` (rows), `layer:0.5` (whole matrix), `block:0.5` (SparseGPT's 128-column
blocks), `2:4` (2 kept of each 4 inputs).

No tensor library is needed here, so that a wrong target is refused before anything heavy is imported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gpmetric.errors import InputError

__all__ = ["BLOCK", "GRANULARITIES", "Granularity", "Target", "parse_target"]

Granularity = Literal["row", "layer", "block", "n:m"]

BLOCK = 128  # columns that SparseGPT's threshold is taken over

# granularity -> the group within which scores compete
GRANULARITIES: dict[Granularity, str] = {
    "row": "the weights of one output",
    "layer": "the whole matrix",
    "block": "each 128 consecutive inputs over all outputs, the last of them maybe fewer",
    "n:m": "each M consecutive inputs of one output",
}

_PREFIXES: dict[str | None, Granularity] = {None: "row", "layer": "layer", "block": "block"}
_ACCEPTED = (
    "a sparsity in [0, 1) such as 0.5, layer:0.5, block:0.5, or N:M with 0 < N < M (N kept of each M inputs), as 2:4"
)


@dataclass(frozen=True)
class Target:
    """What a mask must reach; `text` is the user's own spelling, which results are keyed by.

    `keep` of each `group` consecutive inputs stay under N:M; both are 0 otherwise.
    """

    text: str
    granularity: Granularity
    sparsity: float
    keep: int = 0
    group: int = 0

    def group_size(self, shape: Sequence[int]) -> int:
        """Entries of a comparison group of a weight [out, in]; of a block target's, of one block taken as a layer."""
        return {"row": shape[1], "n:m": self.group}.get(self.granularity, shape[0] * shape[1])

    def removed(self, size: int) -> int:
        """How many entries of a comparison group of that size go."""
        return self.group - self.keep if self.group else int(size * self.sparsity)

    def with_granularity(self, granularity: Granularity) -> Target:
        """This sparsity in another comparison group (the magnitude baseline competes within the layer)."""
        return Target(self.text, granularity, self.sparsity)


def parse_target(text: str) -> Target:
    """Reads a target.

    Raises:
        InputError: naming the text and what is accepted.
    """
    pattern = re.fullmatch(r"\s*(\d{1,4}):(\d{1,4})\s*", text, re.ASCII)
    if pattern:
        keep, group = int(pattern[1]), int(pattern[2])
        if not 0 < keep < group:
            raise InputError(f"--target {text!r:.60} keeps {keep} of each {group}; accepted: {_ACCEPTED}")
        return Target(text, "n:m", 1 - keep / group, keep, group)
    number = re.fullmatch(r"\s*(?:(layer|block):)?([0-9.eE+-]+)\s*", text)
    try:
        sparsity = float(number[2]) if number else math.nan
    except ValueError:
        sparsity = math.nan
    if not number or not 0 <= sparsity < 1:
        raise InputError(f"--target {text!r:.60} is not a target; accepted: {_ACCEPTED}")
    return Target(text, _PREFIXES[number[1]], sparsity)
