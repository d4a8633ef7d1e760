"""`gpmetric ledger repair`: what is sound of a damaged ledger, in a new one that `discover --resume` goes on with."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from gpmetric.errors import GpmetricError, LedgerError
from gpmetric.evolution import driver_lock
from gpmetric.evolution import sqlite_schema as schema
from gpmetric.evolution.consistency import sound_part
from gpmetric.evolution.ledger_check import check_readable, rows_of
from gpmetric.evolution.ledger_requests import LedgerRepairRequest
from gpmetric.evolution.salvage import Found, read_pages, read_tables
from gpmetric.evolution.sqlite_schema import Refusal, opened
from gpmetric.functions import as_function

__all__ = ["repair_ledger", "run_repair"]


def run_repair(request: LedgerRepairRequest) -> dict[str, Any]:
    """Saves what is sound of a ledger: `gpmetric.repair_ledger("campaign.sqlite", output="repaired.sqlite")`.

    A row is sound where its checksum is right, wherever in the file it is found. With a damaged row goes what depends
    on it: the campaign replays from the last generation of which nothing is missing. Measurements stay, so that what
    is drawn again is not measured again.

    Args:
        request: names the ledger, which is not written, and the new one.

    Returns:
        The JSON document of `gpmetric ledger repair`: rows by table `kept`, `damaged` and `dropped`, and the
        generation that the campaign goes on with.

    Raises:
        LedgerError: nothing can be saved.
    """
    assert request.output is not None
    path = request.ledger
    check_readable(path)
    with tempfile.TemporaryDirectory(prefix="gpmetric-") as folder:
        copy = Path(folder) / "ledger.sqlite"
        for suffix in ("", "-wal"):
            if (part := Path(f"{path}{suffix}")).is_file():
                try:
                    shutil.copyfile(part, f"{copy}{suffix}")
                except OSError as error:
                    raise GpmetricError(f"ledger {part} cannot be copied to {folder!r}: {error.strerror}") from error
        found, why, owner = _read(copy)
    if owner is not None and owner["state"] == "alive":
        raise LedgerError(f"ledger {path} is in use by process {owner['pid']} on host {owner['host']}, which writes it")
    if ("merged",) in found["meta"].rows:
        raise LedgerError(f"ledger {path} is of several campaigns: repair these, and merge them again")
    if not found["meta"].rows:
        raise LedgerError(f"ledger {path} {why or 'has no settings'}: it holds no row that is sound")
    tables = rows_of(found)
    kept = sound_part(tables, {table: one.whole for table, one in found.items()})
    # They were written in the order of their names, so that one lost leaves a gap; of the last, --resume tells.
    settings_lost = found["meta"].places != set(range(1, len(tables["meta"]) + 1))
    if settings_lost:
        kept["meta"] = [*kept["meta"], {"key": "lost", "value": "true"}]
    schema.create(request.output, kept)
    return {
        "ledger": str(path),
        "output": str(request.output),
        "kept": {table: len(rows) for table, rows in kept.items()},
        "damaged": {table: len(one.bad) for table, one in found.items() if one.bad},
        "unreadable": {table: one.error for table, one in found.items() if one.error},
        "dropped": {table: lost for table, rows in tables.items() if (lost := len(rows) - len(kept[table])) > 0},
        "settings_lost": settings_lost,
        "next_generation": len(kept["generations"]),
    }


repair_ledger = as_function("repair_ledger", LedgerRepairRequest, run_repair, "ledger")


def _read(copy: Path) -> tuple[dict[str, Found], str, dict[str, Any] | None]:
    """The rows of a copy, read by SQLite, and where that is not all, from its pages; what SQLite says; the owner."""
    found, why = {table: Found(error="SQLite cannot read the file") for table in schema.TABLES}, ""
    owner: dict[str, Any] | None = None
    try:
        with opened(copy, "mode=rw") as connection, closing(connection):
            version = schema.VERSION
            try:
                version = schema.schema_version(connection)
            except Refusal as refusal:
                why = str(refusal)
            if not version:
                raise Refusal("holds no campaign")
            if version < schema.SUMMED_SINCE:
                with closing(schema.upgraded_copy(connection, version)) as upgraded:
                    return read_tables(upgraded), "", None
            found = read_tables(connection)
            with suppress(Refusal, sqlite3.Error):
                owner = driver_lock.describe_owner(connection)
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except LedgerError as error:
        why = why or str(error).removeprefix(f"ledger {copy} ")
    if not all(one.whole for one in found.values()):
        read_pages(copy, found)
        for one in found.values():
            one.rows = dict(sorted(one.rows.items()))
    return found, why, owner
