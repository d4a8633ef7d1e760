"""Pruning a session's model by one metric or several, to a target or by an allocation, under one of two protocols.

Sequential: the statistics of each block's inputs come from the already pruned blocks before it, as in the published
codes; those of gradients from the dense model. One-shot: everything comes from the dense model, as in a search.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpmetric.blockwise.couplings import Coupling, Move, find_couplings
from gpmetric.blockwise.hidden import Hidden, States
from gpmetric.blockwise.replay import record_calls
from gpmetric.calibration.accumulators import LayerStatistics
from gpmetric.calibration.collect import collect_block
from gpmetric.calibration.paired import DenseInputs, collect_paired, reading_order
from gpmetric.calibration.regional import collect_regional
from gpmetric.errors import METRIC_ERRORS, GpmetricError, InputError
from gpmetric.evaluation.perplexity import batches, mean_of, sum_loss
from gpmetric.metrics import Metric
from gpmetric.models import Layer, Model
from gpmetric.operands import is_regional, needs_gradients
from gpmetric.pruning.block_fit import fit_block
from gpmetric.pruning.dense_fit import dense_goal
from gpmetric.pruning.protocol_work import protocol_work, shared_statistics
from gpmetric.pruning.rule import Rule, prune_layer, told_where
from gpmetric.pruning.updaters import needed_statistics, updater_of
from gpmetric.session.listeners import Progress, silent
from gpmetric.session.session import Session
from gpmetric.session.work import Work
from gpmetric.targets import Target

__all__ = ["Measured", "Protocol", "Rule", "Walk", "check_targets"]


@dataclass(frozen=True)
class Measured:
    """One pruned model: mean loss on each text, sparsity reached, seconds pruning took; or why there is none.

    `permuted` counts the layers whose columns were put in another order.
    """

    losses: list[float]
    sparsity: float
    seconds: float
    error: GpmetricError | None = None
    permuted: int = 0


class Protocol:
    """Prunes a session's model; what all rules share (the dense model's statistics) is computed once.

    Args:
        session: its model is dense, and stays so.
        one_shot: dense statistics everywhere, instead of block after pruned block.
        progress: told of the calibration.
        passed: told of the layers that a walk has pruned, by all rules together.
    """

    def __init__(
        self, session: Session, *, one_shot: bool, progress: Progress = silent, passed: Progress = silent
    ) -> None:
        self.session = session
        self.one_shot = one_shot
        self.progress, self.passed = progress, passed

    def shared(self, metrics: Sequence[Metric], update: str) -> frozenset[str]:
        """Names of the dense model's statistics that these metrics share."""
        return shared_statistics(metrics, update, one_shot=self.one_shot)

    def work(self, metrics: Sequence[Metric], update: str, **more: Any) -> Work:
        """What pruning by rules of these metrics takes; more of them as of `protocol_work`."""
        return protocol_work(self.session, metrics, update, one_shot=self.one_shot, **more)

    def prepare(self, metrics: Sequence[Metric], update: str, folder: Path | None = None) -> None:
        """Collects what these metrics share, so that the seconds of each are its own.

        Args:
            metrics: of rules that follow.
            update: theirs.
            folder: keeps the statistics in a file, for a command that is killed to find again.
        """
        dense = self.shared(metrics, update)
        if dense and folder is not None:
            self.session.stored_statistics(dense, folder, self.progress)
        elif dense or self.one_shot:
            self.session.statistics(dense, self.progress)
        fits = any(updater_of(metric, update).fits_blocks for metric in metrics)
        if fits or not self.one_shot:
            calls = self.session.calls
            if fits or is_regional(needed_statistics(metrics, update)):
                _ = calls.alone

    def walk(
        self, rules: Sequence[Rule], texts: Sequence[Tensor] = (), stored: Mapping[str, torch.dtype] | None = None
    ) -> Walk:
        """Takes the model through its blocks, pruned by each of these rules; `prepare` has been called for them.

        Args:
            texts: token windows [windows, length] that the pruned models are measured on.
            stored: by layer, a dtype that weights are rounded to before they are measured.
        """
        return Walk(self, rules, texts, stored or {})

    def measure(self, rules: Sequence[Rule], texts: Sequence[Tensor]) -> list[Measured]:
        """The models pruned by these rules, on texts [windows, length] each, together in one walk.

        Args:
            rules: an allocation in one is one that `check_allocation` lets pass.
        """
        walk = self.walk(rules, texts)
        deque(walk, maxlen=0)  # in a loop, the variable would keep a block's weights while the next is pruned
        return walk.measured()


@dataclass
class _Branch:
    """One pruned model on its way."""

    rule: Rule
    calibration: Hidden | None  # under the sequential protocol
    texts: list[Hidden]
    moves: list[Move] = field(default_factory=list)  # of the block that was passed last
    permuted: int = 0
    zeros: int = 0
    seconds: float = 0.0
    error: GpmetricError | None = None

    def hidden(self) -> dict[str, Hidden]:
        named = {f"text-{index}": text for index, text in enumerate(self.texts)}
        return named | ({"calibration": self.calibration} if self.calibration else {})

    def close(self) -> None:
        for one in self.hidden().values():
            one.close()


@dataclass
class Walk:
    """Pruned models on their way through the blocks of one, which stays as it is; see `Protocol.walk`.

    Iterating over it gives after each block its index and, by rule, the pruned weights [out, in] of its layers by name;
    a layer that is left alone is not among them, and of a rule that failed there is nothing.
    """

    protocol: Protocol
    rules: Sequence[Rule]
    tokens: Sequence[Tensor]
    stored: Mapping[str, torch.dtype]
    _next: int = field(default=0, init=False)
    _done: int = field(default=0, init=False)  # layers, of all rules

    def __post_init__(self) -> None:
        session = self.protocol.session
        self._model = session.model
        texts = [record_calls(self._model, list(batches(self._model, tokens)), session.shelf) for tokens in self.tokens]
        self._branches = [
            _Branch(
                rule,
                None if self.protocol.one_shot else Hidden(session.calls, session.shelf),
                [Hidden(calls, session.shelf) for calls in texts],
            )
            for rule in self.rules
        ]
        if self.protocol.one_shot:
            follows = any(rule.updater.fits_blocks for rule in self.rules)
        else:
            follows = any(rule.follows_dense for rule in self.rules)
        self._dense_states = Hidden(session.calls, session.shelf) if follows else None
        self._dense_inputs: DenseInputs | None = None  # of the block that is passed

    def __iter__(self) -> Iterator[tuple[int, list[dict[str, Tensor]]]]:
        self._tell(self._next)
        for index in range(self._next, len(self._model.blocks)):
            yield index, self._step(index)  # nothing of it is kept here
            self._tell(index + 1)

    def _tell(self, blocks: int | None = None) -> None:
        """Tells of one layer more, or of so many blocks."""
        sizes = [len(self.rules) * len(block.layers) for block in self._model.blocks]
        self._done = self._done + 1 if blocks is None else sum(sizes[:blocks])
        self.protocol.passed("pruning", self._done, sum(sizes))

    @torch.no_grad()
    def _step(self, index: int) -> list[dict[str, Tensor]]:
        """Moves all rules past a block."""
        with self._model.at_hand(index):
            dense, couplings = self._dense(index), self._couplings(index)
            if self._dense_states is not None:
                session = self.protocol.session
                keep = session.plan.inputs
                self._dense_inputs = DenseInputs(session.calls, index, self._dense_states, keep=keep)
            pruned = [self._through(branch, index, dense, couplings) for branch in self._branches]
            if self._dense_inputs is not None and index + 1 < len(self._model.blocks):
                self._dense_inputs.advance()
            self._dense_inputs = None
        self._next = index + 1
        return pruned

    def moves(self) -> list[list[Move]]:
        """By rule, what is to be put in another order, so that N:M holds in the block that was passed last."""
        return [branch.moves for branch in self._branches]

    def state(self) -> Mapping[str, Tensor]:
        """All that is needed to go on behind the last block: hidden states by rule, text and batch."""
        return States(dict(self._hidden()))

    def restore(self, block: int, state: Mapping[str, Tensor]) -> None:
        """Goes on before a block with what `state` gave there, each of which is asked for once."""
        self._next = block
        for place, hidden in self._hidden():
            hidden.restore(state[f"{place}/{number}"] for number in range(len(hidden)))

    def _hidden(self) -> Iterator[tuple[str, Hidden]]:
        """The hidden states of every rule and text, with the name of their place; and of the dense model."""
        if self._dense_states is not None:
            yield "dense", self._dense_states
        for place, branch in enumerate(self._branches):
            for name, hidden in branch.hidden().items():
                yield f"{place}/{name}", hidden

    def ended(self) -> list[list[Hidden] | GpmetricError]:
        """By rule, what the last block gives on each text, once it is passed, or why there is nothing."""
        return [branch.error or branch.texts for branch in self._branches]

    def measured(self) -> list[Measured]:
        """What became of each rule, once the last block is passed."""
        weights = sum(layer.weight.numel() for layer in self._model.layers)
        found = []
        for branch in self._branches:
            if branch.error is not None:
                found.append(Measured([math.inf] * len(self.tokens), math.nan, math.nan, branch.error))
                continue
            losses = [
                mean_of(sum_loss(text.calls, text), tokens)
                for text, tokens in zip(branch.texts, self.tokens, strict=True)
            ]
            branch.close()
            found.append(Measured(losses, branch.zeros / weights, branch.seconds, permuted=branch.permuted))
        return found

    def _dense(self, index: int) -> dict[str, LayerStatistics]:
        """The dense model's statistics of a block's layers, read once for all rules; none where no rule reads them."""
        one_shot, dense = self.protocol.one_shot, self.protocol.session.dense
        rules = [branch.rule for branch in self._branches if branch.error is None]
        read = one_shot or any(needs_gradients(needed_statistics([rule.metric], rule.update)) for rule in rules)
        if dense is None or not read:
            return {}
        return {layer.name: dense.layers[layer.name] for layer in self._model.blocks[index].layers}

    def _couplings(self, index: int) -> Mapping[str, Coupling]:
        """What can be put in another order in a block, by the layer that reads it; nothing where no rule asks."""
        asking = [branch for branch in self._branches if branch.rule.permute and branch.error is None]
        states = next((one for branch in asking for one in branch.hidden().values()), None)
        return {} if states is None else find_couplings(states.calls, index, states[0])

    def _through(
        self, branch: _Branch, index: int, dense: Mapping[str, LayerStatistics], couplings: Mapping[str, Coupling]
    ) -> dict[str, Tensor]:
        """Prunes a block by a rule, and moves the rule's hidden states through it."""
        if branch.error is not None:
            return {}
        block, start = self._model.blocks[index], time.perf_counter()
        try:
            branch.moves = []
            pruned = self._pruned(branch, index, dense, couplings)
            if branch.rule.updater.fits_blocks:
                pruned = self._block_fitted(branch, index, pruned)
        except METRIC_ERRORS as error:
            branch.error = error
            branch.close()
            return {}
        weights = [pruned.get(layer.name, layer.weight) for layer in block.layers]
        if branch.calibration is not None and block is not self._model.blocks[-1]:  # nothing reads what leaves the last
            with self._model.holding(weights, block.layers):
                branch.calibration.advance(index)
        branch.seconds += time.perf_counter() - start
        branch.zeros += sum(int((weight == 0).sum()) for weight in weights)
        rounded = [self._rounded(layer, weight) for layer, weight in zip(block.layers, weights, strict=True)]
        with self._model.holding(rounded, block.layers):
            for text in branch.texts:
                text.advance(index)
        return pruned

    def _pruned(
        self, branch: _Branch, index: int, dense: Mapping[str, LayerStatistics], couplings: Mapping[str, Coupling]
    ) -> dict[str, Tensor]:
        rule, block = branch.rule, self._model.blocks[index]
        collected: Mapping[str, LayerStatistics] = {}
        names = [name for name in needed_statistics([rule.metric], rule.update) if not needs_gradients([name])]
        if branch.calibration is not None and rule.follows_dense and rule.updater.solves:
            return self._fitted(branch, index, branch.calibration, dense, names, couplings)
        if branch.calibration is not None:
            collected = collect_block(branch.calibration.calls, index, branch.calibration, names)
            self.protocol.session.note_borrowed(collected)
        pruned = {}
        for layer in block.layers:
            if rule.target(layer.name).sparsity == 0:
                continue
            statistics = dense.get(layer.name, LayerStatistics())
            if branch.calibration is not None:
                statistics = LayerStatistics(**statistics.gradients, **collected[layer.name].values)
            pruned[layer.name] = self._layer(branch, layer, layer.weight, statistics, couplings)
        return pruned

    def _fitted(
        self,
        branch: _Branch,
        index: int,
        states: Hidden,
        dense: Mapping[str, LayerStatistics],
        names: Collection[str],
        couplings: Mapping[str, Coupling],
    ) -> dict[str, Tensor]:
        """The pruned weights of a block's layers, which make up for errors of those before them."""
        assert self._dense_inputs is not None
        rule, block, pruned = branch.rule, self._model.blocks[index], dict[str, Tensor]()
        regional = collect_regional(states.calls, index, states, names)  # while the block is dense
        for layers in reading_order(states.calls, index, states):
            asked = [layer for layer in layers if rule.target(layer.name).sparsity]
            if not asked:
                continue
            weights = [pruned.get(layer.name, layer.weight) for layer in block.layers]
            found = collect_paired(states.calls, index, states, self._dense_inputs, asked, names, weights)
            self.protocol.session.note_borrowed(found)
            for layer in asked:
                gradients = dense.get(layer.name, LayerStatistics()).gradients
                statistics = LayerStatistics(**gradients, **regional[layer.name], **found.pop(layer.name).values)
                with told_where(rule, layer):
                    goal = dense_goal(layer.weight, statistics)
                pruned[layer.name] = self._layer(branch, layer, goal, statistics, couplings)
        return pruned

    def _layer(
        self,
        branch: _Branch,
        layer: Layer,
        weight: Tensor,
        statistics: LayerStatistics,
        couplings: Mapping[str, Coupling],
    ) -> Tensor:
        """The pruned weight [out, in] of a layer."""
        coupling = couplings.get(layer.name)
        pruned, channels = prune_layer(layer, weight, branch.rule, statistics, coupling)
        self._tell()
        if coupling is not None and channels is not None:
            branch.moves += coupling.moves(channels)
            branch.permuted += 1
        return pruned

    def _block_fitted(self, branch: _Branch, index: int, pruned: dict[str, Tensor]) -> dict[str, Tensor]:
        """The pruned weights of a block's layers after rounds towards what the dense block gives.

        It is read by the dense block, too, unless the dense model is followed; one-shot, the dense model's states are.
        """
        layers = [layer for layer in self._model.blocks[index].layers if layer.name in pruned]
        inputs = self._dense_states if branch.calibration is None else branch.calibration
        read = self._dense_states if branch.rule.follows_dense else inputs
        assert inputs is not None
        assert read is not None
        if not layers:
            return pruned
        goals = Hidden(inputs.calls, self.protocol.session.shelf)
        for number, states in enumerate(read):
            goals[number] = inputs.calls.call(index, number, states)
        weights, told = [pruned[layer.name] for layer in layers], partial(self.protocol.passed, "rounds in a block")
        fitted = fit_block(index, layers, weights, inputs, goals, told)
        goals.close()
        return pruned | {layer.name: one for layer, one in zip(layers, fitted, strict=True)}

    def _rounded(self, layer: Layer, weight: Tensor) -> Tensor:
        dtype = self.stored.get(layer.name)
        return weight if dtype is None else weight.to(dtype)


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
