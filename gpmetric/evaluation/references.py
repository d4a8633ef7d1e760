"""The dense model's references that pruned models are compared with, kept while there is room for them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from gpmetric.evaluation.objectives import OBJECTIVES
from gpmetric.evaluation.perplexity import batches, predictions
from gpmetric.models import Model

__all__ = ["References", "parts_of", "reference_bytes"]


class _Sized(Protocol):
    @property
    def bytes(self) -> int:
        """Memory that it takes."""


Kind = TypeVar("Kind", bound=_Sized)
Parts = Iterable[tuple[Tensor, Tensor]]  # logits and labels, see `blockwise.ends`


class References(Generic[Kind]):
    """References of windows, made when they are first wanted; beyond so many bytes, made again every time.

    Args:
        make: (logits, labels) of the dense model -> a reference: `OBJECTIVES[name].reference`, or a class.
        limit: bytes that are kept.
    """

    def __init__(self, make: Callable[[Tensor, Tensor], Kind], limit: int) -> None:
        self._make = make
        self._room = limit
        self._kept: dict[Hashable, list[Kind]] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def clear(self) -> None:
        """Lets go of all references, where the parts are going to be other ones."""
        self._room += sum(one.bytes for kept in self._kept.values() for one in kept)
        self._kept.clear()

    def of(self, key: Hashable, dense: Callable[[], Parts]) -> Iterator[Kind]:
        """The references under a key, part by part; those that are not kept are made one at a time.

        Args:
            key: the same for the same windows.
            dense: gives logits and labels of the dense model.
        """
        if key in self._kept:
            yield from self._kept[key]
            return
        made: list[Kind] = []
        size = 0
        for logits, labels in dense():
            with torch.no_grad():
                one = self._make(logits, labels)
            del logits, labels
            size += one.bytes
            made = [*made, one] if size <= self._room else []
            yield one
        if size <= self._room:
            self._kept[key] = made
            self._room -= size


def parts_of(model: Model, windows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and labels of windows [n, length] by a model as it is, part by part; with gradients where they are on."""
    for batch in batches(model, windows):
        yield from predictions(model, batch)


def reference_bytes(objective: str, model: Model, tokens: Tensor) -> int:
    """Memory that an objective's references of all windows [n, length] take together."""
    return 2 * tokens.numel() * model.vocabulary if OBJECTIVES[objective].keeps_predictions else 0
