"""The progress of a structured search, report by report, and the state that a killed one goes on from.

In the file, some reports hold the state; what follows the last of these is done again, with the same draws.
"""

from __future__ import annotations

import base64
import logging
import secrets
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpmetric.journal import Journal

__all__ = ["SearchLog", "State", "kept_search"]

_LOG = logging.getLogger(__name__)

_FORMAT = 2


@dataclass(frozen=True)
class State:
    """Where a search is."""

    step: int  # of the next draws
    probabilities: Tensor  # [entries], fp64
    average: float | None = None  # of the policy
    seconds: float = 0.0  # since the search began, interruptions left out
    tokens: int = 0  # measured so far


class SearchLog(Journal):
    """Keeps reports, in a file if one is named; arguments as of `Journal`.

    Attributes:
        reports: all so far, those of a resumed search included.
        state: the last one in the file, None where there is none.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any], *, resume: bool = False) -> None:
        self.reports: list[dict[str, Any]] = []
        self.state: State | None = None
        self._taken: list[dict[str, Any]] = []
        super().__init__(path, "slim", {"format": _FORMAT} | dict(settings), resume=resume)

    def add(self, report: Mapping[str, Any], state: State | None = None) -> None:
        """Adds a report, and with it where the search is.

        Raises:
            GpmetricError: the file cannot be written.
        """
        self.reports.append(dict(report))
        self.write(dict(report) if state is None else dict(report) | {"state": _packed(state)})

    def take(self, record: dict[str, Any]) -> bool:
        """One report of the file; a search goes on behind those that hold its state."""
        packed = record.pop("state", None)
        self._taken.append(record)
        if packed is None:
            return False
        self.state, self.reports = _unpacked(packed), list(self._taken)
        return True


@contextmanager
def kept_search(ledger: Path | None, output: Path) -> Iterator[Path]:
    """The file of a search: the ledger, or where none is named one beside the output, gone when the block ends well.

    Where it does not, whatever the reason, what the search found stays there, and how to go on with it is said.
    """
    path = ledger or output.with_name(f"{output.name}.search-{secrets.token_hex(4)}.jsonl")
    try:
        yield path
    except BaseException:
        if ledger is None and path.exists():
            if b'"state"' in path.read_bytes():
                told = f"--ledger {shlex.quote(str(path))} --resume"
                _LOG.warning("the search is kept in %r: the same command goes on there with %s", str(path), told)
            else:
                path.unlink()
        raise
    if ledger is None:
        path.unlink(missing_ok=True)


def _packed(state: State) -> dict[str, Any]:
    values = state.probabilities.numpy().astype("<f8").tobytes()
    return vars(state) | {"probabilities": base64.b64encode(values).decode()}


def _unpacked(packed: Mapping[str, Any]) -> State:
    values = np.frombuffer(base64.b64decode(packed["probabilities"], validate=True), dtype="<f8")
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("a probability is not between 0 and 1")
    average = None if packed["average"] is None else float(packed["average"])
    step, seconds, tokens = int(packed["step"]), float(packed["seconds"]), int(packed["tokens"])
    return State(step, torch.from_numpy(values.copy()), average, seconds, tokens)
