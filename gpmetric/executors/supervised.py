"""What executors with workers have in common: order, look-ahead, affinity, and workers that are lost and replaced."""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from bisect import insort
from collections.abc import Generator, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpmetric import errors
from gpmetric.errors import GpmetricError
from gpmetric.executors.contract import Executor, Outcome
from gpmetric.executors.task_clock import OutOfTime

__all__ = ["LOOK_AHEAD", "Message", "Supervised", "Worker"]

_LOG = logging.getLogger(__name__)
LOOK_AHEAD = 64  # candidates per worker that may be finished before a slow one in front of them
PARTING_SECONDS = 2.0  # what a worker that was asked to end may take before it is killed
_MOVES = 20  # of a candidate whose machines were lost, after which it may be to blame
_WAITING = 4  # candidates of every place that a worker may choose from

# ("placed", where) and ("ready",) while a worker starts, ("unstarted", cause) where it cannot; ("refused", name of the
# error, message) of what is raised at once; ("done", value, error, seconds, process, host) or ("bug", exception) of its
# candidate; ("lost", cause) where that may have ended it, ("starved", cause) where it had no memory, ("gone", cause)
# where its machine went.
Message = tuple[Any, ...]


@dataclass(order=True)
class _Task:
    """A candidate on its way; ordered by its index."""

    index: int
    candidate: Any = field(compare=False)
    attempt: int = field(default=1, compare=False)
    moves: int = field(default=0, compare=False)  # how many of its workers went with their machine
    smaller: bool = field(default=False, compare=False)  # for what there was no memory

    @property
    def place(self) -> Hashable:
        return getattr(self.candidate, "place", None)


@dataclass(eq=False)
class Worker:
    """A worker as its supervisor sees it.

    Attributes:
        slot: which of the workers it is; the one that replaces it has the same.
        handle: what the executor knows it by.
        placed: whether it has a machine, from when on its start is timed; `ready` once its function is made.
        places: what it holds, the last used at the end.
    """

    slot: int
    handle: Any
    placed: bool = True
    ready: bool = False
    task: _Task | None = None
    since: float = field(default_factory=time.monotonic)
    places: list[Hashable] = field(default_factory=list)


class Supervised(Executor):
    """Keeps workers busy, takes in their outcomes, and replaces those that are lost.

    A candidate with a `place`, of which a worker holds few at once, goes to a worker that holds it, if one is free.

    Args:
        workers: at most; they start with the first candidates and live until `close`.
        timeout: seconds a candidate may take before its worker is taken for hung; None for no limit.
        patience: so many times what candidates like it took, by the clock, are allowed at least, and so many timeouts
            where none is known; 0 allows the timeout.
        start_timeout: the same of a worker's start.
        attempts: workers a candidate may cost before it is given up with an error, and workers of a slot in a row that
            may die while starting before it is given up.
        held: places that a worker holds at once.
        spread: how many places there are.
    """

    def __init__(
        self,
        workers: int = 1,
        timeout: float | None = None,
        attempts: int = 2,
        start_timeout: float | None = None,
        patience: float = 0.0,
        held: int = 1,
        spread: int = 1,
    ) -> None:
        assert workers >= 1, f"workers must be at least 1, but got {workers}"
        assert attempts >= 1, f"attempts must be at least 1, but got {attempts}"
        self._slots = list(range(workers))
        self._timeout, self._start_timeout, self._attempts = timeout, start_timeout, attempts
        self._patience = patience
        self._held, self._ahead = held, _WAITING * spread if spread > 1 else 1
        self._workers: list[Worker] = []
        self._failed_starts: dict[int, int] = {}  # in a row, by slot

    @property
    def workers(self) -> int:  # type: ignore[override]
        """Workers at most; fewer where some cannot be started."""
        return len(self._slots)

    @abstractmethod
    def _start(self, slot: int) -> Worker:
        """A worker that begins to start."""

    @abstractmethod
    def _send(self, worker: Worker, candidate: Any, smaller: bool) -> bool:
        """Gives it a candidate, to evaluate in less memory or not; whether it was there to take it."""

    @abstractmethod
    def _listen(self, workers: Sequence[Worker], patience: float | None) -> list[tuple[Worker, Message]]:
        """What workers have to say, after waiting so many seconds at most until one has; None waits for ever."""

    @abstractmethod
    def _end(self, worker: Worker, patience: float) -> None:
        """Ends it, at once after so many seconds."""

    def map_ordered(self, candidates: Iterable[Any]) -> Generator[Outcome]:
        """Outcomes in order; candidates are taken ahead of them, as workers become free."""
        assert not any(worker.task for worker in self._workers), "one map_ordered at a time"
        batch = _Batch(candidates)
        try:
            while batch.refill(self.workers * self._ahead, LOOK_AHEAD * self.workers * self._ahead):
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
        while self._workers:
            self._dismiss(self._workers[-1], PARTING_SECONDS)

    def _hire(self, batch: _Batch) -> None:
        """Start workers up to the number there is work for."""
        busy = sum(worker.task is not None for worker in self._workers)
        while len(self._workers) < min(self.workers, busy + len(batch.waiting)):
            taken = {worker.slot for worker in self._workers}
            self._workers.append(self._start(next(slot for slot in self._slots if slot not in taken)))

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
            task = self._chosen(worker, batch.waiting)
            if not self.clock.admits(task.candidate):
                batch.is_late = True
                return
            if not self._send(worker, task.candidate, task.smaller):  # it died while idle: not the candidate's fault
                self._dismiss(worker)
                continue
            batch.waiting.remove(task)
            worker.task, worker.since = task, time.monotonic()
            if task.place is not None:
                others = [place for place in worker.places if place != task.place]
                worker.places = [*others, task.place][-self._held :]

    def _chosen(self, worker: Worker, waiting: Sequence[_Task]) -> _Task:
        """The first task of a place that the worker holds, else of one that nobody does, else the first."""
        elsewhere = {place for one in self._workers if one is not worker for place in one.places}
        held = (task for task in waiting if task.place in worker.places)
        free = (task for task in waiting if task.place not in elsewhere)
        return next(held, None) or next(free, waiting[0])

    def _collect(self, batch: _Batch, patient: bool) -> None:
        """Take in what workers have sent; a patient call waits until there is something to act on."""
        shortest = min(map(self._remaining, self._workers), default=0.0) if patient else 0.0
        shortest = min(shortest, self.clock.left)
        patience = None if shortest == float("inf") else max(shortest, 0.0)
        told = self._listen(self._workers, patience)
        for worker, message in told:
            self._receive(worker, batch, message)
        for worker in [one for one in self._workers if one not in {talking for talking, _ in told}]:
            if self._remaining(worker) <= 0:
                self._lose(worker, batch, f"no answer within {self._limit(worker):g} s")

    def _remaining(self, worker: Worker) -> float:
        """Seconds the worker's candidate, or its start, still has; infinite where no limit is set."""
        return worker.since + self._limit(worker) - time.monotonic()

    def _limit(self, worker: Worker) -> float:
        limit = self._timeout if worker.ready else self._start_timeout
        if limit is None or (worker.ready and worker.task is None) or not worker.placed:
            return float("inf")
        if worker.task is None or not self._patience:
            return limit
        return max(limit, self._patience * (self.clock.expected(worker.task.candidate) or limit))

    def _receive(self, worker: Worker, batch: _Batch, message: Message) -> None:
        kind, *content = message
        if kind == "placed":
            worker.placed, worker.since = True, time.monotonic()
        elif kind == "ready":
            worker.ready, self._failed_starts[worker.slot] = True, 0
        elif kind == "refused":
            name, told = content
            raise getattr(errors, name, GpmetricError)(told)
        elif kind == "unstarted":
            self._lose(worker, batch, content[0])
        elif kind in ("lost", "starved", "gone"):
            self._lose(worker, batch, content[0], kind)
        else:
            task, worker.task = worker.task, None
            assert task is not None
            self.clock.note(task.candidate, time.monotonic() - worker.since)
            if kind == "bug":
                batch.outcomes[task.index] = content[0]
            else:
                value, error, seconds, process, host = content
                batch.outcomes[task.index] = Outcome(value, error, seconds, process, task.attempt, host)

    def _lose(self, worker: Worker, batch: _Batch, cause: str, kind: str = "lost") -> None:
        """Bury a worker; its candidate is tried again or given up, a failed start is counted."""
        seconds, task = time.monotonic() - worker.since, worker.task
        self._dismiss(worker)
        if task is not None:
            moved = kind == "gone" and task.moves < _MOVES
            again = moved or task.attempt < self._attempts
            _LOG.warning("a worker was lost (%s); its candidate is %s", cause, "tried again" if again else "given up")
            if again:
                smaller = task.smaller or kind == "starved"
                retried = _Task(task.index, task.candidate, task.attempt + (not moved), task.moves + moved, smaller)
                insort(batch.waiting, retried)
            else:
                error = f"killed its worker {task.attempt} times ({cause})"
                batch.outcomes[task.index] = Outcome(None, error, seconds, 0, task.attempt, lost=True)
        elif not worker.ready and kind != "gone":
            self._fail_start(worker.slot, cause)

    def _fail_start(self, slot: int, cause: str) -> None:
        failed = self._failed_starts[slot] = self._failed_starts.get(slot, 0) + 1
        if failed < self._attempts:
            return
        told = f"a worker could not start, {failed} times in a row: {cause}"
        if not any(worker.ready for worker in self._workers):
            raise GpmetricError(told)
        self._slots.remove(slot)
        _LOG.warning("%s; %d others go on", told, len(self._slots))

    def _dismiss(self, worker: Worker, patience: float = 0.0) -> None:
        self._workers.remove(worker)
        self._end(worker, patience)


class _Batch:
    """The candidates of one `map_ordered`: those waiting for a worker and the outcomes not yet handed out."""

    def __init__(self, candidates: Iterable[Any]) -> None:
        self.waiting: list[_Task] = []  # by index: a candidate tried again goes first
        self._source: Iterator[Any] | None = iter(candidates)
        self.outcomes: dict[int, Outcome | Exception] = {}  # by index, until their turn
        self.is_late = False  # whether a candidate was not admitted: no other is begun
        self._taken = self._given = 0

    def refill(self, count: int, look_ahead: int) -> bool:
        """Whether anything is left to hand out, after taking candidates until `count` wait."""
        while self._source and len(self.waiting) < count and self._taken - self._given < look_ahead:
            for candidate in self._source:
                self.waiting.append(_Task(self._taken, candidate))
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
