"""Collects the operands X, G, H, D and F of every prunable layer in one pass over the calibration windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import Module

from gpmetric.calibration.accumulators import (
    GradientMoments,
    InputMoments,
    LayerStatistics,
    TokenMoments,
    curvature,
)
from gpmetric.calibration.replay import BlockCalls
from gpmetric.errors import ModelError, SolverError
from gpmetric.models import Block, Layer, Model

__all__ = ["Statistics", "collect_block", "collect_chunks", "collect_statistics", "token_batches"]

_BATCH_TOKENS = 2048  # tokens per forward pass without gradients; more only costs memory on a CPU


@dataclass(frozen=True)
class Statistics:
    """The measured operands by layer name, and the sample they were measured on.

    `sequences` and `length` are part of the statistics because GBLM's two terms are balanced by them.
    """

    layers: dict[str, LayerStatistics]
    sequences: int
    length: int


def token_batches(tokens: Tensor) -> list[Tensor]:
    """Windows [n, length] cut into batches of about 2,048 tokens."""
    return list(tokens.split(max(1, _BATCH_TOKENS // tokens.shape[1])))


def collect_statistics(
    model: Model,
    tokens: Tensor,
    *,
    gradients: bool = True,
    fisher: bool = False,
    gram: bool = True,
    chunk_layers: int | None = None,
    accumulated: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Statistics:
    """Statistics of the model as it is now, over calibration windows.

    Args:
        model: in evaluation mode; its weights are read, never changed.
        tokens: [sequences, length], int64.
        gradients: collect G and H, one sequence per backward pass; otherwise a forward pass is enough.
        fisher: collect F with them, which takes as much memory as either.
        gram: keep the Gram matrices and derive D.
        chunk_layers: layers whose accumulators are held at once (all when None); each chunk is another pass over the
            text, and the result is the same.
        accumulated: H as the square of the mean gradient (see GradientMoments).
        progress: called with (sequences done, sequences in all).

    Raises:
        ModelError: a layer is not reached by a text.
        SolverError: a Gram matrix has no inverse even after stronger damping.
    """
    chunks = collect_chunks(
        model,
        tokens,
        gradients=gradients,
        fisher=fisher,
        gram=gram,
        chunk_layers=chunk_layers,
        accumulated=accumulated,
        progress=progress,
    )
    found: dict[str, LayerStatistics] = {}
    for chunk in chunks:
        found |= chunk
    return Statistics(found, sequences=len(tokens), length=tokens.shape[1])


def collect_chunks(
    model: Model,
    tokens: Tensor,
    *,
    gradients: bool = True,
    fisher: bool = False,
    gram: bool = True,
    chunk_layers: int | None = None,
    accumulated: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[dict[str, LayerStatistics]]:
    """What `collect_statistics` collects, from the same arguments, one chunk of layers after the other.

    Nothing of a chunk is kept here, so that peak memory is that of one chunk, if its receiver lets go of it (and of the
    variable it is in) before asking for the next.
    """
    size = chunk_layers or len(model.layers)
    chunks = [model.layers[start : start + size] for start in range(0, len(model.layers), size)]
    for index, chunk in enumerate(chunks):
        before, total = index * len(tokens), len(chunks) * len(tokens)

        def report(done: int, _: int, before: int = before, total: int = total) -> None:
            progress(before + done, total)

        if gradients:
            yield _with_gradients(model, chunk, tokens, fisher, gram, accumulated, report)
        else:
            yield _forward_only(model, chunk, tokens, gram, report)


def collect_block(
    calls: BlockCalls, index: int, block: Block, hidden: Sequence[Tensor], *, gram: bool
) -> dict[str, LayerStatistics]:
    """X (and D) of one block's layers on the given inputs, the block being replayed once, unchanged."""
    with _watch_inputs(block.layers, gram) as moments:
        calls.replay(index, block, hidden)
    return {layer.name: _statistics(layer, moments[layer.name]) for layer in block.layers}


@torch.no_grad()
def _forward_only(
    model: Model, layers: Sequence[Layer], tokens: Tensor, gram: bool, progress: Callable[[int, int], None]
) -> dict[str, LayerStatistics]:
    done = 0
    with _watch_inputs(layers, gram) as moments:
        for batch in token_batches(tokens):
            model.module.base_model(input_ids=batch.to(model.device), use_cache=False)  # without the output layer
            done += len(batch)
            progress(done, len(tokens))
    return {layer.name: _statistics(layer, moments[layer.name]) for layer in layers}


def _with_gradients(
    model: Model,
    layers: Sequence[Layer],
    tokens: Tensor,
    fisher: bool,
    gram: bool,
    accumulated: bool,
    progress: Callable[[int, int], None],
) -> dict[str, LayerStatistics]:
    with (
        _watch_inputs(layers, gram) as moments,
        _watch_gradients(layers, accumulated) as gradients,
        _watch_tokens(layers if fisher else ()) as by_token,
    ):
        for done, window in enumerate(tokens, start=1):
            batch = window[None].to(model.device)  # [1, length]
            with torch.enable_grad():
                loss = model.module(input_ids=batch, labels=batch, use_cache=False).loss
            if loss.requires_grad:  # otherwise no layer was reached, which is refused below
                loss.backward()
            progress(done, len(tokens))
    found = {}
    for layer in layers:
        G, H = gradients[layer.name].result()
        F = by_token[layer.name].result(len(tokens)) if fisher else None
        found[layer.name] = replace(_statistics(layer, moments[layer.name]), G=G, H=H, F=F)
    return found


def _statistics(layer: Layer, moments: InputMoments) -> LayerStatistics:
    """X, D and the Gram matrix."""
    if not moments.tokens:
        raise ModelError(f"layer {layer.name} is not reached by a text, so it cannot be calibrated (--exclude)")
    gram = moments.gram()
    try:
        return LayerStatistics(moments.rms(), None if gram is None else curvature(gram), gram=gram)
    except SolverError as error:
        raise SolverError(f"layer {layer.name}: {error}") from error


@contextmanager
def _watch_inputs(layers: Sequence[Layer], gram: bool) -> Iterator[dict[str, InputMoments]]:
    """Input moments by layer name, gathered by forward pre-hooks while the context is open."""
    moments = {layer.name: InputMoments(layer.weight.shape[1], layer.weight.device, gram=gram) for layer in layers}

    def watch(name: str, _: Module, args: tuple[Tensor, ...]) -> None:
        moments[name].add(args[0])

    with ExitStack() as hooks:  # a hook's handle removes it on exit
        for layer in layers:
            hooks.enter_context(layer.module.register_forward_pre_hook(partial(watch, layer.name)))
        yield moments


@contextmanager
def _watch_gradients(layers: Sequence[Layer], accumulated: bool) -> Iterator[dict[str, GradientMoments]]:
    """Gradient moments by layer name; a gradient is added and freed as soon as autograd has finished it."""
    moments = {
        layer.name: GradientMoments(layer.weight.shape, layer.weight.device, accumulated=accumulated)
        for layer in layers
    }

    def take(layer: Layer, parameter: Tensor) -> None:
        assert parameter.grad is not None
        moments[layer.name].add(layer.oriented(parameter.grad))
        parameter.grad = None

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.parameter.requires_grad_, False)
            layer.parameter.requires_grad_(True)
            hooks.enter_context(layer.parameter.register_post_accumulate_grad_hook(partial(take, layer)))
        yield moments


@contextmanager
def _watch_tokens(layers: Sequence[Layer]) -> Iterator[dict[str, TokenMoments]]:
    """Token moments by layer name, gathered as autograd reaches each layer's output while the context is open."""
    moments = {layer.name: TokenMoments(layer.weight.shape, layer.weight.device) for layer in layers}

    def watch(name: str, _: Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(moments[name].add, args[0].detach()))

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.module.register_forward_hook(partial(watch, layer.name)))
        yield moments
