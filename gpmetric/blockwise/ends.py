"""The end of a model, behind its last block: logits of a batch, cut where they would take too much memory."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gpmetric.blockwise.replay import BlockCalls
from gpmetric.errors import ModelError
from gpmetric.models import Model

__all__ = ["backward_of_loss", "ends", "logits_at_once"]

# Logits that are in memory together, 32 MiB in fp32 on a CPU; where those of one batch are more, it is cut. It changes
# the last bits of what is summed over it, and is therefore the same whatever memory there is.
_LOGITS = {"cpu": 2**23, "cuda": 2**27}


def ends(calls: BlockCalls, number: int, states: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits [predictions, vocabulary], fp32, of a batch and the tokens they predict, [predictions], part by part.

    A window's first token is not predicted. fp32: a half-precision log-softmax loses the third digit of the perplexity.

    Args:
        calls: of the batch.
        number: of the batch.
        states: [windows, length, width], what the last block gives.
    """
    batch = calls.batches[number]
    parts = _parts(calls, number)
    if len(parts) == 1:
        logits = calls.finish(number, states).logits[:, :-1]  # [windows, length - 1, vocabulary]
        yield logits.flatten(0, 1).float(), batch[:, 1:].flatten()
        return
    for kept in parts:
        logits = calls.finish(number, states, logits_to_keep=kept).logits  # [windows, kept, vocabulary]
        yield logits.flatten(0, 1).float(), batch[:, kept + 1].flatten()


def backward_of_loss(calls: BlockCalls, number: int, states: Tensor) -> None:
    """Adds to `states.grad` the gradient of the mean token loss of a batch, the model's own where that fits."""
    if len(_parts(calls, number)) == 1:
        try:
            loss = calls.finish(number, states, labels=calls.batches[number]).loss
        except ModelError:  # one that takes labels for images and texts together fails without images
            loss = None
        if loss is not None:
            loss.backward()
            return
    predictions = calls.batches[number][:, 1:].numel()
    for logits, labels in ends(calls, number, states):
        (cross_entropy(logits, labels, reduction="sum") / predictions).backward()


def logits_at_once(model: Model) -> int:
    """Entries of logits that are in memory together."""
    return _LOGITS.get(model.device.type, _LOGITS["cuda"])


def _parts(calls: BlockCalls, number: int) -> list[Tensor]:
    """Positions of a batch whose logits are taken together, by part."""
    model, batch = calls.model, calls.batches[number]
    length = batch.shape[1] - 1
    size = max(1, logits_at_once(model) // (len(batch) * model.vocabulary))
    may = "logits_to_keep" in inspect.signature(model.module.forward).parameters
    return list(torch.arange(length, device=batch.device).split(size if may and size <= length else length))
