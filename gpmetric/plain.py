"""Text from elsewhere, as a terminal may show it: file names, tensor names and cells of ledgers can hold anything."""

from __future__ import annotations

import logging
import sys
from typing import Any

__all__ = ["LONGEST", "log_plainly", "one_line", "plain"]

LONGEST = 2000  # characters of a message


def plain(text: str) -> str:
    r"""The text in one line, with escapes such as \x1b and \n for whatever would do more than be seen."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def one_line(text: str) -> str:
    """A message as it is told, whatever it quotes: in one line, as a terminal may show it, LONGEST characters at most.

    Of a longer one the middle is left out: its beginning says what is wrong, its end what to do.
    """
    told = plain(" ".join(text.split()))
    half = LONGEST // 2 - 3
    return told if len(told) <= LONGEST else f"{told[:half]} ... {told[-half:]}"


def log_plainly() -> None:
    """Has this process write what is logged and warned of to standard error, as a terminal may show it."""
    shown = logging.StreamHandler(sys.stderr)
    shown.setFormatter(_Plain("gpmetric: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[shown])
    logging.captureWarnings(True)


class _Plain(logging.Formatter):
    """A line a message; tracebacks keep their lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return plain(super().formatMessage(record).rstrip())

    def formatException(self, ei: Any) -> str:
        return "\n".join(map(plain, super().formatException(ei).splitlines()))
