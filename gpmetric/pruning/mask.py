"""Masks from scores: exactly k entries per comparison group are removed, the lower column first among equals."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from gpmetric.errors import MaskError
from gpmetric.pruning import fused
from gpmetric.pruning.target import BLOCK, Target

__all__ = ["check_width", "select_mask"]

# Milliseconds for 2**21 float32 scores, half removed, by ranks, partition and stable sort, one AMD EPYC thread: groups
# of 2 4.4, 48, 43; of 4 6.2, 27, 36; of 8 9.2, 15, 37; of 16 16, 8.9, 47; of 32 33, 7.6, 60. Where all scores are
# equal, which is rare, a partition takes 2.8 times as long as the sort at 8, 0.6 at 4096 (benchmarks/bench_kernels.py).
_RANKS_UP_TO = 8


def select_mask(score: Tensor, target: Target) -> Tensor:
    """Mask keeping the highest scores of every comparison group.

    Args:
        score: [out, in], any float dtype; larger means keep.
        target: each group removes k entries: int(group_size * sparsity), or M - N of each M consecutive inputs under
            N:M. Of equal scores the lower column goes first (whole layer, block: row-major order).

    Returns:
        Boolean [out, in], True = kept, on the device of `score`.

    Raises:
        MaskError: a score is NaN or infinite, or `in` is not divisible by M.

    Source: Sun et al. 2023 (Wanda), section 3, comparison per output.
    """
    check_width(score.shape[1], target)
    if fused.usable(score, [target]):
        return fused.mask_of_scores(score, target)
    # The sum first: 0.1 ms against 5 ms for every score at 512x4096 (AMD EPYC). It may overflow, hence the count.
    if not math.isfinite(score.sum().item()):
        bad = int((~torch.isfinite(score)).sum())
        if bad:
            raise MaskError(f"{bad} of {score.numel()} scores are NaN or infinite")
    if target.granularity == "block":
        whole = target.with_granularity("layer")
        return torch.cat([_select(part, whole) for part in score.split(BLOCK, dim=1)], dim=1)
    return _select(score, target)


def _select(score: Tensor, target: Target) -> Tensor:
    """The mask of a checked score, blocks apart."""
    rows, columns = score.shape
    size = target.group_size(score.shape)
    groups = score.detach().reshape(score.numel() // max(size, 1), size)
    return ~_lowest(groups, target.removed(size)).reshape(rows, columns)


def check_width(columns: int, target: Target) -> None:
    """Refuses a matrix that an N:M target would leave a remainder of (the published codes prune all of it).

    Raises:
        MaskError: `columns` is not divisible by M.
    """
    if target.group and columns % target.group:
        raise MaskError(f"in = {columns} is not divisible by {target.group} (target {target.text})")


def _lowest(groups: Tensor, count: int) -> Tensor:
    """True at the `count` lowest entries of each row of [groups, size], in stable order."""
    if count == 0:
        return torch.zeros_like(groups, dtype=torch.bool)
    if groups.shape[1] <= _RANKS_UP_TO:
        return _lowest_by_rank(groups, count)
    if groups.device.type != "cpu":
        return _lowest_by_sort(groups, count)
    # numpy has no bf16; float64 stays as it is, since rounding makes ties
    values = groups if groups.dtype == torch.float64 else groups.float()
    return torch.from_numpy(_lowest_by_partition(values.numpy(), count))


def _lowest_by_rank(groups: Tensor, count: int) -> Tensor:
    """By how many of its group are lower, or equal and before it; each place in the group at once."""
    places = [groups[:, place].contiguous() for place in range(groups.shape[1])]  # [groups] each
    ranks = torch.zeros(len(places), len(groups), dtype=torch.int8, device=groups.device)
    for second in range(len(places)):
        for first in range(second):
            before = places[first] <= places[second]
            ranks[second] += before
            ranks[first] += ~before
    return (ranks < count).t()


def _lowest_by_sort(groups: Tensor, count: int) -> Tensor:
    order = groups.sort(dim=1, stable=True).indices[:, :count]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True)


def _lowest_by_partition(values: np.ndarray, count: int) -> np.ndarray:
    """By a partition of each row: the count-th smallest value, then ties in column order."""
    threshold = np.partition(values, count - 1, axis=1)[:, count - 1 : count]  # [groups, 1]
    lowest: np.ndarray = values <= threshold
    tied = np.flatnonzero(lowest.sum(axis=1) != count)
    if tied.size:
        below, equal = values[tied] < threshold[tied], values[tied] == threshold[tied]
        missing = count - below.sum(axis=1, keepdims=True)  # [tied, 1]
        lowest[tied] = below | (equal & (equal.cumsum(axis=1, dtype=np.int32) <= missing))
    return lowest
