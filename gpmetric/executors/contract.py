"""The contract of executors, which one test holds all of them to.

- An executor applies one function to candidates, and gives one outcome per candidate, in candidate order, each as soon
  as those before it are out. How many workers there are, which of them answers and how often one is lost changes no
  value.
- A GpmetricError of the function is the candidate's error. Any other exception is a bug: it is raised at the
  candidate's turn.
- The function is made in each worker, once. A GpmetricError that says that it cannot be is raised at once; so is what a
  function says as Unusable, which can no longer be applied to anything.
- A worker that dies or hangs, while it starts or at work, is replaced, and its candidate tried again; where it had no
  memory, by a function that is told to be `smaller`, if it can be. A candidate that has cost two workers is given up:
  its outcome names the cause. One whose worker was lost with its machine is not to blame.
- Where no worker can be started, that is a GpmetricError; where some can, the work goes on with those.
- No candidate is begun that the clock does not admit, and what has not ended when time is over is given up: OutOfTime.
- Candidates are taken from their source ahead of their turn, by a bounded number.
- Closed, whatever the reason, an executor leaves no worker behind; nor does a driver that is killed.

Nobody but the driver, which reads the outcomes, writes files that others read.
"""

from __future__ import annotations

import os
import platform
import time
import traceback
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gpmetric.errors import GpmetricError
from gpmetric.executors.task_clock import TaskClock
from gpmetric.plain import plain

__all__ = ["Executor", "Function", "Outcome", "Unusable", "answer", "call", "in_one_line"]

Function = Callable[[Any], Any]


class Unusable(Exception):
    """Why a function cannot be applied to any candidate from now on."""


@dataclass(frozen=True)
class Outcome:
    """What became of one candidate: a value, or the one-line error of a failed one.

    `seconds`, `process`, `attempt` (1 for the first) and `host` describe the call that decided it; `lost` says that
    there was none, as its workers were lost.
    """

    value: Any
    error: str | None
    seconds: float
    process: int
    attempt: int
    host: str = platform.node()
    lost: bool = False


class Executor(AbstractContextManager["Executor"]):
    """Evaluates candidates somewhere.

    Attributes:
        workers: candidates at once, at most.
    """

    workers = 1

    @cached_property
    def clock(self) -> TaskClock:
        """The time that candidates have, without end unless another one is set."""
        return TaskClock()

    @abstractmethod
    def map_ordered(self, candidates: Iterable[Any]) -> Generator[Outcome]:
        """One outcome per candidate in candidate order, each as soon as those before it are out.

        Raises:
            OutOfTime: the clock admits the next candidate no longer, or those begun before it did not end in time.
        """

    def close(self) -> None:
        """End all workers; a second call does nothing."""

    def __exit__(self, *_: object) -> None:
        self.close()


def call(function: Function, candidate: Any) -> tuple[Any, str | None, float]:
    """(value, error, seconds) of one call."""
    started = time.monotonic()
    try:
        value, error = function(candidate), None
    except Unusable as reason:
        raise GpmetricError(str(reason)) from reason
    except GpmetricError as failure:
        value, error = None, str(failure)
    return value, error, time.monotonic() - started


def answer(function: Function, candidate: Any, smaller: bool) -> tuple[Any, ...]:
    """What a worker answers: ("done", value, error, seconds, process, host), ("refused", name, message) of what
    is raised at once, or ("bug", the exception to raise).
    """
    try:
        if smaller and hasattr(function, "smaller"):
            function.smaller()
        return ("done", *call(function, candidate), os.getpid(), platform.node())
    except GpmetricError as refusal:
        return ("refused", type(refusal).__name__, str(refusal))
    except Exception as bug:
        report = RuntimeError(f"a worker raised {in_one_line(bug)}")
        report.add_note("\n".join(map(plain, traceback.format_exc().splitlines())))
        return ("bug", report)


def in_one_line(error: BaseException) -> str:
    """An exception's kind and message."""
    return plain(traceback.format_exception_only(error)[-1].strip())
