"""The formats of a text file, recognised by its first bytes: plain text, JSON Lines, a JSON array, CSV, Parquet.

A row of a table is a document; a plain text is one.
"""

from __future__ import annotations

import csv
import json
import re
import tempfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import IO, Any

from gpmetric.data.files import BOM, TextFile, first_line
from gpmetric.data.text import Source
from gpmetric.errors import DataError

__all__ = ["checked", "gathered", "recognise"]

_CHUNK = 2**20  # characters of a plain text that are read at once
_OBJECT = re.compile(rb'\s*\{\s*("(?:[^"\\]|\\.)*"\s*:|\}\s*$)')
_ARRAY = re.compile(rb'\s*\[\s*\{\s*"')
_SEPARATED = (".csv", ".tsv")
_COLUMN = "text"  # where --text-column is not given


def recognise(file: TextFile, column: str | None) -> Source:
    """What reads a file; a suffix counts only where bytes cannot tell.

    Args:
        file: with its first bytes.
        column: of a table; "text" where None. It makes a CSV of a file whose first line holds that name.
    """
    told, head = column or _COLUMN, file.head
    is_json = file.suffix in (".json", ".jsonl", ".ndjson")
    if head.startswith(b"PAR1") or file.suffix == ".parquet":
        return _Parquet(file, told)
    if _ARRAY.match(head) or (is_json and head.lstrip().startswith(b"[")):
        return _JsonArray(file, told)
    if is_json or _is_object(head):
        return _JsonLines(file, told)
    if file.suffix in _SEPARATED or (column is not None and column in _fields(head)):
        return _Csv(file, told)
    return _Plain(file)


def _is_object(head: bytes) -> bool:
    """Whether the first line is a JSON object, or the beginning of one that is longer than what was read."""
    if not _OBJECT.match(head):
        return False
    line, end, _ = head.partition(b"\n")
    if not end:
        return True
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _fields(head: bytes) -> list[str]:
    line = head.partition(b"\n")[0].decode(errors="replace")
    return next(csv.reader([line.strip("\r")], delimiter=_delimiter(line)), [])


def _delimiter(line: str) -> str:
    return max(",\t;", key=line.count)


def checked(text: Any, name: str, place: str, column: str) -> str:
    """A value of a column that is a string.

    Raises:
        DataError: it is not, or holds half of a surrogate pair, which JSON can spell and no tokenizer takes.
    """
    if not isinstance(text, str):
        raise DataError(f"text {name!r}, {place}: column {column!r} holds {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"text {name!r}, {place}: half of a surrogate pair at character {error.start}") from error
    return text


def gathered(source: Source) -> Sequence[str]:
    """The documents of a source, all in memory."""
    documents: list[list[str]] = []
    for begins, part in source.parts():
        documents.append([part]) if begins else documents[-1].append(part)
    return ["".join(parts) for parts in documents]


@dataclass(frozen=True)
class _Plain:
    file: TextFile

    def parts(self) -> Iterator[tuple[bool, str]]:
        with self.file.reading(), self.file.open_text() as text:
            begins = True
            while part := text.read(_CHUNK):
                yield begins, part
                begins = False

    def documents(self) -> Sequence[str]:
        return gathered(self)


@dataclass(frozen=True)
class _JsonLines:
    file: TextFile
    column: str

    def parts(self) -> Iterator[tuple[bool, str]]:
        with self.file.reading(), self.file.open() as lines:
            for number, line in enumerate(lines, start=1):
                content = line.removeprefix(BOM) if number == 1 else line
                if content.strip():
                    yield True, self.text_of(content, f"line {number}")

    def text_of(self, line: bytes, place: str) -> str:
        """The text in a line."""
        row = _parse(f"{self.file.name!r}, {place}", line.decode())
        return _text_of_row(row, self.file.name, place, self.column)

    def documents(self) -> Sequence[str]:
        return _Lines(self)


class _Lines(Sequence[str]):
    """Lines of JSON at random: where each begins is known, and gzip is decompressed once, to a temporary file."""

    def __init__(self, table: _JsonLines) -> None:
        self._table = table
        self._places: list[tuple[int, int]] = []  # (line, byte)
        place, compressed = 0, table.file.compressed
        self._file: IO[bytes]
        with table.file.reading(), table.file.open() as lines:
            self._file = tempfile.TemporaryFile() if compressed else table.file.path.open("rb")  # noqa: SIM115
            for number, line in enumerate(lines, start=1):
                if line.removeprefix(BOM).strip():
                    self._places.append((number, place))
                place += len(line)
                if compressed:
                    self._file.write(line)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        number, place = self._places[index]
        self._file.seek(place)
        with self._table.file.reading():
            return self._table.text_of(self._file.readline().removeprefix(BOM), f"line {number}")

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


@dataclass(frozen=True)
class _JsonArray:
    file: TextFile
    column: str

    def parts(self) -> Iterator[tuple[bool, str]]:
        with self.file.reading(), self.file.open_text() as text:
            rows = _parse(f"{self.file.name!r}", text.read())
        for number, row in enumerate(rows, start=1):
            yield True, _text_of_row(row, self.file.name, f"row {number}", self.column)

    def documents(self) -> Sequence[str]:
        return gathered(self)


@dataclass(frozen=True)
class _Csv:
    file: TextFile
    column: str

    def parts(self) -> Iterator[tuple[bool, str]]:
        name = self.file.name
        csv.field_size_limit(2**31 - 1)  # a document may be longer than the 128 KiB that are allowed by default
        with self.file.reading(), self.file.open_text(newline="") as text:
            first = text.readline()
            rows = csv.reader(chain([first], text), delimiter=_delimiter(first), strict=True)
            try:
                names = next(rows, [])
                if first:
                    _check_column(name, self.column, names)
                for row in rows:
                    if not row:
                        continue
                    if len(row) != len(names):
                        counts = f"{len(row)} fields, but the first line has {len(names)}"
                        raise DataError(f"text {name!r}, line {rows.line_num}: {counts}")
                    yield True, row[names.index(self.column)].replace("\r\n", "\n")
            except csv.Error as error:
                raise DataError(f"text {name!r}, line {rows.line_num}: not CSV: {error}") from error

    def documents(self) -> Sequence[str]:
        return gathered(self)


@dataclass(frozen=True)
class _Parquet:
    file: TextFile
    column: str

    def parts(self) -> Iterator[tuple[bool, str]]:
        groups = _RowGroups(self)
        return ((True, text) for group in range(groups.groups) for text in groups.texts(group))

    def documents(self) -> Sequence[str]:
        return _RowGroups(self)


class _RowGroups(Sequence[str]):
    """Rows of a Parquet file at random, of which one row group is in memory."""

    def __init__(self, table: _Parquet) -> None:
        import pyarrow  # 0.3 s to import: only tables need it
        from pyarrow.parquet import ParquetFile

        self._table, name = table, table.file.name
        try:
            self._file = ParquetFile(table.file.path)
            names = self._file.schema_arrow.names
        except (pyarrow.ArrowException, OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
            raise DataError(f"text file {name!r} is not Parquet: {first_line(error)}") from error
        _check_column(name, table.column, names)
        self.groups = self._file.num_row_groups
        sizes = [self._file.metadata.row_group(group).num_rows for group in range(self.groups)]
        self._firsts = [sum(sizes[:group]) for group in range(self.groups + 1)]
        self.texts = lru_cache(maxsize=1)(self._texts)

    def _texts(self, group: int) -> list[str]:
        """The documents of a row group."""
        import pyarrow

        name, column = self._table.file.name, self._table.column
        try:
            rows = self._file.read_row_group(group, columns=[column]).column(column).to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
            raise DataError(f"text file {name!r} is not Parquet: {first_line(error)}") from error
        return [checked(row, name, f"row {number}", column) for number, row in enumerate(rows, self._firsts[group] + 1)]

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        group = bisect_right(self._firsts, index) - 1
        return self.texts(group)[index - self._firsts[group]]


def _parse(place: str, content: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"text {place}: not JSON: {str(error).replace('line 1 column', 'column')}") from error


def _text_of_row(row: Any, name: str, place: str, column: str) -> str:
    if not isinstance(row, dict):
        raise DataError(f"text {name!r}, {place}: an object with {column!r} is wanted, but got {type(row).__name__}")
    if column not in row:
        raise DataError(f"text {name!r}, {place}: no {column!r}; it has {', '.join(row) or 'nothing'} (--text-column)")
    return checked(row[column], name, place, column)


def _check_column(name: str, column: str, names: Sequence[str]) -> None:
    if column not in names:
        raise DataError(f"text {name!r} has no column {column!r}; it has {', '.join(names)} (--text-column)")
    if names.count(column) > 1:
        raise DataError(f"text {name!r} has {names.count(column)} columns {column!r}: one is wanted (--text-column)")
