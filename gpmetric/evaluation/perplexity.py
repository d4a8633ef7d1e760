"""Perplexity on contiguous, non-overlapping token windows: `gpmetric evaluate MODEL --text FILE`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, nll_loss

from gpmetric.blockwise.ends import ends
from gpmetric.blockwise.replay import BlockCalls, record_calls
from gpmetric.models import Model
from gpmetric.placement import HEAD

__all__ = [
    "DenseLoss", "Teacher", "batches", "mean_loss", "mean_of", "perplexity", "predictions", "run_blocks", "sum_loss",
]  # fmt: skip

# Logits of a batch, 16 MiB in fp32: from 32 MiB on, glibc maps every temporary anew. Windows of 256 tokens, vocabulary
# 4,096, 64 wide, one AMD EPYC thread, Teacher.compare per window: 12.0 ms user and 0.1 ms system by 4 windows, 12.9 and
# 7.0 ms by 8.
_BATCH_LOGITS = 2**22

# Logits of a CPU that are gone over at once, 1 MiB in fp32: what is read again is in the cache by then. Teacher.compare
# of 1,020 predictions, vocabulary 4,096, one Intel Xeon thread: 7.6 ms for 16.7 ms at once.
_CACHED = 2**18

AtHand = Callable[[int], AbstractContextManager[object]]
Told = Callable[[int, int], None]  # done, in all


@torch.no_grad()
def mean_loss(
    model: Model, tokens: Tensor, at_hand: AtHand | None = None, told: Told = lambda done, total: None
) -> float:
    """Mean negative log-likelihood in nats over the length - 1 predictions of each window.

    Args:
        model: in evaluation mode; where its weights are not resident, they are read once for all windows.
        tokens: [windows, length], int64; windows do not see each other.
        at_hand: by block, the context that it is run in, `model.at_hand` by default; another may hold other weights.
        told: of windows, by how many blocks they have passed, and how many they are to pass in all.

    Returns:
        The mean, or infinity when the model's losses are not finite (a model pruned to death).
    """
    total, done, windows = 0.0, 0, 0

    def passed() -> None:
        nonlocal done
        done += windows
        told(done, len(model.blocks) * len(tokens))

    told(0, len(model.blocks) * len(tokens))
    for group in _groups(model, tokens):
        calls, windows = record_calls(model, group), sum(map(len, group))
        total += sum_loss(calls, run_blocks(calls, at_hand, passed))
    return mean_of(total, tokens)


def _groups(model: Model, tokens: Tensor) -> Iterator[list[Tensor]]:
    """Batches that pass through the blocks together: one where weights are resident, else as many as there is room."""
    width = model.module.get_input_embeddings().weight.shape[1]
    placement = model.placement
    room = 0 if placement is None or placement.resident else placement.room
    group: list[Tensor] = []
    for batch in batches(model, tokens):
        together = 2 * 4 * width * sum(one.numel() for one in (*group, batch))
        if group and room is not None and together > room:
            yield group
            group = []
        group.append(batch)
    yield group


def run_blocks(
    calls: BlockCalls, at_hand: AtHand | None = None, passed: Callable[[], None] = lambda: None
) -> Sequence[Tensor]:
    """What the last block gives for every batch; `passed` is called behind each block."""
    hidden: Sequence[Tensor] = calls.hidden
    for index in range(len(calls.model.blocks)):
        with (at_hand or calls.model.at_hand)(index):
            hidden = calls.replay(index, hidden)
        passed()
    return hidden


@torch.no_grad()
def sum_loss(calls: BlockCalls, hidden: Iterable[Tensor]) -> float:
    """Negative log-likelihood in nats, summed over the predictions of all batches.

    Args:
        calls: of the batches.
        hidden: by batch, what the last block gives.
    """
    total = 0.0
    with calls.model.at_hand(HEAD):
        for number, states in enumerate(hidden):
            for logits, labels in ends(calls, number, states):
                total += _summed(nll_loss(part, its, reduction="none") for part, its in _log_softmax(logits, labels))
    return total


def mean_of(total: float, tokens: Tensor) -> float:
    """The mean loss of windows [windows, length] whose losses sum up to so much."""
    mean = total / (len(tokens) * (tokens.shape[1] - 1))
    return mean if math.isfinite(mean) else math.inf


def predictions(model: Model, batch: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """What `ends` gives of one batch [windows, length] on the model's device; with gradients where they are on."""
    calls = record_calls(model, [batch])
    (states,) = run_blocks(calls)
    yield from ends(calls, 0, states)


class Teacher:
    """A model's predictions, kept in fp16 for those of a pruned copy to be compared with.

    Args:
        logits: [predictions, vocabulary], fp32, of the dense model.
        labels: [predictions], the tokens that followed.
    """

    def __init__(self, logits: Tensor, labels: Tensor) -> None:
        self._labels = labels
        losses, expected = [], []
        for part, its in _log_softmax(logits, labels):
            losses.append(nll_loss(part, its, reduction="none"))
            expected.append(part.exp_().half())
        self._loss, self._expected = _summed(losses), torch.cat(expected)
        self.predictions = len(self._expected)
        self.bytes = self._expected.nbytes
        self._entropy = -torch.special.xlogy(self._expected.float(), self._expected.float()).sum().item()

    @torch.no_grad()
    def compare(self, logits: Tensor) -> Tensor:
        """[2]: excess log-loss and divergence KL(teacher || model), summed over predictions, in nats, fp64."""
        losses, crossed = [], []
        for part, its, expected in _log_softmax(logits, self._labels, self._expected):
            losses.append(nll_loss(part, its, reduction="none"))
            crossed.append(part.mul_(expected.float()).sum(dim=1))  # in place: no temporary
        told = [_summed(losses) - self._loss, -_summed(crossed) - self._entropy]
        return torch.tensor(told, dtype=torch.float64)

    def excess(self, logits: Tensor) -> Tensor:
        """KL(teacher || model) summed over predictions, in nats, fp32; a scalar with gradients where they are on."""
        log_probabilities = log_softmax(logits, dim=1)
        keeps = log_probabilities.requires_grad
        crossed: Tensor = log_probabilities * self._expected if keeps else log_probabilities.mul_(self._expected)
        excess: Tensor = -crossed.sum(dim=1).sum() - self._entropy
        return excess


class DenseLoss:
    """A model's loss, for that of a pruned copy to be compared with; it takes no memory.

    Args:
        logits, labels: as of `Teacher`.
    """

    bytes = 0

    def __init__(self, logits: Tensor, labels: Tensor) -> None:
        self._labels = labels
        self.predictions = len(labels)
        self._loss = 0.0
        self._loss = self.excess(logits).item()

    def excess(self, logits: Tensor) -> Tensor:
        """Excess log-loss summed over predictions, in nats, fp32; a scalar with gradients where they are on."""
        loss: Tensor = cross_entropy(logits, self._labels, reduction="sum")
        return loss - self._loss


def _log_softmax(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Log-probabilities of logits [predictions, vocabulary], some predictions at a time, with those rows of others.

    They may be written to.
    """
    size = max(1, _CACHED // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(logits))
    for part, *its in zip(*(one.split(size) for one in (logits, *others)), strict=True):
        yield log_softmax(part, dim=1), *its


def _summed(parts: Iterable[Tensor]) -> float:
    """In fp64: a sum of many losses in fp32 depends on its order by a millionth."""
    return torch.cat(list(parts)).double().sum().item()


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats; infinity beyond the range of a double."""
    return math.exp(loss) if loss < 700 else math.inf


def batches(model: Model, tokens: Tensor) -> Iterator[Tensor]:
    """The windows [windows, length] in batches that fit into one forward pass, on the model's device."""
    size = model.batch_tokens
    if model.device.type == "cpu":
        size = min(size, _BATCH_LOGITS // model.vocabulary)
    for batch in torch.split(tokens, max(1, size // tokens.shape[1])):
        yield batch.to(model.device)
