"""The file of a search that a killed one goes on from: JSON Lines, its settings first, then a record a line.

A line that a kill cut short is dropped. A search is not gone on with under other settings than it was begun with. Every
line ends with a checksum of what stands before it, and one process at a time has the file.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, Self

from gpmetric.errors import GpmetricError, InputError
from gpmetric.files import checksum, locked
from gpmetric.plugins import in_use

__all__ = ["Journal", "check_ledger", "read_journal"]

_LOG = logging.getLogger(__name__)
_SUM = re.compile(rb', "checksum": "([0-9a-f]{16})"}', re.ASCII)  # that ends a line
_SUM_BYTES = 33
_WINDOWS = "--sequence-length, --sampling, --bos, --shuffle, --seed"
_OPTIONS = {  # setting -> the options that it comes from, where they are called otherwise
    "calibration": f"--calibration, --samples, {_WINDOWS}",
    "search": f"--calibration, --search, --search-windows, {_WINDOWS}",
    "layers": "--include, --exclude",
    "searched": "--sparsity",
    "equal": "--format",
}


def check_ledger(path: Path | None, resume: bool) -> None:
    """Refuses a --ledger that a search could not begin or go on with, before anything is computed.

    Raises:
        InputError: it is there without --resume, --resume stands alone, or another process has it.
    """
    if resume and path is None:
        raise InputError("--resume needs --ledger FILE")
    with suppress(OSError):  # as where the file is missing; what cannot be written is told with the other outputs
        if path is None or not path.is_file():
            return
        with path.open("rb") as file:
            if not locked(file.fileno()):
                raise _in_use(f"--ledger {str(path)!r}")
        if not resume and path.stat().st_size:
            raise InputError(f"--ledger {str(path)!r} exists: go on with --resume, or name another")


def _in_use(where: str) -> InputError:
    return InputError(f"{where} is in use by another process, which must end first")


class Journal:
    """Hands over the records of a file that is there, and adds to it.

    Args:
        path: the file; None keeps nothing.
        command: whose search it is, `allocate` for instance.
        settings: JSON values, all that determines the search but its length.
        adopted: names of settings where what the file says holds.
        resume: go on with the file if it is there.

    Attributes:
        settings: with those adopted.

    Raises:
        InputError: the file is there without `resume`, cannot be read, is damaged, is another search's, or is in use by
            another process; it is then as it was.
    """

    def __init__(
        self,
        path: Path | None,
        command: str,
        settings: Mapping[str, Any],
        *,
        adopted: Collection[str] = (),
        resume: bool = False,
    ) -> None:
        self.settings: dict[str, Any] = json.loads(json.dumps({**settings, **in_use("plugin")}, sort_keys=True))
        self._command, self._adopted = command, adopted
        self._where = f"--ledger {str(path)!r}"
        self._file: FileIO | None = None
        if path is None:
            return
        try:
            if not resume and path.exists() and path.stat().st_size:
                raise InputError(f"{self._where} exists: go on with --resume, or name another")
            self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
            end = self._opened(self._file, resume)
        except OSError as error:
            self.close()
            raise InputError(f"{self._where} cannot be used: {error.strerror or error}") from error
        except InputError:
            self.close()
            raise
        self._begins = not end

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def take(self, record: dict[str, Any]) -> bool:
        """Takes a whole record of the file; says whether a search can go on behind it.

        What follows the last such record is dropped. What is raised for a record of no use is told as a damaged line.
        """
        raise NotImplementedError

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Adds a record, which is in the file when this returns, the settings before the first.

        A search that ends before has left nothing to go on with, and begins again.

        Raises:
            GpmetricError: the file cannot be written.
        """
        if self._file is None:
            return
        lines = [self.settings, record] if self._begins else [record]
        left, place = b"".join(_summed(line) + b"\n" for line in lines), self._file.tell()
        try:
            while left:
                left = left[self._file.write(left) :]
            self._begins = False
        except OSError as error:
            with suppress(OSError):  # else the next command drops what was cut short
                self._file.seek(place)
                self._file.truncate()
            raise GpmetricError(f"{self._where} cannot be written: {error.strerror or error}") from error

    def _opened(self, file: FileIO, resume: bool) -> int:
        """Locks the file, reads it and cuts it off behind the last record to go on from; that place."""
        if not locked(file.fileno()):
            raise _in_use(self._where)
        content = file.read()
        if content and not resume:  # another process has made it just now
            raise InputError(f"{self._where} exists: go on with --resume, or name another")
        end = self._read(content)
        file.seek(end)
        file.truncate()
        return end

    def _read(self, content: bytes) -> int:
        """Takes the settings and every whole record; the place behind the last one that a search can go on from."""
        head, *lines = content.split(b"\n")[:-1] or [b""]  # what follows the last line end was cut short
        if not head:
            if not _summed(self.settings).startswith(content):  # not our first line, cut short
                raise self._foreign()
            return 0
        record, whole = _unsummed(head)
        if whole is False:
            raise self._damaged(1)
        self._check_settings(record)
        covered = bool(whole)
        if not covered:
            _LOG.warning("%s is of an earlier format: damage to lines without a checksum is not seen", self._where)
        end = place = len(head) + 1
        for number, line in enumerate(lines, start=2):
            place += len(line) + 1
            record, whole = _unsummed(line)
            if whole is False or (covered and not whole):
                raise self._damaged(number)
            try:
                end = place if self.take(_parsed(record)) else end
            except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
                raise self._damaged(number) from error
        return end

    def _check_settings(self, line: bytes) -> None:
        try:
            found = _parsed(line)
        except (ValueError, TypeError, RecursionError) as error:
            raise self._foreign() from error
        self.settings |= {name: found.get(name) for name in self._adopted}
        for name in sorted(found.keys() | self.settings.keys()):
            there, here = found.get(name), self.settings.get(name)
            if there != here:
                options = f" ({_OPTIONS[name]})" if name in _OPTIONS else ""
                told = f"{name} is {there!r:.60} there, {here!r:.60} here{options}"
                raise InputError(f"{self._where} is another search's: {told}")

    def _damaged(self, line: int) -> InputError:
        return InputError(f"{self._where} is damaged at line {line}")

    def _foreign(self) -> InputError:
        return InputError(f"{self._where} is no ledger of gpmetric {self._command}")


def read_journal(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The settings and the records of a journal as it is now, in use or not; a line that is cut short is left out.

    Raises:
        OSError: it cannot be read.
        InputError: it is damaged, or no journal.
    """
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        record, whole = _unsummed(line)
        try:
            if whole is False:
                raise ValueError("its checksum is another one")
            found.append(_parsed(record))
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{str(path)!r} is damaged at line {number}, or no ledger") from error
    if not found:
        raise InputError(f"{str(path)!r} holds no whole line")
    return found[0], found[1:]


def _summed(record: Mapping[str, Any]) -> bytes:
    """The line of a record, with the checksum of its text."""
    text = json.dumps(record).encode()
    return text[:-1] + f', "checksum": "{checksum(text)}"}}'.encode()


def _parsed(text: bytes) -> dict[str, Any]:
    """The object in a line; ValueError, TypeError or RecursionError where it holds none."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise TypeError("not an object")
    return found


def _unsummed(line: bytes) -> tuple[bytes, bool | None]:
    """The text of a record without its checksum, and whether that is right; None where it has none."""
    found = _SUM.fullmatch(line[-_SUM_BYTES:])
    if found is None:
        return line, None
    text = line[:-_SUM_BYTES] + b"}"
    return text, found[1].decode() == checksum(text)
