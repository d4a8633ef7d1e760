"""The dense model's references that pruned models are compared with, kept while there is room for them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from gpmetric.evaluation.objectives import OBJECTIVES
from gpmetric.evaluation.perplexity import batches
from gpmetric.models import Model

__all__ = ["References", "reference_bytes"]


class _Sized(Protocol):
    @property
    def bytes(self) -> int:
        """Memory that it takes."""


Kind = TypeVar("Kind", bound=_Sized)


class References(Generic[Kind]):
    """References of windows, made when they are first wanted; beyond so many bytes, made again every time.

    Args:
        model: dense whenever references are asked for.
        make: (model, batch [windows, length]) -> a reference: `OBJECTIVES[name].reference`, or a class.
        limit: bytes that are kept.
    """

    def __init__(self, model: Model, make: Callable[[Model, Tensor], Kind], limit: int) -> None:
        self._model, self._make = model, make
        self._room = limit
        self._kept: dict[Hashable, list[Kind]] = {}

    def of(self, key: Hashable, windows: Tensor) -> Iterator[Kind]:
        """The references of windows [n, length], batch by batch; those that are not kept are made one at a time.

        Args:
            key: the same for the same windows.
            windows: int64, on any device.
        """
        if key in self._kept:
            yield from self._kept[key]
            return
        made: list[Kind] = []
        size = 0
        for batch in batches(self._model, windows):
            with torch.no_grad():
                one = self._make(self._model, batch)
            size += one.bytes
            made = [*made, one] if size <= self._room else []
            yield one
        if size <= self._room:
            self._kept[key] = made
            self._room -= size


def reference_bytes(objective: str, model: Model, tokens: Tensor) -> int:
    """Memory that an objective's references of all windows [n, length] take together."""
    return 2 * tokens.numel() * model.vocabulary if OBJECTIVES[objective].keeps_predictions else 0
