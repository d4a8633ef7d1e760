"""An order of a weight's inputs that lets more of the scores stay under N:M: channel permutation.

Source: Zhang et al. 2024, "Plug-and-Play: an efficient post-training pruning method", section 4: channels are dealt out
by their sums of scores, then refined by linear sum assignment.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from gpmetric.blockwise.couplings import Coupling
from gpmetric.calibration.accumulators import LayerStatistics
from gpmetric.expression.evaluate import evaluate
from gpmetric.metrics import Metric
from gpmetric.operands import OPERANDS
from gpmetric.targets import Target

__all__ = ["best_channels", "best_order", "in_this_order", "kept_score"]

# Scores |normal| times log-normal columns, 2:4, one core. 4096x11008: slabs of 128, 4 sweeps, 26 s of CPU, 1.80 % more;
# slabs of 256, 4 sweeps, 1.83 %; of 512, 1 sweep, 1.80 %, 2 sweeps, 1.84 %; dealt out only, 1.41 %. 512x1024, all at
# once, 1, 2, 4 and 8 sweeps: 1.89, 1.98, 2.02 and 2.03 %.
_SLAB = 128  # groups that exchange a channel at once
_SWEEPS = 4
_LEAST = 1e-5  # of what thresholds and channels differ by: less is rounding, or not worth another sweep


def best_channels(
    weight: Tensor, metric: Metric, target: Target, statistics: LayerStatistics, coupling: Coupling
) -> Tensor | None:
    """The order [groups, size] of a coupling's channels, within their groups, in which N:M keeps most of the scores.

    Args:
        weight: [out, in], of the layer that reads them.
        metric, target, statistics: that it is pruned with.

    Returns:
        None where no other order keeps more than the given one, or groups of channels do not hold whole groups of M.
    """
    _, groups, size = coupling.columns.shape
    if size % target.group:
        return None
    scores = evaluate(metric.expression, statistics.operands | {"W": weight})
    if not scores.isfinite().all():  # pruning says so
        return None
    columns = coupling.columns.to(scores.device)
    found = []
    for group in range(groups):
        # [out, copies, size] -> [out * copies, size]
        found.append(best_order(scores[:, columns[:, group]].reshape(-1, size), target.keep, target.group))
    channels = torch.stack(found)
    return None if torch.equal(channels, torch.arange(size).expand_as(channels)) else channels


def best_order(scores: Tensor, keep: int, group: int) -> Tensor:
    """An order [in], int64, on the CPU, of columns, whose groups of M consecutive ones keep a high sum of scores.

    Columns are dealt out by their sums. Then one column of every group is taken out at a time, and all of them are
    assigned anew, so that the sum is highest with the others as they are, until little is gained; at most _SLAB groups
    at once, drawn anew from a fixed seed. It never keeps less than the given order. What is added to all scores of a
    row changes nothing, so that they may be negative.

    Args:
        scores: [rows, in], finite; larger means keep.
        keep, group: N and M; `in` is divisible by M.
    """
    columns = scores.shape[1]
    given = torch.arange(columns)
    if columns <= group:
        return given
    values = scores.t().float().contiguous()  # [in, rows]
    dealt = _dealt(values.sum(dim=1, dtype=torch.float64).cpu(), group)
    generator = torch.Generator().manual_seed(0)
    for _ in range(_SWEEPS):
        gained = whole = 0.0
        for slab in torch.randperm(len(dealt), generator=generator).split(_SLAB):
            for place in range(group):
                more, differ = _exchange(values, dealt, slab, place, keep)
                gained, whole = gained + more, whole + differ
        if gained <= _LEAST * whole:
            break
    dealt = dealt.sort(dim=1).values  # the order within a group, and of groups, makes no difference
    order = dealt[dealt[:, 0].argsort()].reshape(-1)  # [in]
    better = kept_score(scores, order, keep, group) > kept_score(scores, given, keep, group)
    return order if better else given


def kept_score(scores: Tensor, order: Tensor, keep: int, group: int) -> float:
    """Sum of the N highest scores of every M consecutive columns in an order [in], in fp64."""
    total = 0.0
    for rows in scores.split(512):
        groups = rows[:, order.to(rows.device)].reshape(len(rows), -1, group)  # [rows, in / M, M]
        total += float(groups.topk(keep, dim=2).values.sum(dtype=torch.float64))
    return total


def in_this_order(statistics: LayerStatistics, order: Tensor) -> LayerStatistics:
    """Statistics of a layer whose inputs are in another order [in]."""
    found = {}
    for name, value in statistics.values.items():
        place = order.to(value.device)
        if name in OPERANDS:
            found[name] = value.index_select(value.dim() - 1, place)
        else:  # Gram matrices [in, in]
            found[name] = value.index_select(0, place).index_select(1, place)
    return LayerStatistics(**found)


def _dealt(sums: Tensor, group: int) -> Tensor:
    """Columns by group [in / M, M]: the highest sums go one to each group, the next in reverse, and so on."""
    layers = sums.argsort(descending=True, stable=True).view(group, -1)  # [M, in / M]
    layers[1::2] = layers[1::2].flip(1)
    return layers.t().contiguous()


def _exchange(values: Tensor, dealt: Tensor, slab: Tensor, place: int, keep: int) -> tuple[float, float]:
    """Assigns the columns at a place of some groups anew; what is gained, and what is compared with it.

    Where t is the N-th highest of a group's other scores in a row, a column of score s adds max(s - t, 0) to the sum
    there: max(s, t) = (s + t + |s - t|) / 2, and the sums of s and t over all groups are those of any assignment. The
    best one has the largest sum of distances.

    Args:
        values: [in, rows], fp32.
        dealt: columns by group, [in / M, M], changed in place.
        slab: groups, [n].
    """
    others = [column for column in range(dealt.shape[1]) if column != place]
    rest = values[dealt[slab][:, others].to(values.device)]  # [n, M - 1, rows]
    thresholds = rest.sort(dim=1, descending=True).values[:, keep - 1]  # [n, rows]
    single = dealt[slab, place]
    distances = torch.cdist(thresholds, values[single.to(values.device)], p=1).cpu().double()  # [groups, columns]
    _, chosen = linear_sum_assignment(distances.numpy(), maximize=True)
    before, after = float(distances.trace()), float(distances[range(len(chosen)), chosen].sum())
    if after <= before * (1 + _LEAST / 10):
        return 0.0, before
    dealt[slab, place] = single[torch.from_numpy(chosen)]
    return after - before, before
