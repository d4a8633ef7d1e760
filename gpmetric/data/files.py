"""A file of text, plain or gzip, and what is told of one that cannot be read."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from gpmetric.errors import DataError

__all__ = ["BOM", "TextFile", "first_line", "open_file"]

BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_OTHERS = {b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip"}
_HEAD = 2**16  # bytes that a format is recognised by


@dataclass(frozen=True)
class TextFile:
    """A file that text is read from.

    Attributes:
        name: that messages call it by.
        path: where it is.
        compressed: whether it is gzip.
        head: its first bytes, decompressed, without a byte-order mark.
    """

    name: str
    path: Path
    compressed: bool
    head: bytes

    @property
    def suffix(self) -> str:
        """The last suffix of its name, without that of gzip, in lower case."""
        return Path(self.name.lower().removesuffix(".gz")).suffix

    def open(self) -> IO[bytes]:
        """Its bytes, decompressed."""
        return cast("IO[bytes]", gzip.open(self.path)) if self.compressed else self.path.open("rb")

    def open_text(self, newline: str | None = None) -> io.TextIOWrapper:
        """Its characters, without a byte-order mark; `newline` as of `open`."""
        return io.TextIOWrapper(self.open(), encoding="utf-8-sig", newline=newline)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Tells of what goes wrong inside.

        Raises:
            DataError: naming the file, and the place where that is known.
        """
        where = f"text file {self.name!r}"
        try:
            yield
        except UnicodeDecodeError as error:
            raise DataError(f"{where} is not UTF-8: {error.reason} at byte {self._bad_byte(error)}") from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{where} is not whole as gzip: {first_line(error)}") from error
        except OSError as error:
            raise DataError(f"{where} cannot be read: {error.strerror or error}") from error

    def _bad_byte(self, error: UnicodeDecodeError) -> int:
        """Where the first byte that is not UTF-8 stands: a decoder counts from the piece that it was given."""
        place = 0
        with self.open() as file:
            for line in file:
                try:
                    line.decode()
                except UnicodeDecodeError as found:
                    return place + found.start
                place += len(line)
        return error.start


def open_file(name: str, path: Path) -> TextFile:
    """A file with its first bytes read.

    Raises:
        DataError: there is none, it cannot be read, or it is compressed by other means than gzip.
    """
    file = TextFile(name, path, False, b"")
    with file.reading():
        if not path.is_file():
            raise DataError(f"text file {name!r} does not exist")
        with path.open("rb") as raw:
            magic = raw.read(6)
        for start, kind in _OTHERS.items():
            if magic.startswith(start):
                raise DataError(f"text file {name!r} is compressed as {kind}; plain and gzip are read")
        file = TextFile(name, path, magic.startswith(_GZIP), b"")
        with file.open() as opened:
            head = opened.read(_HEAD)
    return TextFile(name, path, file.compressed, head.removeprefix(BOM))


def first_line(error: Exception) -> str:
    """The first line of what an error, or the one behind it, says."""
    cause = error.__cause__ or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]
