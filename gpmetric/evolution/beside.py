"""What lies beside a ledger while a driver has it: the driver's note of its progress, a request to end the search."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from gpmetric.errors import GpmetricError
from gpmetric.files import read_object

__all__ = ["note_file", "read_note", "stop_file"]

_KINDS = {"host": str, "pid": int, "began": float, "step": str, "since": float}  # of what a note holds


def note_file(ledger: Path) -> Path:
    """Where a driver notes its progress: `campaign.sqlite.progress`."""
    return ledger.with_name(f"{ledger.name}.progress")


def stop_file(ledger: Path) -> Path:
    """The file whose being there ends a campaign's search: `campaign.sqlite.stop`."""
    return ledger.with_name(f"{ledger.name}.stop")


def read_note(ledger: Path) -> dict[str, Any] | None:
    """The note beside a ledger; None where there is none that can be used."""
    with suppress(OSError, GpmetricError):
        note = read_object(note_file(ledger))
        progress = note.get("progress")
        if all(isinstance(note.get(name), kind) for name, kind in _KINDS.items()) and (
            progress is None or (isinstance(progress, dict) and progress.keys() == {"what", "done", "total"})
        ):
            return note
    return None
