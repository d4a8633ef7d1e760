"""Pruning a model in memory by one metric, one target or allocation, and one protocol.

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
from gpmetric.expression.columns import ColumnScores
from gpmetric.expression.evaluate import evaluate
from gpmetric.models import Layer, Model
from gpmetric.operands import OPERANDS
from gpmetric.pruning import fused
from gpmetric.pruning.allocation import Allocation
from gpmetric.pruning.mask import select_mask
from gpmetric.pruning.metrics import Metric, Update
from gpmetric.pruning.sparsegpt import reconstruct, reconstruct_blockwise
from gpmetric.pruning.target import Target

__all__ = [
    "layer_operands",
    "layer_rule",
    "measured",
    "prune_one_shot",
    "prune_sequential",
    "prune_weight",
    "prune_weights",
    "rules_of",
    "score_weight",
    "sparsity",
]

# Entries of the small weights that the solver takes at once. Four targets, one AMD EPYC thread, at 2**15, 2**17, 2**19
# and 2**21: 35 weights of 64x64 to 64x192 0.48, 0.25, 0.25 and 0.25 of the seconds one by one, eight of 512x192 1.07,
# 1.06, 0.60 and 0.48 (benchmarks/bench_solver.py). Large weights are taken one by one, for their memory.
_TOGETHER = 2**19


@torch.no_grad()
def prune_one_shot(
    model: Model,
    metric: Metric,
    target: Target | Allocation,
    statistics: Mapping[str, LayerStatistics],
    update: Update = "none",
) -> None:
    """Prunes every layer in place from statistics of the dense model.

    Args:
        model: the dense model.
        metric, update: how weights are chosen, and what happens to the others.
        target: of all layers, or an allocation that names each; a layer whose sparsity is 0 is left alone.
        statistics: by layer name.

    Raises:
        MaskError, SolverError: naming the layer; layers before it are already pruned.
    """
    for layer in model.layers:
        _prune_layer(layer, metric, target, statistics[layer.name], update)


@torch.no_grad()
def prune_sequential(
    model: Model,
    metric: Metric,
    target: Target | Allocation,
    calls: BlockCalls,
    dense: Statistics | None = None,
    update: Update = "none",
) -> None:
    """Prunes block after block in place; X and D of a block are those on the outputs of the pruned blocks before it.

    Args:
        model: the dense model.
        metric, target, update: as for `prune_one_shot`.
        calls: the dense model's calls of its blocks on the calibration windows.
        dense: statistics of the dense model, for metrics that need G, H or F; its X and D are not used.

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
                statistics = replace(statistics, G=gradients.G, H=gradients.H, F=gradients.F)
            _prune_layer(layer, metric, target, statistics, update)
        if block is not model.blocks[-1]:  # nothing reads what leaves the last one
            hidden = calls.replay(index, block, hidden)


def score_weight(weight: Tensor, metric: Metric, statistics: LayerStatistics) -> Tensor:
    """The metric's score of every entry of one weight, [out, in], fp32; it does not depend on the target."""
    return evaluate(metric.expression, layer_operands(weight, statistics))


def prune_weight(
    weight: Tensor,
    metric: Metric,
    target: Target,
    statistics: LayerStatistics,
    update: Update = "none",
    score: Tensor | None = None,
) -> Tensor:
    """The pruned copy of one weight [out, in]: `prune_weights` of one weight at one target."""
    return prune_weights([weight], metric, [target], [statistics], update, None if score is None else [score])[0][0]


def prune_weights(
    weights: Sequence[Tensor],
    metric: Metric,
    targets: Sequence[Target],
    statistics: Sequence[LayerStatistics],
    update: Update = "none",
    scores: Sequence[Tensor] | None = None,
) -> list[list[Tensor]]:
    """The pruned copies of several weights by target and weight; small weights are solved together.

    On CUDA devices masks come from the Triton kernels of `fused`, unless scores are given.

    Args:
        weights: [out, in] each, of any shapes.
        targets: a plain number competes where the metric says.
        statistics: one for each weight.
        scores: what `score_weight` gives for each weight, when the caller has it already; not used by obs-blockwise,
            which scores the updated weights.

    Returns:
        Weights of the dtype given where kept weights stay as they are, in fp32 otherwise.

    Raises:
        MaskError: a score is not finite, or `in` is not divisible by M.
        SolverError: an update is asked for and the Gram matrix cannot be factorised.
    """
    rules = rules_of(metric, targets)
    given: Sequence[Tensor | None] = scores or [None] * len(weights)
    cases = list(zip(weights, statistics, given, strict=True))
    if update == "none":
        return [list(row) for row in zip(*(_masked(w, metric, rules, s, score) for w, s, score in cases), strict=True)]
    masks: list[Tensor] = []  # [targets, out, in] each
    if update == "obs":
        masks = [torch.stack(_masks(w, metric, rules, s, score)) for w, s, score in cases]
    weights = [weight.float() for weight in weights]
    solved: dict[int, Tensor] = {}
    for batch in _batches(weights):
        alike = torch.stack([weights[index] for index in batch])  # [n, out, in]
        found = [statistics[index] for index in batch]
        if update == "obs":
            factors = torch.stack([one.factor for one in found])
            result = reconstruct(alike, factors, torch.stack([masks[index] for index in batch]))
        else:
            result = _prune_blockwise(alike, metric, targets, found)
        solved |= zip(batch, result, strict=True)
    return [list(target) for target in zip(*(solved[index] for index in range(len(weights))), strict=True)]


def rules_of(metric: Metric, targets: Sequence[Target]) -> list[Target]:
    """The targets with the comparison group of the metric where they are plain numbers."""
    return [
        target.with_granularity(metric.granularity) if target.granularity == "row" else target for target in targets
    ]


def layer_rule(metric: Metric, target: Target | Allocation, layer: str) -> Target:
    """What a layer is pruned to: only where no allocation says it, the metric tells where a plain number competes."""
    return target.targets[layer] if isinstance(target, Allocation) else rules_of(metric, [target])[0]


def _masked(
    weight: Tensor, metric: Metric, rules: Sequence[Target], statistics: LayerStatistics, score: Tensor | None
) -> list[Tensor]:
    """The masked copies of one weight."""
    if score is None and fused.usable(weight, rules):
        return fused.prune(weight, metric.expression, measured(statistics), rules)
    return [weight.masked_fill(~mask, 0) for mask in _masks(weight, metric, rules, statistics, score)]


def _masks(
    weight: Tensor, metric: Metric, rules: Sequence[Target], statistics: LayerStatistics, score: Tensor | None
) -> list[Tensor]:
    if score is None and fused.usable(weight, rules):
        return fused.masks(weight, metric.expression, measured(statistics), rules)
    score = score_weight(weight, metric, statistics) if score is None else score
    return [select_mask(score, rule) for rule in rules]


def _batches(weights: Sequence[Tensor]) -> list[list[int]]:
    """Indices of weights to solve together: of one shape, at most `_TOGETHER` entries unless it is one weight."""
    batches: list[list[int]] = []
    by_shape: dict[torch.Size, list[int]] = {}
    for index, weight in enumerate(weights):
        by_shape.setdefault(weight.shape, []).append(index)
    for shape, indices in by_shape.items():
        size = max(1, _TOGETHER // shape.numel())
        batches += [indices[first : first + size] for first in range(0, len(indices), size)]
    return batches


def _prune_blockwise(
    weights: Tensor, metric: Metric, targets: Sequence[Target], statistics: Sequence[LayerStatistics]
) -> Tensor:
    """`reconstruct_blockwise` of weights [n, out, in] scored by the metric: [n, targets, out, in]."""
    factors = torch.stack([one.factor for one in statistics])
    # D on the updated weights is SparseGPT's 1 / d^2, d the diagonal of the factor (algorithm 1)
    layers = [
        layer_operands(weight, one) | {"D": 1 / one.factor.diagonal().square()}
        for weight, one in zip(weights, statistics, strict=True)
    ]
    # an input that is always zero is pruned first, as in the published code
    dead = torch.stack([one.X == 0 for one in statistics])  # [n, in]
    score = ColumnScores(metric.expression, layers)
    return reconstruct_blockwise(weights.masked_fill(dead[:, None], 0), factors, targets, score)


def layer_operands(weight: Tensor, statistics: LayerStatistics) -> dict[str, Tensor]:
    """The operands of one layer by name, those that were measured."""
    return {"W": weight.float()} | measured(statistics)


def measured(statistics: LayerStatistics) -> dict[str, Tensor]:
    """The same without the weight."""
    found = {name: getattr(statistics, name) for name in OPERANDS if name != "W"}
    return {name: value for name, value in found.items() if value is not None}


def sparsity(model: Model) -> float:
    """Fraction of the prunable weights that are zero."""
    zeros = sum(int((layer.weight == 0).sum()) for layer in model.layers)
    return zeros / sum(layer.weight.numel() for layer in model.layers)


def _prune_layer(
    layer: Layer, metric: Metric, target: Target | Allocation, statistics: LayerStatistics, update: Update
) -> None:
    rule = layer_rule(metric, target, layer.name)
    if rule.sparsity == 0:
        return
    metric = replace(metric, granularity=rule.granularity)  # rows too, whatever the metric says of a plain number
    try:
        layer.weight.copy_(prune_weight(layer.weight, metric, rule, statistics, update))
    except MaskError as error:
        raise MaskError(f"metric {metric.name} at {rule.text}: {error} (layer {layer.name})") from error
    except SolverError as error:
        raise SolverError(f"metric {metric.name} at {rule.text}: {error} (layer {layer.name})") from error
