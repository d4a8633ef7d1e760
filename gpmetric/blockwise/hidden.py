"""Hidden states of token batches on their way through a model's blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import count

import torch
from torch import Tensor

from gpmetric.blockwise.replay import BlockCalls
from gpmetric.blockwise.shelf import Shelf

__all__ = ["Hidden", "States"]

_NAMES = count()


class Hidden:
    """What the next block reads, batch by batch; several may set out from the same calls.

    Args:
        calls: how the model calls its blocks on these batches.
        shelf: keeps the states.
    """

    def __init__(self, calls: BlockCalls, shelf: Shelf) -> None:
        self.calls = calls
        self._shelf = shelf
        self._name = next(_NAMES)
        self._moved = [False] * len(calls.hidden)

    def __len__(self) -> int:
        return len(self._moved)

    def __iter__(self) -> Iterator[Tensor]:
        """The states [batch, length, width] of every batch, on the model's device."""
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Tensor:
        if not self._moved[number]:
            return self.calls.hidden[number]
        return self._shelf.get((self._name, number))["states"].to(self.calls.model.device)

    def __setitem__(self, number: int, states: Tensor) -> None:
        self._shelf.put((self._name, number), {"states": states})
        self._moved[number] = True

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Moves all batches through a block, which is at hand."""
        for number in range(len(self)):
            self[number] = self.calls.call(index, number, self[number])

    def close(self) -> None:
        """Lets go of the states."""
        for number in range(len(self)):
            self._shelf.drop((self._name, number))

    def __del__(self) -> None:
        self.close()

    def restore(self, states: Iterable[Tensor]) -> None:
        """Goes on with what iterating gave before, on any device."""
        for number, one in enumerate(states):
            self[number] = one


class States(Mapping[str, Tensor]):
    """Hidden states by place and batch, as they are when they are asked for."""

    def __init__(self, places: Mapping[str, Hidden]) -> None:
        self._places = places

    def __getitem__(self, name: str) -> Tensor:
        place, _, number = name.rpartition("/")
        return self._places[place][int(number)]

    def __iter__(self) -> Iterator[str]:
        return (f"{place}/{number}" for place, hidden in self._places.items() for number in range(len(hidden)))

    def __len__(self) -> int:
        return sum(map(len, self._places.values()))
