"""Where candidates are evaluated: in this process, or in supervised local worker processes.

Every executor gives the same outcomes in the same order; only the driver, which reads them, writes the ledger.
"""

from __future__ import annotations

import heapq
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import ModuleType
from typing import Any

from gpmetric import errors
from gpmetric.errors import GpmetricError
from gpmetric.evolution.task_clock import OutOfTime, TaskClock
from gpmetric.plain import log_plainly, plain

__all__ = ["Executor", "LocalProcesses", "Outcome", "Serial"]

LOOK_AHEAD = 64  # candidates per worker that may be finished before a slow one in front of them
PARTING_SECONDS = 2.0  # what a worker that was asked to end may take before it is killed

_HIDING = threading.Lock()

Function = Callable[[Any], Any]


@dataclass(frozen=True)
class Outcome:
    """What became of one candidate: a value, or the one-line error of a failed one.

    `seconds`, `process` and `attempt` (1 for the first) describe the call that decided it.
    """

    value: Any
    error: str | None
    seconds: float
    process: int
    attempt: int


class Executor(AbstractContextManager["Executor"]):
    """Evaluates candidates somewhere.

    A GpmetricError of the function is the candidate's error; any other exception is a bug and is raised at the
    candidate's turn.

    Attributes:
        workers: candidates at once, at most.
    """

    workers = 1

    @cached_property
    def clock(self) -> TaskClock:
        """The time that candidates have, without end unless another one is set."""
        return TaskClock()

    @abstractmethod
    def map_ordered(self, candidates: Iterable[Any]) -> Iterator[Outcome]:
        """One outcome per candidate in candidate order, each as soon as those before it are out.

        Raises:
            OutOfTime: the clock admits the next candidate no longer, or those begun before it did not end in time.
        """

    def close(self) -> None:
        """End all workers; a second call does nothing."""

    def __exit__(self, *_: object) -> None:
        self.close()


class Serial(Executor):
    """Calls the function in this process."""

    def __init__(self, function: Function) -> None:
        self._function = function

    def map_ordered(self, candidates: Iterable[Any]) -> Iterator[Outcome]:
        """Outcomes in order; a candidate is taken only when its outcome is asked for."""
        for candidate in candidates:
            if not self.clock.admits(candidate):
                raise OutOfTime
            started = self.clock.now()
            value, error, seconds = _call(self._function, candidate)
            self.clock.note(candidate, self.clock.now() - started)
            yield Outcome(value, error, seconds, os.getpid(), 1)


class LocalProcesses(Executor):
    """Spawned worker processes, watched: one that dies or hangs is replaced and its candidate tried again.

    Args:
        factory: module-level function, run once in each worker; `factory(*arguments)` returns the function that is
            applied to every candidate. Threads per worker are its business.
        arguments: plain data, as are candidates and values.
        workers: processes at most; they start with the first candidates and live until `close`.
        timeout: seconds a candidate may take before its worker is killed; None for no limit. Starting is not limited.
        attempts: workers a candidate may cost before it is given up with an error, and workers in a row that may
            die while starting before that is a GpmetricError. A GpmetricError of the factory is raised at once.
    """

    def __init__(
        self,
        factory: Callable[..., Function],
        arguments: tuple[Any, ...] = (),
        workers: int = 1,
        timeout: float | None = None,
        attempts: int = 2,
    ) -> None:
        assert workers >= 1, f"workers must be at least 1, but got {workers}"
        assert attempts >= 1, f"attempts must be at least 1, but got {attempts}"
        self._factory, self._arguments = factory, arguments
        self.workers, self._timeout, self._attempts = workers, timeout, attempts
        self._workers: list[_Worker] = []
        self._failed_starts = 0

    def map_ordered(self, candidates: Iterable[Any]) -> Iterator[Outcome]:
        """Outcomes in order; candidates are taken ahead of them, as workers become free."""
        assert not any(worker.task for worker in self._workers), "one map_ordered at a time"
        batch = _Batch(candidates, LOOK_AHEAD * self.workers)
        try:
            while batch.refill(self.workers):
                self._hire(batch)
                self._assign(batch)
                self._check_time(batch)
                self._collect(batch, patient=not batch.is_ready())
                self._assign(batch)  # workers just freed are busy while the caller looks at the outcome
                if batch.is_ready():
                    yield batch.pop()
        finally:
            for worker in [worker for worker in self._workers if worker.task]:  # the caller gave up
                self._dismiss(worker)

    def close(self) -> None:
        for worker in self._workers:
            worker.process.terminate()
        while self._workers:
            self._dismiss(self._workers[-1], PARTING_SECONDS)

    def _hire(self, batch: _Batch) -> None:
        """Start workers up to the number there is work for."""
        busy = sum(worker.task is not None for worker in self._workers)
        while len(self._workers) < min(self.workers, busy + len(batch.waiting)):
            self._workers.append(_start(self._factory, self._arguments))

    def _check_time(self, batch: _Batch) -> None:
        """Gives up where the time is over, or where those that were begun are out and no other may be begun."""
        busy = any(worker.task for worker in self._workers)
        over = self.clock.left <= 0 or (batch.is_late and not busy)
        if over and not batch.is_ready():
            raise OutOfTime

    def _assign(self, batch: _Batch) -> None:
        for worker in [worker for worker in self._workers if worker.ready and worker.task is None]:
            if not batch.waiting or batch.is_late:
                return
            if not self.clock.admits(batch.waiting[0].candidate):
                batch.is_late = True
                return
            task = heapq.heappop(batch.waiting)
            try:
                worker.connection.send(task.candidate)
            except OSError:  # it died while idle, which is not the candidate's fault
                heapq.heappush(batch.waiting, task)
                self._dismiss(worker)
            else:
                worker.task, worker.since = task, time.monotonic()

    def _collect(self, batch: _Batch, patient: bool) -> None:
        """Take in what workers have sent; a patient call waits until there is something to act on."""
        shortest = min(map(self._remaining, self._workers), default=0.0) if patient else 0.0
        shortest = min(shortest, self.clock.left)
        patience = None if shortest == float("inf") else max(shortest, 0.0)
        talking = wait([worker.connection for worker in self._workers], patience)
        for worker in list(self._workers):
            if worker.connection in talking:
                self._receive(worker, batch)
            elif self._remaining(worker) <= 0:
                self._lose(worker, batch, f"no answer within {self._timeout:g} s")

    def _remaining(self, worker: _Worker) -> float:
        """Seconds the worker's candidate still has; infinite when it has none or no limit is set."""
        if self._timeout is None or worker.task is None:
            return float("inf")
        return worker.since + self._timeout - time.monotonic()

    def _receive(self, worker: _Worker, batch: _Batch) -> None:
        try:
            kind, *content = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join(PARTING_SECONDS)
            self._lose(worker, batch, f"exit code {worker.process.exitcode}")
            return
        if kind == "ready":
            worker.ready, self._failed_starts = True, 0
        elif kind == "refused":
            name, message = content
            raise getattr(errors, name, GpmetricError)(message)
        elif kind == "unstarted":
            self._lose(worker, batch, content[0])
        else:
            task, worker.task = worker.task, None
            assert task is not None
            self.clock.note(task.candidate, time.monotonic() - worker.since)
            batch.outcomes[task.index] = content[0] if kind == "bug" else _outcome(worker, task, *content)

    def _lose(self, worker: _Worker, batch: _Batch, cause: str) -> None:
        """Bury a worker; its candidate is tried again or given up, a failed start is counted."""
        seconds, task = time.monotonic() - worker.since, worker.task
        self._dismiss(worker)
        if task is not None and task.attempt < self._attempts:
            heapq.heappush(batch.waiting, _Task(task.index, task.candidate, task.attempt + 1))
        elif task is not None:
            error = f"killed its worker {task.attempt} times ({cause})"
            batch.outcomes[task.index] = _outcome(worker, task, None, error, seconds)
        elif not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= self._attempts:
                raise GpmetricError(f"a worker could not start, {self._failed_starts} times in a row: {cause}")

    def _dismiss(self, worker: _Worker, patience: float = 0.0) -> None:
        self._workers.remove(worker)
        worker.connection.close()
        worker.process.join(patience)
        worker.process.kill()
        worker.process.join()


@dataclass(order=True)
class _Task:
    """A candidate on its way; ordered by its index."""

    index: int
    candidate: Any = field(compare=False)
    attempt: int = field(default=1, compare=False)


@dataclass(eq=False)
class _Worker:
    """A worker process as its supervisor sees it; `ready` once its factory is done."""

    process: SpawnProcess
    connection: Connection
    ready: bool = False
    task: _Task | None = None
    since: float = 0.0


def _outcome(worker: _Worker, task: _Task, value: Any, error: str | None, seconds: float) -> Outcome:
    return Outcome(value, error, seconds, worker.process.pid or 0, task.attempt)


class _Batch:
    """The candidates of one `map_ordered`: those waiting for a worker and the outcomes not yet handed out."""

    def __init__(self, candidates: Iterable[Any], look_ahead: int) -> None:
        self.waiting: list[_Task] = []  # a heap: a candidate tried again goes first
        self._source: Iterator[Any] | None = iter(candidates)
        self._look_ahead = look_ahead
        self.outcomes: dict[int, Outcome | Exception] = {}  # by index, until their turn
        self.is_late = False  # whether a candidate was not admitted: no other is begun
        self._taken = self._given = 0

    def refill(self, count: int) -> bool:
        """Whether anything is left to hand out, after taking candidates until `count` wait."""
        while self._source and len(self.waiting) < count and self._taken - self._given < self._look_ahead:
            for candidate in self._source:
                heapq.heappush(self.waiting, _Task(self._taken, candidate))
                self._taken += 1
                break
            else:
                self._source = None
        return self._given < self._taken

    def is_ready(self) -> bool:
        """Whether the next outcome in order is there."""
        return self._given in self.outcomes

    def pop(self) -> Outcome:
        """The next outcome; raises in its place what the function raised by mistake."""
        outcome = self.outcomes.pop(self._given)
        self._given += 1
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def _call(function: Function, candidate: Any) -> tuple[Any, str | None, float]:
    """(value, error, seconds) of one call."""
    started = time.monotonic()
    try:
        value, error = function(candidate), None
    except GpmetricError as failure:
        value, error = None, str(failure)
    return value, error, time.monotonic() - started


def _start(factory: Callable[..., Function], arguments: tuple[Any, ...]) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, factory, arguments), daemon=True)
    with _interrupts_held(), _main_hidden():
        process.start()
    theirs.close()  # so that the end of the worker is the end of the pipe
    return _Worker(process, ours)


@contextmanager
def _main_hidden() -> Iterator[None]:
    """Keep a process that starts inside from running the caller's script once more, which may have no main guard."""
    with _HIDING:  # of another thread that starts one, which would take the empty module for the caller's
        own = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = own


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Keep Ctrl-C and SIGUSR1 from a process that starts inside: it inherits the mask, ours comes after."""
    resource_tracker.ensure_running()  # otherwise start() does, and lifts the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(connection: Connection, factory: Callable[..., Function], arguments: tuple[Any, ...]) -> None:
    """Body of a worker: make the function, then answer candidates until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    log_plainly()
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with suppress(EOFError, OSError):
        try:
            function = factory(*arguments)
        except GpmetricError as refusal:
            connection.send(("refused", type(refusal).__name__, str(refusal)))
            return
        except Exception as bug:
            connection.send(("unstarted", _in_one_line(bug)))
            return
        connection.send(("ready",))
        while True:
            connection.send(_answer(function, connection.recv()))


def _die_with_parent() -> None:
    """End this process when its driver ends in any way, also in the middle of a candidate."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _answer(function: Function, candidate: Any) -> tuple[Any, ...]:
    try:
        return ("done", *_call(function, candidate))
    except Exception as bug:
        report = RuntimeError(f"a worker raised {_in_one_line(bug)}")
        report.add_note("\n".join(map(plain, traceback.format_exc().splitlines())))
        return ("bug", report)


def _in_one_line(error: BaseException) -> str:
    return plain(traceback.format_exception_only(error)[-1].strip())
