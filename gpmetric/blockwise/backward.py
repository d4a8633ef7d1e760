"""Backward passes block by block: each block's is run on its own, from the last to the first.

Where all weights are resident, the graphs of a batch's blocks are kept from the forward pass. Elsewhere the inputs of
every block are put aside for all batches, and each block is run again before its backward pass, for one more forward
pass in all. The gradients are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from gpmetric.blockwise.replay import BlockCalls
from gpmetric.blockwise.shelf import Shelf
from gpmetric.placement import HEAD

__all__ = ["run_backward"]

Watch = Callable[[int], AbstractContextManager[object]]
Loss = Callable[[BlockCalls, int, Tensor], None]


def _unwatched(_: int) -> AbstractContextManager[object]:
    return nullcontext()


def run_backward(
    calls: BlockCalls,
    numbers: Sequence[int],
    loss: Loss,
    *,
    first: int = 0,
    shelf: Shelf | None = None,
    forward: Watch = _unwatched,
    backward: Watch = _unwatched,
    at_hand: Watch | None = None,
) -> Iterator[int]:
    """Runs batches forward and backward; yields the index of each block, from the last one, when its pass is over.

    Args:
        calls: of the batches.
        numbers: of those that are run.
        loss: (calls, number, states) adds the gradient of what is differentiated to `states.grad`.
        first: the first block whose gradients are wanted.
        shelf: takes the inputs of blocks, which are then run twice; None keeps their graphs.
        forward, backward: by block, the context in which it is run the first time, and in which its gradients come.
        at_hand: by block, the context in which it has its weights, `model.at_hand` by default.
    """
    model = calls.model
    at_hand = at_hand or model.at_hand
    hidden, gradients = _Aside("hidden", shelf, model.device), _Aside("gradients", shelf, model.device)
    graphs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for index in range(len(model.blocks)):
        with at_hand(index), forward(index):
            for number in numbers:
                before = hidden[number] if index else calls.hidden[number]
                entering = before.detach().requires_grad_(index > first)
                if shelf is None or index < first:
                    with torch.set_grad_enabled(index >= first):
                        leaving = calls.call(index, number, entering)
                    if index >= first:
                        graphs[index, number] = entering, leaving
                else:
                    shelf.put((index, number), {"states": entering.detach()})
                    with torch.no_grad():
                        leaving = calls.call(index, number, entering)
                hidden[number] = leaving.detach()
    with model.at_hand(HEAD):  # until the backward pass is over, not only in `finish`
        for number in numbers:
            states = hidden[number].requires_grad_()
            with torch.enable_grad():
                loss(calls, number, states)
            assert states.grad is not None
            gradients[number] = states.grad
            hidden.drop(number)
    for index in reversed(range(first, len(model.blocks))):
        with at_hand(index), backward(index):
            for number in numbers:
                if shelf is None:
                    entering, leaving = graphs.pop((index, number))
                else:
                    entering = shelf.get((index, number))["states"].to(model.device).requires_grad_(index > first)
                    shelf.drop((index, number))
                    with torch.enable_grad():
                        leaving = calls.call(index, number, entering)
                if leaving.requires_grad:  # otherwise the block has no weight that is watched, and nor had those before
                    torch.autograd.backward(leaving, gradients[number])
                if entering.grad is not None:
                    gradients[number] = entering.grad
        yield index


class _Aside:
    """A tensor for each batch: on the device, or on a shelf between two blocks."""

    def __init__(self, name: str, shelf: Shelf | None, device: torch.device) -> None:
        self._name, self._shelf, self._device = name, shelf, device
        self._here: dict[int, Tensor] = {}

    def __getitem__(self, number: int) -> Tensor:
        if self._shelf is None:
            return self._here[number]
        return self._shelf.get((self._name, number))["states"].to(self._device)

    def __setitem__(self, number: int, value: Tensor) -> None:
        if self._shelf is None:
            self._here[number] = value
        else:
            self._shelf.put((self._name, number), {"states": value})

    def drop(self, number: int) -> None:
        if self._shelf is None:
            del self._here[number]
        else:
            self._shelf.drop((self._name, number))
