"""Functions named in a table whose modules are imported when they are first called.

Tables of choices are read by the command line, which must answer before torch is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

__all__ = ["lazy"]


def lazy(place: str) -> Callable[..., Any]:
    """A function that stands for another: `lazy("gpmetric.pruning.mask:prune_by_mask")`."""
    module, _, name = place.partition(":")

    def call(*arguments: Any, **options: Any) -> Any:
        return getattr(import_module(module), name)(*arguments, **options)

    return call
