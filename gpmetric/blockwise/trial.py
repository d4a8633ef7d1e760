"""A model run once as it is, on a few tokens, to see how it calls its blocks and what its layers do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from gpmetric.blockwise.choosing import Choosing
from gpmetric.blockwise.handed_on import HandedOn, Place, Slot, given, slots_in
from gpmetric.blockwise.recorded import Arguments, Recorded, same
from gpmetric.blockwise.steps import cannot, emptied, first_of, its_own, standing_aside, steps_of
from gpmetric.errors import ModelError
from gpmetric.models import Model
from gpmetric.placement import FRONT, HEAD

__all__ = ["Trial"]

_Contents = dict[Place, dict[Any, Any]]


class Trial:
    """A model's own forward pass, watched.

    Args:
        model: its blocks are at hand when they are run.
        tokens: [windows, length], on its device.

    Attributes:
        steps: every module of the blocks in turn, with the index of its block.
        logits: what came out.
        last: what the last block gave, [windows, length, width].
        forms: by step, what it returns behind the hidden states, without tensors; None where it returns them alone.
        dense: by name, why layers of blocks cannot be pruned.

    Raises:
        ModelError: the model fails, or its blocks are not called one after the other, each once.
    """

    def __init__(self, model: Model, tokens: Tensor) -> None:
        self.steps = steps_of(model)
        self.forms: list[Sequence[Any] | None] = [None] * len(self.steps)
        self.last = torch.empty(0)
        self._model, self._tokens = model, tokens
        self._recorded = Recorded(len(self.steps))
        self._order: list[int] = []
        self._follows = True
        self._contents: list[tuple[Tensor, _Contents, _Contents]] = []  # states; of mappings, before and after a step
        called: set[nn.Module] = set()
        choosing = Choosing({layer.name: layer.module for layer in model.layers})
        with ExitStack() as stack:
            for module in {one for block in model.blocks for one in block.module.modules()}:
                stack.enter_context(module.register_forward_pre_hook(lambda one, _: called.add(one)))
            stack.enter_context(its_own(model))
            stack.enter_context(model.at_hand(FRONT))
            stack.enter_context(model.at_hand(HEAD))
            stack.enter_context(standing_aside(self.steps, self._run, real=True))
            with choosing:
                self.logits: Tensor = model.module(input_ids=tokens, use_cache=False).logits
        self._check_order()
        self.dense = dict.fromkeys(sorted(choosing.found), "a router: its outputs are chosen among")
        self.dense |= _never_called(model, called)

    def handed_on(self) -> list[HandedOn | None]:
        """By step, what is left for later ones in mappings; None where none is filled.

        Raises:
            ModelError: something else than keys and values is.
        """
        pairs = [(before, after) for _, before, after in self._contents]
        filled = {place for before, after in pairs for place in after if not _unchanged(before[place], after[place])}
        if not filled:
            return [None] * len(self.steps)
        found: list[HandedOn | None] = []
        left: tuple[Slot, ...] = ()
        for step, (states, before, after) in enumerate(self._contents):
            places = tuple(place for place in after if place in filled)
            if self._slots(before, places, states) != left:
                raise cannot(self._model, "what its blocks hand on changes between them")
            entering, left = left, self._slots(after, places, states) if step + 1 < len(self.steps) else ()
            found.append(HandedOn(places, entering, left))
        return found

    def called_as(self, arguments: Sequence[Sequence[Arguments]]) -> bool:
        """Whether the blocks are called with these, by step and batch, too, but for what they hand on themselves."""
        known = self.handed_on()
        return all(
            len(one) == 1 and same(_without(one[0], handed), _without(own[0], handed))
            for one, own, handed in zip(arguments, self._recorded.arguments, known, strict=True)
        )

    def _run(self, step: int, args: tuple[Any, ...], kwargs: dict[str, Any], forward: Callable[..., Any]) -> Any:
        states = self._recorded.keep(step, args, kwargs)
        close = states.shape == self.last.shape and torch.allclose(states, self.last, rtol=0, atol=0, equal_nan=True)
        self._follows &= not self._order or close
        self._order.append(step)
        mappings = given(args[1:], kwargs)
        before = {place: dict(mapping) for place, mapping in mappings.items()}
        with self._model.at_hand(self.steps[step][0]):
            output = forward(*args, **kwargs)
        self._contents.append((states, before, {place: dict(mapping) for place, mapping in mappings.items()}))
        self.forms[step] = emptied(output[1:]) if isinstance(output, (tuple, list)) else None
        self.last = first_of(output).clone()
        return output

    def _check_order(self) -> None:
        names = {module: name for name, module in self._model.module.named_modules()}
        for step, (_, module) in enumerate(self.steps):
            if (count := self._order.count(step)) != 1:
                raise cannot(
                    self._model, f"{names[module]} is called {f'{count} times' if count else 'never'} in a forward pass"
                )
        if self._order != sorted(self._order):
            first = next(step for step, called in enumerate(self._order) if step != called)
            raise cannot(self._model, f"{names[self.steps[self._order[first]][1]]} is not called in its turn")
        if not self._follows:
            raise cannot(self._model, "what a block reads is not what the one before it gives")

    def _slots(self, contents: _Contents, places: Sequence[Place], states: Tensor) -> tuple[Slot, ...]:
        try:
            return tuple(slot for place in places for slot in slots_in(place, contents[place], states, self._tokens))
        except ModelError as error:
            raise cannot(self._model, str(error)) from error


def _never_called(model: Model, called: set[nn.Module]) -> dict[str, str]:
    """Layers that are not called although what holds them is: Mamba reads one's weight itself, and a decoder that was
    made for an encoder has attention to it that no text reaches.

    An expert that no token was given to is not called as a whole: a member of a list, or told by its name.
    """
    parents = {child: parent for parent in model.module.modules() for child in parent.children()}
    found = {}
    for layer in model.layers:
        above, expert = layer.module, "expert" in layer.name and parents[layer.module] not in called
        while above not in called and not isinstance(above, (nn.ModuleList, nn.ModuleDict)):
            above = parents[above]
        if above is not layer.module and above in called and not expert:
            found[layer.name] = "never called, so that nothing is known of its inputs"
    return found


def _unchanged(before: dict[Any, Any], after: dict[Any, Any]) -> bool:
    return before.keys() == after.keys() and all(before[key] is after[key] for key in before)


def _without(arguments: Arguments, handed: HandedOn | None) -> Arguments:
    """Arguments without the mappings that blocks fill."""
    if handed is None:
        return arguments
    positional, keyword = arguments
    return (
        tuple(one for place, one in enumerate(positional) if place not in handed.places),
        {name: one for name, one in keyword.items() if name not in handed.places},
    )
