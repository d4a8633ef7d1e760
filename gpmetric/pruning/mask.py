"""Masks from scores: exactly k entries per comparison group are removed, the lower column first among equals.

Whether the Triton kernels of `fused` do it or torch is decided here, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from gpmetric.calibration.accumulators import LayerStatistics
from gpmetric.errors import MaskError
from gpmetric.expression.evaluate import evaluate
from gpmetric.metrics import Metric
from gpmetric.pruning import fused
from gpmetric.targets import Target, parse_target

__all__ = ["by_group", "choose_masks", "compile_ahead", "prune_by_mask", "select_mask", "select_masks"]

# Milliseconds for 2**21 float32 scores, half removed, by ranks, partition and stable sort, one AMD EPYC thread: groups
# of 2 4.4, 48, 43; of 4 6.2, 27, 36; of 8 9.2, 15, 37; of 16 16, 8.9, 47; of 32 33, 7.6, 60. Where all scores are
# equal, which is rare, a partition takes 2.8 times as long as the sort at 8, 0.6 at 4096 (benchmarks/bench_kernels.py).
_RANKS_UP_TO = 8


def prune_by_mask(
    weights: Sequence[Tensor],
    metric: Metric,
    targets: Sequence[Target],
    statistics: Sequence[LayerStatistics],
    scores: Sequence[Tensor] | None = None,
) -> list[list[Tensor]]:
    """The masked copies of weights by target and weight, in their dtype: the updater `none`."""
    if scores is None and _by_kernels(weights, targets, metric):
        by_weight = fused.prune(weights, metric.expression, [one.operands for one in statistics], targets)
        return [list(pruned) for pruned in zip(*by_weight, strict=True)]
    by_weight = []
    for index, (weight, measured) in enumerate(zip(weights, statistics, strict=True)):
        if scores is None and fused.usable(weight, targets, metric.expression):
            by_weight += fused.prune([weight], metric.expression, [measured.operands], targets)
        else:
            score = [scores[index]] if scores else None
            (masks,) = choose_masks([weight], metric, targets, [measured], score)
            by_weight.append([weight.masked_fill(~mask, 0) for mask in masks])
    return [list(pruned) for pruned in zip(*by_weight, strict=True)]


def compile_ahead(
    metrics: Sequence[Metric], layers: Sequence[tuple[Tensor, LayerStatistics]], targets: Sequence[Target], bits: bool
) -> None:
    """Begins to compile the kernel of several metrics, where kernels prune these weights at these targets.

    Args:
        layers: weights with their statistics, at least one of each width.
        bits: whether masks will be asked for, or else pruned copies.
    """
    expressions = [one.expression for one in metrics if fused.usable(layers[0][0], targets, one.expression)]
    if expressions:
        found = [(weight, statistics.operands) for weight, statistics in layers]
        fused.compile_together(expressions, found, targets, bits)


def _by_kernels(weights: Sequence[Tensor], targets: Sequence[Target], metric: Metric) -> bool:
    """Whether the kernels prune all of them by a metric, in one place."""
    here = {weight.device for weight in weights}
    return len(here) == 1 and all(fused.usable(weight, targets, metric.expression) for weight in weights)


def choose_masks(
    weights: Sequence[Tensor],
    metric: Metric,
    targets: Sequence[Target],
    statistics: Sequence[LayerStatistics],
    scores: Sequence[Tensor] | None = None,
) -> list[list[Tensor]]:
    """The masks [out, in] by weight and target, True = kept.

    Args:
        scores: of the weights, when the caller has them already.

    Raises:
        MaskError: as `select_mask`.
    """
    if scores is None and _by_kernels(weights, targets, metric):
        return fused.masks(weights, metric.expression, [one.operands for one in statistics], targets)
    found = []
    for index, (weight, measured) in enumerate(zip(weights, statistics, strict=True)):
        if scores is None and fused.usable(weight, targets, metric.expression):
            found += fused.masks([weight], metric.expression, [measured.operands], targets)
            continue
        score = scores[index] if scores else evaluate(metric.expression, measured.operands | {"W": weight})
        found.append([select_mask(score, target) for target in targets])
    return found


def select_mask(score: Tensor, target: Target | str | float) -> Tensor:
    """Mask keeping the highest scores of every comparison group.

    Args:
        score: [out, in], any float dtype; larger means keep.
        target: or what `parse_target` reads, 0.5 or "2:4"; each group removes k entries: int(group_size * sparsity), or
            M - N of each M consecutive inputs under N:M. Of equal scores the lower column goes first (groups of several
            rows: row-major order).

    Returns:
        Boolean [out, in], True = kept, on the device of `score`.

    Raises:
        MaskError: a score is NaN or infinite, or `in` is not divisible by M.
        InputError: no target.

    Source: Sun et al. 2023 (Wanda), section 3, comparison per output.
    """
    if not isinstance(target, Target):
        target = parse_target(target)
    if not target.fits(score.shape[1]):
        raise MaskError(f"in = {score.shape[1]} is not divisible by {target.group} (target {target.text})")
    if fused.usable(score, [target]):
        return fused.masks_of_scores([score], [target])[0]
    # The sum first: 0.1 ms against 5 ms for every score at 512x4096 (AMD EPYC). It may overflow, hence the count.
    if not math.isfinite(score.sum().item()):
        bad = int((~torch.isfinite(score)).sum())
        if bad:
            raise MaskError(f"{bad} of {score.numel()} scores are NaN or infinite")
    return by_group(lambda groups: ~_lowest(groups, target.removed(groups.shape[1])), score.detach(), target)


def select_masks(scores: Sequence[Tensor], targets: Sequence[Target]) -> list[Tensor]:
    """`select_mask` of scores [out, in] in one place, each at its target."""
    if scores and all(fused.usable(score, [target]) for score, target in zip(scores, targets, strict=True)):
        return fused.masks_of_scores(scores, targets)
    return [select_mask(score, target) for score, target in zip(scores, targets, strict=True)]


def by_group(function: Callable[[Tensor], Tensor], values: Tensor, target: Target) -> Tensor:
    """What a function of comparison groups [groups, size] gives for those of a matrix, as [out, in] again.

    Args:
        function: gives one value for each entry; of groups that differ in width it is called apart.
        values: [out, in]; under N:M, `in` is divisible by M.
        target: says what a group is.
    """
    rows, columns = values.shape
    width = target.width(columns)
    if target.across_rows and width < columns:
        parts = torch.split(values, width, dim=1)
    elif width and columns % width:
        parts = torch.split(values, [columns - columns % width, columns % width], dim=1)
    else:
        size = (rows if target.across_rows else 1) * width
        return function(values.reshape(values.numel() // max(size, 1), size)).reshape(rows, columns)
    return torch.cat([by_group(function, part, target) for part in parts], dim=1)


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
