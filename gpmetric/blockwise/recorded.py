"""What blocks are called with: arguments kept with those that are equal sharing their memory, and compared."""

from __future__ import annotations

from collections.abc import MutableSequence
from typing import Any

import torch
from torch import Tensor

from gpmetric.blockwise.shelf import Shelf
from gpmetric.errors import ModelError

__all__ = ["Arguments", "Recorded", "Shelved", "same"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword, without the hidden states


class Recorded:
    """Arguments of blocks, equal ones sharing their memory."""

    def __init__(self, blocks: int, hidden: MutableSequence[Tensor] | None = None) -> None:
        self.hidden: MutableSequence[Tensor] = [] if hidden is None else hidden
        self.arguments: list[list[Arguments]] = [[] for _ in range(blocks)]

    def keep(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Keeps what a block is called with, and returns its hidden states."""
        states, rest, named = _separate(args, kwargs)
        if index == 0:
            self.hidden.append(states.detach())
        before = self.arguments[index] or self.arguments[0]
        reference = before[0] if before else ((), {})
        self.arguments[index].append((_share(rest, reference[0]), _share(named, reference[1])))
        return states


class Shelved(MutableSequence[Tensor]):
    """Hidden states on a shelf, which come back to a device when they are asked for."""

    def __init__(self, shelf: Shelf, device: torch.device) -> None:
        self._shelf, self._device = shelf, device
        self._keys: list[object] = []

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, number: Any) -> Any:
        return self._shelf.get(self._keys[number])["states"].to(self._device)

    def insert(self, number: int, states: Tensor) -> None:
        self._keys.insert(number, object())
        self._shelf.put(self._keys[number], {"states": states})

    def __setitem__(self, number: Any, states: Any) -> None:
        self._shelf.put(self._keys[number], {"states": states})

    def __delitem__(self, number: Any) -> None:
        self._shelf.drop(self._keys.pop(number))

    def __del__(self) -> None:
        for key in self._keys:
            self._shelf.drop(key)


def _separate(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    if "hidden_states" not in kwargs:
        raise ModelError(f"the model cannot be run block by block: its blocks take {', '.join(kwargs) or 'nothing'}")
    return kwargs["hidden_states"], (), {name: value for name, value in kwargs.items() if name != "hidden_states"}


def _share(value: Any, reference: Any) -> Any:
    """`value`, with tensors equal to those at the same place in `reference` replaced by the latter."""
    if isinstance(value, Tensor) and isinstance(reference, Tensor):
        return reference if same(value, reference) else value
    if isinstance(value, tuple) and isinstance(reference, tuple) and len(value) == len(reference):
        return tuple(_share(*pair) for pair in zip(value, reference, strict=True))
    if isinstance(value, dict) and isinstance(reference, dict):
        return {name: _share(item, reference.get(name)) for name, item in value.items()}
    return value


def same(value: Any, other: Any) -> bool:
    """Whether two arguments are equal, tensor by tensor; of what has no tensors, whether they are of one type."""
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return value.shape == other.shape and value.dtype == other.dtype and torch.equal(value, other)
    if isinstance(value, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(value) == len(other) and all(same(*pair) for pair in zip(value, other, strict=True))
    if isinstance(value, dict) and isinstance(other, dict):
        # the whole model may hand its own options down, off: what a block is not told is off, too
        return all(name in other or not _told(value[name]) for name in value) and all(
            same(value[name], other[name]) if name in value else not _told(other[name]) for name in other
        )
    return type(value) is type(other)


def _told(value: Any) -> bool:
    """Whether an argument says something: None, False and 0 are what a block takes by default."""
    return isinstance(value, Tensor) or value not in (None, False, 0)
