"""Collects statistics of every prunable layer, asked for by operand name, in one pass over the calibration windows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import Module

from gpmetric.blockwise.backward import run_backward
from gpmetric.blockwise.ends import backward_of_loss
from gpmetric.blockwise.hidden import Hidden
from gpmetric.blockwise.replay import BlockCalls, record_calls
from gpmetric.blockwise.shelf import Shelf
from gpmetric.calibration.accumulators import (
    ACCUMULATORS,
    Accumulator,
    FromGradients,
    FromInputs,
    FromRegion,
    FromTokens,
    InputMoments,
    LayerStatistics,
    functions_of,
)
from gpmetric.calibration.regional import collect_regional, gradients_of
from gpmetric.calibration.siblings import Siblings, families
from gpmetric.experts import expert_family
from gpmetric.models import Layer, Model
from gpmetric.placement import BATCH_TOKENS

__all__ = [
    "Accumulators",
    "Statistics",
    "collect",
    "collect_block",
    "collect_blocks",
    "count_tokens",
    "needs_pairs",
    "token_batches",
]

_Progress = Callable[[int, int], None]
Accumulators = Mapping[str, FromInputs | FromGradients | FromTokens | FromRegion]


@dataclass(frozen=True)
class Statistics:
    """The measured statistics by layer name, and the sample they were measured on.

    `sequences` and `length` are part of the statistics because GBLM's two terms are balanced by them.
    """

    layers: Mapping[str, LayerStatistics]
    sequences: int
    length: int

    @property
    def names(self) -> frozenset[str]:
        """What was measured of every layer."""
        return frozenset(next(iter(self.layers.values())).values)


def token_batches(tokens: Tensor, size: int = BATCH_TOKENS) -> list[Tensor]:
    """Windows [n, length] cut into batches of about so many tokens."""
    return list(torch.split(tokens, max(1, size // tokens.shape[1])))


def collect(model: Model, tokens: Tensor, names: Collection[str], **options: Any) -> Statistics:
    """Statistics of the model as it is now, over calibration windows; arguments and errors as of `collect_blocks`."""
    found = {name: one for block in collect_blocks(model, tokens, names, **options) for name, one in block.items()}
    return Statistics({layer.name: found[layer.name] for layer in model.layers}, *tokens.shape)


def collect_blocks(
    model: Model,
    tokens: Tensor,
    names: Collection[str],
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    accumulators: Accumulators = ACCUMULATORS,
    at_once: bool = True,
    room: int | None = None,
) -> Iterator[dict[str, LayerStatistics]]:
    """Statistics of the model as it is now, over calibration windows, block by block, those of gradients from the last.

    Nothing of a block is kept here once its receiver has let go of it (and of the variable it is in), but for gradients
    that are accumulated at once.

    Args:
        model: in evaluation mode; its weights are read, never changed.
        tokens: [sequences, length], int64.
        names: operands, and `gram` for the Gram matrices. X costs nothing and is always there. Gradients take one
            sequence per backward pass; without any, a forward pass is enough. Regional ones take a walk of their own
            beside them.
        progress: called with (steps done, steps in all); a step is a block's pass over all windows, or a window's over
            all blocks.
        accumulators: by name, how each is measured.
        at_once: whether gradients of all layers are accumulated together, in one forward and one backward pass; else
            those of one block at a time, for one more forward pass.
        room: bytes of inputs of blocks that are kept in memory for the backward pass; beyond, they go to disk.

    Raises:
        ModelError: a layer is not reached by a text.
        SolverError: a Gram matrix has no inverse even after stronger damping.
    """
    rows = {name: row for name, row in accumulators.items() if name in names or name == "X"}
    if not any(isinstance(row, FromGradients | FromTokens) for row in rows.values()):
        return _from_inputs(model, tokens, rows, progress, room)
    regional = {name: row for name, row in rows.items() if isinstance(row, FromRegion)}
    if regional:
        return _with_regional(model, tokens, rows, regional, progress, at_once, room)
    if at_once and model.resident:
        return _at_once(model, tokens, rows, progress)
    return _block_by_block(model, tokens, rows, progress, room)


def count_tokens(
    model: Model, tokens: Tensor, room: int | None = None, progress: _Progress = lambda done, total: None
) -> dict[str, int]:
    """How many of the tokens [sequences, length] each layer of a mixture's experts reads, by its name."""
    rows = {name: row for name, row in ACCUMULATORS.items() if name == "X"}
    layers = {layer.name for layer in model.layers if expert_family(layer.name)}
    found: dict[str, int] = {}
    for block in _from_inputs(model, tokens, rows, progress, room):
        found |= {name: one.tokens or 0 for name, one in block.items() if name in layers}
    return found


def needs_pairs(names: Collection[str]) -> bool:
    """Whether statistics are made of Gram matrices."""
    rows = (ACCUMULATORS.get(name) for name in names)
    return any(row.pairs for row in rows if isinstance(row, FromInputs))


def collect_block(
    calls: BlockCalls,
    index: int,
    hidden: Iterable[Tensor],
    names: Collection[str],
    accumulators: Accumulators = ACCUMULATORS,
) -> dict[str, LayerStatistics]:
    """What a block alone tells of its layers: `names` of X, D and the like, and of R.

    The block is replayed once, and for R once more, forward and back.

    Args:
        calls: how the model calls its blocks.
        index: of the block, which is at hand.
        hidden: [batch, length, width] each, what it reads; iterated over once or twice.
        names: of statistics; of others nothing is collected.
        accumulators: by name, how each is measured.
    """
    rows = {name: row for name, row in accumulators.items() if name in names or name == "X"}
    layers = calls.model.blocks[index].layers
    regional = collect_regional(calls, index, hidden, names, accumulators)
    with _Watch(layers, {name: row for name, row in rows.items() if isinstance(row, FromInputs)}) as watch:
        for number, states in enumerate(hidden):
            calls.call(index, number, states)
    return {layer.name: _joined(watch.result(layer, 0), regional[layer.name]) for layer in layers}


def _joined(statistics: LayerStatistics, others: Mapping[str, Tensor]) -> LayerStatistics:
    return statistics.joined(others)


_Blocks = Iterator[dict[str, LayerStatistics]]


def _from_inputs(model: Model, tokens: Tensor, rows: Accumulators, progress: _Progress, room: int | None) -> _Blocks:
    progress(0, len(model.blocks))
    shelf = Shelf(room, None if room is None else torch.device("cpu"))
    hidden = Hidden(record_calls(model, token_batches(tokens, model.batch_tokens), shelf), shelf)
    if any(isinstance(row, FromRegion) for row in rows.values()):
        _ = hidden.calls.alone  # before a block is at hand
    for index, block in enumerate(model.blocks):
        # not around the generator: torch's wrapper of one keeps what it gave until the next is made
        with torch.no_grad(), model.at_hand(index):
            regional = collect_regional(hidden.calls, index, hidden, rows, rows)
            with _Watch(block.layers, rows) as watch:
                hidden.advance(index)
        progress(index + 1, len(model.blocks))
        yield {
            layer.name: _joined(watch.result(layer, len(tokens)), regional.pop(layer.name)) for layer in block.layers
        }


def _with_regional(
    model: Model,
    tokens: Tensor,
    rows: Accumulators,
    regional: Accumulators,
    progress: _Progress,
    at_once: bool,
    room: int | None,
) -> _Blocks:
    """Regional gradients in a forward walk, put aside until the backward pass of the others comes to their block."""
    others = {name: row for name, row in rows.items() if name not in regional}
    at_once = at_once and model.resident
    first = len(model.blocks)
    steps = first + (len(tokens) if at_once else 2 * first)
    with Shelf(None if at_once else room, None if at_once else torch.device("cpu")) as shelf:
        for block in _from_inputs(model, tokens, regional, lambda done, _: progress(done, steps), room):
            for name in list(block):
                shelf.put(name, block.pop(name).values)

        def told(done: int, _: int) -> None:
            if done:  # one bar for both walks
                progress(first + done, steps)

        rest = _at_once(model, tokens, others, told) if at_once else _block_by_block(model, tokens, others, told, room)
        for block in rest:
            for name in block:
                aside = _moved(shelf.get(name), model.device)
                shelf.drop(name)
                block[name] = _joined(block[name], aside)
            yield block
            del block  # or it would be kept here while the next is made


def _at_once(model: Model, tokens: Tensor, rows: Accumulators, progress: _Progress) -> _Blocks:
    """A forward and a backward pass for every window, through all blocks."""
    progress(0, len(tokens))
    with _Watch(model.layers, rows) as watch:
        for done, window in enumerate(tokens, start=1):
            _pass_window(model, window)
            progress(done, len(tokens))
    for block in model.blocks:
        yield {layer.name: watch.result(layer, len(tokens)) for layer in block.layers}


@torch.enable_grad()
def _pass_window(model: Model, window: Tensor) -> None:
    """A window's forward and backward pass; nothing is left of its graph, whose hooks hold accumulators."""
    calls = record_calls(model, [window[None]])
    states = calls.hidden[0]
    # one graph of all blocks: with one for each, a window of 64 tokens takes a tenth longer (demo, one thread)
    for index in range(len(model.blocks)):
        states = calls.call(index, 0, states)
    end = states.detach().requires_grad_()
    backward_of_loss(calls, 0, end)
    if states.requires_grad:  # otherwise no layer is reached, which is told when the results are read
        states.backward(end.grad)


def _block_by_block(model: Model, tokens: Tensor, rows: Accumulators, progress: _Progress, room: int | None) -> _Blocks:
    """All windows through one block after the other, forward and back; of gradients, one block's at a time."""
    from_inputs = {name: row for name, row in rows.items() if isinstance(row, FromInputs)}
    others = {name: row for name, row in rows.items() if name not in from_inputs}
    steps = 2 * len(model.blocks)
    progress(0, steps)
    watches: dict[int, _Watch] = {}
    read: dict[str, tuple[int | None, tuple[str, ...]]] = {}

    @contextmanager
    def forward(index: int) -> Iterator[None]:
        with _Watch(model.blocks[index].layers, from_inputs) as watch:
            yield
        for layer in model.blocks[index].layers:
            seen = watch.result(layer, len(tokens))
            read[layer.name] = seen.tokens, seen.borrowed
            inputs.put(layer.name, seen.values)
        progress(index + 1, steps)

    def backward(index: int) -> _Watch:
        watches[index] = _Watch(model.blocks[index].layers, others)
        return watches[index]

    def result(layer: Layer, watch: _Watch) -> LayerStatistics:
        seen = _moved(inputs.get(layer.name), model.device)
        inputs.drop(layer.name)
        known, borrowed = read.pop(layer.name)
        found = watch.result(layer, len(tokens))
        return found.joined(seen).told(known, [*borrowed, *found.borrowed])

    host = torch.device("cpu")
    with Shelf(room, host) as shelf, Shelf(room, host) as inputs:
        calls = record_calls(model, list(tokens[:, None]), shelf)
        passes = run_backward(
            calls, range(len(tokens)), backward_of_loss, first=_first_watched(model), shelf=shelf, forward=forward,
            backward=backward,
        )  # fmt: skip
        for index in passes:
            progress(steps - index, steps)
            watch = watches.pop(index)
            yield {layer.name: result(layer, watch) for layer in model.blocks[index].layers}


def _moved(values: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in values.items()}


def _first_watched(model: Model) -> int:
    """The first block that has layers to prune: gradients go no further back."""
    return next(index for index, block in enumerate(model.blocks) if block.layers)


class _Watch(AbstractContextManager["_Watch"]):
    """Accumulates what passes through some layers while its context is open.

    Args:
        layers: those watched.
        rows: by name, how what is wanted of them is measured.
    """

    def __init__(self, layers: Sequence[Layer], rows: Accumulators) -> None:
        self._hooks = ExitStack()
        self._layers = layers
        self._read = {name: row for name, row in rows.items() if isinstance(row, FromInputs)}
        self._gradients = {name: row.start for name, row in rows.items() if isinstance(row, FromGradients)}
        self._tokens = {name: row.start for name, row in rows.items() if isinstance(row, FromTokens)}
        self._tokens_read = dict.fromkeys((layer.name for layer in layers), 0)
        self._families: dict[str, Siblings] = {}
        self._moments: dict[str, InputMoments] = {}
        self._accumulated: dict[str, dict[str, Accumulator]] = {}

    def __enter__(self) -> Self:
        pairs = any(row.pairs for row in self._read.values())
        functions = functions_of(self._read)
        for layer in self._layers:
            shape, device = layer.weight.shape, layer.weight.device
            self._moments[layer.name] = InputMoments(shape[1], device, gram=pairs, functions=functions)
            by_gradient = {name: start(shape, device) for name, start in self._gradients.items()}
            by_token = {name: start(shape, device) for name, start in self._tokens.items()}
            self._accumulated[layer.name] = {**by_gradient, **by_token}
            self._hooks.enter_context(layer.module.register_forward_pre_hook(partial(self._see_inputs, layer)))
            if by_token:
                watch = partial(_see_tokens, list(by_token.values()))
                self._hooks.enter_context(layer.module.register_forward_hook(watch))
            if self._gradients or self._tokens:
                self._hooks.enter_context(gradients_of(layer, list(by_gradient.values())))
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def result(self, layer: Layer, sequences: int) -> LayerStatistics:
        """What was asked for of one layer, over so many sequences; what is accumulated is let go of with its family."""
        if layer.name not in self._families:
            family = next(one for one in families(self._layers) if any(other is layer for other in one))
            self._families |= dict.fromkeys([one.name for one in family], Siblings(family, self._tokens_read))
        siblings = self._families.pop(layer.name)
        found = siblings.read(layer, self._read, self._moments, self._accumulated, sequences)
        if siblings not in self._families.values():
            for name in siblings.names:
                del self._moments[name], self._accumulated[name]
        return found

    def _see_inputs(self, layer: Layer, _: Module, args: tuple[Tensor, ...]) -> None:
        self._tokens_read[layer.name] += args[0].numel() // args[0].shape[-1]
        if self._read:
            self._moments[layer.name].add(args[0])


def _see_tokens(accumulators: Sequence[Accumulator], _: Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    """A layer's forward hook: its inputs with the gradients of its outputs, as soon as autograd has them."""

    def take(gradients: Tensor) -> None:
        for accumulator in accumulators:
            accumulator.add(args[0].detach(), gradients)

    if output.requires_grad:
        output.register_hook(take)
