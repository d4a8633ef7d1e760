"""The updaters of SparseGPT's reconstruction: masks chosen before (`obs`), or inside its solver (`obs-blockwise`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gpmetric.calibration.accumulators import LayerStatistics
from gpmetric.expression.columns import ColumnScores
from gpmetric.metrics import Metric
from gpmetric.pruning.mask import choose_masks
from gpmetric.pruning.sparsegpt import reconstruct, reconstruct_blockwise
from gpmetric.targets import Target

__all__ = ["prune_blockwise", "prune_obs"]

# Entries of the small weights that the solver takes at once. Four targets, one AMD EPYC thread, at 2**15, 2**17, 2**19
# and 2**21: 35 weights of 64x64 to 64x192 0.48, 0.25, 0.25 and 0.25 of the seconds one by one, eight of 512x192 1.07,
# 1.06, 0.60 and 0.48 (benchmarks/bench_solver.py). Large weights are taken one by one, for their memory.
_TOGETHER = 2**19

# (weights [n, out, in] of one shape, fp32, their places in the list) -> the pruned ones, [n, targets, out, in]
_Solve = Callable[[Tensor, Sequence[int]], Tensor]


def prune_obs(
    weights: Sequence[Tensor],
    metric: Metric,
    targets: Sequence[Target],
    statistics: Sequence[LayerStatistics],
    scores: Sequence[Tensor] | None = None,
) -> list[list[Tensor]]:
    """The reconstructed copies of weights by target and weight, fp32, their masks those of the dense weights.

    Source: Frantar and Alistarh 2023 (SparseGPT), section 3.3 with a mask given.
    """
    # [targets, out, in] each
    masks = [torch.stack(found) for found in choose_masks(weights, metric, targets, statistics, scores)]

    def solve(alike: Tensor, places: Sequence[int]) -> Tensor:
        factors = LayerStatistics.factors([statistics[place] for place in places])
        return reconstruct(alike, factors, torch.stack([masks[place] for place in places]))

    return _solved_together(weights, solve)


def prune_blockwise(
    weights: Sequence[Tensor],
    metric: Metric,
    targets: Sequence[Target],
    statistics: Sequence[LayerStatistics],
    scores: Sequence[Tensor] | None = None,
) -> list[list[Tensor]]:
    """The reconstructed copies, fp32, masks re-chosen in every block on the updated weights; no scores are taken over.

    Source: Frantar and Alistarh 2023 (SparseGPT), algorithm 1.
    """

    def solve(alike: Tensor, places: Sequence[int]) -> Tensor:
        found = [statistics[place] for place in places]
        factors = LayerStatistics.factors(found)
        # D on the updated weights is SparseGPT's 1 / d^2, d the diagonal of the factor (algorithm 1)
        layers = [
            one.operands | {"W": weight, "D": 1 / one.factor.diagonal().square()}
            for weight, one in zip(alike, found, strict=True)
        ]
        # an input that is always zero is pruned first, as in the published code
        dead = torch.stack([one["X"] == 0 for one in found])  # [n, in]
        score = ColumnScores(metric.expression, layers)
        return reconstruct_blockwise(alike.masked_fill(dead[:, None], 0), factors, targets, score)

    return _solved_together(weights, solve)


def _solved_together(weights: Sequence[Tensor], solve: _Solve) -> list[list[Tensor]]:
    """What `solve` gives, by target and weight; small weights of one shape are given to it together."""
    by_shape: dict[torch.Size, list[int]] = {}
    for place, weight in enumerate(weights):
        by_shape.setdefault(weight.shape, []).append(place)
    solved: dict[int, Tensor] = {}
    for shape, alike in by_shape.items():
        size = max(1, _TOGETHER // shape.numel())
        for first in range(0, len(alike), size):
            places = alike[first : first + size]
            batch = torch.stack([weights[place].float() for place in places])  # [n, out, in]
            solved |= zip(places, solve(batch, places), strict=True)
    return [list(pruned) for pruned in zip(*(solved[place] for place in range(len(weights))), strict=True)]
