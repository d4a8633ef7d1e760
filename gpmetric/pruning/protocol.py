"""Pruning a session's model in place by one metric, to one target or by an allocation, under one of two protocols.

Sequential: the statistics of each block's inputs come from the already pruned blocks before it, as in the published
codes; those of gradients from the dense model. One-shot: everything comes from the dense model, as in a search.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpmetric.calibration.accumulators import LayerStatistics
from gpmetric.calibration.collect import collect_block
from gpmetric.calibration.replay import record_calls
from gpmetric.errors import InputError, MaskError, SolverError
from gpmetric.evaluation.perplexity import batches, mean_loss
from gpmetric.metrics import Metric
from gpmetric.models import Layer, Model
from gpmetric.operands import needs_gradients
from gpmetric.pruning.allocation import Allocation
from gpmetric.pruning.checkpoint import stored_layers
from gpmetric.pruning.updaters import needed_statistics, resolve_target, updater_of
from gpmetric.session.session import Progress, Session
from gpmetric.targets import Target

__all__ = ["Protocol", "Rule", "Walk", "Walked", "check_targets", "sparsity"]


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


@dataclass(frozen=True)
class Walked:
    """What a walk found: mean loss of the pruned model on each text, in nats, and the seconds that pruning took."""

    losses: list[float]
    seconds: float


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

    def walk(self, rules: Sequence[Rule], texts: Sequence[Tensor] = ()) -> Walk:
        """The same block by block, texts being read on the way; `prepare` has been called for these metrics.

        Args:
            rules: how; one.
            texts: [windows, length], int64: what the pruned model is measured on.
        """
        (rule,) = rules
        return Walk(self, rule, texts)

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


class Walk:
    """The model pruned by one rule, block by block: `for index, (pruned,) in walk`, by layer name [out, in].

    Layers that are left alone are not among the pruned ones. A walk can be gone on with behind any block.
    """

    def __init__(self, protocol: Protocol, rule: Rule, texts: Sequence[Tensor]) -> None:
        self._protocol, self._rule, self._texts = protocol, rule, texts
        self._model, self._block, self._seconds = protocol.session.model, 0, 0.0
        self._names = [name for name in needed_statistics([rule.metric], rule.update) if not needs_gradients([name])]
        self._read = [record_calls(self._model, list(batches(self._model, tokens))) for tokens in texts]
        self._hidden: list[list[Tensor]] = [calls.hidden for calls in self._read]
        if not protocol.one_shot:
            self._read.append(protocol.session.calls)
            self._hidden.append(protocol.session.calls.hidden)
        self._dtypes = {name: file.places[tensor].dtype for name, (file, tensor) in stored_layers(self._model).items()}

    def __iter__(self) -> Iterator[tuple[int, tuple[dict[str, Tensor]]]]:
        for index in range(self._block, len(self._model.blocks)):
            yield index, (self._prune(index),)

    def restore(self, block: int, state: Mapping[str, Tensor]) -> None:
        """Goes on before a block with what `state` gave there."""
        self._block = block
        for number, hidden in enumerate(self._hidden):
            for batch in range(len(hidden)):
                hidden[batch] = state[f"{number}.{batch}"].to(self._model.device)

    def state(self) -> dict[str, Tensor]:
        """What is needed to go on behind the last block: what leaves it, by text and batch."""
        return {f"{i}.{j}": batch for i, hidden in enumerate(self._hidden) for j, batch in enumerate(hidden)}

    @torch.no_grad()
    def measured(self) -> tuple[Walked]:
        """For each rule, what the walk found."""
        losses = []
        for tokens, hidden in zip(self._texts, self._hidden, strict=False):
            states = iter(hidden)

            def told(_: object, __: object, output: Any, states: Iterator[Tensor] = states) -> Any:
                return (next(states), *output[1:]) if isinstance(output, tuple) else next(states)

            with self._model.blocks[-1].module.register_forward_hook(told):
                losses.append(mean_loss(self._model, tokens))
        return (Walked(losses, self._seconds),)

    @torch.no_grad()
    def _prune(self, index: int) -> dict[str, Tensor]:
        start, block, session = time.perf_counter(), self._model.blocks[index], self._protocol.session
        if self._protocol.one_shot:
            assert session.dense is not None
            found = {layer.name: session.dense.layers[layer.name] for layer in block.layers}
        else:
            collected = collect_block(session.calls, index, block, self._hidden[-1], self._names)
            found = {
                name: LayerStatistics(**self._protocol._gradients(name), **one.values)
                for name, one in collected.items()
            }
        for layer in block.layers:
            _prune_layer(layer, self._rule, found[layer.name])
        if not self._protocol.one_shot:
            self._hidden[-1] = self._read[-1].replay(index, block, self._hidden[-1])
        self._seconds += time.perf_counter() - start
        for layer in block.layers:  # texts read the model as it is stored
            layer.weight.copy_(layer.weight.to(self._dtypes[layer.name]))
        for number in range(len(self._texts)):
            self._hidden[number] = self._read[number].replay(index, block, self._hidden[number])
        self._block = index + 1
        return {layer.name: layer.weight for layer in block.layers if self._rule.target(layer.name).sparsity > 0}


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
