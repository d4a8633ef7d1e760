"""Where a Python function shows its progress: in a notebook by itself, elsewhere where it is asked to."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["progress_console"]


def progress_console(progress: bool | None) -> Console | None:
    """The console that progress goes to, None for none.

    Args:
        progress: True for a notebook or standard error, False for none, None for a notebook alone.
    """
    if progress is False:
        return None
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_jupyter:  # bars there are a widget; without its package there are lines
        return Console(force_terminal=True if find_spec("ipywidgets") else None)
    return console if progress else None
