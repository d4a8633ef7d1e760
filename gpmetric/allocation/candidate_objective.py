"""The objective of candidates on common windows, and its first-order change at all other levels by a backward pass.

A candidate is computed from the first block on that differs from the one measured before it. Where the weights are not
resident, candidates that are asked for together pass through the blocks together, so that each is read once for all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gpmetric.allocation.level_masks import PrunedModel
from gpmetric.allocation.levels import Levels, Numbers
from gpmetric.blockwise.backward import run_backward
from gpmetric.blockwise.ends import ends
from gpmetric.blockwise.replay import BlockCalls, record_calls
from gpmetric.blockwise.shelf import Shelf
from gpmetric.errors import InputError
from gpmetric.evaluation.objectives import OBJECTIVES, Reference
from gpmetric.evaluation.perplexity import batches, run_blocks
from gpmetric.evaluation.references import reference_bytes
from gpmetric.models import Layer, Model
from gpmetric.placement import HEAD

__all__ = ["Asked", "CandidateObjective", "Objective", "Slopes", "check_memory", "output_bytes"]

Asked = tuple[Levels, int, int]  # a candidate, and its batches from the first up to the last
Slopes = list[Numbers]  # by gene, the first-order change of the objective at each level, [levels]

_REFERENCE_BYTES = 4 * 2**30  # of the dense model's predictions
_STAGES = 8  # batches at least, where there are so many windows
_OUTPUT_BYTES = 2 * 2**30  # of block outputs kept; with more, every candidate is computed from the first block on


def check_memory(model: Model, tokens: Tensor, objective: str) -> None:
    """Refuses more windows [windows, length] than the dense model's predictions may be kept of.

    Raises:
        InputError: naming what they would take.
    """
    needed = reference_bytes(objective, model, tokens)
    if needed > _REFERENCE_BYTES:
        others = " or ".join(f"--objective {name}" for name, row in OBJECTIVES.items() if not row.keeps_predictions)
        raise InputError(
            f"--objective {objective} would keep {needed / 2**30:.1f} GiB of predictions, of "
            f"{_REFERENCE_BYTES / 2**30:.0f} allowed: take fewer --search-windows, or {others}"
        )


def output_bytes(model: Model, tokens: Tensor) -> int:
    """Memory of the blocks' outputs that are kept for windows [windows, length], where the weights are resident."""
    width = model.module.get_input_embeddings().weight.shape[1]
    found = len(model.blocks) * tokens.numel() * width * getattr(torch, model.dtype).itemsize
    return int(found) if found <= _OUTPUT_BYTES else 0


class Objective(Protocol):
    """What a search asks of candidates, whoever measures them; as of `CandidateObjective`."""

    windows: list[int]
    tokens: list[int]
    seconds: dict[str, float]

    def __len__(self) -> int: ...

    def measure_all(self, asked: Sequence[Asked]) -> Iterator[list[float]]: ...

    def slopes(self, levels: Levels, last: int) -> Slopes: ...


class CandidateObjective:
    """The objective of candidates on some windows, and its first-order change at other levels.

    Args:
        pruned: the model that takes the candidates on.
        tokens: [windows, length], int64.
        objective: a key of OBJECTIVES.

    Raises:
        InputError: the dense model's predictions would not fit into memory.
    """

    def __init__(self, pruned: PrunedModel, tokens: Tensor, objective: str = "kl") -> None:
        self._pruned = pruned
        model = pruned.model
        check_memory(model, tokens, objective)
        pruned.dense()  # what the references are of
        parts = torch.split(tokens, -(-len(tokens) // _STAGES))  # few windows can be looked at in stages, too
        shelf = None if model.resident else Shelf(pruned.room // 2, torch.device("cpu"))
        self._calls = record_calls(model, [batch for part in parts for batch in batches(model, part)], shelf)
        self._references = _references(self._calls, objective)
        self.windows = [len(batch) for batch in self._calls.batches]
        self.tokens = [batch.numel() for batch in self._calls.batches]
        self._block_of = [index for index, block in enumerate(model.blocks) for _ in block.layers]
        self._outputs: list[list[Tensor]] = [[torch.empty(0)] * len(model.blocks) for _ in self.tokens]
        self._known = [0] * len(self.tokens)  # by batch, how many blocks' outputs are those of the present weights
        self._seen = pruned.levels  # what those are outputs of; others may set the model between two calls
        states = sum(hidden.nbytes for hidden in self._calls.hidden)
        self._keeps = states * len(model.blocks) <= (_OUTPUT_BYTES if model.resident else pruned.room)
        self._together = pruned.together(states)
        largest = max(hidden.nbytes for hidden in self._calls.hidden)
        self._at_once = len(self.tokens) if model.resident else max(1, pruned.room // (2 * largest))  # batches
        self.seconds = {"masks": 0.0, "forward": 0.0, "backward": 0.0}

    def __len__(self) -> int:
        """Batches of windows."""
        return len(self.tokens)

    def measure(self, levels: Levels, first: int, last: int) -> list[float]:
        """The objective on each batch from `first` up to `last`, in nats per prediction.

        Infinite where it is not finite, as for a model pruned to death.
        """
        return next(self.measure_all([(levels, first, last)]))

    def measure_all(self, asked: Sequence[Asked]) -> Iterator[list[float]]:
        """What `measure` gives of each, as soon as it is known."""
        pieces = [
            (levels, start, min(start + self._at_once, last))
            for levels, first, last in asked
            for start in range(first, last, self._at_once)
        ]
        wanted = iter([last - first for _, first, last in asked])
        count, found = next(wanted, 0), list[float]()
        for start in range(0, len(pieces), self._together):
            for measured in self._measured(pieces[start : start + self._together]):
                found += measured
                if len(found) == count:
                    yield found
                    count, found = next(wanted, 0), []

    def slopes(self, levels: Levels, last: int) -> Slopes:
        """By gene, the first-order change of the objective at each of its levels, the others staying as they are.

        One backward pass over the batches up to `last` gives them all: what a weight's return or removal changes is, to
        first order, the weight times the gradient at its place, whether it is there or not.

        Returns:
            In nats per prediction; 0 at the present level.
        """
        self._take_on(levels)
        start = time.perf_counter()
        table, model = self._pruned.table, self._pruned.model
        sums = [torch.zeros(len(targets), dtype=torch.float64) for targets in table.targets]
        watched = partial(self._watched, sums)
        backward = partial(
            run_backward, self._calls, loss=self._backward, first=min(self._block_of), at_hand=self._pruned.block
        )
        if model.resident:
            with watched(range(len(model.blocks))):
                for batch in range(last):
                    for _ in backward([batch]):
                        pass
        else:
            with Shelf(self._pruned.room, torch.device("cpu")) as shelf:
                for _ in backward(range(last), shelf=shelf, backward=lambda index: watched([index])):
                    pass
        predictions = sum(one.predictions for references in self._references[:last] for one in references)
        self.seconds["backward"] += time.perf_counter() - start
        kept = [np.sum([sums[layer].numpy() for layer in members], axis=0) / predictions for members in table.genes]
        return [by_level - by_level[level] for by_level, level in zip(kept, levels, strict=True)]

    def _take_on(self, levels: Levels) -> None:
        start = time.perf_counter()
        self._pruned.set(levels)
        seen, self._seen = self._seen, self._pruned.levels
        changed = [index for index, (was, now) in enumerate(zip(seen, self._seen, strict=True)) if was != now]
        if changed:
            self._known = [min(known, self._block_of[changed[0]]) for known in self._known]
        self.seconds["masks"] += time.perf_counter() - start

    @torch.no_grad()
    def _measured(self, group: Sequence[Asked]) -> list[list[float]]:
        """What `measure` gives of candidates that pass through the blocks together."""
        for levels, _, _ in group:
            self._take_on(levels)
        start = time.perf_counter()
        states = self._through_blocks(group)
        with self._pruned.model.at_hand(HEAD):
            found = [
                [self._excess(batch, states.pop((place, batch))) for batch in range(first, last)]
                for place, (_, first, last) in enumerate(group)
            ]
        self.seconds["forward"] += time.perf_counter() - start
        return found

    def _through_blocks(self, group: Sequence[Asked]) -> dict[tuple[int, int], Tensor]:
        """By candidate and batch, what the last block gives; the last candidate's outputs of blocks are kept."""
        model, calls, known = self._pruned.model, self._calls, list(self._known)
        kept = range(*group[-1][1:])
        states = {}
        for place, (_, first, last) in enumerate(group):
            for batch in range(first, last):
                states[place, batch] = self._outputs[batch][known[batch] - 1] if known[batch] else calls.hidden[batch]
        for batch in kept:
            self._known[batch] = 0  # until this ends well
        for index in range(min(known[batch] for _, batch in states), len(model.blocks)):
            with model.at_hand(index):
                for place, (levels, first, last) in enumerate(group):
                    self._pruned.set(levels)
                    with self._pruned.block(index):
                        for batch in (one for one in range(first, last) if known[one] <= index):
                            states[place, batch] = calls.call(index, batch, states[place, batch])
                            if self._keeps and place == len(group) - 1:
                                self._outputs[batch][index] = states[place, batch]
        for batch in kept:
            self._known[batch] = len(model.blocks) if self._keeps else 0
        return states

    def _excess(self, batch: int, states: Tensor) -> float:
        """The objective on a batch, of what the last block gives."""
        references = self._references[batch]
        pairs = zip(references, ends(self._calls, batch, states), strict=True)
        total = sum(one.excess(logits).item() for one, (logits, _) in pairs)
        found = total / sum(one.predictions for one in references)
        return found if np.isfinite(found) else float("inf")

    def _backward(self, calls: BlockCalls, batch: int, states: Tensor) -> None:
        """Adds the gradient of the objective, summed over predictions, to that of the states."""
        for one, (logits, _) in zip(self._references[batch], ends(calls, batch, states), strict=True):
            one.excess(logits).backward()

    @contextmanager
    def _watched(self, sums: Sequence[Tensor], blocks: Sequence[int]) -> Iterator[None]:
        """Adds to the sums of each layer of some blocks what its gradients tell of its levels."""

        def take(index: int, layer: Layer, parameter: torch.nn.Parameter) -> None:
            assert parameter.grad is not None
            sums[index].add_(self._pruned.by_level(index, layer.oriented(parameter.grad)))
            parameter.grad = None

        with ExitStack() as stack:
            for index, layer in enumerate(self._pruned.model.layers):
                if self._block_of[index] in blocks:
                    stack.callback(layer.parameter.requires_grad_, False)
                    layer.parameter.requires_grad_(True)
                    hook = layer.parameter.register_post_accumulate_grad_hook(partial(take, index, layer))
                    stack.callback(hook.remove)
            yield


@torch.no_grad()
def _references(calls: BlockCalls, objective: str) -> list[list[Reference]]:
    """By batch, part by part, what the dense model says."""
    make = OBJECTIVES[objective].reference
    outputs = run_blocks(calls)
    with calls.model.at_hand(HEAD):
        return [[make(*part) for part in ends(calls, batch, states)] for batch, states in enumerate(outputs)]
