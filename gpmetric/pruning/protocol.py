"""Pruning a session's model in place by one metric, to one target or by an allocation, under one of two protocols.

Sequential: the statistics of each block's inputs come from the already pruned blocks before it, as in the published
codes; those of gradients from the dense model. One-shot: everything comes from the dense model, as in a search.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpmetric.calibration.accumulators import LayerStatistics
from gpmetric.calibration.collect import collect_block
from gpmetric.errors import InputError, MaskError, SolverError
from gpmetric.metrics import Metric
from gpmetric.models import Layer, Model
from gpmetric.operands import needs_gradients
from gpmetric.pruning.allocation import Allocation
from gpmetric.pruning.updaters import needed_statistics, resolve_target, updater_of
from gpmetric.session.session import Progress, Session
from gpmetric.targets import Target

__all__ = ["Protocol", "Rule", "check_targets", "sparsity"]


@dataclass(frozen=True)
class Rule:
    """How a model is pruned.

    Attributes:
        metric: what scores the weights.
        plan: a target of all layers, or an allocation that names each; a layer whose sparsity is 0 is left alone.
        update: what happens to the weights that stay, unless that is part of the metric.
    """

    metric: Metric
    plan: Target | Allocation
    update: str = "none"

    def target(self, layer: str) -> Target:
        """What a layer is pruned to, comparison group included."""
        asked = self.plan.targets[layer] if isinstance(self.plan, Allocation) else self.plan
        return resolve_target(asked, self.metric, self.update)


class Protocol:
    """Prunes a session's model; what all rules share (the dense model's block calls, its statistics) is computed once.

    Args:
        session: its model is dense.
        one_shot: dense statistics everywhere, instead of block after pruned block.
        progress: told of the calibration.
    """

    def __init__(self, session: Session, *, one_shot: bool, progress: Progress = lambda *told: None) -> None:
        self.session = session
        self.one_shot = one_shot
        self._progress = progress

    def shared(self, metrics: Sequence[Metric], update: str) -> frozenset[str]:
        """Names of the dense model's statistics that these metrics share."""
        names = needed_statistics(metrics, update)
        return names if self.one_shot else frozenset(name for name in names if needs_gradients([name]))

    def prepare(self, metrics: Sequence[Metric], update: str) -> None:
        """Collects what these metrics share, so that the seconds of each are its own; the model is dense.

        Raises:
            InputError: model and dense statistics need more memory than the request allows.
        """
        self.session.require(dense := self.shared(metrics, update))
        if dense or self.one_shot:
            self.session.statistics(dense, self._progress)
        if not self.one_shot:
            _ = self.session.calls

    @torch.no_grad()
    def prune(self, rule: Rule) -> None:
        """Prunes the model for good; `prepare` has been called for this metric.

        Raises:
            MaskError, SolverError: naming metric, target and layer; layers before it are already pruned.
        """
        for layer, statistics in self._dense() if self.one_shot else self._block_by_block(rule):
            _prune_layer(layer, rule, statistics)

    def _dense(self) -> Iterator[tuple[Layer, LayerStatistics]]:
        assert self.session.dense is not None
        for layer in self.session.model.layers:
            yield layer, self.session.dense.layers[layer.name]

    def _block_by_block(self, rule: Rule) -> Iterator[tuple[Layer, LayerStatistics]]:
        """Each layer with its statistics; who takes one prunes it before asking for the next."""
        model, calls = self.session.model, self.session.calls
        names = [name for name in needed_statistics([rule.metric], rule.update) if not needs_gradients([name])]
        hidden: Sequence[Tensor] = calls.hidden
        for index, block in enumerate(model.blocks):
            collected = collect_block(calls, index, block, hidden, names)
            for layer in block.layers:
                yield layer, LayerStatistics(**self._gradients(layer.name), **collected[layer.name].values)
            if block is not model.blocks[-1]:  # nothing reads what leaves the last one
                hidden = calls.replay(index, block, hidden)

    def _gradients(self, layer: str) -> Mapping[str, Tensor]:
        dense = self.session.dense
        return {} if dense is None else dense.layers[layer].gradients


def _prune_layer(layer: Layer, rule: Rule, statistics: LayerStatistics) -> None:
    target = rule.target(layer.name)
    if target.sparsity == 0:
        return
    updater = updater_of(rule.metric, rule.update)
    try:
        ((pruned,),) = updater.prune([layer.weight], rule.metric, [target], [statistics])
    except (MaskError, SolverError) as error:
        told = f"metric {rule.metric.name} at {target.text}: {error} (layer {layer.name})"
        raise type(error)(told) from error
    layer.weight.copy_(pruned)


def check_targets(model: Model, targets: Collection[Target]) -> None:
    """Refuses an N:M target that some layer's input does not allow, before any work.

    Raises:
        InputError: naming target, layer and its width.
    """
    for target in targets:
        for layer in model.layers:
            width = layer.weight.shape[1]
            if not target.fits(width):
                raise InputError(
                    f"--target {target.text}: in = {width} of layer {layer.name} is not divisible by {target.group}"
                )


def sparsity(model: Model) -> float:
    """Fraction of the prunable weights that are zero."""
    zeros = sum(int((layer.weight == 0).sum()) for layer in model.layers)
    return zeros / sum(layer.weight.numel() for layer in model.layers)
