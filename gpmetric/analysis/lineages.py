"""Which formulas of a campaign come from one founder: relatives are alike, and are no independent observations."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from gpmetric.evolution.records import Evaluation

__all__ = ["Kin", "find_lineages"]

Kin = NDArray[np.int64]  # [formulas], the index of the founder of each


def find_lineages(
    rows: Sequence[Evaluation],
    parts: Sequence[frozenset[str]],
    populations: Mapping[int, Sequence[str]],
    starts: Collection[int] = (0,),
) -> Kin:
    """The founder of every formula: the first of its line, which no earlier formula was bred into.

    A ledger names no parents, but it holds the population that every generation was bred from. The parent of a
    formula is taken to be the one of that population with which it has the largest share of parts in common (Jaccard),
    of equal ones the first, which is the better.

    Args:
        rows: evaluated formulas in the order paid for.
        parts: of each formula, the names of what it consists of.
        populations: the formulas that survived each generation, the best first. Where that of a generation is not
            stored, as in a merged ledger, every earlier formula of the campaign may be a parent.
        starts: generations that were not bred. A fork's is one of them, so that relatives in it count as founders.
    """
    founders: list[int] = []
    index = {row.formula: place for place, row in enumerate(rows)}
    for place, row in enumerate(rows):
        begun = max((start for start in starts if start <= row.generation), default=0)
        if row.generation == begun:
            founders.append(place)
            continue
        stored = populations.get(row.generation - 1)
        if stored is None:
            mates = [one for one in range(place) if begun <= rows[one].generation < row.generation]
        else:
            mates = [index[formula] for formula in stored if index.get(formula, place) < place]
        shares = [_overlap(parts[place], parts[mate]) for mate in mates]
        closest = max(range(len(mates)), key=shares.__getitem__, default=None)
        founders.append(place if closest is None else founders[mates[closest]])
    return np.array(founders, dtype=np.int64)


def _overlap(first: frozenset[str], second: frozenset[str]) -> float:
    return len(first & second) / len(first | second)
