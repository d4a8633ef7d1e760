"""Pruning a model in memory by one metric, one target and one protocol.

Sequential: the activation statistics of each block come from the already pruned blocks before it, as in the published
codes. One-shot: everything comes from the dense model, as in a search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gpmetric.calibration.accumulators import LayerStatistics
from gpmetric.calibration.collect import Statistics, collect_block
from gpmetric.calibration.replay import BlockCalls
from gpmetric.errors import MaskError, SolverError
from gpmetric.expression.evaluate import evaluate, needs_whole_matrix
from gpmetric.models import Layer, Model
from gpmetric.operands import OPERANDS
from gpmetric.pruning.mask import select_mask
from gpmetric.pruning.metrics import Metric, Update
from gpmetric.pruning.sparsegpt import reconstruct, reconstruct_blockwise
from gpmetric.pruning.target import Target

__all__ = ["prune_one_shot", "prune_sequential", "prune_weight", "score_weight", "sparsity"]


@torch.no_grad()
def prune_one_shot(
    model: Model, metric: Metric, target: Target, statistics: Mapping[str, LayerStatistics], update: Update = "none"
) -> None:
    """Prunes every layer in place from statistics of the dense model.

    Raises:
        MaskError, SolverError: naming the layer; layers before it are already pruned.
    """
    for layer in model.layers:
        _prune_layer(layer, metric, target, statistics[layer.name], update)


@torch.no_grad()
def prune_sequential(
    model: Model,
    metric: Metric,
    target: Target,
    calls: BlockCalls,
    dense: Statistics | None = None,
    update: Update = "none",
) -> None:
    """Prunes block after block in place; X and D of a block are those on the outputs of the pruned blocks before it.

    Args:
        model: the dense model.
        metric, target, update: as for `prune_one_shot`.
        calls: the dense model's calls of its blocks on the calibration windows.
        dense: statistics of the dense model, for metrics that need G or H; its X and D are not used.

    Raises:
        MaskError, SolverError: naming the layer.
    """
    gram = metric.needs_gram or update != "none"
    hidden: Sequence[Tensor] = calls.hidden
    for index, block in enumerate(model.blocks):
        collected = collect_block(calls, index, block, hidden, gram=gram)
        for layer in block.layers:
            statistics = collected[layer.name]
            if dense is not None:
                gradients = dense.layers[layer.name]
                statistics = replace(statistics, G=gradients.G, H=gradients.H)
            _prune_layer(layer, metric, target, statistics, update)
        hidden = calls.replay(index, block, hidden)


def score_weight(weight: Tensor, metric: Metric, statistics: LayerStatistics) -> Tensor:
    """The metric's score of every entry of one weight, [out, in], fp32; it does not depend on the target."""
    return evaluate(metric.expression, _operands(weight, statistics))


def prune_weight(
    weight: Tensor,
    metric: Metric,
    target: Target,
    statistics: LayerStatistics,
    update: Update = "none",
    score: Tensor | None = None,
) -> Tensor:
    """The pruned copy of one weight [out, in], in fp32.

    Args:
        score: what `score_weight` gives, when the caller has it already; not used by obs-blockwise, which scores the
            updated weights.

    Raises:
        MaskError: a score is not finite, or `in` is not divisible by M.
        SolverError: an update is asked for and the Gram matrix cannot be factorised.
    """
    if target.granularity == "row":
        target = target.with_granularity(metric.granularity)
    weight = weight.float()
    if update == "obs-blockwise":
        return _prune_blockwise(weight, metric, target, statistics)
    mask = select_mask(score_weight(weight, metric, statistics) if score is None else score, target)
    if update == "obs":
        return reconstruct(weight, statistics.factor, mask)
    return weight.masked_fill(~mask, 0)


def _prune_blockwise(weight: Tensor, metric: Metric, target: Target, statistics: LayerStatistics) -> Tensor:
    factor = statistics.factor
    # D on the updated weights is SparseGPT's 1 / d^2, d the diagonal of the factor (algorithm 1)
    operands = _operands(weight, statistics) | {"D": 1 / factor.diagonal().square()}
    whole = needs_whole_matrix(metric.expression)

    def score(weights: Tensor, start: int, end: int) -> Tensor:
        """A reduction (mms, rowsum, ...) is taken over the whole matrix as updated so far."""
        if whole:
            return evaluate(metric.expression, operands | {"W": weights})[:, start:end]
        columns = {name: value[..., start:end] for name, value in operands.items()}
        return evaluate(metric.expression, columns | {"W": weights[:, start:end]})

    # an input that is always zero is pruned first, as in the published code
    return reconstruct_blockwise(weight.masked_fill(statistics.X == 0, 0), factor, target, score)


def _operands(weight: Tensor, statistics: LayerStatistics) -> dict[str, Tensor]:
    measured = {name: getattr(statistics, name) for name in OPERANDS if name != "W"}
    return {"W": weight.float()} | {name: value for name, value in measured.items() if value is not None}


def sparsity(model: Model) -> float:
    """Fraction of the prunable weights that are zero."""
    zeros = sum(int((layer.weight == 0).sum()) for layer in model.layers)
    return zeros / sum(layer.weight.numel() for layer in model.layers)


def _prune_layer(layer: Layer, metric: Metric, target: Target, statistics: LayerStatistics, update: Update) -> None:
    try:
        layer.weight.copy_(prune_weight(layer.weight, metric, target, statistics, update))
    except MaskError as error:
        raise MaskError(f"metric {metric.name} at {target.text}: {error} (layer {layer.name})") from error
    except SolverError as error:
        raise SolverError(f"metric {metric.name} at {target.text}: {error} (layer {layer.name})") from error
