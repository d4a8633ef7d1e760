"""Whose a ledger is: one driver at a time, and one that died is taken over.

A driver of this boot of this machine and this namespace of process numbers is known by its number and when it started,
whatever the host is called; one of another boot or host by its heartbeat. A number of another namespace (a container's)
tells nothing here: such a driver is respected until somebody who knows that it has ended frees the ledger.
"""

from __future__ import annotations

import os
import socket
import sqlite3
import time
from contextlib import suppress
from pathlib import Path

from gpmetric.evolution.sqlite_schema import Refusal

__all__ = ["beat", "claim", "release"]

_STALE_SECONDS = 60.0  # heartbeat age at which an owner on another host counts as dead


def claim(connection: sqlite3.Connection) -> str:
    """Token of the ownership just taken, refused while another driver lives."""
    owner = connection.execute("SELECT * FROM owner").fetchone()
    host, pid, token = socket.gethostname(), os.getpid(), os.urandom(16).hex()
    if owner is not None and (rule := _respected(owner, host)) is not None:
        raise Refusal(f"is in use by process {owner['pid']} on host {owner['host']}{rule}")
    row = (host, pid, _start_of(pid), token, time.time())
    connection.execute("INSERT OR REPLACE INTO owner VALUES (1, ?, ?, ?, ?, ?)", row)
    return token


def _respected(owner: sqlite3.Row, host: str) -> str | None:
    """What is to be said of an owner that lives, or may live; None for one that has ended."""
    boot, _, namespace = _place(owner["started"])
    here, _, ours = _place(_start_of(os.getpid()))
    age = time.time() - owner["heartbeat"]
    if namespace and boot == here:
        if namespace != ours:
            told = f"in another container or namespace of process numbers, heard of {age:.0f} s ago"
            return f', {told}; if it has ended, free the ledger with: sqlite3 FILE "DELETE FROM owner"'
    elif owner["host"] != host or namespace:
        rule = f", heard of {age:.0f} s ago (free {_STALE_SECONDS:.0f} s after its last heartbeat)"
        return rule if age <= _STALE_SECONDS else None
    return "" if _start_of(owner["pid"]) in (owner["started"], "running") else None


def _place(started: str) -> tuple[str, str, str]:
    """Boot and namespace that a start is of, "" where they are not known: of an earlier version, or without /proc."""
    return started.rpartition("/")[0].partition("/")


def beat(connection: sqlite3.Connection, token: str) -> None:
    """Tells other hosts that this driver lives; refused when it is no longer the owner."""
    statement = "UPDATE owner SET heartbeat = ? WHERE token = ?"
    if not connection.execute(statement, (time.time(), token)).rowcount:
        raise Refusal("was taken over by another driver")


def release(connection: sqlite3.Connection, token: str) -> None:
    """Gives the ownership up."""
    with suppress(sqlite3.Error):  # a full disk must not hide what led here
        connection.execute("DELETE FROM owner WHERE token = ?", (token,))


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
