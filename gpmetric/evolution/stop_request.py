"""Being asked to end a search after its present generation and go on to its result: by a file, or by SIGUSR1."""

from __future__ import annotations

import logging
import signal
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import FrameType

from gpmetric.errors import InputError
from gpmetric.evolution.beside import stop_file
from gpmetric.interrupts import asked_to_end

__all__ = ["StopRequest"]

_LOG = logging.getLogger(__name__)


class StopRequest(AbstractContextManager["StopRequest"]):
    """Whether it has come; inside the context, the signal is answered, and the file is removed once it is seen.

    A file that is there from before is none of this campaign's. Signals are answered in the main thread alone.
    """

    def __init__(self, ledger: Path) -> None:
        self.path = stop_file(ledger)
        self._asked = False

    def __enter__(self) -> StopRequest:
        if self._take():
            if self.path.exists():
                raise InputError(
                    f"{str(self.path)!r} asks for a search to end, and cannot be removed: remove it, to begin one"
                )
            _LOG.warning("%s is from before this command: it is removed, and the search goes on", self.path)
        self._asked = asked_to_end()
        with suppress(ValueError):  # in another thread
            self._before = signal.signal(signal.SIGUSR1, self._answer)
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ValueError, AttributeError):
            signal.signal(signal.SIGUSR1, self._before)
        self._take()

    def __call__(self) -> bool:
        self._asked = self._take() or self._asked
        return self._asked

    def _answer(self, number: int, _: FrameType | None) -> None:
        self._asked = True

    def _take(self) -> bool:
        """Whether the file is there, which it is no longer then."""
        try:
            self.path.unlink()
        except FileNotFoundError:
            return False
        except OSError:  # a folder, or not ours to remove
            return True
        return True
