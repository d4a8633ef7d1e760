"""Gradients of the norm of a block's own output: what one block alone tells of its weights, with no loss at hand."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from gpmetric.blockwise.replay import BlockCalls
from gpmetric.calibration.accumulators import ACCUMULATORS, Accumulator, FromRegion
from gpmetric.calibration.siblings import lend
from gpmetric.models import Layer

__all__ = ["collect_regional", "gradients_of"]


def collect_regional(
    calls: BlockCalls,
    index: int,
    hidden: Iterable[Tensor],
    names: Collection[str],
    rows: Mapping[str, object] = ACCUMULATORS,
) -> dict[str, dict[str, Tensor]]:
    """By layer of a block, which is at hand, what gradients of its regional loss tell: `names` of R and the like.

    The regional loss of a sequence is ||f(X)||_2, over all tokens and features of what the block f makes of its hidden
    states X. Each takes a forward and a backward pass through the block, so that the graph of one sequence in one block
    is in memory, and one layer's gradient.

    Args:
        calls: how the model calls its blocks.
        index: of the block; its weights are those that it has now.
        hidden: [batch, length, width] each, what it reads, batch by batch.
        names: of statistics; what is not regional is not looked at.
        rows: by name, how each is measured.
    """
    starts = {name: row.start for name, row in rows.items() if name in names and isinstance(row, FromRegion)}
    layers = calls.model.blocks[index].layers
    found = {
        layer.name: {name: start(layer.weight.shape, layer.weight.device) for name, start in starts.items()}
        for layer in layers
    }
    sequences = 0
    with ExitStack() as stack:
        for layer in layers if starts else ():
            stack.enter_context(gradients_of(layer, list(found[layer.name].values())))
        for batch in hidden if starts else ():
            for states in batch.split(1):
                _pass_region(calls.alone, index, sequences, states)
                sequences += 1
    results = {layer: {name: one.result(sequences) for name, one in of.items()} for layer, of in found.items()}
    lend(results, layers)
    return results


@torch.enable_grad()
def _pass_region(calls: BlockCalls, index: int, number: int, states: Tensor) -> None:
    """A sequence's forward and backward pass; nothing is left of its graph."""
    norm = calls.call(index, number, states.detach()).float().norm()
    if norm.requires_grad:  # otherwise no layer is reached, which is told when inputs are read
        norm.backward()


@contextmanager
def gradients_of(layer: Layer, accumulators: Sequence[Accumulator]) -> Iterator[None]:
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
        layer.parameter.grad = None  # an interrupt may have left one
