"""Where a Python function shows its progress: in a notebook by itself, elsewhere where it is asked to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from gpmetric.plain import plain

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["progress_console", "shown"]

_PAUSE = 0.2  # seconds between two looks of a bar


def progress_console(progress: bool | None) -> Console | None:
    """The console that progress goes to, None for none.

    Args:
        progress: True for a notebook or standard error, False for none, None for a notebook alone.
    """
    if progress is False:
        return None
    from rich.console import Console

    console = Console(stderr=True)
    return console if progress or console.is_jupyter else None


@contextmanager
def shown(listener: Callable[[Console], Any], console: Console) -> Iterator[Any]:
    """What a listener of the command line makes of a console, open; in a notebook it has a bar in the cell, too.

    Rich's own bars are off there: they need another package, and lines that are printed beside them are lost.
    """
    with listener(console) as told:
        if not console.is_jupyter or not hasattr(told, "progress"):
            yield told
            return
        bar, lines = _Bar(), told.progress

        def both(what: str, done: int, total: int) -> None:
            bar.show(what, done, total)
            lines(what, done, total)

        told.progress = both
        try:
            yield told
        finally:
            bar.close()


class _Bar:
    """One bar in a cell's output, of the step that was told of last."""

    def __init__(self) -> None:
        from IPython.display import HTML, display

        self._html = HTML
        self._handle = display(HTML(""), display_id=True)
        self._what, self._began, self._told = "", 0.0, 0.0

    def show(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what:
            self._what, self._began = what, now
        elif now - self._told < _PAUSE:
            return
        self._told = now
        left = f", {(now - self._began) * (total - done) / done:.0f} s left" if done else ""
        bar = f'<progress value="{int(done)}" max="{int(total)}"></progress>'
        self._handle.update(self._html(f"{bar} {escape(plain(what))}: {int(done)} of {int(total)}{left}"))

    def close(self) -> None:
        self._handle.update(self._html(""))
