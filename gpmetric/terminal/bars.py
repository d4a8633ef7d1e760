"""A bar for each step that is under way, from its first moment on; it needs no torch, so that it is there at once."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.spinner import Spinner
from rich.table import Column

from gpmetric.plain import plain
from gpmetric.terminal.figures import duration
from gpmetric.terminal.figures import size as told_size
from gpmetric.terminal.text import Text

__all__ = ["QUIET", "Bars", "opening"]

QUIET = 60  # seconds without a line, where there are no bars
_LOADING = "loading"
_WIDTH = 20  # characters of a bar at most
_LARGE = 10**8  # bytes from which on it is said where they go


class _Left(ProgressColumn):
    """The time left by the mean speed since the step began, as soon as a part of it is done."""

    def render(self, task: Task) -> Text:
        if not task.completed or task.elapsed is None or task.total is None:
            return Text("")
        return Text(f"{duration(task.elapsed * (task.total - task.completed) / task.completed)} left")


class _Display(Progress):
    """Bars, and above them whatever is shown with them."""

    above: RenderableType | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        if self.above is not None:
            yield self.above
        yield self.make_tasks_table(self.tasks)


class Bars:
    """Progress bars with the time left, each there until it is done; a line now and then where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._moving = console.is_terminal and not console.is_dumb_terminal  # else lines take the place of bars
        self._bar = _Display(
            TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
            BarColumn(min(_WIDTH, console.width // 5)), MofNCompleteColumn(), TimeElapsedColumn(), _Left(),
            console=console, transient=True, expand=True, redirect_stdout=not console.stderr, disable=not self._moving,
        )  # fmt: skip
        self._tasks: dict[str, Any] = {}
        self._began: dict[str, tuple[float, int]] = {}  # when, and how much was done by then
        self._latest: dict[str, int] = {}
        self._told = time.monotonic()

    def __enter__(self) -> Self:
        self._tasks[_LOADING] = self._bar.add_task(_LOADING, total=None)  # torch, for seconds
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def progress(self, what: str, done: int, total: int) -> None:
        if _LOADING in self._tasks:
            self._bar.remove_task(self._tasks.pop(_LOADING))
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(plain(what), total=total)
        now = time.monotonic()
        if done == 0 or done < self._latest.get(what, done + 1):  # it begins, maybe again
            self._began[what] = now, done
            self._bar.reset(self._tasks[what])
        self._bar.update(self._tasks[what], completed=done, total=total, visible=done < total)
        self._latest[what] = done
        began, first = self._began[what]
        if not self._moving and now - self._told > QUIET and began < now:
            self._told = now
            left = duration((now - began) * (total - done) / max(1, done - first))
            self._console.print(Text(f"{what}: {done} of {total}, about {left} left"), soft_wrap=True)

    def stores(self, what: str, folder: Path, size: int) -> None:
        if size > _LARGE:
            self._console.print(Text(f"{what}: {told_size(size)} go to {folder}"), soft_wrap=True)

    def _forget(self) -> None:
        """Takes away what is unfinished of the steps before."""
        for task in self._tasks.values():
            self._bar.remove_task(task)
        self._tasks.clear()
        self._latest.clear()


@contextmanager
def opening(console: Console, told: str) -> Iterator[Live]:
    """Says at once what has begun, on a terminal; something moves until the context is left or it is stopped.

    Args:
        console: of standard error, which says nothing where it is no terminal; standard output is left alone.
        told: the line.
    """
    if console.is_terminal:
        console.print(Text(told), soft_wrap=True)
    moving = Spinner("dots", Text(_LOADING))
    with Live(moving, console=console, transient=True, redirect_stdout=False, refresh_per_second=10) as shown:
        yield shown
