"""Formulas that campaigns of this project found, each for the use it was found in: `--metric catalogue:NAME`.

Published metrics are `gpmetric.metrics.BASELINES`. What each is worth on which model stands in catalogue.json, which
`gpmetric catalogue --model DIR ... --json FILE` writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["CATALOGUE", "EVIDENCE", "PREFIX", "Entry"]

PREFIX = "catalogue"  # `catalogue:NAME` in place of a formula
EVIDENCE = Path(__file__).with_name("catalogue.json")


@dataclass(frozen=True)
class Entry:
    """A formula and what it is for.

    Attributes:
        formula: behind the comparison group of plain-number targets.
        found: in which campaign: model, targets, length, seed, version.
        update, fit: what it was found inside; part of the method, as the update of a published metric is.
    """

    formula: str
    found: str
    update: str = "none"
    fit: str = "own"

    @property
    def group(self) -> str:
        """The comparison group; rows where none is written."""
        return self.formula.rpartition(":")[0] or "row"

    @property
    def expression(self) -> str:
        """The formula without it."""
        return self.formula.rpartition(":")[2]


_LLAMA = "llama of 0.5 million parameters, WikiText-2 and PTB, at 0.5, 0.6, 0.7 and 2:4, one core"

CATALOGUE: dict[str, Entry] = {
    "alps_dense": Entry(
        "layer:abs(W)*X", "not found but published: Meng et al. 2024, with the fit to the dense model", "admm", "dense"
    ),
    "fisher_dense": Entry("layer:W**1.928*F", f"{_LLAMA}, 14 minutes, seed 1", "admm", "dense"),
    "fisher_growth_dense": Entry(
        "layer:W**2.928*F*(G+X/400)/sqrt(rownorm(W))", f"{_LLAMA}, 16 minutes, seed 2", "admm", "dense"
    ),
}
