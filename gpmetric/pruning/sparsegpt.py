"""SparseGPT's column-by-column reconstruction, for any mask and for any metric choosing it on the way.

Pruning a weight is followed by the update of the weights to its right that best keeps the layer's output (optimal brain
surgeon); SparseGPT is the metric `W*W*D` chosen inside this solver.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gpmetric.pruning.mask import check_width, select_mask
from gpmetric.pruning.target import Target

__all__ = ["ColumnScore", "block_columns", "reconstruct", "reconstruct_blockwise"]

_BLOCK = 128  # columns updated lazily together, and the group SparseGPT's threshold is taken over

# (weights as updated so far [out, in], first column, end column) -> score of those columns [out, end - first]
ColumnScore = Callable[[Tensor, int, int], Tensor]


def reconstruct(weight: Tensor, factor: Tensor, mask: Tensor) -> Tensor:
    """The pruned weight [out, in] whose kept entries make up best for those a given mask removes.

    Args:
        weight: [out, in], the dense weight.
        factor: [in, in], upper Cholesky factor of the damped inverse Gram matrix (`calibration.inverse_factor`).
        mask: [out, in], True = kept; it is used as it is.

    Source: Frantar and Alistarh 2023 (SparseGPT), algorithm 1 with M given.
    """
    return _solve(weight, factor, _BLOCK, lambda weights, start, end: mask[:, start:end], group=0)


def reconstruct_blockwise(weight: Tensor, factor: Tensor, target: Target, score: ColumnScore) -> Tensor:
    """The pruned weight [out, in] with the mask re-chosen on the updated weights, inside each 128-column block.

    One threshold per block holds over all rows and removes exactly int(block size * sparsity) weights (the published
    code removes one more); under N:M each M columns are chosen when the solver reaches them.

    Raises:
        MaskError: a score is not finite, or `in` is not divisible by M.

    Source: SparseGPT, algorithm 1, adaptive mask selection of section 3.4.
    """
    check_width(weight.shape[1], target)
    if target.granularity == "n:m":
        columns = block_columns(target)
        return _solve(weight, factor, columns, _chooser(score, target), group=target.group)
    return _solve(weight, factor, _BLOCK, _chooser(score, target.with_granularity("layer")), group=0)


def block_columns(target: Target) -> int:
    """Columns per block: 128, or the largest multiple of M below it so that no group is cut."""
    return _BLOCK if not target.group else max(target.group, _BLOCK // target.group * target.group)


def _chooser(score: ColumnScore, target: Target) -> ColumnScore:
    return lambda weights, start, end: select_mask(score(weights, start, end), target)


def _solve(weight: Tensor, factor: Tensor, columns: int, choose: ColumnScore, group: int) -> Tensor:
    """Algorithm 1: `choose` gives the mask of a block, or of each `group` columns as they are reached when not 0."""
    weights = weight.float().clone()
    for start in range(0, weights.shape[1], columns):
        end = min(start + columns, weights.shape[1])
        errors = torch.zeros_like(weights[:, start:end])
        keep = torch.ones_like(errors, dtype=torch.bool) if group else choose(weights, start, end)
        for column in range(start, end):
            if group and (column - start) % group == 0:
                keep[:, column - start : column - start + group] = choose(weights, column, column + group)
            kept = torch.where(keep[:, column - start], weights[:, column], 0)
            error = (weights[:, column] - kept) / factor[column, column]
            errors[:, column - start] = error
            weights[:, column] = kept
            weights[:, column + 1 : end] -= error[:, None] * factor[column, column + 1 : end]
        weights[:, end:] -= errors @ factor[start:end, end:]
    return weights
