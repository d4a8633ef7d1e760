"""The ledger of a structured search: its progress line by line, and the state that a killed one goes on from.

JSON Lines: the settings, then a line per report, of which some hold the probabilities; what follows the last of these
is done again, with the same draws. A line cut short by a kill is dropped.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from gpmetric.errors import GpmetricError, InputError

__all__ = ["Ledger", "State"]

_FORMAT = 2


@dataclass(frozen=True)
class State:
    """Where a search is.

    Attributes:
        step: of the next draws.
        probabilities: [entries], fp64.
        average: of the policy.
        seconds: since the search began, interruptions left out.
        tokens: measured so far.
    """

    step: int
    probabilities: Tensor
    average: float | None = None
    seconds: float = 0.0
    tokens: int = 0


class Ledger(AbstractContextManager["Ledger"]):
    """Keeps reports, in a file if one is named.

    Args:
        path: the file; None keeps the reports in memory.
        settings: JSON values, all that determines the search but its length.
        resume: go on with the file if it is there.

    Attributes:
        reports: all so far, those of a resumed search included.
        state: the last one in the file, None where there is none.

    Raises:
        InputError: the file cannot be read, or is another search's.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any], *, resume: bool = False) -> None:
        self.reports: list[dict[str, Any]] = []
        self.state: State | None = None
        self._file: TextIO | None = None
        if path is not None:
            self._file = self._open(path, json.dumps({"format": _FORMAT} | dict(settings), sort_keys=True), resume)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; reports and state stay."""
        if self._file is not None:
            self._file.close()

    def write(self, report: Mapping[str, Any], state: State | None = None) -> None:
        """Adds a report, and with it where the search is.

        Raises:
            GpmetricError: the file cannot be written.
        """
        self.reports.append(dict(report))
        if self._file is None:
            return
        record = dict(report) if state is None else dict(report) | {"state": _packed(state)}
        try:
            print(json.dumps(record), file=self._file, flush=True)
        except OSError as error:
            raise GpmetricError(f"--ledger {self._file.name!r} cannot be written: {error.strerror}") from error

    def _open(self, path: Path, head: str, resume: bool) -> TextIO:
        """The file, read up to the last line with a state, for more to be written behind."""
        where = f"--ledger {str(path)!r}"
        try:
            content = path.read_bytes() if path.exists() else b""
            if content and not resume:
                raise InputError(f"{where} exists: go on with --resume, or name another")
            lines = content.split(b"\n")[:-1]  # what follows the last line end was cut short
            end = self._read(where, lines, head) if lines else 0
            if content and not lines and not head.encode().startswith(content):
                raise InputError(f"{where} is no ledger of gpmetric slim")
            file = path.open("r+" if content else "w", encoding="utf-8", newline="\n")
            file.seek(end)
            file.truncate()
        except OSError as error:
            raise InputError(f"{where} cannot be used: {error.strerror or error}") from error
        if not lines:
            print(head, file=file, flush=True)
        return file

    def _read(self, where: str, lines: list[bytes], head: str) -> int:
        """Takes reports and the last state; returns the place behind it."""
        try:
            found, wanted = dict(json.loads(lines[0])), json.loads(head)
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{where} is no ledger of gpmetric slim") from error
        for key in sorted(found.keys() | wanted.keys()):
            if found.get(key) != wanted.get(key):
                there, here = f"{found.get(key)!r:.60}", f"{wanted.get(key)!r:.60}"
                raise InputError(f"{where} is another search's: {key} is {there} there, {here} here")
        end = place = len(lines[0]) + 1
        reports: list[dict[str, Any]] = []
        for number, line in enumerate(lines[1:], start=2):
            place += len(line) + 1
            try:
                record = dict(json.loads(line))
                packed = record.pop("state", None)
                reports.append(record)
                if packed is not None:
                    self.state, self.reports, end = _unpacked(packed), list(reports), place
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError, binascii.Error) as error:
                raise InputError(f"{where} is damaged at line {number}") from error
        return end


def _packed(state: State) -> dict[str, Any]:
    values = state.probabilities.numpy().astype("<f8").tobytes()
    return vars(state) | {"probabilities": base64.b64encode(values).decode()}


def _unpacked(packed: Mapping[str, Any]) -> State:
    values = np.frombuffer(base64.b64decode(packed["probabilities"], validate=True), dtype="<f8")
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("a probability is not between 0 and 1")
    return State(
        int(packed["step"]),
        torch.from_numpy(values.copy()),
        None if packed["average"] is None else float(packed["average"]),
        float(packed["seconds"]),
        int(packed["tokens"]),
    )
