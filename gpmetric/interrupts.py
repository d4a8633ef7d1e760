"""Being asked to stop: a flag that a signal sets, and that no library can swallow as it can the exception."""

from __future__ import annotations

import signal
from types import FrameType

__all__ = ["asked_to_end", "check_stop", "watch_signals"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, a cluster's time limit, a terminal that closed
_asked: list[int] = []
_to_end: list[int] = []


def watch_signals() -> None:
    """Answers each of these signals with a KeyboardInterrupt, once more at `check_stop` where that was swallowed.

    One that the caller ignores, as nohup does, stays ignored.
    """
    _asked.clear()
    _to_end.clear()
    if signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL:  # which would end the process
        signal.signal(signal.SIGUSR1, _end)
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)


def check_stop() -> None:
    """Raises KeyboardInterrupt where a signal has come, whatever became of the exception that it raised."""
    if _asked:
        raise KeyboardInterrupt


def asked_to_end() -> bool:
    """Whether SIGUSR1 has come since signals are watched: what is under way is to be ended with a result."""
    return bool(_to_end)


def _end(number: int, _: FrameType | None) -> None:
    _to_end.append(number)


def _stop(number: int, _: FrameType | None) -> None:
    _asked.append(number)
    raise KeyboardInterrupt
