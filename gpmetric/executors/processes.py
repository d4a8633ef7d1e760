"""Supervised worker processes of this machine.

Pebble 5.2 and loky 3.7 were tried for this. In loky, one process that dies takes all candidates with it and ends the
executor. In pebble, a failing start does the same, without its cause; a process at work outlives a killed driver; and a
process is not known by its place, as one is that has a device of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import ModuleType
from typing import Any

from gpmetric.errors import GpmetricError
from gpmetric.executors.contract import Function, answer, in_one_line
from gpmetric.executors.supervised import PARTING_SECONDS, Message, Supervised, Worker
from gpmetric.plain import log_plainly

__all__ = ["LocalProcesses"]

_STARTING = threading.Lock()  # of another thread that starts a process, too


class LocalProcesses(Supervised):
    """Spawned worker processes.

    Args:
        factory: module-level function, run once in each worker; `factory(*arguments)` returns the function that is
            applied to every candidate. Threads per worker are its business.
        arguments: plain data, as are candidates and values.
        devices: what `CUDA_VISIBLE_DEVICES` is for the workers, one after the other; all that are visible here if none.
        supervision: as of `Supervised`, `workers` above all.
    """

    def __init__(
        self,
        factory: Callable[..., Function],
        arguments: tuple[Any, ...] = (),
        workers: int = 1,
        timeout: float | None = None,
        devices: Sequence[str] = (),
        **supervision: Any,
    ) -> None:
        super().__init__(workers, timeout, **supervision)
        self._factory, self._arguments, self._devices = factory, arguments, devices

    def _start(self, slot: int) -> Worker:
        environment = {}
        if self._devices:
            environment["CUDA_VISIBLE_DEVICES"] = self._devices[slot % len(self._devices)]
        return Worker(slot, (*_started(self._factory, self._arguments, environment), _memory_kills()))

    def _send(self, worker: Worker, candidate: Any, smaller: bool) -> bool:
        try:
            worker.handle[1].send((candidate, smaller))
        except OSError:
            return False
        return True

    def _listen(self, workers: Sequence[Worker], patience: float | None) -> list[tuple[Worker, Message]]:
        by_connection = {worker.handle[1]: worker for worker in workers}
        talking = wait(list(by_connection), patience)
        return [(worker, _heard(*worker.handle)) for one, worker in by_connection.items() if one in talking]

    def close(self) -> None:
        for worker in self._workers:
            worker.handle[0].terminate()
        super().close()

    def _end(self, worker: Worker, patience: float) -> None:
        process, connection, _ = worker.handle
        connection.close()
        process.join(patience)
        process.kill()
        process.join()


def _heard(process: SpawnProcess, connection: Connection, kills: int) -> Message:
    try:
        message: Message = connection.recv()
    except (EOFError, OSError):
        process.join(PARTING_SECONDS)
        return _ended(process.exitcode, kills)
    return message


def _ended(code: int | None, kills: int) -> Message:
    """How a process ended; `kills` is what `_memory_kills` gave when it began."""
    if code is None or code >= 0:
        return ("lost", f"exit code {code}")
    if -code == signal.SIGKILL and _memory_kills() > kills:
        return ("starved", "out of memory")
    return ("lost", signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}")


def _memory_kills() -> int:
    """How many processes Linux has ended for want of memory, in whatever container; 0 where it does not tell."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("oom_kill ")).split()[1])
    return 0


def _started(
    factory: Callable[..., Function], arguments: tuple[Any, ...], environment: Mapping[str, str]
) -> tuple[SpawnProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, factory, arguments), daemon=True)
    with _STARTING, _interrupts_held(), _main_hidden(), _told(environment):
        process.start()
    theirs.close()  # so that the end of the worker is the end of the pipe
    return process, ours


@contextmanager
def _main_hidden() -> Iterator[None]:
    """Keep a process that starts inside from running the caller's script once more, which may have no main guard."""
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


@contextmanager
def _told(environment: Mapping[str, str]) -> Iterator[None]:
    """Variables that a process that starts inside has, before it imports anything."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


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
            connection.send(("unstarted", in_one_line(bug)))
            return
        connection.send(("ready",))
        while True:
            connection.send(answer(function, *connection.recv()))


def _die_with_parent() -> None:
    """End this process when its driver ends in any way, also in the middle of a candidate."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
