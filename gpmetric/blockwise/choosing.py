"""Layers that choose experts, found by what becomes of their outputs while a model runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Self

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["Choosing"]

_CHOICES = {"topk", "argmax", "argsort", "sort", "multinomial"}
# What leaves a score the score of the same expert: of one tensor, or of it and what is added to it or masks it.
_SAME = {
    "softmax", "log_softmax", "sigmoid", "tanh", "relu", "softplus", "sqrt", "exp", "float", "to", "type", "type_as",
    "view", "reshape", "flatten", "squeeze", "unsqueeze", "contiguous", "clone", "detach", "add", "sub", "mul", "div",
    "truediv", "radd", "rmul", "rsub", "masked_fill", "masked_fill_", "clamp", "getitem", "gather", "scatter", "where",
}  # fmt: skip


class Choosing(TorchFunctionMode):
    """While its context is open, notes which of some layers give the scores of a choice.

    Args:
        layers: by name.

    Attributes:
        found: names of those that do.
    """

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self._layers = layers
        self._scores: dict[int, tuple[Tensor, str]] = {}  # by id, with the tensor, so that no other has the id
        self._hooks = ExitStack()
        self.found: set[str] = set()

    def __enter__(self) -> Self:
        for name, layer in self._layers.items():
            self._hooks.enter_context(
                layer.register_forward_hook(lambda _, args, output, name=name: self._note(name, output))
            )
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hooks.close()
        self._scores.clear()

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").strip("_")
        scored = [self._scores[id(one)][1] for one in args[:3] if id(one) in self._scores]
        if scored and name in _CHOICES:
            self.found.update(scored)
        elif scored and name in _SAME:
            self._note(scored[0], output)
        return output

    def _note(self, name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            self._scores[id(output)] = output, name
