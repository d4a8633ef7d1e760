"""The SQLite file under a ledger: schema and migrations, opening and refusing, ownership, and the form of a column."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from gpmetric.errors import LedgerError

__all__ = [
    "APPLICATION_ID",
    "BUDGET_KEYS",
    "ENCODED",
    "MIGRATIONS",
    "TABLES",
    "VOLATILE",
    "Refusal",
    "claim",
    "explained",
    "is_old",
    "opened",
    "schema_version",
    "settle",
    "to_column",
    "to_json",
    "transaction",
    "upgrade",
]

APPLICATION_ID = 0x67706D74  # "gpmt"
BUDGET_KEYS = frozenset({"generations", "evaluations", "minutes"})  # settings a resumed campaign may change
ENCODED = frozenset({"population", "rng", "losses", "divergences", "value", "seconds"})  # columns of JSON
VOLATILE = frozenset({"seconds", "seconds_score", "seconds_loss", "duration", "host", "process", "attempt", "finished"})
_STALE_SECONDS = 60.0  # heartbeat age at which an owner on another host counts as dead
_RECOVERY = "save what is readable with sqlite3 FILE .recover"
_HINTS = {sqlite3.SQLITE_CORRUPT: _RECOVERY, sqlite3.SQLITE_CANTOPEN: "its folder must exist and be writable"}
TABLES = (
    "meta",
    "generations",
    "evaluations",
    "candidates",
    "measurements",
    "judgements",
    "results",
)  # all but `owner`
# Script n upgrades schema version n to n + 1. Statements are split at ";", so none may contain one.
MIGRATIONS: tuple[str, ...] = (
    f"""
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL CHECK (json_valid(value)));
    CREATE TABLE owner (id INTEGER PRIMARY KEY CHECK (id = 1), host TEXT NOT NULL, pid INTEGER NOT NULL CHECK (pid > 0),
        started TEXT NOT NULL, token TEXT NOT NULL, heartbeat REAL NOT NULL);
    CREATE TABLE generations (number INTEGER PRIMARY KEY, population TEXT NOT NULL CHECK (json_valid(population)),
        rng TEXT NOT NULL CHECK (json_valid(rng)), evaluations INTEGER NOT NULL, hypervolume REAL, finished REAL);
    CREATE TABLE evaluations (id INTEGER PRIMARY KEY, formula TEXT NOT NULL, canonical TEXT, fingerprint TEXT UNIQUE,
        generation INTEGER NOT NULL, status TEXT NOT NULL CHECK (status IN ('done', 'failed')), reason TEXT,
        losses TEXT NOT NULL CHECK (json_valid(losses)), nodes INTEGER, operands TEXT, seconds_score REAL,
        seconds_loss REAL, host TEXT, process INTEGER, attempt INTEGER, finished REAL);
    CREATE TABLE candidates (id INTEGER PRIMARY KEY, generation INTEGER NOT NULL, position INTEGER NOT NULL,
        formula TEXT NOT NULL, canonical TEXT, status TEXT NOT NULL, evaluation INTEGER REFERENCES evaluations (id),
        reason TEXT, UNIQUE (generation, position),
        CHECK (status = 'failed' OR status IN ('evaluated', 'duplicate') AND evaluation IS NOT NULL));
    CREATE INDEX candidates_canonical ON candidates (canonical);
    CREATE TABLE results (name TEXT PRIMARY KEY, value TEXT NOT NULL CHECK (json_valid(value)),
        seconds TEXT NOT NULL CHECK (json_valid(seconds)));
    PRAGMA application_id = {APPLICATION_ID}
    """,
    """
    ALTER TABLE candidates ADD COLUMN opposites TEXT;
    ALTER TABLE candidates ADD COLUMN ranked TEXT;
    ALTER TABLE candidates ADD COLUMN fingerprint TEXT;
    ALTER TABLE evaluations ADD COLUMN sketch TEXT;
    ALTER TABLE evaluations ADD COLUMN divergences TEXT NOT NULL DEFAULT '{}' CHECK (json_valid(divergences));
    CREATE TABLE measurements (generation INTEGER NOT NULL, position INTEGER NOT NULL, rung TEXT NOT NULL,
        value TEXT NOT NULL CHECK (json_valid(value)), error TEXT, duration REAL, process INTEGER, attempt INTEGER,
        PRIMARY KEY (generation, position, rung));
    CREATE TABLE judgements (metric TEXT NOT NULL, target TEXT NOT NULL, split TEXT NOT NULL, calibration TEXT NOT NULL,
        excess REAL, loss REAL, error TEXT, PRIMARY KEY (metric, target, split, calibration))
    """,
)


class Refusal(Exception):
    """Why a ledger cannot be used; becomes a LedgerError naming the file."""


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what goes wrong inside into one line for the user."""
    try:
        yield
    except Refusal as refusal:
        raise LedgerError(f"ledger {path} {refusal}") from None
    except (sqlite3.Error, json.JSONDecodeError) as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the primary one
        hint = "it is a directory" if path.is_dir() else _HINTS.get(code)
        raise LedgerError(f"ledger {path} cannot be used: {error}{f' ({hint})' if hint else ''}") from error


@contextmanager
def opened(path: Path, query: str) -> Iterator[sqlite3.Connection]:
    """Connection that stays open unless the checks made inside fail."""
    uri = f"{path.absolute().as_uri()}?{query}"  # as_uri quotes, so that "a?mode=ro" is only a name
    with explained(path), ExitStack() as stack:
        connection = stack.enter_context(closing(sqlite3.connect(uri, uri=True, isolation_level=None)))
        connection.row_factory = sqlite3.Row
        for setting in ("busy_timeout = 30000", "synchronous = FULL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {setting}")
        yield connection
        stack.pop_all()


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    with connection:  # commits, or rolls back
        connection.execute("BEGIN IMMEDIATE")  # a deferred one fails at once when it upgrades, ignoring busy_timeout
        yield


def schema_version(connection: sqlite3.Connection) -> int:
    """Version of a sound ledger of ours; 0 for a file that holds nothing yet."""
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if application != APPLICATION_ID:
        if application or version or connection.execute("SELECT 1 FROM sqlite_master").fetchone():
            raise Refusal("is a SQLite file of another program")
        return 0
    if version > len(MIGRATIONS):
        raise Refusal(f"has schema version {version}, newer than {len(MIGRATIONS)}: it needs a newer gpmetric")
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise Refusal(f"is damaged: {verdict.splitlines()[-1]} ({_RECOVERY})")
    for table in (*TABLES, "owner") if version == len(MIGRATIONS) else ():
        connection.execute(f"SELECT 1 FROM {table} LIMIT 1")  # a missing one is an error here, not hours later
    return version


def is_old(version: int) -> bool:
    """Whether a schema version needs an upgrade before it can be read."""
    return version < len(MIGRATIONS)


def upgrade(connection: sqlite3.Connection, version: int) -> None:
    """Bring a file of an older schema version, 0 for an empty one, to the newest."""
    for number, script in enumerate(MIGRATIONS[version:], version + 1):
        for statement in f"{script}; PRAGMA user_version = {number}".split(";"):
            connection.execute(statement)  # executescript would commit the transaction first


def settle(connection: sqlite3.Connection, settings: dict[str, Any]) -> None:
    """Store the settings of a new campaign, or the budget of one that is continued."""
    here = {key: to_json(value) for key, value in settings.items()}
    there = dict(connection.execute("SELECT key, value FROM meta").fetchall())
    changed = sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
    foreign = [key for key in changed if key not in BUDGET_KEYS]
    if there and foreign:
        pairs = (f"{key}={there.get(key, '?'):.60} there, {key}={here.get(key, '?'):.60} here" for key in foreign)
        raise Refusal(f"is of another campaign: {'; '.join(pairs)}")
    if changed:
        connection.execute("DELETE FROM results")
        connection.execute("DELETE FROM meta")
        connection.executemany("INSERT INTO meta VALUES (?, ?)", sorted(here.items()))


def claim(connection: sqlite3.Connection) -> str:
    """Token of the ownership just taken, refused while another driver lives."""
    owner = connection.execute("SELECT * FROM owner").fetchone()
    host, pid, token = socket.gethostname(), os.getpid(), os.urandom(16).hex()
    if owner is not None:
        local, age = owner["host"] == host, time.time() - owner["heartbeat"]
        if _start_of(owner["pid"]) in (owner["started"], "running") if local else age <= _STALE_SECONDS:
            rule = "" if local else f", heard of {age:.0f} s ago (free {_STALE_SECONDS:.0f} s after its last heartbeat)"
            raise Refusal(f"is in use by process {owner['pid']} on host {owner['host']}{rule}")
    row = (host, pid, _start_of(pid), token, time.time())
    connection.execute("INSERT OR REPLACE INTO owner VALUES (1, ?, ?, ?, ?, ?)", row)
    return token


def _start_of(pid: int) -> str:
    """Boot and start tick of a process, "" for a dead one, "running" where /proc does not tell."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if status[0] in "ZX" else f"{boot}/{status[19]}"  # fields 3 and 22 of proc(5)
    with suppress(ProcessLookupError):
        with suppress(PermissionError):  # another user's
            os.kill(pid, 0)
        return "running"
    return ""


def to_json(value: Any) -> str:
    """The one JSON text of a value; ValueError when it holds a NaN or infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def to_column(name: str, value: Any) -> Any:
    if isinstance(value, str):  # a reason may quote a file name that is not UTF-8
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    text = to_json(value)  # of a number only to refuse what is not finite
    return text if name in ENCODED else value
