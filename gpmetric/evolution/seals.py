"""Seals: that rows are as they were written, told for a whole table at once.

Rows of most tables are only ever added. Under a seal is every row up to one of them, with one digest: to compare that
takes a fifth of the time of their checksums. Where it differs, or where there is none, checksums are compared row by
row, and these alone say that a row is damaged.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from gpmetric.evolution import sqlite_schema as schema
from gpmetric.evolution.sqlite_schema import Refusal

__all__ = ["SEALED", "Seals", "check_rows"]

SEALED = ("generations", "evaluations", "candidates", "measurements", "judgements")
_BEFORE_ALL = -(2**63)  # a rowid


@dataclass
class _Seal:
    """Of one table: the rows so far, the last of which has the rowid `place`."""

    hasher: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))
    place: int = _BEFORE_ALL

    def digest(self, connection: sqlite3.Connection, table: str, last: object = None) -> str:
        """Of the table's rows up to the rowid `last`, or of all."""
        for row in _rows(connection, table, self.place, last):
            self.hasher.update(repr(row).encode())
            self.place = row[0]
        return str(self.hasher.hexdigest())


class Seals:
    """The seals of a ledger, that go on with the rows added since."""

    def __init__(self, of: dict[str, _Seal] | None = None) -> None:
        self._of = {table: _Seal() for table in SEALED} | (of or {})

    def store(self, connection: sqlite3.Connection) -> None:
        """Seals what is there, in the transaction that wrote it."""
        for table, seal in self._of.items():
            digest = seal.digest(connection, table)
            connection.execute("INSERT OR REPLACE INTO seals VALUES (?, ?, ?)", (table, seal.place, digest))


def check_rows(connection: sqlite3.Connection, version: int) -> Seals:
    """Seals that go on with the rows of a file of this version, which has checksums.

    Raises:
        Refusal: a row is not as it was written.
    """
    stored = {} if version < schema.SEALED_SINCE else dict(_pairs(connection))
    seals: dict[str, _Seal] = {}
    for table in schema.TABLES:
        seal = _Seal()
        if table in stored and seal.digest(connection, table, stored[table][0]) == stored[table][1]:
            seals[table] = seal
        after = seals[table].place if table in seals else _BEFORE_ALL
        for row in connection.execute(f"SELECT rowid AS place, * FROM {table} WHERE rowid > ?", (after,)):
            columns = dict(row)
            place = columns.pop("place")
            if not schema.is_sound(table, columns):
                raise Refusal(f"is damaged: row {place} of {table} does not match its checksum ({schema.RECOVERY})")
    return Seals(seals)


def _pairs(connection: sqlite3.Connection) -> Iterator[tuple[str, tuple[object, str]]]:
    for row in connection.execute("SELECT * FROM seals"):
        if row["name"] in SEALED:
            yield row["name"], (row["last"], row["digest"])


def _rows(connection: sqlite3.Connection, table: str, after: int, last: object) -> Iterator[tuple[Any, ...]]:
    """Rows by rowid, which comes first, as tuples: their text tells a number from its digits."""
    cursor = connection.cursor()
    cursor.row_factory = None
    until = "" if last is None else " AND rowid <= ?"
    arguments = (after,) if last is None else (after, last)
    return cursor.execute(f"SELECT rowid, * FROM {table} WHERE rowid > ?{until} ORDER BY rowid", arguments)
