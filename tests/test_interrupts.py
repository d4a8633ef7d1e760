"""Signals: each stops a command, also where a library has swallowed the exception, unless the caller ignores it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from gpmetric import interrupts
from gpmetric.interrupts import check_stop, watch_signals
from gpmetric.session.deadline import Deadline

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def watched() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    watch_signals()
    yield
    interrupts._asked.clear()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("minutes", [None, 5.0])
@pytest.mark.usefixtures("watched")
def test_what_is_swallowed_is_raised_at_the_next_step(number: signal.Signals, minutes: float | None) -> None:
    told: list[int] = []
    progress = Deadline.starting(minutes).watching(lambda what, done, total: told.append(done))
    progress("windows", 1, 9)
    with suppress(KeyboardInterrupt):  # as libraries do that catch everything
        signal.raise_signal(number)
    with pytest.raises(KeyboardInterrupt):
        progress("windows", 2, 9)
    assert told == [1]
    watch_signals()  # another command in the same process
    check_stop()


def test_a_signal_that_the_caller_ignores_stays_ignored(watched: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    watch_signals()
    signal.raise_signal(signal.SIGHUP)
    check_stop()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_during_imports_is_told_in_one_line(number: signal.Signals, tmp_path: Path) -> None:
    """It comes while the command line is imported, by a module of that name that stands in its way."""
    script = tmp_path / "run.py"
    script.write_text(
        "import signal, sys\n"
        "from importlib.abc import MetaPathFinder\n"
        "class Late(MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == 'typer': signal.raise_signal({int(number)})\n"
        "sys.meta_path.insert(0, Late())\n"
        "from gpmetric.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (130, "gpmetric: error: interrupted\n")
