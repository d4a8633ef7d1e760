"""Perplexity on contiguous, non-overlapping token windows: `gpmetric evaluate MODEL --text FILE`."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, nll_loss

from gpmetric.models import Model

__all__ = ["Teacher", "batches", "mean_loss", "perplexity"]

_BATCH_TOKENS = 2048


@torch.no_grad()
def mean_loss(model: Model, tokens: Tensor) -> float:
    """Mean negative log-likelihood in nats over the length - 1 predictions of each window.

    Args:
        model: in evaluation mode.
        tokens: [windows, length], int64; windows do not see each other.

    Returns:
        The mean, or infinity when the model's losses are not finite (a model pruned to death).
    """
    total = 0.0
    for batch in batches(model, tokens):
        # fp32: a half-precision log-softmax loses the third digit of the perplexity
        loss = cross_entropy(_logits(model, batch), batch[:, 1:].flatten(), reduction="sum")
        total += loss.item()
    mean = total / (len(tokens) * (tokens.shape[1] - 1))
    return mean if math.isfinite(mean) else math.inf


class Teacher:
    """A model's predictions on a batch of windows, kept in fp16 for a pruned copy to be compared with.

    Args:
        model: the dense model.
        batch: [windows, length], int64, on its device.
    """

    def __init__(self, model: Model, batch: Tensor) -> None:
        self._batch = batch
        log_probabilities = log_softmax(_logits(model, batch), dim=1)  # [windows * (length - 1), vocabulary]
        self._loss = nll_loss(log_probabilities, batch[:, 1:].flatten(), reduction="sum").item()
        self._expected = log_probabilities.half()

    @property
    def predictions(self) -> int:
        """Tokens predicted in the batch."""
        return len(self._expected)

    @property
    def bytes(self) -> int:
        """Memory the predictions take."""
        return self._expected.nbytes

    @torch.no_grad()
    def compare(self, model: Model) -> Tensor:
        """[2]: excess log-loss and divergence KL(teacher || model), summed over predictions, in nats, fp64."""
        log_probabilities = log_softmax(_logits(model, self._batch), dim=1)
        loss = nll_loss(log_probabilities, self._batch[:, 1:].flatten(), reduction="sum").item()
        divergence = kl_div(log_probabilities, self._expected.float(), reduction="sum", log_target=True).item()
        return torch.tensor([loss - self._loss, divergence], dtype=torch.float64)


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats; infinity beyond the range of a double."""
    return math.exp(loss) if loss < 700 else math.inf


def batches(model: Model, tokens: Tensor) -> Iterator[Tensor]:
    """The windows [windows, length] in batches that fit into one forward pass, on the model's device."""
    for batch in tokens.split(max(1, _BATCH_TOKENS // tokens.shape[1])):
        yield batch.to(model.device)


def _logits(model: Model, batch: Tensor) -> Tensor:
    """[windows * (length - 1), vocabulary], fp32: the predictions of every token but the first of each window."""
    logits: Tensor = model.module(input_ids=batch, use_cache=False).logits[:, :-1]  # [windows, length - 1, vocabulary]
    return logits.flatten(0, 1).float()
