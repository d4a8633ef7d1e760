"""Rank statistics. A test is `{"effect", "p"}`, effect in [-1, 1]; both are None where there is nothing to compare."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

__all__ = ["add_q_values", "compare", "correlate", "fitness_ranks", "mantel"]

Test = dict[str, float | None]
Vector = NDArray[np.float64]


def fitness_ranks(excess: Vector) -> Vector:
    """Rank-normalised fitness: 1 for the lowest excess, 0 for the highest, ties in the middle of their ranks."""
    ranks: Vector = 1 - (stats.rankdata(excess) - 1) / (len(excess) - 1)
    return ranks


def compare(excess: Vector, members: NDArray[np.bool_]) -> Test:
    """Whether members lose less than the others.

    Returns:
        effect: rank-biserial correlation, P(a member is better) - P(another is better): 1 where every member has a
            lower excess than everyone else, -1 where every one has a higher.
        p: two-sided, Mann and Whitney 1947.
    """
    inside, outside = excess[members], excess[~members]
    if not len(inside) or not len(outside) or np.ptp(excess) == 0:
        return {"effect": None, "p": None}
    test = stats.mannwhitneyu(inside, outside)
    return {"effect": float(1 - 2 * test.statistic / (len(inside) * len(outside))), "p": float(test.pvalue)}


def correlate(first: Vector, second: Vector) -> Test:
    """Spearman's rank correlation and its two-sided p."""
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return {"effect": None, "p": None}
    test = stats.spearmanr(first, second)
    return {"effect": float(test.statistic), "p": float(test.pvalue)}


def mantel(first: Vector, second: Vector, seed: int, permutations: int = 999) -> Test:
    """Rank correlation between the entries of two distance matrices.

    Args:
        first, second: symmetric [n, n]; only entries above the diagonal are read.
        seed: of the permutations of one matrix's rows and columns, from which the two-sided p is estimated.

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
