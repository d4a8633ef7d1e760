"""Perplexity on contiguous, non-overlapping token windows: `gpmetric evaluate MODEL --text FILE`."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gpmetric.models import Model

__all__ = ["mean_loss", "perplexity"]

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
    for batch in tokens.split(max(1, _BATCH_TOKENS // tokens.shape[1])):
        inputs = batch.to(model.device)
        logits = model.module(input_ids=inputs, use_cache=False).logits[:, :-1]  # [batch, length - 1, vocabulary]
        # fp32: a half-precision log-softmax loses the third digit of the perplexity
        loss = cross_entropy(logits.flatten(0, 1).float(), inputs[:, 1:].flatten(), reduction="sum")
        total += loss.item()
    mean = total / (len(tokens) * (tokens.shape[1] - 1))
    return mean if math.isfinite(mean) else math.inf


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats; infinity beyond the range of a double."""
    return math.exp(loss) if loss < 700 else math.inf
