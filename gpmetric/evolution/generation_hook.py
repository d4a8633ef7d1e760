"""A command of the user's after each generation of a campaign, which it neither delays nor harms."""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from gpmetric.evolution.fitness import mean_excess
from gpmetric.evolution.listener import DiscoverListener
from gpmetric.evolution.selection import Individual
from gpmetric.files import finite

__all__ = ["GenerationHook"]

_LOG = logging.getLogger(__name__)
_PARTING = 2.0  # seconds that the last one may keep the campaign from its end
_ERRORS = 2  # the file descriptor that its output goes to: standard output may be the result's


class GenerationHook(DiscoverListener):
    """Starts the command, of words and not of a shell, and never waits for it.

    It finds GPMETRIC_LEDGER, GPMETRIC_GENERATION, GPMETRIC_EVALUATIONS, GPMETRIC_FORMULA (the best) and
    GPMETRIC_MEAN_EXCESS in its environment, and the whole front as JSON on its standard input. One runs at a time: what
    generations end meanwhile have none.

    Args:
        command: as a shell would read it, without variables and patterns.
        ledger: the campaign's.
    """

    def __init__(self, command: str, ledger: Path) -> None:
        self._command, self._words, self._ledger = command, shlex.split(command), str(ledger.absolute())
        self._process: subprocess.Popen[bytes] | None = None
        self._told: set[str] = set()
        self._number = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_PARTING if kind is None else 0)
            if not self._is_free():
                self._tell("runs", f"still runs after generation {self._number}, and is left to itself")
                self._process.returncode = 0  # as far as this process is concerned

    def generation(self, number: int, front: Sequence[Individual], counts: Mapping[str, int]) -> None:
        if not self._is_free():
            self._tell("runs", f"still runs after generation {self._number}: it is not started again before it ends")
            return
        rows = [{"formula": one.text, "mean_excess": mean_excess(one.excess), "excess": one.excess} for one in front]
        best = rows[0] if rows else {"formula": "", "mean_excess": ""}
        known = {
            "LEDGER": self._ledger, "GENERATION": number, "EVALUATIONS": counts["paid"], "FORMULA": best["formula"],
            "MEAN_EXCESS": best["mean_excess"],
        }  # fmt: skip
        document = {"ledger": self._ledger, "generation": number, "counts": dict(counts), "front": rows}
        self._number = number
        self._start({f"GPMETRIC_{name}": str(value) for name, value in known.items()}, document)

    def _start(self, known: Mapping[str, str], document: Mapping[str, Any]) -> None:
        try:
            with tempfile.TemporaryFile() as told:  # unlike a pipe, it takes all of it at once
                told.write(json.dumps(finite(document)).encode())
                told.seek(0)
                self._process = subprocess.Popen(
                    self._words, stdin=told, stdout=_ERRORS, env=os.environ | known, start_new_session=True
                )
        except OSError as error:
            self._tell("failed", f"cannot be started: {error.strerror}")

    def _is_free(self) -> bool:
        """Whether none runs; how the last one ended is told if it was not well."""
        if self._process is None:
            return True
        status = self._process.poll()
        if status is None:
            return False
        if status:
            self._tell("failed", f"failed after generation {self._number}, with exit status {status}")
        self._process = None
        return True

    def _tell(self, kind: str, what: str) -> None:
        """Says it, once."""
        if kind not in self._told:
            self._told.add(kind)
            _LOG.warning("--on-generation %r %s (told once; the campaign goes on)", self._command, what)
