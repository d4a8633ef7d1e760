"""The page of a campaign served while it runs, on this machine's own address alone: `gpmetric discover --live 0`.

A process of its own makes it, of the ledger as anyone may read it, so that the campaign is neither delayed nor altered.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Self

from gpmetric.errors import GpmetricError, InputError
from gpmetric.plugins import places

__all__ = ["HOST", "LivePage"]

_LOG = logging.getLogger(__name__)
HOST = "127.0.0.1"
_PARTING = 2.0  # seconds that the process may take to leave


class LivePage:
    """Serves the page of a ledger while the context lasts.

    Args:
        port: to serve at; 0 for any that is free.
        ledger: the campaign's, there or not yet.

    Attributes:
        address: of the page.

    Raises:
        InputError: the port cannot be had.
    """

    def __init__(self, port: int, ledger: Path) -> None:
        try:
            self._socket = socket.create_server((HOST, port))
        except OSError as error:
            told = os.strerror(error.errno) if error.errno else str(error)
            raise InputError(f"--live {port}: {told}; name another port, or 0 for any") from error
        self.address = f"http://{HOST}:{self._socket.getsockname()[1]}/"
        self._ledger = ledger

    def __enter__(self) -> Self:
        path = os.pathsep.join(filter(None, sys.path))
        place = self._socket.fileno()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "gpmetric.reporting", str(place), str(self._ledger.absolute()), *places()],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=(place,), bufsize=0,
                start_new_session=True,  # Ctrl-C is the command's
                env=os.environ | {"PYTHONPATH": path},
            )  # fmt: skip
        except OSError as error:
            raise GpmetricError(f"--live cannot be started: {error}") from error
        finally:
            self._socket.close()  # it is the process's
        return self

    def __exit__(self, *_: object) -> None:
        if (status := self._process.poll()) is not None:
            _LOG.warning("--live: its process ended with status %d; the campaign went on without it", status)
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()  # which ends it, as the end of this process would
        try:
            self._process.wait(_PARTING)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
