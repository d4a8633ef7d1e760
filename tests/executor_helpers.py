"""Functions that spawned workers import for tests/test_executors.py."""

from __future__ import annotations

import logging
import os
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpmetric.errors import ExpressionError, ModelError


def make_squarer(delay: float = 0.0) -> Callable[[int], int]:
    """Squares after a random delay of up to `delay` seconds; refuses 13."""

    def square(number: int) -> int:
        time.sleep(random.random() * delay)
        if number == 13:
            raise ExpressionError("13 is refused")
        return number * number

    return square


def make_clumsy(folder: str) -> Callable[[str], str]:
    """Acts on the word it gets: "crash once", "crash", "hang", "wait", "bug", "slow"; answers any other."""
    calls = {"count": 0}

    def act(word: str) -> str:
        calls["count"] += 1
        with Path(folder, word.replace(" ", "_")).open("a", encoding="utf-8") as log:
            log.write(f"{os.getpid()}\n")
        if word == "crash" or (word == "crash once" and attempts(folder, word) == 1):
            os._exit(7)
        if word in ("hang", "hang once") and (word == "hang" or attempts(folder, word) == 1):
            time.sleep(600)
        if word == "slow":
            time.sleep(0.6)
        if word == "bug":
            raise KeyError("a bug")
        return f"{word} done"

    return act


def make_teller() -> Callable[[str], str]:
    """Logs, warns and fails with the text it gets."""

    def tell(text: str) -> str:
        logging.getLogger("gpmetric.test").warning("read %s", text)
        warnings.warn(f"met {text}", stacklevel=1)
        try:
            raise ValueError(f"found {text}")
        except ValueError:
            logging.getLogger("other").exception("saw %s", text)
        raise KeyError(text)

    return tell


def attempts(folder: str, word: str) -> int:
    """How often a word was acted on."""
    path = Path(folder, word.replace(" ", "_"))
    return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0


def make_refusal() -> Callable[[Any], Any]:
    raise ModelError("no such model")


def make_crash() -> Callable[[Any], Any]:
    os._exit(9)


def make_broken() -> Callable[[Any], Any]:
    raise OSError("disk on fire")


def make_late_crash(folder: str) -> Callable[[Any], Any]:
    """The first worker dies while it starts; the others work."""
    path = Path(folder, "started")
    if not path.exists():
        path.touch()
        os._exit(9)
    return make_squarer()


DRIVER = """
import sys
from gpmetric.evolution.executors import LocalProcesses
from tests import executor_helpers

if __name__ == "__main__":
    with LocalProcesses(executor_helpers.make_clumsy, (sys.argv[1],), workers=2) as executor:
        for outcome in executor.map_ordered(["one", "hang", "hang"]):
            print(outcome.value, flush=True)
"""
