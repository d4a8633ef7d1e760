"""Texts by what the command line calls them: a file, a folder or a pattern of shards, standard input, the Hub."""

from __future__ import annotations

import glob
import os
import shutil
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from gpmetric.data.files import open_file
from gpmetric.data.hub import open_hub
from gpmetric.data.tables import recognise
from gpmetric.data.text import GAP, Source, Text
from gpmetric.errors import DataError

__all__ = ["STDIN", "read_text"]

STDIN = "-"
_HELD = 2**25  # characters of a text that are held; a text that is longer is read as far as it is needed
_SUFFIXES = (".txt", ".text", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")  # of shards in a folder


def read_text(source: str, column: str | None = None) -> Text:
    """The text behind a source as given on the command line.

    Args:
        source: a path, a pattern such as `c4/*.json.gz`, - for standard input, or `hf:owner/name[/config]:split`.
        column: of tables; "text" where None.

    Raises:
        DataError: nothing there, not readable as text, no such column, or empty.
    """
    opened = _open(source, column)
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    size = 0
    for begins, part in opened.parts():
        if begins and spans:
            pieces.append(GAP)
            size += len(GAP)
        first = size if begins else spans.pop()[0]
        pieces.append(part)
        size += len(part)
        spans.append((first, size))
        if size > _HELD:
            break
    content = "".join(pieces)
    if not content.strip():
        raise DataError(f"text {source!r} is empty")
    return Text(source, content, tuple(spans), opened if size > _HELD else None)


def _open(source: str, column: str | None) -> Source:
    if source.startswith("hf:"):
        return open_hub(source, column)
    if source == STDIN:
        return _Input.read(column)
    paths = _shards(source)
    if len(paths) == 1 and str(paths[0]) == source:
        return recognise(open_file(source, paths[0]), column)
    return _Shards([recognise(open_file(str(path), path), column) for path in paths])


def _shards(source: str) -> list[Path]:
    """The files that a path or pattern stands for, by name.

    Raises:
        DataError: there are none.
    """
    path = Path(source)
    if os.path.isdir(path):
        inside = sorted(one for one in path.rglob("*") if one.is_file() and not one.name.startswith("."))
        found = [one for one in inside if one.name.lower().removesuffix(".gz").endswith(_SUFFIXES)]
        if not found:
            raise DataError(f"text {source!r} is a folder without a shard: {', '.join(_SUFFIXES)}, or those with .gz")
        return found
    if "\0" in source or not glob.has_magic(source) or os.path.lexists(path):
        return [path]
    found = [one for one in map(Path, sorted(glob.glob(source, recursive=True))) if one.is_file()]
    if not found:
        raise DataError(f"text {source!r}: no file is called so")
    return found


@dataclass(frozen=True)
class _Shards:
    """Sources one behind the other."""

    shards: Sequence[Source]

    def parts(self) -> Iterator[tuple[bool, str]]:
        return (part for shard in self.shards for part in shard.parts())

    def documents(self) -> Sequence[str]:
        return _Chain([shard.documents() for shard in self.shards])


class _Chain(Sequence[str]):
    """Sequences one behind the other."""

    def __init__(self, sequences: Sequence[Sequence[str]]) -> None:
        self._sequences = sequences
        self._ends = list(accumulate(map(len, sequences)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        number = bisect_right(self._ends, index)
        if index < 0 or number == len(self._ends):
            raise IndexError(index)
        return self._sequences[number][index - (self._ends[number - 1] if number else 0)]


@dataclass(frozen=True)
class _Input:
    """Standard input, kept in a temporary file so that it can be read again."""

    inside: Source
    kept: Any = field(repr=False)  # closed, and gone, with this

    @classmethod
    def read(cls, column: str | None) -> _Input:
        kept = tempfile.NamedTemporaryFile()  # noqa: SIM115
        shutil.copyfileobj(sys.stdin.buffer, kept)
        kept.flush()
        return cls(recognise(open_file(STDIN, Path(kept.name)), column), kept)

    def parts(self) -> Iterator[tuple[bool, str]]:
        return self.inside.parts()

    def documents(self) -> Sequence[str]:
        return self.inside.documents()
