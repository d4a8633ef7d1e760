"""Running a model block by block: record how it calls its blocks, then replay them one at a time.

Pruning needs each block's inputs on the outputs of the already pruned blocks before it. The calls are captured once, so
no architecture's attention masks or position embeddings are rebuilt by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpmetric.models import Block, Model

__all__ = ["BlockCalls", "record_calls"]


@dataclass(frozen=True)
class BlockCalls:
    """What the first block reads, and the arguments each block is called with, batch by batch."""

    hidden: list[Tensor]  # one [batch, length, width] per batch
    arguments: list[list[tuple[tuple[Any, ...], dict[str, Any]]]]  # [block][batch] -> (positional, keyword)

    def replay(self, index: int, block: Block, hidden: Sequence[Tensor]) -> list[Tensor]:
        """The outputs of one block on `hidden`, called as the model called it."""
        calls = zip(hidden, self.arguments[index], strict=True)
        return [_first(block.module(states, *args, **kwargs)) for states, (args, kwargs) in calls]


@torch.no_grad()
def record_calls(model: Model, batches: Sequence[Tensor]) -> BlockCalls:
    """Runs the model over token batches and records how it calls its blocks.

    Each block's own arguments are kept: reusing the first block's for all is wrong where layers differ (Gemma 2,
    sliding windows). Equal arguments of different batches and blocks share their memory.
    """
    hidden: list[Tensor] = []
    arguments: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = [[] for _ in model.blocks]

    def keep(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states, rest, named = _separate(args, kwargs)
        if index == 0:
            hidden.append(states.detach())
        reference = arguments[index][0] if arguments[index] else arguments[0][0] if arguments[0] else ((), {})
        arguments[index].append((_share(rest, reference[0]), _share(named, reference[1])))

    hooks = [
        block.module.register_forward_pre_hook(
            lambda _, args, kwargs, index=index: keep(index, args, kwargs), with_kwargs=True
        )
        for index, block in enumerate(model.blocks)
    ]
    try:
        for batch in batches:
            model.module.base_model(input_ids=batch.to(model.device), use_cache=False)  # without the output layer
    finally:
        for hook in hooks:
            hook.remove()
    return BlockCalls(hidden, arguments)


def _separate(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {name: value for name, value in kwargs.items() if name != "hidden_states"}


def _share(value: Any, reference: Any) -> Any:
    """`value`, with tensors equal to those at the same place in `reference` replaced by the latter."""
    if isinstance(value, Tensor) and isinstance(reference, Tensor):
        same = value.shape == reference.shape and value.dtype == reference.dtype and torch.equal(value, reference)
        return reference if same else value
    if isinstance(value, tuple) and isinstance(reference, tuple) and len(value) == len(reference):
        return tuple(_share(*pair) for pair in zip(value, reference, strict=True))
    if isinstance(value, dict) and isinstance(reference, dict):
        return {name: _share(item, reference.get(name)) for name, item in value.items()}
    return value


def _first(output: Any) -> Tensor:
    states: Tensor = output[0] if isinstance(output, tuple) else output  # Bloom's blocks return a tuple
    return states
