"""The modules of a model's blocks in turn, and how they stand aside while the model runs what lies around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gpmetric.errors import GpmetricError, ModelError
from gpmetric.models import Model

__all__ = ["EnoughError", "Steps", "cannot", "emptied", "first_of", "its_own", "shaped", "standing_aside", "steps_of"]

Steps = Sequence[tuple[int, nn.Module]]  # each module that is called, with the index of its block


def steps_of(model: Model) -> list[tuple[int, nn.Module]]:
    """A model's steps: one for each block, but for those of several modules."""
    found = []
    for index, block in enumerate(model.blocks):
        modules = block.module if isinstance(block.module, nn.ModuleList) else [block.module]
        found += [(index, module) for module in modules]
    return found


@contextmanager
def standing_aside(steps: Steps, stand_in: Callable[..., Any], *, real: bool = False) -> Iterator[None]:
    """Each module's forward pass is `stand_in(step, args, kwargs)`; with `real` it is given the module's own, too."""
    with ExitStack() as stack:
        for step, (_, module) in enumerate(steps):
            own = (module.forward,) if real else ()

            def forward(*args: Any, step: int = step, own: tuple[Any, ...] = own, **kwargs: Any) -> Any:
                return stand_in(step, args, kwargs, *own)

            vars(module)["forward"] = forward
            stack.callback(vars(module).pop, "forward")
        yield


class EnoughError(Exception):
    """Raised by a hook of ours to leave a forward pass whose rest nobody needs."""


@contextmanager
def its_own(model: Model) -> Iterator[None]:
    """Tells what a model's own forward pass raises, but for a lack of memory and what our hooks raise.

    Raises:
        ModelError: it raises something.
    """
    try:
        yield
    except (GpmetricError, EnoughError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # an architecture's own
        if "memory" in str(error):
            raise
        reason = " ".join(str(error).split())
        raise ModelError(
            f"model {model.name!r} fails in its own forward pass: {type(error).__name__}: {reason:.240}"
        ) from error


def cannot(model: Model, why: str) -> ModelError:
    """That a model is refused."""
    return ModelError(f"model {model.name!r} cannot be run block by block: {why}")


def first_of(output: Any) -> Tensor:
    """Hidden states of what a block returns: Bloom's return a tuple, OpenAI GPT's a list."""
    states: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return states


def emptied(value: Any) -> Any:
    """The same without its tensors, so that who would read one cannot."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(emptied, value)) if type(value) in (tuple, list) else tuple(map(emptied, value))
    return None if isinstance(value, Tensor) else value


def shaped(states: Tensor, rest: Sequence[Any] | None) -> Any:
    """Hidden states as a block returns them."""
    if rest is None:
        return states
    return [states, *rest] if isinstance(rest, list) else (states, *rest)
