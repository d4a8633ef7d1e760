"""The objective of candidates on common windows, and its first-order change at all other levels by a backward pass.

A candidate is computed from the first block on that differs from the one measured before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpmetric.allocation.level_masks import PrunedModel
from gpmetric.allocation.levels import Levels, Numbers
from gpmetric.errors import InputError
from gpmetric.evaluation.objectives import OBJECTIVES, Reference
from gpmetric.evaluation.perplexity import batches
from gpmetric.evaluation.references import References, reference_bytes
from gpmetric.models import Layer, Model

__all__ = ["CandidateObjective", "Slopes", "check_memory"]

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
        pieces = [batch for part in parts for batch in batches(model, part)]
        kept = References(model, OBJECTIVES[objective].reference, _REFERENCE_BYTES)
        self._references: list[Reference] = [one for key, piece in enumerate(pieces) for one in kept.of(key, piece)]
        self.windows = [len(batch) for batch in pieces]
        self.tokens = [batch.numel() for batch in pieces]
        self._blocks = [block.module for block in model.blocks]
        self._block_of = [index for index, block in enumerate(model.blocks) for _ in block.layers]
        self._outputs: list[list[Any]] = [[None] * len(self._blocks) for _ in pieces]
        self._known = [0] * len(pieces)  # by batch, how many blocks' outputs are those of the present weights
        self._seen = pruned.levels  # what those are outputs of; others may set the model between two calls
        width = model.module.get_input_embeddings().weight
        size = sum(self.tokens) * len(self._blocks) * width.shape[1] * width.element_size()  # of all outputs, in bytes
        self._keeps = size <= _OUTPUT_BYTES
        self.seconds = {"masks": 0.0, "forward": 0.0, "backward": 0.0}

    def __len__(self) -> int:
        """Batches of windows."""
        return len(self._references)

    @torch.no_grad()
    def measure(self, levels: Levels, first: int, last: int) -> list[float]:
        """The objective on each batch from `first` up to `last`, in nats per prediction.

        Infinite where it is not finite, as for a model pruned to death.
        """
        self._take_on(levels)
        start = time.perf_counter()
        found = []
        for batch in range(first, last):
            reference = self._references[batch]
            with self._from_block(batch) if self._keeps else ExitStack():
                found.append(reference.excess(self._pruned.model).item() / reference.predictions)
        self.seconds["forward"] += time.perf_counter() - start
        return [value if np.isfinite(value) else float("inf") for value in found]

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

        def take(index: int, layer: Layer, parameter: torch.nn.Parameter) -> None:
            assert parameter.grad is not None
            sums[index] += self._pruned.by_level(index, layer.oriented(parameter.grad))
            parameter.grad = None

        with ExitStack() as stack, torch.enable_grad():
            for index, layer in enumerate(model.layers):
                stack.callback(layer.parameter.requires_grad_, False)
                layer.parameter.requires_grad_(True)
                hook = layer.parameter.register_post_accumulate_grad_hook(partial(take, index, layer))
                stack.callback(hook.remove)
            for reference in self._references[:last]:
                reference.excess(model).backward()
        predictions = sum(reference.predictions for reference in self._references[:last])
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

    @contextmanager
    def _from_block(self, batch: int) -> Iterator[None]:
        """Blocks whose outputs on this batch are known answer with them; those of the others are kept."""
        outputs, known = self._outputs[batch], self._known[batch]
        self._known[batch] = 0  # until this ends well
        try:
            for index, block in enumerate(self._blocks):
                answers = index < known
                block.forward = _answer(outputs, index, known) if answers else _keep(outputs, index, block.forward)
            yield
        finally:
            for block in self._blocks:
                vars(block).pop("forward", None)
        self._known[batch] = len(self._blocks)


def _answer(outputs: Sequence[Any], index: int, known: int) -> Callable[..., Any]:
    """Stands for a block whose output is known."""
    output = outputs[index]
    if index == known - 1:  # the next block reads it, and might write to it
        output = (output[0].clone(), *output[1:]) if isinstance(output, tuple) else output.clone()
    return lambda *args, **kwargs: output


def _keep(outputs: list[Any], index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Stands for a block whose output is to be known."""

    def run(*args: Any, **kwargs: Any) -> Any:
        outputs[index] = forward(*args, **kwargs)
        return outputs[index]

    return run
