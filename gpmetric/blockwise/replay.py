"""Running a model block by block: how it calls its blocks is recorded once, then they are called one at a time.

Nothing else is needed of an architecture: what lies before the blocks and behind them is run by the model itself, with
the blocks standing aside, so that no attention mask, position embedding or norm is rebuilt by hand.
"""

from __future__ import annotations

import inspect
import logging
from collections import deque
from collections.abc import Mapping, MutableSequence, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gpmetric.blockwise.handed_on import HandedOn
from gpmetric.blockwise.recorded import Arguments, Recorded, Shelved
from gpmetric.blockwise.shelf import Shelf
from gpmetric.blockwise.steps import cannot, first_of, its_own, shaped, standing_aside
from gpmetric.blockwise.trial import Trial
from gpmetric.errors import ModelError
from gpmetric.models import Model
from gpmetric.placement import FRONT, HEAD

__all__ = ["BlockCalls", "check_blocks", "record_calls"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockCalls:
    """What the first block reads, and the arguments each block is called with, batch by batch.

    Attributes:
        model: whose calls they are.
        batches: token windows [batch, length] each, on the model's device.
        hidden: [batch, length, width] each, on the model's device.
        arguments: by step, which is a module of a block, and batch.
    """

    model: Model
    batches: list[Tensor]
    hidden: Sequence[Tensor]
    arguments: list[list[Arguments]]

    @cached_property
    def alone(self) -> BlockCalls:
        """The same calls with every window a batch of its own, in their order, but for what the first block reads.

        What lies before the blocks is run once more, when it is asked for first.
        """
        windows = [window for batch in self.batches for window in batch.split(1)]
        return self if len(windows) == len(self.batches) else _record(self.model, windows, deque(maxlen=0))

    def replay(self, index: int, hidden: Sequence[Tensor]) -> list[Tensor]:
        """The outputs of one block, which is at hand, on `hidden`, called as the model called it."""
        return [self.call(index, number, states) for number, states in enumerate(hidden)]

    def call(self, index: int, number: int, states: Tensor) -> Tensor:
        """The output of one block on one batch: hidden states, and what they carry (`handed_on`)."""
        traits = _traits(self.model)
        with its_own(self.model):
            for step, (place, module) in enumerate(traits.steps):
                if place == index:
                    states = self._step(step, module, number, states, traits.handed[step])
        return states

    def _step(self, step: int, module: nn.Module, number: int, states: Tensor, handed: HandedOn | None) -> Tensor:
        positional, keyword = self.arguments[step][number]
        if handed is None:
            return first_of(module(states, *positional, **keyword))
        states, positional, keyword = handed.unpack(states, self.batches[number], positional, keyword)
        return handed.pack(first_of(module(states, *positional, **keyword)), positional, keyword)

    def finish(self, number: int, states: Tensor, **options: Any) -> Any:
        """What the model makes of what its last block gives for a batch, as transformers returns it.

        Args:
            number: of the batch.
            states: [batch, length, width].
            options: for the model's forward, `logits_to_keep` or `labels` for instance.
        """
        traits = _traits(self.model)
        aside = standing_aside(traits.steps, lambda step, *_: shaped(states, traits.forms[step]))
        with its_own(self.model), self.model.at_hand(HEAD), aside:
            if traits.by_states:
                return self.model.module(inputs_embeds=states, use_cache=False, **options)
            with self.model.at_hand(FRONT):
                return self.model.module(input_ids=self.batches[number], use_cache=False, **options)


def record_calls(model: Model, batches: Sequence[Tensor], shelf: Shelf | None = None) -> BlockCalls:
    """How a model calls its blocks on token batches [batch, length], the blocks themselves not being run.

    Each block's own arguments are kept: reusing the first block's for all is wrong where layers differ (Gemma 2,
    sliding windows). Equal arguments of different batches and blocks share their memory.

    Args:
        model: of which only what lies before the blocks is run.
        batches: on any device.
        shelf: takes what the first block reads, where that is not to stay on the device.

    Raises:
        ModelError: the model's blocks cannot be run one by one; see `check_blocks`.
    """
    return _record(model, batches, None if shelf is None else Shelved(shelf, model.device))


@torch.no_grad()
def _record(model: Model, batches: Sequence[Tensor], hidden: MutableSequence[Tensor] | None) -> BlockCalls:
    """`record_calls`, `hidden` taking what the first block reads."""
    traits = _traits(model)
    recorded = Recorded(len(traits.steps), hidden)

    def stand_in(step: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return shaped(recorded.keep(step, args, kwargs), traits.forms[step])

    placed = [batch.to(model.device) for batch in batches]
    with its_own(model), model.at_hand(FRONT), standing_aside(traits.steps, stand_in):
        for batch in placed:
            model.module.base_model(input_ids=batch, use_cache=False)  # without the output layer
    return BlockCalls(model, placed, recorded.hidden, recorded.arguments)


@torch.no_grad()
def check_blocks(model: Model) -> Mapping[str, str]:
    """Why layers of a model, by name, are to stay dense, as running it shows; there may be none.

    It is run on two windows of two tokens as it is, and block by block.

    Raises:
        ModelError: a prediction depends on the token after it (BERT and its kin load as causal models): a perplexity
            would mean nothing; or the blocks cannot be run one after the other, each once.
    """
    traits = _traits(model)
    first, second = traits.logits[:, 0].float()
    if not torch.allclose(first, second, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise ModelError(f"model {model.name!r} is not causal: its prediction after a token depends on the next one")
    return {layer.name: traits.dense[layer.name] for layer in model.layers if layer.name in traits.dense}


@dataclass(frozen=True)
class _Traits:
    """What is known of a model once it has been run.

    Attributes:
        steps: every module of the blocks in turn, with the index of its block.
        logits: of the windows that it was run on.
        forms: by step, what it returns behind the hidden states, without tensors; None where it returns them alone.
        handed: by step, what it leaves for later ones beside hidden states; None where no block does.
        by_states: whether the end of the model may be run without token ids.
        dense: why layers cannot be pruned, by name.
    """

    steps: list[tuple[int, nn.Module]]
    logits: Tensor
    forms: list[Sequence[Any] | None]
    handed: list[HandedOn | None]
    by_states: bool
    dense: Mapping[str, str]


_KNOWN: WeakKeyDictionary[nn.Module, _Traits] = WeakKeyDictionary()


def _traits(model: Model) -> _Traits:
    if model.module not in _KNOWN:
        _KNOWN[model.module] = _examine(model)
    return _KNOWN[model.module]


@torch.no_grad()
def _examine(model: Model) -> _Traits:
    """Runs the model on two windows as it is, then as `BlockCalls` does, and compares."""
    tokens = torch.tensor([[0, 0], [0, 1]], device=model.device)
    trial = Trial(model, tokens)
    handed = trial.handed_on()
    takes = inspect.signature(model.module.forward).parameters
    for by_states in (True, False) if "inputs_embeds" in takes else (False,):
        traits = _Traits(trial.steps, trial.logits, trial.forms, handed, by_states, trial.dense)
        _KNOWN[model.module] = traits
        try:
            calls, last = record_calls(model, [tokens]), trial.last.clone()
            found = calls.finish(0, last).logits
            untouched = _alike(last, trial.last, rtol=0, atol=0)  # some scale the embeddings they are given in place
            if untouched and trial.called_as(calls.arguments) and _alike(found, trial.logits):
                return traits
        except Exception as error:  # whatever an architecture raises that wants ids, or what a block hands on
            _LOG.debug("model %r, by states: %s: %s", model.name, by_states, error)
        del _KNOWN[model.module]
    raise cannot(model, "its blocks hand on more than hidden states")


def _alike(value: Tensor, other: Tensor, **tolerance: float) -> bool:
    """Whether two tensors are equal, also where a model gives nothing that is finite."""
    return value.shape == other.shape and torch.allclose(value, other, equal_nan=True, **tolerance)
