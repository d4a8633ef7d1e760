"""`gpmetric ledger check` and `free`: what is wrong with a ledger, all of it, and an owner that has ended."""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from gpmetric.errors import InputError
from gpmetric.evolution import driver_lock
from gpmetric.evolution import sqlite_schema as schema
from gpmetric.evolution.consistency import contradictions
from gpmetric.evolution.ledger_requests import LedgerRequest
from gpmetric.evolution.salvage import Found, read_tables
from gpmetric.evolution.sqlite_schema import Refusal, opened
from gpmetric.functions import as_function

__all__ = [
    "check_ledger",
    "check_readable",
    "first_problem",
    "free_ledger",
    "rows_of",
    "run_check",
    "run_free",
]

_LOG = logging.getLogger(__name__)


def run_check(request: LedgerRequest) -> dict[str, Any]:
    """What is wrong with a campaign's ledger, also while a driver has it: `gpmetric.check_ledger("campaign.sqlite")`.

    Args:
        request: names the file, which is read, never written.

    Returns:
        The JSON document of `gpmetric ledger check`: `ok`, `problems` with a line each, rows by table as `counts`, and
        the owner.

    Raises:
        InputError: there is no such file, or it cannot be read.
    """
    path = request.ledger
    check_readable(path)
    document: dict[str, Any] = {"ledger": str(path), "version": None, "counts": {}, "owner": None}
    problems: list[str] = []
    try:
        with opened(path, schema.read_query(path)) as connection, closing(connection):
            connection.execute("BEGIN")  # one snapshot
            version = schema.schema_version(connection)
            document["version"] = version or None
            problems += _problems(connection, version, document)
    except InputError as error:
        problems.append(str(error.args[0]).removeprefix(f"ledger {path} "))
    return document | {"ok": not problems, "problems": problems}


check_ledger = as_function("check_ledger", LedgerRequest, run_check, "ledger")


def check_readable(path: Path) -> None:
    """Refuses what is no file or cannot be read, where there is nothing to check."""
    if not path.exists():
        raise InputError(f"ledger {str(path)!r} does not exist")
    if not path.is_file():
        raise InputError(f"ledger {str(path)!r} is {'a directory' if path.is_dir() else 'not a regular file'}")
    if not os.access(path, os.R_OK):
        raise InputError(f"ledger {str(path)!r} cannot be read: permission denied")


def first_problem(document: Mapping[str, Any]) -> str | None:
    """Why the check failed, None where it did not."""
    problems = document["problems"]
    if not problems:
        return None
    more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
    return f"ledger {document['ledger']} {problems[0]}{more}; gpmetric ledger repair keeps what is sound"


def _problems(connection: sqlite3.Connection, version: int, document: dict[str, Any]) -> Iterator[str]:
    if not version:
        yield "holds no campaign"
        return
    yield from _structure(connection, version)
    try:
        current = connection if version >= schema.SUMMED_SINCE else schema.upgraded_copy(connection, version)
    except sqlite3.Error as error:
        yield f"cannot be upgraded from version {version}: {error}"
        return
    with closing(current):
        found = read_tables(current)
        try:
            document["owner"] = driver_lock.describe_owner(current)
        except (Refusal, sqlite3.Error) as error:
            yield f"does not tell whose it is: {error}"
    document["counts"] = {table: len(one.rows) for table, one in found.items()}
    yield from _bad_rows(found)
    if all(one.whole for one in found.values()):
        settings = {key for (key,) in found["meta"].rows}
        if not settings:
            yield "holds no settings"
        yield from contradictions(rows_of(found), merged="merged" in settings)
    if (owner := document["owner"]) and owner["state"] == "ended":
        yield f"is of process {owner['pid']} on host {owner['host']}, which ended without closing it: --resume goes on"


def _structure(connection: sqlite3.Connection, version: int) -> Iterator[str]:
    try:
        for (verdict,) in connection.execute("PRAGMA integrity_check").fetchall():
            yield from (f"is damaged: {line}" for line in verdict.splitlines() if line != "ok" and line[:3] != "***")
        schema.check_tables(connection, version)
    except (Refusal, sqlite3.Error) as error:
        yield str(error).partition(f" ({schema.RECOVERY})")[0]


def _bad_rows(found: Mapping[str, Found]) -> Iterator[str]:
    for table, one in found.items():
        yield from (f"is damaged: row {place} of {table} does not match its checksum" for place in one.bad)
        if one.error:
            yield f"is damaged: {table} can be read for {len(one.rows)} rows only: {one.error}"


def rows_of(found: Mapping[str, Found]) -> dict[str, list[dict[str, Any]]]:
    """The rows by table."""
    return {table: list(one.rows.values()) for table, one in found.items()}


def run_free(request: LedgerRequest) -> dict[str, Any]:
    """Takes a ledger from a driver that has ended where nothing tells so: `gpmetric.free_ledger("campaign.sqlite")`.

    A driver of this machine is known to live or not. One in another container or on another host is watched for a
    minute, in which it would be heard of.

    Args:
        request: names the file.

    Returns:
        The JSON document of `gpmetric ledger free`: the owner that there was, and whether it was `freed`.

    Raises:
        LedgerError: the owner lives, or the file is no ledger.
    """
    path = request.ledger
    check_readable(path)
    with opened(path, "mode=rw") as connection, closing(connection):
        if not schema.schema_version(connection):
            raise Refusal("holds no campaign")
        owner = driver_lock.describe_owner(connection)
        driver_lock.free(connection, lambda why: _LOG.warning("ledger %s %s: it is watched for a minute", path, why))
    return {"ledger": str(path), "freed": owner is not None, "owner": owner}


free_ledger = as_function("free_ledger", LedgerRequest, run_free, "ledger")
