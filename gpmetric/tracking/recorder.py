"""Trackers at work, each in a process of its own, so that what one does or fails to do harms and delays nothing here.

Records go to it through a pipe that is never waited for; what it has no room for is left out. The first failure is told
in one line, and then the command does without that tracker.
"""

from __future__ import annotations

import json
import logging
import math
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

from gpmetric.errors import GpmetricError
from gpmetric.files import finite

__all__ = ["Trackers"]

_LOG = logging.getLogger(__name__)
_ROOM = 2**20  # bytes of records that wait while the pipe is full
_PARTING = 3.0  # seconds that all trackers together may keep the command from leaving


class Trackers(AbstractContextManager["Trackers"]):
    """The trackers of a command, which begin with `start`; those not finished at the end learn of no result.

    Args:
        texts: as of `--track`, checked.
        name: of the run.
    """

    def __init__(self, texts: Sequence[str], name: str) -> None:
        self._texts, self._name = texts, name
        self._all: list[_Recorder] = []
        self._is_finished = False

    def start(self, settings: Mapping[str, Any]) -> None:
        """Begins the runs; of other settings than texts, numbers and truth values, their text is kept.

        Raises:
            GpmetricError: one cannot be started.
        """
        for text in self._texts:
            try:
                self._all.append(_Recorder(text, self._name))
            except OSError as error:  # no process, or no memory
                raise GpmetricError(f"--track {text} cannot be started: {error}") from error
        plain = {key: value for key, value in settings.items() if value not in (None, ())}
        self._send("start", {key: _setting(value) for key, value in plain.items()})

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Keeps the finite ones of these figures."""
        self._send("log", step, {name: float(value) for name, value in figures.items() if math.isfinite(value)})

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """Ends the runs, and waits for them for a moment; a second call does nothing."""
        if self._is_finished:
            return
        self._is_finished = True
        self._send("finish", result if result is None else finite(result))
        end = time.monotonic() + _PARTING
        for one in self._all:
            one.close(end)

    def __exit__(self, *_: object) -> None:
        self.finish(None)

    def _send(self, *record: Any) -> None:
        line = json.dumps(record).encode() + b"\n"
        for one in self._all:
            one.send(line)


class _Recorder:
    """One tracker's process, as the command sees it."""

    def __init__(self, text: str, name: str) -> None:
        self._text = text
        self._waiting = bytearray()
        self._is_over = False
        path = os.pathsep.join(filter(None, sys.path))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "gpmetric.tracking", text, name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
            start_new_session=True,  # Ctrl-C is the command's
            env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._of = self._process.stdin, self._process.stdout
        os.set_blocking(self._to.fileno(), False)
        os.set_blocking(self._of.fileno(), False)

    def send(self, line: bytes) -> None:
        """Takes a record, if there is room."""
        if self._is_over:
            return
        if len(self._waiting) + len(line) > _ROOM:
            self._end("takes no figures any more")
            return
        self._waiting += line
        self._flush()

    def close(self, end: float) -> None:
        """Waits until `end`, by time.monotonic(), for the tracker to take everything and to leave."""
        if self._is_over:
            return
        while self._waiting and not self._is_over and (left := end - time.monotonic()) > 0:
            select.select([], [self._to], [], left)
            self._flush()
        self._to.close()
        if self._is_over:
            return
        with suppress(subprocess.TimeoutExpired):
            if self._process.wait(max(0.0, end - time.monotonic())):
                self._fail()
            self._of.close()
            return
        _LOG.warning("--track %s is not done yet; it goes on by itself", self._text)
        self._of.close()
        self._process.returncode = 0  # as far as this process is concerned

    def _flush(self) -> None:
        try:
            while self._waiting:
                del self._waiting[: os.write(self._to.fileno(), self._waiting)]
        except BlockingIOError:
            pass
        except OSError:  # it has ended
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)
            self._fail()

    def _fail(self) -> None:
        answer = (self._of.read() or b"").decode(errors="replace").strip()
        self._end(f"failed: {answer or f'its process ended with status {self._process.returncode}'}")

    def _end(self, why: str) -> None:
        self._is_over = True
        self._process.kill()
        self._process.wait()
        self._to.close()
        self._of.close()
        _LOG.warning("--track %s %s; the command goes on without it", self._text, why)


def _setting(value: Any) -> Any:
    if isinstance(value, (bool, int, float, str)):
        return value
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
