"""Whose a ledger is: one driver at a time, and one that died is taken over.

A driver of this boot of this machine and this namespace of process numbers is known by its number and when it started,
whatever the host is called. One of another boot or host is known by its heartbeat, which a thread of it changes as long
as it lives: whoever wants the ledger watches for a while, by a clock of its own, whether it changes. What clocks of two
hosts say is never compared. A number of another namespace (a container's) tells nothing here: such a driver is
respected until somebody who knows that it has ended frees the ledger.
"""

from __future__ import annotations

import os
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpmetric.evolution.sqlite_schema import Refusal, from_column, opened, transaction
from gpmetric.interrupts import check_stop

__all__ = [
    "STALE_SECONDS",
    "Heart",
    "Owner",
    "Unheard",
    "Unseen",
    "beat",
    "claim",
    "describe_owner",
    "free",
    "lives",
    "release",
    "watch",
]

STALE_SECONDS = 60.0  # without a heartbeat, after which an owner on another host counts as dead
_BEAT_SECONDS = 10.0  # between two heartbeats, several of which may be late
_LOOK_SECONDS = 1.0

Owner = tuple[str, float]  # token and heartbeat


class Unheard(Refusal):
    """The owner is elsewhere, and has to be watched before anything can be said of it."""


class Unseen(Refusal):
    """The owner is in another namespace of process numbers: it may be stopped for long, and go on."""


def claim(connection: sqlite3.Connection, silent: Owner | None = None) -> str:
    """Token of the ownership just taken, refused while another driver lives.

    Args:
        connection: in a transaction.
        silent: an owner that `watch` has not heard of.

    Raises:
        Unheard: the owner is elsewhere, and another one than `silent`.
        Refusal: it lives, or may live.
    """
    _check_owner(connection, silent)
    pid, token = os.getpid(), os.urandom(16).hex()
    row = (socket.gethostname(), pid, _start_of(pid), token, time.time())
    connection.execute("INSERT OR REPLACE INTO owner VALUES (1, ?, ?, ?, ?, ?)", row)
    return token


def _check_ended(owner: Mapping[str, Any], silent: Owner | None) -> None:
    told = f"is in use by process {owner['pid']} on host {owner['host']}"
    alive = lives(owner)
    if alive is not None:
        if alive:
            raise Refusal(told)
        return
    boot, _, namespace = _place(owner["started"])
    if namespace and boot == _place(_start_of(os.getpid()))[0]:
        age = time.time() - owner["heartbeat"]  # the same clock
        told += f", in another container or namespace of process numbers, heard of {age:.0f} s ago"
        raise Unseen(f"{told}; if it has ended, gpmetric ledger free FILE")
    if (owner["token"], owner["heartbeat"]) != silent:
        raise Unheard(told)


def free(connection: sqlite3.Connection, told: Callable[[str], None]) -> None:
    """Takes a ledger from an owner that has ended, or that is elsewhere and silent for `STALE_SECONDS`.

    Args:
        connection: in no transaction.
        told: called with why the owner is watched, before that takes its time.

    Raises:
        Refusal: the owner lives, or is heard of.
    """
    silent = None
    try:
        _check_owner(connection, None)
    except (Unheard, Unseen) as elsewhere:
        told(str(elsewhere))
        silent = watch(connection)
    with transaction(connection):
        if silent is None or _owner(connection) != silent:
            _check_owner(connection, silent)  # another one since
        connection.execute("DELETE FROM owner")


def _check_owner(connection: sqlite3.Connection, silent: Owner | None) -> None:
    owner = _row(connection)
    if owner is not None:
        _check_ended(owner, silent)


def _row(connection: sqlite3.Connection) -> dict[str, Any] | None:
    row = connection.execute("SELECT * FROM owner").fetchone()
    return None if row is None else {name: from_column(name, value) for name, value in dict(row).items()}


def describe_owner(connection: sqlite3.Connection) -> dict[str, Any] | None:
    """Process, host and state of the owner, "alive", "ended" or "elsewhere"; None where there is none."""
    owner = _row(connection)
    if owner is None:
        return None
    state = "ended"
    try:
        _check_ended(owner, None)
    except (Unheard, Unseen):
        state = "elsewhere"
    except Refusal:
        state = "alive"
    return {"pid": owner["pid"], "host": owner["host"], "state": state}


def watch(connection: sqlite3.Connection) -> Owner | None:
    """The owner, not heard of for `STALE_SECONDS` of this process's clock; None where there is none any more.

    Args:
        connection: in no transaction, so that the owner can write.

    Raises:
        Refusal: it is heard of.
    """
    first, began = _owner(connection), time.monotonic()
    while first is not None and time.monotonic() - began <= STALE_SECONDS:
        check_stop()
        time.sleep(_LOOK_SECONDS)
        if (now := _owner(connection)) is None:
            return None
        if now != first:
            row = connection.execute("SELECT * FROM owner").fetchone()
            raise Refusal(f"is in use by process {row['pid']} on host {row['host']}, which is heard of")
    return first


def _owner(connection: sqlite3.Connection) -> Owner | None:
    row = connection.execute("SELECT token, heartbeat FROM owner").fetchone()
    return row and (row["token"], row["heartbeat"])


def _place(started: str) -> tuple[str, str, str]:
    """Boot and namespace that a start is of, "" where they are not known: of an earlier version, or without /proc."""
    return started.rpartition("/")[0].partition("/")


def beat(connection: sqlite3.Connection, token: str) -> None:
    """Tells other hosts that this driver lives; refused when it is no longer the owner."""
    # greater each time, also where the clock was put back
    statement = "UPDATE owner SET heartbeat = max(?, heartbeat + 0.001) WHERE token = ?"
    if not connection.execute(statement, (time.time(), token)).rowcount:
        raise Refusal("was taken over by another driver")


class Heart:
    """A thread that beats beside whatever takes long, until it is stopped or another driver has the ledger."""

    def __init__(self, path: Path, token: str) -> None:
        self._path, self._token = path, token
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpmetric-heart", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends it; a second call does nothing."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(_BEAT_SECONDS):
            with suppress(Exception):  # whatever is wrong with the file, who writes next tells of it
                self._beat()

    def _beat(self) -> None:
        with opened(self._path, "mode=rw") as connection:
            try:
                with transaction(connection):
                    beat(connection, self._token)
            finally:
                connection.close()


def release(connection: sqlite3.Connection, token: str) -> None:
    """Gives the ownership up."""
    with suppress(sqlite3.Error):  # a full disk must not hide what led here
        connection.execute("DELETE FROM owner WHERE token = ?", (token,))


def lives(owner: Mapping[str, Any]) -> bool | None:
    """Whether the driver of a row lives; None where it is of another host or namespace, so that nothing here tells."""
    boot, _, namespace = _place(owner["started"])
    here, _, ours = _place(_start_of(os.getpid()))
    if (namespace, boot) != (ours, here) if namespace else owner["host"] != socket.gethostname():
        return None
    return _start_of(owner["pid"]) in (owner["started"], "running")


def _start_of(pid: int) -> str:
    """Boot, namespace and start tick of a process, "" for a dead one, "running" where /proc does not tell."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()  # the same in all containers of a machine
        namespace = os.readlink("/proc/self/ns/pid")
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if status[0] in "ZX" else f"{boot}/{namespace}/{status[19]}"  # fields 3 and 22 of proc(5)
    with suppress(ProcessLookupError):
        with suppress(PermissionError):  # another user's
            os.kill(pid, 0)
        return "running"
    return ""
