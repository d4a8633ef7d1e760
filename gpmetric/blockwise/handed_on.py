"""Keys and values that blocks leave for later ones in a mapping all of them are given (Gemma 3n and 4).

A block that is run alone, again, or of one of several models that are on their way together would find another's in it.
They are therefore carried with the hidden states, as further features of every token, and each call has a mapping of
its own: what is kept, put aside, differentiated or answered from memory is always the states and what belongs to them.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpmetric.errors import ModelError

__all__ = ["HandedOn", "Slot", "given", "slots_in"]

Place = int | str  # of an argument: positional, the hidden states not counted, or keyword


@dataclass(frozen=True)
class Slot:
    """A tensor in a mapping: [batch, heads, length, features], or [batch, length, features] with `heads` 0."""

    argument: Place
    key: Hashable
    part: int | None  # of a tuple; None where the value is the tensor
    heads: int
    features: int

    @property
    def width(self) -> int:
        """Features of a token."""
        return max(1, self.heads) * self.features


@dataclass(frozen=True)
class HandedOn:
    """What a block is given beside its hidden states, and what it leaves.

    Attributes:
        places: of the mappings among its arguments.
        before, after: what is in them when the block is called and when it is done; none after the last block.
    """

    places: tuple[Place, ...]
    before: tuple[Slot, ...]
    after: tuple[Slot, ...]

    def unpack(
        self, states: Tensor, batch: Tensor, positional: tuple[Any, ...], keyword: Mapping[str, Any]
    ) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
        """Hidden states without what they carry, and the arguments with it in mappings of their own.

        Args:
            states: [..., width and what is carried].
            batch: token ids [batch, length].
            positional, keyword: the arguments as they were recorded.
        """
        windows, length = batch.shape
        per_row = windows * length / (states.numel() // states.shape[-1])  # tokens: less than 1 for several streams
        widths = [round(slot.width * per_row) for slot in self.before]
        own, *carried = states.split([states.shape[-1] - sum(widths), *widths], dim=-1)
        named: dict[str, Any] = dict(keyword)
        ordered = list(positional)
        mappings: dict[Place, MutableMapping[Hashable, Any]] = {}
        for place in self.places:
            mappings[place] = type(ordered[place] if isinstance(place, int) else named[place])()
            if isinstance(place, int):
                ordered[place] = mappings[place]
            else:
                named[place] = mappings[place]
        for slot, value in zip(self.before, carried, strict=True):
            if slot.heads:
                one = value.reshape(windows, length, slot.heads, slot.features).transpose(1, 2)
            else:
                one = value.reshape(windows, length, slot.features)
            mapping = mappings[slot.argument]
            mapping[slot.key] = one if slot.part is None else (*mapping.get(slot.key, ()), one)
        return own, tuple(ordered), named

    def pack(self, states: Tensor, positional: Sequence[Any], keyword: Mapping[str, Any]) -> Tensor:
        """The states [..., width] with what is in the mappings as further features."""
        if not self.after:
            return states
        carried = []
        for slot in self.after:
            value = (positional[slot.argument] if isinstance(slot.argument, int) else keyword[slot.argument])[slot.key]
            one: Tensor = value if slot.part is None else value[slot.part]
            one = one.transpose(1, 2) if slot.heads else one
            carried.append(one.reshape(*states.shape[:-1], -1))  # [..., width of the slot]
        return torch.cat([states, *carried], dim=-1)


def given(positional: Sequence[Any], keyword: Mapping[str, Any]) -> dict[Place, MutableMapping[Hashable, Any]]:
    """The mappings among a block's arguments, by place."""
    arguments: dict[Place, Any] = dict(enumerate(positional))
    arguments.update(keyword.items())
    return {place: value for place, value in arguments.items() if isinstance(value, MutableMapping)}


def slots_in(place: Place, mapping: Mapping[Hashable, Any], states: Tensor, batch: Tensor) -> list[Slot]:
    """What is in a mapping, in its order.

    Args:
        place: of the mapping.
        mapping: of tensors or tuples of tensors.
        states: hidden states that they are to be carried with, [..., width].
        batch: token ids [batch, length].

    Raises:
        ModelError: something else is in it than keys and values of the batch, in the dtype of the states.
    """
    found = []
    for key, value in mapping.items():
        parts = enumerate(value) if isinstance(value, tuple) else [(None, value)]
        for part, one in parts:
            rows = states.numel() // states.shape[-1]
            fits = isinstance(one, Tensor) and one.dim() in (3, 4) and one.dtype == states.dtype
            if not fits or (len(one), one.shape[-2]) != tuple(batch.shape) or one.numel() % rows:
                raise ModelError(f"its blocks hand on {key!r}, which is no keys and values")
            heads = one.shape[1] if one.dim() == 4 else 0
            found.append(Slot(place, key, part, heads, one.shape[-1]))
    return found
