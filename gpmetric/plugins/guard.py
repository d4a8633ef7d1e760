"""Functions of plug-ins, called so that what they raise names them."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import fields, replace
from functools import wraps
from pathlib import Path
from typing import Any

from gpmetric.errors import NO_MEMORY, GpmetricError, PluginError

__all__ = ["guarded", "guarded_row", "told_of"]


def guarded_row(row: Any, told: str, place: str, makers: tuple[str, ...]) -> Any:
    """A row of a table whose functions raise a PluginError that begins with `told` where they raise anything else.

    Args:
        row: a dataclass.
        told: whose row it is.
        place: of the plug-in, whose line is named.
        makers: fields whose functions make objects, the methods of which are guarded, too.
    """
    values = {field.name: getattr(row, field.name) for field in fields(row) if field.init}
    changed = {
        name: guarded(value, f"{told}, {name}", place, deep=name in makers)
        for name, value in values.items()
        if callable(value)
    }
    return replace(row, **changed) if changed else row


def guarded(function: Callable[..., Any], told: str, place: str, *, deep: bool = False) -> Callable[..., Any]:
    """A function that raises a PluginError where the other one raises what is neither ours nor a want of memory."""

    @wraps(function, updated=())
    def call(*arguments: Any, **options: Any) -> Any:
        try:
            found = function(*arguments, **options)
        except (GpmetricError, MemoryError, OverflowError):  # the last is of numbers, and expected of `scalar`
            raise
        except Exception as error:
            if isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY):
                raise
            raise PluginError(f"{told}: {told_of(error, place)}") from error
        return _Watched(found, told, place) if deep else found

    return call


class _Watched:
    """An object that a plug-in made."""

    def __init__(self, whole: Any, told: str, place: str) -> None:
        self._whole, self._told, self._place = whole, told, place

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._whole, name)
        return guarded(found, f"{self._told}.{name}", self._place) if callable(found) else found


def told_of(error: BaseException, place: str) -> str:
    """An exception's kind and message, and the last line of a plug-in's file that it came through."""
    frames = [one for one in traceback.extract_tb(error.__traceback__) if one.filename == place]
    where = f" ({Path(place).name}, line {frames[-1].lineno})" if frames else ""
    return traceback.format_exception_only(error)[-1].strip() + where
