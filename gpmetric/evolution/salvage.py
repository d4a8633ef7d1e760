"""The rows of a ledger that may be damaged: as far as SQLite reads them, and from the pages of the file alone.

A row whose checksum is right is as it was written, wherever it was found: the checksum also tells its table.
"""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpmetric.evolution import sqlite_schema as schema

__all__ = ["Found", "read_pages", "read_tables"]

Row = dict[str, Any]  # cells as SQLite keeps them, by column
_KEYS = {
    "meta": ("key",), "generations": ("number",), "evaluations": ("id",), "candidates": ("id",),
    "measurements": ("generation", "position", "rung"), "judgements": ("metric", "target", "split", "calibration"),
    "results": ("name",),
}  # fmt: skip
_ROWIDS = {"generations": "number", "evaluations": "id", "candidates": "id"}  # columns that are the rowid
_LEAF = 13  # the first byte of a page that holds rows of a table


@dataclass
class Found:
    """What there is of a table.

    Attributes:
        rows: those as they were written, by their keys.
        bad: rowids of those that were changed.
        error: why reading ended before the last row, "" where it did not.
        places: rowids of the rows.
    """

    rows: dict[tuple[Any, ...], Row] = field(default_factory=dict)
    bad: list[int] = field(default_factory=list)
    error: str = ""
    places: set[int] = field(default_factory=set)

    @property
    def whole(self) -> bool:
        """Whether all that was written is there, as far as the table tells."""
        return not self.bad and not self.error

    def take(self, table: str, rowid: int, row: Row) -> None:
        """Takes a row that is as it was written, unless it is there."""
        del row["checksum"]
        key = tuple(row[name] for name in _KEYS[table])
        if self.rows.setdefault(key, row) == row:
            self.places.add(rowid)


def read_tables(connection: sqlite3.Connection) -> dict[str, Found]:
    """What SQLite reads of each table, in the order of its rows."""
    return {table: _read_table(connection, table) for table in schema.TABLES}


def _read_table(connection: sqlite3.Connection, table: str) -> Found:
    found = Found()
    cursor = connection.cursor()
    cursor.row_factory = None
    names = ["checksum", *schema.columns_of(table)]
    try:
        for place, *cells in cursor.execute(
            f"SELECT rowid, {', '.join(names)} FROM {table} NOT INDEXED ORDER BY rowid"
        ):
            row = dict(zip(names, cells, strict=True))
            if schema.is_sound(table, row):
                found.take(table, place, row)
            else:
                found.bad.append(place)
    except (sqlite3.Error, UnicodeDecodeError) as error:
        found.error = str(error)
    return found


def read_pages(path: Path, tables: dict[str, Found]) -> None:
    """Adds to damaged tables the rows that the file's pages hold besides, whatever trees and schema say.

    Not to `results`: an earlier one, deleted since, may stand in a page that is free.

    Source: "Database File Format", sections 1.5 to 2.1, sqlite.org/fileformat2.html.
    """
    names = {table: ["checksum", *schema.columns_of(table)] for table in schema.TABLES}
    wanted = [table for table, found in tables.items() if not found.whole and table != "results"]
    for rowid, cells in _records(path.read_bytes()):
        for table in wanted:
            if len(cells) == len(names[table]):
                row = dict(zip(names[table], cells, strict=True))
                if table in _ROWIDS:
                    row[_ROWIDS[table]] = rowid  # where the record itself holds NULL
                if schema.is_sound(table, row):
                    tables[table].take(table, rowid, row)
                    break


def _records(content: bytes) -> Iterator[tuple[int, list[Any]]]:
    """Rowid and cells of every record in a page of rows; what makes no sense is left out."""
    size = int.from_bytes(content[16:18], "big")
    size = 65536 if size == 1 else size if size >= 512 and not size & (size - 1) else 4096
    for start in range(0, len(content), size):
        page = content[start : start + size]
        head = 100 if start == 0 else 0
        if len(page) < size or page[head] != _LEAF:
            continue
        for place in range(int.from_bytes(page[head + 3 : head + 5], "big")):
            pointer = head + 8 + 2 * place
            try:
                rowid, payload = _payload(content, page, int.from_bytes(page[pointer : pointer + 2], "big"), size)
                yield rowid, _cells(payload)
            except (IndexError, ValueError):  # also UnicodeDecodeError
                continue


def _payload(content: bytes, page: bytes, place: int, size: int) -> tuple[int, bytes]:
    """Rowid and record of a cell, with what of it lies in other pages."""
    length, place = _varint(page, place)
    rowid, place = _varint(page, place)
    if length > len(content):
        raise ValueError("longer than the file")
    here = length
    if length > size - 35:
        least = (size - 12) * 32 // 255 - 23
        here = least + (length - least) % (size - 4)
        here = here if here <= size - 35 else least
    parts = [page[place : place + here]]
    following = int.from_bytes(page[place + here : place + here + 4], "big") if here < length else 0
    while following and here < length:
        start = (following - 1) * size
        parts.append(content[start + 4 : start + size][: length - here])
        if not parts[-1]:
            raise ValueError("beyond the file")
        here += len(parts[-1])
        following = int.from_bytes(content[start : start + 4], "big")
    if here != length:
        raise ValueError("cut short")
    return rowid - 2**64 if rowid >= 2**63 else rowid, b"".join(parts)


def _cells(record: bytes) -> list[Any]:
    """The values of a record."""
    length, place = _varint(record, 0)
    kinds = []
    while place < length:
        kind, place = _varint(record, place)
        kinds.append(kind)
    cells: list[Any] = []
    for kind in kinds:
        taken = (0, 1, 2, 3, 4, 6, 8, 8, 0, 0, 0, 0)[kind] if kind < 12 else (kind - 12) // 2
        raw, place = record[place : place + taken], place + taken
        if len(raw) < taken:
            raise ValueError("cut short")
        cells.append(_cell(kind, raw))
    return cells


def _cell(kind: int, raw: bytes) -> Any:
    if kind in (0, 8, 9):
        return {0: None, 8: 0, 9: 1}[kind]
    if kind == 7:
        return struct.unpack(">d", raw)[0]
    if kind < 7:
        return int.from_bytes(raw, "big", signed=True)
    return raw.decode() if kind % 2 else raw


def _varint(content: bytes, place: int) -> tuple[int, int]:
    """A number of one to nine bytes, and the place behind it."""
    value = 0
    for count in range(9):
        byte = content[place + count]
        if count == 8:
            return value << 8 | byte, place + 9
        value = value << 7 | byte & 127
        if byte < 128:
            return value, place + count + 1
    raise ValueError("no number")
