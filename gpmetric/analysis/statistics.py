"""Rank statistics. A test is `{"effect", "p"}`, effect in [-1, 1]; both are None where there is nothing to compare.

Formulas that descend from one founder share parts and, whatever the reason, fitness, so that a test which takes them
for independent finds what is not there: of 600 drawn genealogies in which both are inherited and have nothing to do
with each other, Mann and Whitney's test calls half significant at 0.05, this one 4 to 6 %. Lineages are the units,
each of one vote however many formulas it has. It contributes one number, the mean over its formulas of the product of
two centred ranks, and p is twice the share of all ways to give these numbers signs in which their sum is as far as
the observed one, in the direction of the effect: near 1 where lineages say the opposite of formulas. That holds if
each number is as likely to be positive as negative where there is no effect, however formulas of a lineage depend on
each other. Fewer than 6 lineages cannot reach p < 0.05 (2 / 2**5 = 0.0625).

Sources: Datta and Satten 2005, ranks in which clusters have one vote each; Canay, Romano and Shaikh 2017, sign
changes of clusters.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from gpmetric.analysis.lineages import Kin

__all__ = ["FEWEST_LINEAGES", "add_q_values", "compare", "correlate", "fitness_ranks", "mantel"]

Test = dict[str, float | None]
Vector = NDArray[np.float64]

FEWEST_LINEAGES = 6  # with which p < 0.05 can be reached
_EXACT = 13  # lineages up to which all 8192 ways are counted
_DRAWN = 9_999  # ways otherwise, besides the observed one


def fitness_ranks(excess: Vector) -> Vector:
    """Rank-normalised fitness: 1 for the lowest excess, 0 for the highest, ties in the middle of their ranks."""
    ranks: Vector = 1 - (stats.rankdata(excess) - 1) / (len(excess) - 1)
    return ranks


def compare(excess: Vector, members: NDArray[np.bool_], kin: Kin, seed: int) -> Test:
    """Whether members lose less than the others.

    Args:
        excess, members, kin: [formulas]; what each loses, whether it is a member, and its lineage.
        seed: of the signs, where there are too many lineages to count all ways.

    Returns:
        effect: rank-biserial correlation, P(a member is better) - P(another is better): 1 where every member has a
            lower excess than everyone else, -1 where every one has a higher.
        p: two-sided, with lineages as units.
    """
    inside, outside = int(members.sum()), int((~members).sum())
    if not inside or not outside or np.ptp(excess) == 0:
        return {"effect": None, "p": None}
    ranks = stats.rankdata(excess)
    effect = 2 * float(ranks[~members].mean() - ranks[members].mean()) / len(excess)
    return {"effect": effect, "p": _sign_changes(members.astype(float), -excess, kin, effect, seed)}


def correlate(first: Vector, second: Vector, kin: Kin, seed: int) -> Test:
    """Spearman's rank correlation of two values of every formula, and its two-sided p with lineages as units."""
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return {"effect": None, "p": None}
    effect = float(_centred_ranks(first) @ _centred_ranks(second))
    return {"effect": effect, "p": _sign_changes(first, second, kin, effect, seed)}


def _sign_changes(first: Vector, second: Vector, kin: Kin, effect: float, seed: int) -> float:
    _, lineage, formulas = np.unique(kin, return_inverse=True, return_counts=True)
    votes = 1 / (formulas[lineage] * len(formulas))  # they sum to 1
    numbers = np.bincount(lineage, votes * _ranks_by_vote(first, votes) * _ranks_by_vote(second, votes))
    sums = np.copysign(1.0, effect) * (_signs(len(numbers), seed) @ numbers)
    observed = np.copysign(1.0, effect) * numbers.sum()
    as_far = int((sums >= observed - 1e-12).sum())  # a sum equal to the observed one may be a rounding apart
    drawn = len(numbers) > _EXACT  # the observed one is one more
    return min(1.0, 2 * (as_far + drawn) / (len(sums) + drawn))


def _ranks_by_vote(values: Vector, votes: Vector) -> Vector:
    """The share of votes below each value and half of those at it, less the mean, which is a half."""
    _, place = np.unique(values, return_inverse=True)
    at = np.bincount(place, votes)
    ranks: Vector = (np.cumsum(at) - at / 2)[place] - 0.5
    return ranks


@lru_cache(maxsize=4)
def _signs(count: int, seed: int) -> Vector:
    """[ways, lineages] of 1 and -1: all ways where they are few, the observed one among them, or drawn ones."""
    if count <= _EXACT:
        return np.array(list(product((1.0, -1.0), repeat=count)))
    return np.random.default_rng(seed).choice((1.0, -1.0), (_DRAWN, count))


def mantel(first: Vector, second: Vector, seed: int, permutations: int = 999) -> Test:
    """Rank correlation between the entries of two distance matrices.

    Args:
        first, second: symmetric [n, n]; only entries above the diagonal are read.
        seed: of the permutations of one matrix's rows and columns, from which the two-sided p is estimated.

    Pairs of relatives count as any others: what it says is of the formulas at hand.

    Source: Mantel 1967, with ranks; the observed order counts as one of the permutations.
    """
    above = np.triu_indices(len(first), 1)
    if len(above[0]) < 3 or np.ptp(first[above]) == 0 or np.ptp(second[above]) == 0:
        return {"effect": None, "p": None}
    fixed = _centred_ranks(first[above])
    ranks = np.zeros_like(second)
    ranks[above] = _centred_ranks(second[above])
    ranks += ranks.T
    observed = float(fixed @ ranks[above])
    rng = np.random.default_rng(seed)
    as_far = 1
    for _ in range(permutations):
        order = rng.permutation(len(ranks))
        # a permuted matrix equal to the observed one may sum to a value a rounding apart
        as_far += abs(float(fixed @ ranks[order[above[0]], order[above[1]]])) >= abs(observed) - 1e-12
    return {"effect": observed, "p": as_far / (permutations + 1)}


def _centred_ranks(values: Vector) -> Vector:
    """Ranks with mean 0 and sum of squares 1, so that a dot product is a correlation."""
    ranks = stats.rankdata(values)
    ranks -= ranks.mean()
    unit: Vector = ranks / np.linalg.norm(ranks)
    return unit


def add_q_values(document: Any) -> None:
    """Sets `q` beside every `p` in a nested document: corrected for the number of all tests in it.

    Source: Benjamini and Hochberg 1995.
    """
    tests = list(_tests(document))
    known = [test for test in tests if test["p"] is not None]
    corrected = stats.false_discovery_control([test["p"] for test in known]) if known else []
    for test in tests:
        test["q"] = None
    for test, q in zip(known, corrected, strict=True):
        test["q"] = float(q)


def _tests(document: Any) -> Iterator[dict[str, Any]]:
    if isinstance(document, dict):
        if "p" in document:
            yield document
        for value in document.values():
            yield from _tests(value)
    elif isinstance(document, list):
        for value in document:
            yield from _tests(value)
