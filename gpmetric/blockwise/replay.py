"""Running a model block by block: how it calls its blocks is recorded once, then they are called one at a time.

Nothing else is needed of an architecture: what lies before the blocks and behind them is run by the model itself, with
the blocks standing aside, so that no attention mask, position embedding or norm is rebuilt by hand.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gpmetric.blockwise.shelf import Shelf
from gpmetric.errors import ModelError
from gpmetric.models import Model
from gpmetric.placement import FRONT, HEAD

__all__ = ["BlockCalls", "check_blocks", "record_calls"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword, without the hidden states


@dataclass(frozen=True)
class BlockCalls:
    """What the first block reads, and the arguments each block is called with, batch by batch.

    Attributes:
        model: whose calls they are.
        batches: token windows [batch, length] each, on the model's device.
        hidden: [batch, length, width] each, on the model's device.
        arguments: by block and batch.
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
        """The output of one block on one batch."""
        positional, keyword = self.arguments[index][number]
        return _first(self.model.blocks[index].module(states, *positional, **keyword))

    def finish(self, number: int, states: Tensor, **options: Any) -> Any:
        """What the model makes of what its last block gives for a batch, as transformers returns it.

        Args:
            number: of the batch.
            states: [batch, length, width].
            options: for the model's forward, `logits_to_keep` or `labels` for instance.
        """
        forms = _traits(self.model).forms
        with self.model.at_hand(HEAD), _standing_aside(self.model, lambda index, *_: _shaped(states, forms[index])):
            if _traits(self.model).by_states:
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
    return _record(model, batches, None if shelf is None else _Shelved(shelf, model.device))


@torch.no_grad()
def _record(model: Model, batches: Sequence[Tensor], hidden: MutableSequence[Tensor] | None) -> BlockCalls:
    """`record_calls`, `hidden` taking what the first block reads."""
    forms = _traits(model).forms
    recorded = _Recorded(len(model.blocks), hidden)

    def stand_in(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _shaped(recorded.keep(index, args, kwargs), forms[index])

    placed = [batch.to(model.device) for batch in batches]
    with model.at_hand(FRONT), _standing_aside(model, stand_in):
        for batch in placed:
            model.module.base_model(input_ids=batch, use_cache=False)  # without the output layer
    return BlockCalls(model, placed, recorded.hidden, recorded.arguments)


@torch.no_grad()
def check_blocks(model: Model) -> None:
    """Refuses a model that is not causal, or whose blocks cannot be run one after the other.

    It is run on two windows of two tokens as it is, and block by block.

    Raises:
        ModelError: a prediction depends on the token after it (BERT and its kin load as causal models): a perplexity
            would mean nothing; or blocks hand each other more than hidden states.
    """
    first, second = _traits(model).logits[:, 0].float()
    if not torch.allclose(first, second, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise ModelError(f"model {model.name!r} is not causal: its prediction after a token depends on the next one")


@dataclass(frozen=True)
class _Traits:
    """What is known of a model once it has been run.

    Attributes:
        logits: of the windows that it was run on.
        forms: by block, what it returns behind the hidden states, without tensors; None where it returns them alone.
        by_states: whether the end of the model may be run without token ids.
    """

    logits: Tensor
    forms: list[tuple[Any, ...] | None]
    by_states: bool


_KNOWN: WeakKeyDictionary[nn.Module, _Traits] = WeakKeyDictionary()


def _traits(model: Model) -> _Traits:
    if model.module not in _KNOWN:
        _KNOWN[model.module] = _examine(model)
    return _KNOWN[model.module]


@torch.no_grad()
def _examine(model: Model) -> _Traits:
    """Runs the model on two windows as it is, then as `BlockCalls` does, and compares."""
    tokens = torch.tensor([[0, 0], [0, 1]], device=model.device)
    real, last = _Recorded(len(model.blocks)), [torch.empty(0)]
    forms: list[tuple[Any, ...] | None] = [None] * len(model.blocks)
    follows = True

    def run(index: int, args: tuple[Any, ...], kwargs: dict[str, Any], forward: Callable[..., Any]) -> Any:
        nonlocal follows
        states = real.keep(index, args, kwargs)
        follows &= index == 0 or _alike(states, last[0], rtol=0, atol=0)
        with model.at_hand(index):
            output = forward(*args, **kwargs)
        forms[index] = _emptied(output[1:]) if isinstance(output, tuple) else None
        last[0] = _first(output).clone()
        return output

    with model.at_hand(FRONT), model.at_hand(HEAD), _standing_aside(model, run, real=True):
        logits: Tensor = model.module(input_ids=tokens, use_cache=False).logits
    follows &= all(len(arguments) == 1 for arguments in real.arguments)  # each is called, and once
    takes = inspect.signature(model.module.forward).parameters
    for by_states in (True, False) if "inputs_embeds" in takes else (False,):
        _KNOWN[model.module] = traits = _Traits(logits, forms, by_states)
        try:
            calls = record_calls(model, [tokens])
            found = calls.finish(0, last[0]).logits
        except Exception:  # whatever an architecture raises that wants ids, or what a block hands on
            continue
        if follows and _same(calls.arguments, real.arguments) and _alike(found, logits):
            return traits
    del _KNOWN[model.module]
    raise ModelError(f"model {model.name!r} cannot be run block by block: its blocks hand on more than hidden states")


class _Recorded:
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


class _Shelved(MutableSequence[Tensor]):
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


@contextmanager
def _standing_aside(model: Model, stand_in: Callable[..., Any], *, real: bool = False) -> Iterator[None]:
    """Each block's forward pass is `stand_in(index, args, kwargs)`; with `real` it is given the block's own, too."""
    with ExitStack() as stack:
        for index, block in enumerate(model.blocks):
            own = (block.module.forward,) if real else ()

            def forward(*args: Any, index: int = index, own: tuple[Any, ...] = own, **kwargs: Any) -> Any:
                return stand_in(index, args, kwargs, *own)

            vars(block.module)["forward"] = forward
            stack.callback(vars(block.module).pop, "forward")
        yield


def _shaped(states: Tensor, rest: tuple[Any, ...] | None) -> Any:
    """Hidden states as a block returns them."""
    return states if rest is None else (states, *rest)


def _emptied(value: Any) -> Any:
    """The same without its tensors, so that who would read one cannot."""
    if isinstance(value, tuple):
        return tuple(map(_emptied, value))
    return None if isinstance(value, Tensor) else value


def _separate(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    if "hidden_states" not in kwargs:
        raise ModelError(f"the model cannot be run block by block: its blocks take {', '.join(kwargs) or 'nothing'}")
    return kwargs["hidden_states"], (), {name: value for name, value in kwargs.items() if name != "hidden_states"}


def _share(value: Any, reference: Any) -> Any:
    """`value`, with tensors equal to those at the same place in `reference` replaced by the latter."""
    if isinstance(value, Tensor) and isinstance(reference, Tensor):
        return reference if _same(value, reference) else value
    if isinstance(value, tuple) and isinstance(reference, tuple) and len(value) == len(reference):
        return tuple(_share(*pair) for pair in zip(value, reference, strict=True))
    if isinstance(value, dict) and isinstance(reference, dict):
        return {name: _share(item, reference.get(name)) for name, item in value.items()}
    return value


def _same(value: Any, other: Any) -> bool:
    """Whether two arguments are equal, tensor by tensor; of what has no tensors, whether they are of one type."""
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return value.shape == other.shape and value.dtype == other.dtype and torch.equal(value, other)
    if isinstance(value, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(value) == len(other) and all(_same(*pair) for pair in zip(value, other, strict=True))
    if isinstance(value, dict) and isinstance(other, dict):
        both = value.keys() & other.keys()
        # mixtures hand on `output_router_logits`, a flag that is off, from the whole model alone
        off = all(
            (value | other)[name] is None or (value | other)[name] is False for name in value.keys() ^ other.keys()
        )
        return off and all(_same(value[name], other[name]) for name in both)
    return type(value) is type(other)


def _alike(value: Tensor, other: Tensor, **tolerance: float) -> bool:
    """Whether two tensors are equal, also where a model gives nothing that is finite."""
    return value.shape == other.shape and torch.allclose(value, other, equal_nan=True, **tolerance)


def _first(output: Any) -> Tensor:
    states: Tensor = output[0] if isinstance(output, tuple) else output  # Bloom's blocks return a tuple
    return states
