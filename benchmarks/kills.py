"""Campaigns that are killed and resumed: `python benchmarks/kills.py --rounds 100`.

Each round begins a campaign, kills its driver or one of its workers with SIGKILL, resumes it, and compares what the
ledger holds in the end with that of an undisturbed campaign: every table but its times, and the winner. What was
committed before the kill must be there afterwards as it was, so that nothing of it was evaluated twice. Rounds are

- `moment`: the driver, at a random moment of its run;
- `failpoint`: the driver, before or after its first, a middle or its last call of a function that is named;
- `final`: the same among the measurements on test text and the draws of the calibration;
- `worker`: one of two workers, while it works; the driver goes on;
- `both`: a worker first, and then the driver.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from results import append, row

from gpmetric.calibration import cache
from gpmetric.errors import LedgerError
from gpmetric.evolution import discover
from gpmetric.evolution import ledger as ledger_module
from gpmetric.evolution.evaluator import Evaluator
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.request import DiscoverRequest

__all__ = ["FAILPOINTS", "Failpoint", "Round", "plan_rounds", "run_round"]

OPTIONS: dict[str, Any] = {
    "target": ("0.5", "2:4"), "operands": ("W", "X", "G"), "population": 6, "evaluations": 14, "samples": 4,
    "search_windows": 8, "windows": 2, "sequence_length": 32, "calibration_seeds": 2, "include": r"\.0\.", "seed": 5,
}  # fmt: skip

# name -> what holds the function, and the function's name
FAILPOINTS: dict[str, tuple[Any, str]] = {
    "statistics": (discover, "collect_statistics"),
    "cache": (cache.os, "replace"),
    "executor": (discover, "make_executor"),
    "measure": (Ledger, "measure"),
    "record": (Ledger, "record"),
    "generation": (Ledger, "commit_generation"),
    "held out": (Ledger, "hold_out"),
    "result": (Ledger, "save_result"),
    "transaction": (ledger_module, "transaction"),
    "evaluation": (Evaluator, "together"),
}


@dataclass(frozen=True)
class Failpoint:
    """A call of a function: `before` or `after` the call of this number, from 0.

    Of a transaction, `after` is before what was written in it is committed.
    """

    name: str
    side: str
    number: int

    def arm(self) -> None:
        """Has this process killed there."""
        holder, attribute = FAILPOINTS[self.name]
        original, calls = getattr(holder, attribute), [0]

        @contextmanager
        def killing_inside(*arguments: Any) -> Iterator[None]:
            mine = calls[0] == self.number
            calls[0] += 1
            with original(*arguments):
                if mine and self.side == "before":
                    die()
                yield
                if mine:
                    die()

        def killing(*arguments: Any, **options: Any) -> Any:
            mine = calls[0] == self.number
            calls[0] += 1
            if mine and self.side == "before":
                die()
            found = original(*arguments, **options)
            if mine and self.side == "after":
                die()
            return found

        setattr(holder, attribute, killing_inside if self.name == "transaction" else killing)


@dataclass(frozen=True)
class Round:
    """What is killed when: at a failpoint, or after a share of an undisturbed run's time."""

    kind: str
    failpoint: Failpoint | None = None
    share: float = 0.0
    workers: int = 1


def die() -> None:
    """Ends this process as a lack of power would."""
    os.kill(os.getpid(), signal.SIGKILL)


def started(folder: Path, workers: int, failpoint: Failpoint | Counter | None = None) -> int:
    """The process number of a driver, which resumes what is there; nothing runs in this process, which forks."""
    pid = os.fork()
    if pid:
        return pid
    try:
        if failpoint is not None:
            failpoint.arm()
        request = DiscoverRequest(
            **OPTIONS, workers=workers, ledger=folder / "a.sqlite", resume=True, cache=folder / "cache"
        )
        discover.run_campaign(request)
    except BaseException:
        traceback.print_exc()
        os._exit(3)
    os._exit(0)


def ended(pid: int) -> int:
    """How a process ended: its exit code, or the negated number of the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def is_over(pid: int) -> bool:
    """Whether it has ended; it is not waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def workers_of(driver: int) -> list[int]:
    """Worker processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            command = (path.parent / "cmdline").read_text()
        except OSError:
            continue
        if int(fields[1]) == driver and "spawn_main" in command:
            found.append(int(path.parent.name))
    return found


@dataclass(frozen=True)
class Counter:
    """Writes down how often each function is called, a letter for each call."""

    folder: Path

    def arm(self) -> None:
        """Has this process counted."""
        for name, (holder, attribute) in FAILPOINTS.items():
            setattr(holder, attribute, self._counting(self.folder / f"{name}.calls", getattr(holder, attribute)))

    def _counting(self, path: Path, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with path.open("a") as file:
                file.write("x")
            return original(*arguments, **options)

        return call

    def counts(self) -> dict[str, int]:
        """Calls by name."""
        return {name: len(path.read_text()) for name in FAILPOINTS if (path := self.folder / f"{name}.calls").exists()}


def plan_rounds(counts: Mapping[str, int], rounds: int, rng: random.Random) -> list[Round]:
    """So many rounds: of a hundred, 36 at failpoints, 14 in the final test and the draws, 25 of workers, 5 of both."""
    named = [
        Failpoint(name, side, number)
        for name, count in counts.items()
        for side in ("before", "after")
        for number in sorted({0, count // 2, count - 1})
        if count
    ]
    held = counts["held out"]
    final = [Failpoint("held out", side, number) for side in ("before", "after") for number in range(held // 2, held)]
    rng.shuffle(named)
    rng.shuffle(final)
    found = [Round("failpoint", named[index % len(named)]) for index in range(round(0.36 * rounds))]
    found += [Round("final", final[index % len(final)]) for index in range(round(0.14 * rounds))]
    found += [Round("worker", share=rng.random(), workers=2) for _ in range(round(0.25 * rounds))]
    found += [Round("both", share=rng.random(), workers=2) for _ in range(round(0.05 * rounds))]
    return found + [Round("moment", share=rng.random()) for _ in range(rounds - len(found))]


def rows_of(ledger: Path) -> dict[str, set[str]]:
    """Rows by table as they are in the file, times included; none where there is no campaign yet."""
    try:
        with Ledger.read(ledger) as opened:
            tables = ("evaluations", "candidates", "measurements", "judgements", "generations")
            return {
                name: {str(dict(one)) for one in opened._connection.execute(f"SELECT * FROM {name}")} for name in tables
            }
    except LedgerError:
        return {}


def outcome(ledger: Path) -> tuple[Any, Any]:
    """What must be equal: the tables without their times, and the winner."""
    with Ledger.read(ledger) as opened:
        result = opened.result()
        return opened.comparable_tables(), None if result is None else result["winner"]


def kill_worker(driver: int, ledger: Path, seconds: float) -> bool:
    """Kills a worker so many seconds after workers have given the first figures; whether there was one still.

    Rung after rung and target after target, both have something to do from then on.
    """
    while not is_over(driver) and not (ledger.exists() and rows_of(ledger).get("judgements")):
        time.sleep(0.05)
    time.sleep(seconds)
    if is_over(driver) or not (working := workers_of(driver)):
        return False
    os.kill(random.choice(working), signal.SIGKILL)
    return True


def run_round(one: Round, folder: Path, seconds: float, expected: tuple[Any, Any]) -> tuple[str, bool]:
    """(what went wrong, or nothing; whether something was killed).

    Args:
        folder: of this round, empty.
        seconds: that an undisturbed campaign takes with as many workers.
        expected: what `outcome` gives of one.
    """
    ledger = folder / "a.sqlite"
    driver, killed = started(folder, one.workers, one.failpoint), False
    if one.kind in ("worker", "both"):
        killed = kill_worker(driver, ledger, one.share * seconds / 3)
    if one.kind in ("moment", "both"):
        time.sleep(one.share * seconds / (1 if one.kind == "moment" else 4))
        os.kill(driver, signal.SIGKILL)
    code = ended(driver)
    killed = killed or code == -signal.SIGKILL
    if code not in (0, -signal.SIGKILL):
        return f"the driver ended with {code}", killed
    before = rows_of(ledger) if ledger.exists() else {}
    if (code := ended(started(folder, one.workers))) != 0:
        return f"resumed, the driver ended with {code}", killed
    after = rows_of(ledger)
    for table, rows in before.items():
        if lost := rows - after[table]:
            return f"{len(lost)} rows of {table} are no longer what was committed", killed
    return "" if outcome(ledger) == expected else "the ledger is another one than undisturbed", killed


def timed(folder: Path, workers: int) -> float:
    """Seconds of an undisturbed campaign."""
    folder.mkdir()
    start = time.monotonic()
    assert ended(started(folder, workers)) == 0
    return time.monotonic() - start


def rounds_of(rounds: int, seed: int, folder: Path, kinds: Collection[str]) -> Iterator[tuple[Round, str, bool]]:
    """Each round of these kinds, or of all, with what went wrong, and whether it killed anything."""
    (folder / "undisturbed").mkdir(parents=True)
    counter = Counter(folder / "undisturbed")
    assert ended(started(folder / "undisturbed", 1, counter)) == 0
    expected = outcome(folder / "undisturbed" / "a.sqlite")
    seconds = {workers: timed(folder / f"timed-{workers}", workers) for workers in (1, 2)}
    for workers in (1, 2):
        assert outcome(folder / f"timed-{workers}" / "a.sqlite") == expected
    for number, one in enumerate(plan_rounds(counter.counts(), rounds, random.Random(seed))):
        if kinds and one.kind not in kinds and (one.failpoint is None or one.failpoint.name not in kinds):
            continue
        place = folder / str(number)
        place.mkdir()
        wrong, killed = run_round(one, place, seconds[one.workers], expected)
        if not wrong:
            shutil.rmtree(place)
        yield one, wrong, killed


def main() -> None:
    """Runs the rounds, and says what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="add rows to results.csv")
    parser.add_argument("--kinds", default="", help="of rounds that are run, of those planned; all by default")
    options = parser.parse_args()
    kinds = options.kinds.split(",") if options.kinds else []
    folder = Path(tempfile.mkdtemp(prefix="gpmetric-kills-"))
    told: dict[str, list[str]] = {}
    kills: dict[str, int] = {}
    for one, wrong, killed in rounds_of(options.rounds, options.seed, folder, kinds):
        told.setdefault(one.kind, []).append(wrong)
        kills[one.kind] = kills.get(one.kind, 0) + killed
        print(f"{one}: {wrong or 'as undisturbed'}{'' if killed else ' (nothing was killed)'}", flush=True)
    for kind, found in told.items():
        bad = sum(map(bool, found))
        print(f"{kind}: {len(found)} rounds, {kills[kind]} kills, {bad} wrong")
        if options.record:
            append(
                [row("kills", f"{kind}, {kills[kind]} kills, seed {options.seed}: wrong", np.array([bad]), unit="n")]
            )
    if any(map(any, told.values())):
        sys.exit(f"what went wrong is in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
