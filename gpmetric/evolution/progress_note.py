"""What a driver notes beside its ledger while it runs: since when, and which step it has come to.

The note, `campaign.sqlite.progress`, is nothing that the campaign reads, and is gone with its driver unless that is
killed.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from gpmetric.errors import GpmetricError
from gpmetric.evolution.beside import note_file
from gpmetric.evolution.listener import DiscoverListener
from gpmetric.files import write_json
from gpmetric.provenance import gpmetric_version

__all__ = ["ProgressNote"]

_EVERY = 2.0  # seconds between two notes of the same step


class ProgressNote(DiscoverListener):
    """Writes the note; where that fails, the campaign does without one.

    Args:
        ledger: the campaign's.
        elapsed: seconds since the command began.
        minutes: that it has; None is no limit.
    """

    def __init__(self, ledger: Path, elapsed: float, minutes: float | None) -> None:
        self._path = note_file(ledger)
        began = time.time() - elapsed
        self._note: dict[str, Any] = {
            "gpmetric": gpmetric_version(), "host": socket.gethostname(), "pid": os.getpid(),
            "began": began, "minutes": minutes, "step": "opening", "since": began, "progress": None,
        }  # fmt: skip
        self._written = 0.0

    def __enter__(self) -> Self:
        self._write()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    def step(self, name: str) -> None:
        self._note |= {"step": name, "since": time.time(), "progress": None}
        self._write()

    def progress(self, what: str, done: int, total: int) -> None:
        self._note["progress"] = {"what": what, "done": done, "total": total}
        if time.monotonic() - self._written >= _EVERY:
            self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        with suppress(GpmetricError):
            write_json(self._path, self._note | {"updated": time.time()})
