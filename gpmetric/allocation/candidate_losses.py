"""The log-loss of candidates on held-out windows: where the weights are not resident, of many in one walk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gpmetric.allocation.level_masks import PrunedModel
from gpmetric.allocation.levels import Levels
from gpmetric.blockwise.hidden import Hidden
from gpmetric.blockwise.replay import BlockCalls, record_calls
from gpmetric.blockwise.shelf import Shelf
from gpmetric.evaluation.perplexity import batches, mean_loss, mean_of, sum_loss

__all__ = ["candidate_losses"]


def candidate_losses(pruned: PrunedModel, candidates: Sequence[Levels], tokens: Tensor) -> Iterator[float]:
    """What `mean_loss` says of each candidate on windows [windows, length], as soon as it is known."""
    model = pruned.model
    if model.resident:
        for levels in candidates:
            pruned.set(levels)
            yield mean_loss(model, tokens)
        return
    shelf = Shelf(pruned.room, torch.device("cpu"))
    calls = record_calls(model, list(batches(model, tokens)), shelf)
    together = pruned.together(sum(states.nbytes for states in calls.hidden))
    for start in range(0, len(candidates), together):
        for total in _sums(pruned, calls, candidates[start : start + together], shelf):
            yield mean_of(total, tokens)


@torch.no_grad()
def _sums(pruned: PrunedModel, calls: BlockCalls, group: Sequence[Levels], shelf: Shelf) -> list[float]:
    """By candidate, the loss summed over predictions; each block is read once for all."""
    hidden = [Hidden(calls, shelf) for _ in group]
    for index in range(len(calls.model.blocks)):
        with calls.model.at_hand(index):
            for place, levels in enumerate(group):
                pruned.set(levels)
                with pruned.block(index):
                    hidden[place].advance(index)
    sums = [sum_loss(calls, states) for states in hidden]
    for states in hidden:
        states.close()
    return sums
