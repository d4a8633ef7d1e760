"""What a search consists of."""

from __future__ import annotations

from dataclasses import dataclass

from gpmetric.evolution.grammar import FORBIDDEN, Nesting
from gpmetric.evolution.objectives import Searched
from gpmetric.evolution.request import Group
from gpmetric.evolution.screening import Rung
from gpmetric.expression.rank import RankGroup

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """What a search consists of; together with model, texts and calibration it determines every evaluation.

    Attributes:
        targets: what an evaluation's figures are keyed by.
        start: metrics the first generation begins with.
        population: survivors of a generation, and new formulas drawn for one.
        rungs: the screening ladder.
        objective: what candidates are compared by.
        group: comparison group of plain-number targets; "search" evolves it with the formula.
        ranks: what rank equivalence takes for a group where `group` is row: whole layers under obs-blockwise, or
            where a target itself is of a layer or block.
        forbidden: (outer, inner) primitives that must not be nested.
        breeding: false draws every formula at random, as a yardstick.
        fingerprints: false pays for equal masks again, as a yardstick.
        generations, evaluations: end the search, whichever is reached first; None is no limit.
    """

    targets: tuple[str, ...]
    operands: tuple[str, ...]
    primitives: tuple[str, ...]
    start: tuple[str, ...]
    population: int
    max_nodes: int
    seed: int
    rungs: tuple[Rung, ...]
    objective: Searched = "kl"
    group: Group = "row"
    ranks: RankGroup = "row"
    forbidden: tuple[Nesting, ...] = FORBIDDEN
    breeding: bool = True
    fingerprints: bool = True
    generations: int | None = None
    evaluations: int | None = None
