"""Collects statistics of every prunable layer, asked for by operand name, in one pass over the calibration windows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import Module

from gpmetric.calibration.accumulators import (
    ACCUMULATORS,
    Accumulator,
    FromGradients,
    FromInputs,
    FromTokens,
    InputMoments,
    LayerStatistics,
)
from gpmetric.calibration.replay import BlockCalls
from gpmetric.errors import ModelError, SolverError
from gpmetric.models import Block, Layer, Model

__all__ = ["Accumulators", "Statistics", "collect", "collect_block", "collect_chunks", "token_batches"]

_BATCH_TOKENS = 2048  # tokens per forward pass without gradients; more only costs memory on a CPU

Accumulators = Mapping[str, FromInputs | FromGradients | FromTokens]


@dataclass(frozen=True)
class Statistics:
    """The measured statistics by layer name, and the sample they were measured on.

    `sequences` and `length` are part of the statistics because GBLM's two terms are balanced by them.
    """

    layers: dict[str, LayerStatistics]
    sequences: int
    length: int

    @property
    def names(self) -> frozenset[str]:
        """What was measured of every layer."""
        return frozenset(next(iter(self.layers.values())).values)


def token_batches(tokens: Tensor) -> list[Tensor]:
    """Windows [n, length] cut into batches of about 2,048 tokens."""
    return list(torch.split(tokens, max(1, _BATCH_TOKENS // tokens.shape[1])))


def collect(model: Model, tokens: Tensor, names: Collection[str], **options: Any) -> Statistics:
    """Statistics of the model as it is now, over calibration windows; arguments and errors as of `collect_chunks`."""
    chunks = collect_chunks(model, tokens, names, **options)
    return Statistics({name: one for chunk in chunks for name, one in chunk.items()}, *tokens.shape)


def collect_chunks(
    model: Model,
    tokens: Tensor,
    names: Collection[str],
    *,
    chunk_layers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    accumulators: Accumulators = ACCUMULATORS,
) -> Iterator[dict[str, LayerStatistics]]:
    """Statistics of the model as it is now, over calibration windows, one chunk of layers after the other.

    Nothing of a chunk is kept here, so that peak memory is that of one chunk, if its receiver lets go of it (and of the
    variable it is in) before asking for the next.

    Args:
        model: in evaluation mode; its weights are read, never changed.
        tokens: [sequences, length], int64.
        names: operands, and `gram` for the Gram matrices. X costs nothing and is always there. Gradients take one
            sequence per backward pass; without any, a forward pass is enough.
        chunk_layers: layers whose accumulators are held at once (all when None); each chunk is another pass over the
            text, and the result is the same.
        progress: called with (sequences done, sequences in all).
        accumulators: by name, how each is measured.

    Raises:
        ModelError: a layer is not reached by a text.
        SolverError: a Gram matrix has no inverse even after stronger damping.
    """
    size = chunk_layers or len(model.layers)
    chunks = [model.layers[start : start + size] for start in range(0, len(model.layers), size)]
    for index, chunk in enumerate(chunks):
        with _Watch(chunk, names, accumulators) as watch:
            run = _with_gradients if watch.needs_gradients else _forward_only
            for done in run(model, tokens):
                progress(index * len(tokens) + done, len(chunks) * len(tokens))
        yield {layer.name: watch.result(layer, len(tokens)) for layer in chunk}


def collect_block(
    calls: BlockCalls,
    index: int,
    block: Block,
    hidden: Sequence[Tensor],
    names: Collection[str],
    accumulators: Accumulators = ACCUMULATORS,
) -> dict[str, LayerStatistics]:
    """What inputs alone tell of one block's layers, `names` of X, D and the like, the block being replayed once."""
    known = [name for name in names if isinstance(accumulators[name], FromInputs)]
    with _Watch(block.layers, known, accumulators) as watch:
        calls.replay(index, block, hidden)
    return {layer.name: watch.result(layer, 0) for layer in block.layers}


def _forward_only(model: Model, tokens: Tensor) -> Iterator[int]:
    """Runs the model over the windows; yields how many are done."""
    done = 0
    for batch in token_batches(tokens):
        with torch.no_grad():
            model.module.base_model(input_ids=batch.to(model.device), use_cache=False)  # without the output layer
        done += len(batch)
        yield done


def _with_gradients(model: Model, tokens: Tensor) -> Iterator[int]:
    """The same with a backward pass for every window."""
    for done, window in enumerate(tokens, start=1):
        batch = window[None].to(model.device)  # [1, length]
        with torch.enable_grad():
            loss = model.module(input_ids=batch, labels=batch, use_cache=False).loss
        if loss.requires_grad:  # otherwise no layer was reached, which is refused when results are asked for
            loss.backward()
        yield done


class _Watch(AbstractContextManager["_Watch"]):
    """Accumulates what passes through some layers while its context is open.

    Args:
        layers: those watched.
        names: what is wanted of them.
        accumulators: by name, how each is measured.
    """

    def __init__(self, layers: Sequence[Layer], names: Collection[str], accumulators: Accumulators) -> None:
        rows = {name: row for name, row in accumulators.items() if name in names or name == "X"}
        self._hooks = ExitStack()
        self._layers = layers
        self._read = {name: row for name, row in rows.items() if isinstance(row, FromInputs)}
        self._gradients = {name: row.start for name, row in rows.items() if isinstance(row, FromGradients)}
        self._tokens = {name: row.start for name, row in rows.items() if isinstance(row, FromTokens)}
        self.needs_gradients = bool(self._gradients or self._tokens)
        self._moments: dict[str, InputMoments] = {}
        self._accumulated: dict[str, dict[str, Accumulator]] = {}

    def __enter__(self) -> Self:
        pairs = any(row.pairs for row in self._read.values())
        for layer in self._layers:
            shape, device = layer.weight.shape, layer.weight.device
            self._moments[layer.name] = InputMoments(shape[1], device, gram=pairs)
            by_gradient = {name: start(shape, device) for name, start in self._gradients.items()}
            by_token = {name: start(shape, device) for name, start in self._tokens.items()}
            self._accumulated[layer.name] = {**by_gradient, **by_token}
            self._hooks.enter_context(layer.module.register_forward_pre_hook(partial(self._see_inputs, layer)))
            if by_token:
                watch = partial(_see_tokens, list(by_token.values()))
                self._hooks.enter_context(layer.module.register_forward_hook(watch))
            if self.needs_gradients:
                self._hooks.enter_context(_gradients_of(layer, list(by_gradient.values())))
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def result(self, layer: Layer, sequences: int) -> LayerStatistics:
        """What was asked for of one layer, over so many sequences."""
        moments = self._moments.pop(layer.name)
        if not moments.tokens:
            raise ModelError(f"layer {layer.name} is not reached by a text, so it cannot be calibrated (--exclude)")
        try:
            found = {name: row.read(moments) for name, row in self._read.items()}
        except SolverError as error:
            raise SolverError(f"layer {layer.name}: {error}") from error
        accumulated = self._accumulated.pop(layer.name)
        return LayerStatistics(**found, **{name: one.result(sequences) for name, one in accumulated.items()})

    def _see_inputs(self, layer: Layer, _: Module, args: tuple[Tensor, ...]) -> None:
        self._moments[layer.name].add(args[0])


@contextmanager
def _gradients_of(layer: Layer, accumulators: Sequence[Accumulator]) -> Iterator[None]:
    """Gives a layer's gradients to accumulators and frees each as soon as autograd has finished it."""

    def take(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = layer.oriented(parameter.grad).float()
        for accumulator in accumulators:
            accumulator.add(gradient)
        parameter.grad = None

    layer.parameter.requires_grad_(True)
    try:
        with layer.parameter.register_post_accumulate_grad_hook(take):
            yield
    finally:
        layer.parameter.requires_grad_(False)


def _see_tokens(accumulators: Sequence[Accumulator], _: Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    """A layer's forward hook: its inputs with the gradients of its outputs, as soon as autograd has them."""

    def take(gradients: Tensor) -> None:
        for accumulator in accumulators:
            accumulator.add(args[0].detach(), gradients)

    if output.requires_grad:
        output.register_hook(take)
