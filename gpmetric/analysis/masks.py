"""How masks differ: a sketch is the packed keep-bits of a formula's masks at fixed sampled positions, as hex text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpmetric.analysis.lineages import Kin
from gpmetric.analysis.statistics import Vector, correlate, mantel
from gpmetric.errors import LedgerError

__all__ = ["compare_masks", "distances", "read_sketches"]

_SUBSAMPLE = 300  # formulas whose masks are compared pair by pair


def read_sketches(sketches: Sequence[str]) -> NDArray[np.uint8]:
    """Sketches as packed bytes [formulas, bytes].

    Raises:
        LedgerError: not hexadecimal, empty, or of unequal length.
    """
    try:
        rows = [bytes.fromhex(sketch) for sketch in sketches]
    except ValueError as error:
        raise LedgerError(f"a mask sketch in the ledger is not hexadecimal: {error}") from error
    if len({len(row) for row in rows}) != 1 or not rows[0]:
        raise LedgerError("the mask sketches in the ledger are empty or differ in length")
    return np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), -1)


def distances(sketches: NDArray[np.uint8], one: NDArray[np.uint8]) -> Vector:
    """Share of differing mask entries between every sketch [formulas, bytes] and one [bytes]."""
    differing: NDArray[np.int64] = np.bitwise_count(sketches ^ one).sum(axis=1, dtype=np.int64)
    return differing / (8.0 * len(one))


def compare_masks(
    sketches: NDArray[np.uint8],
    excess: Vector,
    references: Mapping[str, NDArray[np.uint8] | None],
    kin: Kin,
    seed: int,
) -> dict[str, Any]:
    """How distance between masks goes with excess.

    Args:
        sketches: [formulas, bytes].
        excess: [formulas], mean over targets.
        references: name -> the sketch [bytes] of a published metric; None where the ledger has none.
        kin: [formulas], their lineages, the units of the tests but that of pairs.
        seed: of the subsample compared pair by pair, of its permutations, and of signs.

    Returns:
        `to_best`: rank correlation of the distance to the best formula's masks and excess, the best itself left out;
        `references`: the same for published metrics, with the distance from the best and the median distance;
        `pairs`: rank correlation of two formulas' distance and the difference of their excess.
    """
    best = int(excess.argmin())
    others = np.arange(len(excess)) != best
    to_best = distances(sketches, sketches[best])
    rows: dict[str, Any] = {}
    for name, sketch in references.items():
        away = None if sketch is None else distances(sketches, sketch)
        rows[name] = None if away is None else {
            "from_best": float(away[best]), "median": float(np.median(away)), **correlate(away, excess, kin, seed)
        }  # fmt: skip
    rng = np.random.default_rng(seed)
    few = np.sort(rng.permutation(len(excess))[:_SUBSAMPLE])
    apart = np.stack([distances(sketches[few], sketches[index]) for index in few])
    gaps = np.abs(excess[few, None] - excess[few])
    return {
        "formulas": len(excess),
        "bits": 8 * sketches.shape[1],
        "to_best": {"distances": to_best.tolist(), **correlate(to_best[others], excess[others], kin[others], seed)},
        "references": rows,
        "pairs": {"formulas": len(few), "median": float(np.median(apart[np.triu_indices(len(few), 1)]))}
        | mantel(apart, gaps, seed),
    }
