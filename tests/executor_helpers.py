"""Functions that spawned workers import for tests/test_executors.py."""

from __future__ import annotations

import logging
import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
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


class Clumsy:
    """Acts on the word it gets: "crash once", "hang once", "starve once", "bug", "slow ..."; answers any other."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def smaller(self) -> None:
        self("smaller")

    def __call__(self, word: str) -> str:
        folder = self._folder
        with Path(folder, word.replace(" ", "_")).open("a", encoding="utf-8") as log:
            log.write(f"{os.getpid()}\n")
        if word == "crash" or (word == "crash once" and attempts(folder, word) == 1):
            os._exit(7)
        if word in ("hang", "hang once") and (word == "hang" or attempts(folder, word) == 1):
            time.sleep(600)
        if word.startswith("slow"):
            time.sleep(0.6)
        if word == "starve" or (word == "starve once" and attempts(folder, word) == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "bug":
            raise KeyError("a bug")
        return f"{word} done"


make_clumsy = Clumsy


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


def make_late(folder: str, first: str) -> Callable[[Any], Any]:
    """The first worker dies or hangs while it starts; the others work."""
    path = Path(folder, "started")
    if not path.exists():
        path.touch()
        if first == "crash":
            os._exit(9)
        time.sleep(600)
    return make_squarer()


def make_only_one(folder: str) -> Callable[[Any], Any]:
    """The first worker works, all others die while they start."""
    with suppress(FileExistsError), Path(folder, "started").open("x"):
        return make_squarer(0.2)
    time.sleep(0.2)  # until that one has begun
    os._exit(9)


@dataclass(frozen=True)
class Placed:
    """A number that belongs somewhere."""

    place: str
    number: int


def make_holder(delay: float) -> Callable[[Placed], tuple[str, int, bool]]:
    """Tells place and number, and whether it had to move there."""
    held = [""]

    def hold(one: Placed) -> tuple[str, int, bool]:
        time.sleep(delay)
        moved, held[0] = held[0] != one.place, one.place
        return one.place, one.number, moved

    return hold


def make_environment(delay: float) -> Callable[[str], str | None]:
    def read(name: str) -> str | None:
        time.sleep(delay)
        return os.environ.get(name)

    return read


DRIVER = """
import sys
from gpmetric.executors import LocalProcesses
from tests import executor_helpers

if __name__ == "__main__":
    with LocalProcesses(executor_helpers.make_clumsy, (sys.argv[1],), workers=2) as executor:
        for outcome in executor.map_ordered(["one", "hang", "hang"]):
            print(outcome.value, flush=True)
"""
