"""Inputs of a block's layers in a pruned model beside those in the dense one, for layers that make up for the former.

The layers of a block are looked at in the order in which they read: by then, those before them may be pruned.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial

import torch
from torch import Tensor
from torch.nn import Module

from gpmetric.blockwise.hidden import Hidden
from gpmetric.blockwise.replay import BlockCalls
from gpmetric.blockwise.steps import EnoughError
from gpmetric.calibration.accumulators import (
    ACCUMULATORS,
    FromInputs,
    InputMoments,
    LayerStatistics,
    functions_of,
)
from gpmetric.calibration.siblings import Siblings, families
from gpmetric.models import Layer
from gpmetric.operands import CROSS, GRAM

__all__ = ["DenseInputs", "collect_paired", "reading_order"]


class DenseInputs:
    """What the layers of a block read in the dense model, for all rules and stages of one step through the blocks.

    Args:
        calls: how the model calls its blocks.
        index: of the block, which is at hand.
        hidden: what the block reads in the dense model.
        keep: whether they are kept once they are known, [tokens, in] of every place that is read; otherwise each who
            asks has the block run again, as far as it takes.
    """

    def __init__(self, calls: BlockCalls, index: int, hidden: Hidden, *, keep: bool) -> None:
        self._calls, self._index, self._hidden, self._keep = calls, index, hidden, keep
        self._known: dict[int, dict[str, Tensor]] = {}
        self._ends: dict[int, Tensor] = {}

    def of(self, number: int, layers: Sequence[Layer]) -> Mapping[str, Tensor]:
        """What layers read [..., in] of a batch, by name; those that are not reached may be missing."""
        if not self._keep:
            return _inputs(self._calls, self._index, number, self._hidden[number], layers, nullcontext())
        if number not in self._known:
            with _watching(self._calls.model.blocks[self._index].layers, whole=True) as inputs:
                self._ends[number] = self._calls.call(self._index, number, self._hidden[number])
            if any(one._version != version for one, version in inputs.values()):  # changed in place after it was read
                self._keep = False
                return self.of(number, layers)
            self._known[number] = {name: one for name, (one, _) in inputs.items()}
        return self._known[number]

    @torch.no_grad()
    def advance(self) -> None:
        """Moves what the block reads behind it; nothing is kept any more."""
        self._known.clear()
        for number in range(len(self._hidden)):
            end = self._ends.pop(number, None)
            if end is None:
                end = self._calls.call(self._index, number, self._hidden[number])
            self._hidden[number] = end


@torch.no_grad()
def reading_order(calls: BlockCalls, index: int, hidden: Hidden) -> list[list[Layer]]:
    """The layers of a block, which is at hand, in the order in which they read; those that read the same together.

    The experts of a mixture are taken together, by the names of their layers.
    """
    layers = calls.model.blocks[index].layers
    inputs = _inputs(calls, index, 0, hidden[0], layers, nullcontext())
    kind = {layer.name: re.sub(r"\.\d+\.", ".*.", layer.name.rpartition(".layers.")[2]) for layer in layers}
    stages: list[list[Layer]] = []
    seen: dict[str, Tensor] = {}  # by kind, what the first of it reads
    by_name = {layer.name: layer for layer in layers}
    for name in [*inputs, *(layer.name for layer in layers if layer.name not in inputs)]:
        first = seen.get(kind[name])
        if first is None:
            first = seen[kind[name]] = inputs.get(name, torch.empty(0))
            alike = [stage for stage in stages if seen[kind[stage[0].name]] is first]
        else:
            alike = [stage for stage in stages if any(kind[one.name] == kind[name] for one in stage)]
        if alike:
            alike[0].append(by_name[name])
        else:
            stages.append([by_name[name]])
    return stages


@torch.no_grad()
def collect_paired(
    calls: BlockCalls,
    index: int,
    pruned: Hidden,
    dense: DenseInputs,
    layers: Sequence[Layer],
    names: Collection[str],
    weights: Sequence[Tensor],
) -> dict[str, LayerStatistics]:
    """What the inputs of some layers tell in a pruned model, `names` of X, D, gram and the like, and `cross`.

    A layer whose inputs are not the same tokens in both models, an expert of a mixture, has no `cross`.

    Args:
        calls: how the model calls its blocks.
        index: of the block, which is at hand.
        pruned: what the block reads in the pruned model.
        dense: what its layers read in the dense model, of the same batches.
        layers: of the block.
        names: of statistics.
        weights: [out, in] of all layers of the block, as they are by now in the pruned model.

    Raises:
        ModelError: a layer is not reached by a text.
        SolverError: a Gram matrix has no inverse even after stronger damping.
    """
    rows = {name: row for name, row in ACCUMULATORS.items() if name in {*names, "X"} and isinstance(row, FromInputs)}
    pairs, model = {layer.name: _Pair(layer, functions_of(rows)) for layer in layers}, calls.model
    for number, mine in enumerate(pruned):
        tokens = calls.batches[number].numel()
        before = dense.of(number, layers)
        after = _inputs(calls, index, number, mine, layers, model.holding(weights, model.blocks[index].layers))
        shared: dict[int, _Pair] = {}  # the first layer that reads a tensor counts for all that read it
        for name, pair in pairs.items():
            if name in after:
                pair.of = shared.setdefault(id(after[name]), pair)
                if pair.of is pair:
                    pair.add(after[name], before.get(name), tokens)
    found = {}
    moments = {name: pair.of.moments for name, pair in pairs.items()}
    for family in families(layers):
        siblings = Siblings(family, {name: one.tokens for name, one in moments.items()})
        for layer in family:
            own = siblings.read(layer, rows, moments, {}, 0)
            cross = None if GRAM in own.borrowed else pairs[layer.name].of.cross
            found[layer.name] = own if cross is None else own.joined({CROSS: cross})
    return found


class _Pair:
    """Moments of a layer's inputs in the pruned model, and their products with those in the dense one."""

    def __init__(self, layer: Layer, functions: Iterable[Callable[[Tensor], Tensor]]) -> None:
        width, device = layer.weight.shape[1], layer.weight.device
        self.of = self
        self.moments = InputMoments(width, device, gram=True, functions=functions)
        self._products: Tensor | None = torch.zeros(width, width, device=device)

    def add(self, pruned: Tensor, dense: Tensor | None, tokens: int) -> None:
        """Adds activations [..., in] of a batch of so many tokens in both models."""
        self.moments.add(pruned)
        rows = [None if one is None else one.reshape(-1, one.shape[-1]).float() for one in (dense, pruned)]
        if rows[0] is None or rows[1] is None or not len(rows[0]) == len(rows[1]) == tokens:
            self._products = None
        elif self._products is not None:
            self._products.addmm_(rows[0].t(), rows[1])

    @property
    def cross(self) -> Tensor | None:
        """[in, in], X_dense^T X / n, where the tokens were the same."""
        return None if self._products is None else self._products / max(1, self.moments.tokens)


def _inputs(
    calls: BlockCalls,
    index: int,
    number: int,
    states: Tensor,
    layers: Sequence[Layer],
    held: AbstractContextManager[None],
) -> dict[str, Tensor]:
    """What layers of a block read of a batch, by name; those that are not reached are not in it."""
    with held, _watching(layers) as inputs, suppress(EnoughError):
        calls.call(index, number, states)
    return {name: one for name, (one, _) in inputs.items()}


@contextmanager
def _watching(layers: Sequence[Layer], *, whole: bool = False) -> Iterator[dict[str, tuple[Tensor, int]]]:
    """First inputs by layer, in the order of reading, with how often they had been changed in place by then.

    A forward pass ends where the last of the layers has read, or is whole.
    """
    inputs: dict[str, tuple[Tensor, int]] = {}

    def read(name: str, _: Module, args: tuple[Tensor, ...]) -> None:
        inputs.setdefault(name, (args[0], args[0]._version))
        if not whole and len(inputs) == len(layers):
            raise EnoughError  # all that were asked for have read

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.module.register_forward_pre_hook(partial(read, layer.name)))
        yield inputs
