"""Executors against the plain loop, with workers that crash, hang, refuse, and lose their driver."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpmetric.errors import GpmetricError, ModelError
from gpmetric.evolution.executors import LOOK_AHEAD, Executor, LocalProcesses, Serial
from tests import executor_helpers as helpers

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def one_worker() -> Iterator[Executor]:
    with LocalProcesses(helpers.make_squarer, (), workers=1) as executor:
        yield executor


@pytest.fixture(scope="module")
def three_workers() -> Iterator[Executor]:
    with LocalProcesses(helpers.make_squarer, (0.02,), workers=3) as executor:
        yield executor


def clumsy(folder: Path, **options: float) -> LocalProcesses:
    return LocalProcesses(helpers.make_clumsy, (str(folder),), **options)  # type: ignore[arg-type]


def test_every_executor_gives_the_loop_in_order(one_worker: Executor, three_workers: Executor) -> None:
    numbers = [*range(20), 13]
    expected = [(None, "13 is refused") if n == 13 else (n * n, None) for n in numbers]
    for executor in (Serial(helpers.make_squarer()), one_worker, three_workers):
        outcomes = list(executor.map_ordered(numbers))
        assert [(outcome.value, outcome.error) for outcome in outcomes] == expected
        assert all(outcome.attempt == 1 and outcome.seconds >= 0 for outcome in outcomes)


def test_nothing_gives_nothing() -> None:
    with LocalProcesses(helpers.make_crash, (), workers=2) as executor:  # no worker is started
        assert list(executor.map_ordered([])) == []


def test_workers_are_other_processes_and_stay(three_workers: Executor) -> None:
    first = {outcome.process for outcome in three_workers.map_ordered(range(30))}
    second = {outcome.process for outcome in three_workers.map_ordered(range(30))}
    assert os.getpid() not in first
    assert len(first | second) <= 3


def test_serial_takes_a_candidate_when_asked() -> None:
    taken: list[int] = []
    outcomes = Serial(helpers.make_squarer()).map_ordered(taken.append(n) or n for n in range(9))  # type: ignore[func-returns-value]
    next(outcomes)
    assert taken == [0]


def test_a_crash_is_tried_again_and_poison_is_given_up(tmp_path: Path) -> None:
    with clumsy(tmp_path, workers=2) as executor:
        outcomes = list(executor.map_ordered(["a", "crash once", "crash", "b"]))
    assert [outcome.value for outcome in outcomes] == ["a done", "crash once done", None, "b done"]
    assert outcomes[2].error == "killed its worker 2 times (exit code 7)"
    assert [outcome.attempt for outcome in outcomes] == [1, 2, 2, 1]
    assert helpers.attempts(str(tmp_path), "crash") == 2


def test_a_hang_is_killed_after_its_timeout(tmp_path: Path) -> None:
    with clumsy(tmp_path, workers=1, timeout=0.4, attempts=2) as executor:
        outcomes = list(executor.map_ordered(["hang once", "hang", "b"]))
    assert [outcome.value for outcome in outcomes] == ["hang once done", None, "b done"]
    assert outcomes[1].error == "killed its worker 2 times (no answer within 0.4 s)"
    assert 0.4 <= outcomes[1].seconds < 3
    assert all(not is_running(pid) for word in ("hang_once", "hang") for pid in pids(tmp_path / word))


def test_a_slow_candidate_does_not_stop_the_others(tmp_path: Path) -> None:
    words = ["a", "slow", *(f"w{n}" for n in range(20))]
    with clumsy(tmp_path, workers=2) as executor:
        outcomes = executor.map_ordered(words)
        assert next(outcomes).value == "a done"
        assert next(outcomes).value == "slow done"
        early = sum(helpers.attempts(str(tmp_path), word) for word in words[2:])
        assert [outcome.value for outcome in outcomes] == [f"{word} done" for word in words[2:]]
    assert early == 20


def test_look_ahead_is_bounded(one_worker: Executor) -> None:
    taken: list[int] = []
    outcomes = one_worker.map_ordered(taken.append(n) or n for n in range(1000))  # type: ignore[func-returns-value]
    next(outcomes)
    assert len(taken) <= LOOK_AHEAD + 1
    outcomes.close()  # type: ignore[attr-defined]
    assert [outcome.value for outcome in one_worker.map_ordered([3])] == [9]  # nothing of the first is left over


def test_a_worker_killed_while_idle_is_replaced() -> None:
    with LocalProcesses(helpers.make_squarer, (), workers=1) as executor:
        (first,) = executor.map_ordered([1])
        os.kill(first.process, signal.SIGKILL)
        (second,) = executor.map_ordered([2])
    assert second.value == 4
    assert second.process != first.process


def test_a_bug_is_raised_at_its_turn(tmp_path: Path) -> None:
    with clumsy(tmp_path, workers=2) as executor:
        outcomes = executor.map_ordered(["slow", "bug", "b"])
        assert next(outcomes).value == "slow done"
        with pytest.raises(RuntimeError, match="a worker raised KeyError: 'a bug'") as caught:
            next(outcomes)
    assert "in act" in caught.value.__notes__[0]
    with pytest.raises(KeyError):
        list(Serial(helpers.make_clumsy(str(tmp_path))).map_ordered(["bug"]))


def test_what_the_factory_refuses_is_raised_here() -> None:
    with LocalProcesses(helpers.make_refusal, (), workers=2) as executor, pytest.raises(ModelError, match="no such"):
        list(executor.map_ordered([1]))


@pytest.mark.parametrize(
    ("factory", "cause"), [(helpers.make_crash, "exit code 9"), (helpers.make_broken, "OSError: disk on fire")]
)
def test_workers_that_never_start_are_an_error(factory: Callable[[], object], cause: str) -> None:
    complaint = f"could not start, 2 times in a row: {cause}"
    executor = LocalProcesses(factory, (), workers=1)  # type: ignore[arg-type]
    with executor, pytest.raises(GpmetricError, match=complaint):
        list(executor.map_ordered([1, 2, 3]))


def test_one_failed_start_is_survived(tmp_path: Path) -> None:
    with LocalProcesses(helpers.make_late_crash, (str(tmp_path),), workers=1) as executor:
        assert [(outcome.value, outcome.attempt) for outcome in executor.map_ordered([5])] == [(25, 1)]


def test_close_leaves_no_worker(tmp_path: Path) -> None:
    with clumsy(tmp_path, workers=1) as executor:
        outcomes = executor.map_ordered(["one", "hang"])
        next(outcomes)  # "hang" is under way while the caller looks at it
        wait_for(lambda: pids(tmp_path / "hang") != [])
    assert all(not is_running(pid) for word in ("one", "hang") for pid in pids(tmp_path / word))
    executor.close()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_its_driver(tmp_path: Path, number: signal.Signals) -> None:
    """The signal goes to the whole process group, as Ctrl-C does, but for the kill of the driver alone."""
    script = tmp_path / "driver.py"
    script.write_text(helpers.DRIVER, encoding="utf-8")
    driver = subprocess.Popen(
        [sys.executable, script, tmp_path],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: len(pids(tmp_path / "hang")) == 2 and len(pids(tmp_path / "one")) == 1)
    if number == signal.SIGINT:
        os.killpg(driver.pid, number)
    else:
        driver.send_signal(number)
    output, complaint = driver.communicate(timeout=20)
    assert output == "one done\n"
    assert complaint.count("Traceback") == (number == signal.SIGINT), complaint  # only the driver's own
    assert driver.returncode in (-number, 130)
    wait_for(lambda: not any(is_running(pid) for word in ("one", "hang") for pid in pids(tmp_path / word)))


def pids(path: Path) -> list[int]:
    return [int(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def is_running(pid: int) -> bool:
    """Whether a process does anything still; a zombie that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_a_script_without_a_main_guard_runs_once(tmp_path: Path) -> None:
    """Workers start from the caller's process, and not by its script [PySR issue 909]."""
    script = tmp_path / "script.py"
    script.write_text(
        "from functools import partial\n"
        "from operator import mul\n"
        "from gpmetric.evolution.executors import LocalProcesses\n"
        "print('begun')\n"
        "with LocalProcesses(partial, (mul, 3), workers=2) as executor:\n"
        "    print([one.value for one in executor.map_ordered([1, 2, 3])])\n"
        "import __main__; print(__main__.__file__ == __file__)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines() == ["begun", "[3, 6, 9]", "True"], done.stderr
