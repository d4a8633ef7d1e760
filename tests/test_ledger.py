"""The ledger against a fake campaign that is killed everywhere, and against every bad store we know of."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from gpmetric.errors import GpmetricError, LedgerError
from gpmetric.evolution import driver_lock, sqlite_schema
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.records import Candidate, Evaluation, HeldOutMeasurement, Measurement
from gpmetric.evolution.settings import BUDGET_KEYS

ROOT = Path(__file__).parents[1]
SETTINGS: dict[str, Any] = {"model": "sha256:aa", "targets": ["0.5", "2:4"], "seed": 2, "generations": 3}
EVALUATED = Candidate(0, 0, "abs(W)*X", "W*X", "evaluated", opposites="abs(W)*X", ranked="W*X", fingerprint="f1")
PAID = Evaluation(
    "abs(W)*X", "W*X", 0, "done", "f1", figures={"loss": {"0.5": 0.25}, "kl": {"0.5": 0.125}}, nodes=4, operands="W,X",
    sketch="a0ff", seconds_loss=1.5,
)  # fmt: skip


def campaign(path: Path, settings: dict[str, Any] = SETTINGS, size: int = 5, pause: float = 0.0) -> None:
    """A deterministic campaign with all that a real one has: repeats, equal masks, failures, a result."""
    with Ledger.open(path, settings, resume=True) as ledger:
        rng = random.Random(settings["seed"])
        last = ledger.last_generation()
        population = ["W"] if last is None else last.population
        if last is not None:
            rng.setstate(last.rng_state)
        for number in range(0 if last is None else last.number + 1, settings["generations"]):
            drawn = [f"{rng.choice(population)[-9:]}*{rng.randrange(12)}" for _ in range(size)]
            for position, formula in enumerate(drawn):
                time.sleep(pause)
                draw(ledger, number, position, formula)
            population = rng.sample(drawn, 3)
            rng.gauss()  # the second half of the pair is part of the state
            ledger.commit_generation(number, population, rng.getstate())
        if ledger.result() is None:
            ledger.save_result({"winner": population[0], "counts": ledger.counts()})


def draw(ledger: Ledger, number: int, position: int, formula: str) -> None:
    canonical = formula.replace("*0", "")
    known = ledger.find_canonical(canonical)
    mask = str(sum(map(ord, canonical)) % 17)
    if formula.endswith("*1"):
        ledger.record(Candidate(number, position, formula, None, "failed", reason="all scores tie"))
    elif known is not None:
        ledger.record(Candidate(number, position, formula, canonical, "duplicate", known.id))
    else:
        status, fingerprint = ("failed", None) if formula.endswith("*7") else ("done", mask)
        figures = {"loss": {"0.5": len(formula) / 3}}
        row = Evaluation(formula, canonical, number, status, fingerprint, figures=figures)  # type: ignore[arg-type]
        ledger.record(Candidate(number, position, formula, canonical, "evaluated"), row)


def tables(path: Path) -> dict[str, list[dict[str, Any]]]:
    with Ledger.read(path) as ledger:
        return ledger.comparable_tables()


def sql(path: Path, *statements: str) -> list[Any]:
    """What the last statement finds."""
    connection, found = sqlite3.connect(path), list[Any]()
    for statement in statements:
        found = connection.execute(statement).fetchall()
    connection.commit()
    connection.close()
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


# A campaign killed and resumed


class Killed(BaseException):
    """Stands for the end of the process: nothing that runs after it reaches the database."""


class Mortal(sqlite3.Connection):
    """Kills the process before or after its n-th statement. No fsync: a killed process does not need it."""

    statements = 0
    deadline: float = float("inf")

    def execute(self, statement: str, *arguments: Any) -> sqlite3.Cursor:  # type: ignore[override]
        if Mortal.statements >= Mortal.deadline:
            raise Killed
        Mortal.statements += 1
        cursor = super().execute(statement.replace("synchronous = FULL", "synchronous = OFF"), *arguments)
        if Mortal.statements > Mortal.deadline:  # n and a half: done, but the caller never hears of it
            raise Killed
        return cursor


@pytest.fixture
def mortal(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite_schema.sqlite3, "connect", lambda *a, **k: connect(*a, **k, factory=Mortal))
    monkeypatch.setattr(Mortal, "statements", 0)
    monkeypatch.setattr(Mortal, "deadline", float("inf"))
    starts = iter(range(10**6))
    # Every opening is another process here, and the one before it is dead.
    monkeypatch.setattr(driver_lock, "_start_of", lambda pid: str(next(starts)))


@pytest.mark.slow
@pytest.mark.usefixtures("mortal")
def test_resume_equals_the_uninterrupted_run_at_every_stopping_point(tmp_path: Path) -> None:
    settings, size = SETTINGS | {"seed": 7}, 3  # the work grows with the square of what is drawn
    campaign(tmp_path / "whole", settings, size)
    total = Mortal.statements
    expected = tables(tmp_path / "whole")
    assert {row["status"] for row in expected["candidates"]} == {"evaluated", "duplicate", "failed"}
    for half in range(2 * total):
        path = tmp_path / f"killed{half}"
        Mortal.statements, Mortal.deadline = 0, half / 2
        with pytest.raises(Killed):
            campaign(path, settings, size)
        Mortal.deadline = float("inf")
        campaign(path, settings, size)
        assert tables(path) == expected


@pytest.mark.usefixtures("mortal")
def test_resume_survives_being_killed_again_and_again(tmp_path: Path) -> None:
    campaign(tmp_path / "whole")
    deaths = 0
    for deadline in range(30, 400, 7):
        Mortal.statements, Mortal.deadline = 0, deadline
        try:
            campaign(tmp_path / "killed")
        except Killed:
            deaths += 1
    Mortal.deadline = float("inf")
    campaign(tmp_path / "killed")
    assert deaths > 3
    assert tables(tmp_path / "killed") == tables(tmp_path / "whole")


def test_resume_after_a_real_kill(tmp_path: Path) -> None:
    """kill -9 of a driver process, three times; its death is noticed at once and nothing committed is lost."""
    settings, path = SETTINGS | {"generations": 6}, tmp_path / "killed"
    program = f"from tests.test_ledger import *; campaign(Path({str(path)!r}), {settings!r}, pause=0.02)"
    for records in (3, 11, 19):
        driver = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
        while count(path) < records:
            assert driver.poll() is None
            time.sleep(0.01)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        assert count(path) >= records
    campaign(path, settings)
    campaign(tmp_path / "whole", settings)
    assert tables(path) == tables(tmp_path / "whole")


def count(path: Path) -> int:
    try:
        with Ledger.read(path) as ledger:
            return ledger.counts()["drawn"]
    except LedgerError:  # not there yet
        return 0


def test_a_longer_budget_equals_it_from_the_start(tmp_path: Path) -> None:
    campaign(tmp_path / "longer")
    campaign(tmp_path / "longer", SETTINGS | {"generations": 5, "minutes": 2})
    campaign(tmp_path / "whole", SETTINGS | {"generations": 5, "minutes": 2})
    assert tables(tmp_path / "longer") == tables(tmp_path / "whole")


def test_a_finished_campaign_is_left_as_it_is(path: Path) -> None:
    campaign(path)
    with Ledger.read(path) as ledger:
        before = ledger.result(), ledger.generations(), ledger.evaluations(), ledger.candidates()
    campaign(path)
    with Ledger.read(path) as ledger:
        assert (ledger.result(), ledger.generations(), ledger.evaluations(), ledger.candidates()) == before


# What is recorded


def test_rows_come_back_as_they_were_given(path: Path) -> None:
    rng = random.Random(5)
    rng.gauss()
    with Ledger.open(path, SETTINGS, resume=False) as ledger:
        assert ledger.record(EVALUATED, PAID) == 1
        (evaluation,) = ledger.evaluations("done")
        assert evaluation == replace(PAID, id=1, host=socket.gethostname(), finished=evaluation.finished)
        assert ledger.candidate(0, 0) == replace(EVALUATED, id=1, evaluation=1)
        assert ledger.candidate(0, 1) is None
        assert ledger.find_canonical("W*X") == ledger.find_fingerprint("f1") == evaluation
        assert ledger.find_canonical("W") is None
        ledger.commit_generation(0, [["W", 0.1]], rng.getstate())
        stored = ledger.last_generation()
        assert stored is not None
        assert (stored.population, stored.evaluations) == ([["W", 0.1]], 1)
        assert stored.rng_state == rng.getstate()
        assert ledger.settings == SETTINGS


def test_a_candidate_is_recorded_once(path: Path) -> None:
    with Ledger.open(path, SETTINGS, resume=False) as ledger:
        first = ledger.record(EVALUATED, PAID)
        assert ledger.record(EVALUATED, replace(PAID, figures={"loss": {"0.5": 9.0}})) == first
        assert ledger.evaluations()[0].losses == {"0.5": 0.25}
        with pytest.raises(LedgerError, match=r"has abs\(W\)\*X as candidate 0 of generation 0, but .* draws W;"):
            ledger.record(replace(EVALUATED, formula="W"), PAID)


def test_equal_masks_are_paid_for_once(path: Path) -> None:
    twin = Candidate(0, 1, "sqr(W)*X", "W**2*X", "evaluated")
    with Ledger.open(path, SETTINGS, resume=False) as ledger:
        first = ledger.record(EVALUATED, PAID)
        assert ledger.record(twin, replace(PAID, formula=twin.formula, canonical=twin.canonical)) == first
        assert ledger.record(replace(twin, position=2, status="duplicate", evaluation=first)) == first
        assert [candidate.status for candidate in ledger.candidates()] == ["evaluated", "duplicate", "duplicate"]
        known = ledger.find_canonical("W**2*X")
        assert known is not None
        assert known.id == first
        assert ledger.counts()["drawn"] == 3
        assert ledger.counts()["paid"] == 1


def test_counts_by_hand(path: Path) -> None:
    rows = [
        ("exp(log(W))", "W", "W", "W", "m1"),
        ("neg(neg(W))", "W", "W", "W", "m1"),
        ("W + W", "W + W", "2*W", "W", None),
        ("3*W + 0", "3*W", "3*W", "W", None),
        ("3*W + 0", "3*W", "3*W", "W", None),
        ("W*X", "W*X", "W*X", "W*X", "m2"),
        ("W*X*X", "W*X*X", "W*X**2", "W*X**2", "m2"),
    ]
    with Ledger.open(path, SETTINGS, resume=False) as ledger:
        zero = dict.fromkeys(ledger.counts(), 0)
        assert ledger.counts() == zero
        for place, (text, opposites, canonical, ranked, mask) in enumerate(rows):
            candidate = Candidate(
                0, place, text, canonical, "failed", opposites=opposites, ranked=ranked, fingerprint=mask
            )
            ledger.record(candidate)
        ledger.record(replace(EVALUATED, position=7, formula="W*X"), PAID)
        assert ledger.counts() == {
            "drawn": 8,
            "unique_texts": 6,
            "unique_opposites": 6,
            "unique_canonical": 5,
            "unique_ranked": 3,
            "unique_masks": 3,
            "paid": 1,
        }


def test_measurements_come_back_as_they_were_given(path: Path) -> None:
    value = {"error": None, "fingerprint": "f", "reconstruction": {"0.5": 1 / 3}}
    rows = [
        Measurement(0, 1, "reconstruction", value, None, 0.25, 77, 1),
        Measurement(0, 0, "reconstruction", None, "2 of 8 scores are NaN", 0.5, None, 2),
        Measurement(0, 1, "4 windows", {"loss": {"0.5": 0.1}, "kl": {"0.5": 1e-17}}, None, 1.0),
        Measurement(1, 1, "reconstruction", value, None, 0.25),
    ]
    with Ledger.open(path, SETTINGS, resume=False) as ledger:
        ledger.measure(rows[:2])
        ledger.measure([replace(rows[0], value={"other": 1}, duration=9.0), *rows[2:]])  # the first stays
        ledger.measure([])
        assert ledger.measurements() == rows
        assert ledger.measurements(0) == rows[:3]
        assert ledger.measurements(7) == []
        tables = ledger.comparable_tables()["measurements"]
        assert [(row["position"], row["rung"]) for row in tables[:2]] == [(0, "reconstruction"), (1, "4 windows")]
        assert set(tables[0]) == {"generation", "position", "rung", "value", "error"}


def test_measurements_are_stored_all_or_none(path: Path) -> None:
    row = Measurement(0, 0, "reconstruction", {"figure": 1.0}, None, 0.25)
    with Ledger.open(path, SETTINGS, resume=False) as ledger:
        with pytest.raises(ValueError, match="JSON compliant"):
            ledger.measure([row, replace(row, position=1, value={"figure": float("inf")})])
        assert ledger.measurements() == []
    with Ledger.read(path) as ledger, pytest.raises(LedgerError, match="open for reading only"):
        ledger.measure([row])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_infinite_is_stored(path: Path, bad: float) -> None:
    with Ledger.open(path, SETTINGS, resume=False) as ledger:
        attempts: list[Callable[[], object]] = [
            lambda: ledger.record(EVALUATED, replace(PAID, figures={"loss": {"0.5": bad}})),
            lambda: ledger.record(EVALUATED, replace(PAID, seconds_score=bad)),
            lambda: ledger.commit_generation(0, [bad], [3, [1], None]),
            lambda: ledger.save_result({"excess": bad}),
        ]
        for attempt in attempts:
            with pytest.raises(ValueError, match="JSON compliant"):
                attempt()
        assert not any(rows for name, rows in ledger.comparable_tables().items() if name != "meta")


def test_a_reason_may_hold_anything(path: Path) -> None:
    with Ledger.open(path, SETTINGS, resume=False) as ledger:
        ledger.record(replace(EVALUATED, status="failed", reason="no file \udcff\n\x00'\""))
        (candidate,) = ledger.candidates()
        assert candidate.reason == "no file \\udcff\n\x00'\""


@pytest.mark.parametrize("candidate", [EVALUATED, replace(EVALUATED, status="odd"), replace(EVALUATED, evaluation=7)])
def test_a_candidate_without_its_evaluation_is_refused(path: Path, candidate: Candidate) -> None:
    with Ledger.open(path, SETTINGS, resume=False) as ledger:
        with pytest.raises(LedgerError, match="constraint failed"):
            ledger.record(candidate)
        assert ledger.candidates() == []


def test_what_is_stored_is_durable_and_ours(path: Path) -> None:
    with Ledger.open(path, SETTINGS, resume=False) as ledger:
        expected = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30000}
        for pragma, value in expected.items():
            assert ledger._connection.execute(f"PRAGMA {pragma}").fetchone()[0] == value
    assert path.read_bytes()[68:72] == sqlite_schema.APPLICATION_ID.to_bytes(4, "big")
    assert [name.name for name in path.parent.iterdir()] == [path.name]  # closed: one file, no log beside it


# Whose ledger it is


def test_an_existing_ledger_needs_resume(path: Path) -> None:
    campaign(path)
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=r"exists: continue it with --resume or use another --ledger"):
        Ledger.open(path, SETTINGS, resume=False)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"seed": 3}, ["--seed: 2 there, 3 here"]),
        (
            {"model": "b" * 90, "extra": 1},
            ["--extra: none there, 1 here", f"--model: sha256:aa there, {'b' * 57}... here"],
        ),
        ({"targets": ["0.5"]}, ["--targets: 0.5,2:4 there, 0.5 here"]),
    ],
)
def test_another_campaign_is_refused(path: Path, changes: dict[str, Any], complaint: list[str]) -> None:
    campaign(path)
    with pytest.raises(LedgerError, match="is of another campaign; --fork begins one from its population") as caught:
        Ledger.open(path, SETTINGS | changes, resume=True)
    assert list(caught.value.details) == complaint
    campaign(path)


@pytest.mark.parametrize("key", sorted(BUDGET_KEYS))
def test_a_new_budget_replaces_the_old_one_and_its_result(path: Path, key: str) -> None:
    campaign(path)
    with Ledger.open(path, SETTINGS | {key: 77}, resume=True) as ledger:
        assert ledger.settings == SETTINGS | {key: 77}
        assert ledger.result() is None
    with Ledger.open(path, SETTINGS | {"targets": ("0.5", "2:4")}, resume=True) as ledger:
        assert ledger.settings == SETTINGS


def test_a_second_driver_is_refused_while_the_first_lives(path: Path) -> None:
    with Ledger.open(path, SETTINGS, resume=False) as ledger:
        with pytest.raises(LedgerError, match=f"in use by process {os.getpid()} on host {socket.gethostname()}"):
            Ledger.open(path, SETTINGS, resume=True)
        ledger.record(EVALUATED, PAID)
    Ledger.open(path, SETTINGS, resume=True).close()


def own(path: Path, **columns: object) -> None:
    campaign(path)
    row = {"host": socket.gethostname(), "pid": os.getpid(), "started": "earlier", "heartbeat": time.time()} | columns
    connection = sqlite3.connect(path)
    connection.execute("INSERT INTO owner VALUES (1, :host, :pid, :started, 'token', :heartbeat)", row)
    connection.commit()
    connection.close()


def test_a_reused_process_number_is_not_the_owner(path: Path) -> None:
    own(path)
    Ledger.open(path, SETTINGS, resume=True).close()


def test_a_zombie_is_not_the_owner(path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    start = driver_lock._start_of(child.pid)
    assert child.stdout is not None
    child.stdout.read()  # it has ended, and nobody has waited for it
    own(path, pid=child.pid, started=start)
    time.sleep(0.1)
    Ledger.open(path, SETTINGS, resume=True).close()
    child.wait()
    child.stdout.close()


def test_without_proc_a_living_process_owns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_lock, "Path", lambda *parts: Path(*parts) if parts[0] == path else tmp_missing(path))
    assert driver_lock._start_of(os.getpid()) == driver_lock._start_of(1) == "running"
    assert driver_lock._start_of(2**22 + 1) == ""


def tmp_missing(path: Path) -> Path:
    return path.parent / "missing"


@dataclass
class Clock:
    """Stands in for `time`: sleeping takes no time, and something may happen meanwhile; the wall clock is wrong."""

    wall: float
    path: Path
    beats_at: tuple[float, ...] = ()  # when the owner beats, in seconds
    wall_there: float = 0.0  # what its clock says then
    now: float = 0.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.wall

    def sleep(self, seconds: float) -> None:
        before, self.now = self.now, self.now + seconds
        if any(before < beat <= self.now for beat in self.beats_at):
            connection = sqlite3.connect(self.path)
            with connection, pytest.MonkeyPatch.context() as patch:
                patch.setattr(self, "wall", self.wall_there)
                driver_lock.beat(connection, "token")
            connection.close()


FOREIGN = [{"host": "elsewhere"}, {"started": "b00t/pid:[7]/1"}]  # another host; another boot under the same name


@pytest.mark.parametrize("columns", FOREIGN)
@pytest.mark.parametrize("skew", [-1e6, -3600.0, -5.0, 0.0, 61.0, 1e6])
def test_an_owner_elsewhere_has_ended_where_it_is_silent_for_a_minute_here(
    skew: float, columns: dict[str, str], path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """However its clock and ours differ: only what changes while we look counts."""
    own(path, **columns, heartbeat=1e9 + skew)
    clock = Clock(1e9, path)
    monkeypatch.setattr(driver_lock, "time", clock)
    Ledger.open(path, SETTINGS, resume=True).close()
    assert 60 < clock.now < 63
    host = columns.get("host", socket.gethostname())
    told = f"ledger {path} is in use by process {os.getpid()} on host {host}: it is taken over unless that is heard of "
    assert caplog.messages == [f"{told}within 60 s"]


@pytest.mark.parametrize("columns", FOREIGN)
@pytest.mark.parametrize("skew", [-1e6, -61.0, 0.0, 1e6])
@pytest.mark.parametrize("back", [0.0, 500.0])
def test_an_owner_elsewhere_that_is_heard_of_lives(
    back: float, skew: float, columns: dict[str, str], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that is late, with a clock of another time, or that was put back meanwhile."""
    own(path, **columns, heartbeat=1e9 + skew)
    clock = Clock(1e9, path, beats_at=(58.0,), wall_there=1e9 + skew - back)
    monkeypatch.setattr(driver_lock, "time", clock)
    with pytest.raises(LedgerError, match=r"is in use by process \d+ on host .*, which is heard of$"):
        Ledger.open(path, SETTINGS, resume=True)
    assert clock.now == 58
    with pytest.raises(LedgerError, match="exists: continue it with --resume"):  # nobody waits to be told that
        Ledger.open(path, SETTINGS, resume=False)
    assert clock.now == 58


def test_who_took_over_meanwhile_is_not_displaced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own(path, host="elsewhere", heartbeat=5.0)
    watched = driver_lock.watch

    def other(connection: sqlite3.Connection) -> Any:
        found = watched(connection)
        sql(path, "UPDATE owner SET token = 'another'")
        return found

    monkeypatch.setattr(driver_lock, "time", Clock(1e9, path))
    monkeypatch.setattr(driver_lock, "watch", other)
    with pytest.raises(LedgerError, match=r"is in use by process \d+ on host elsewhere$"):
        Ledger.open(path, SETTINGS, resume=True)
    assert sql(path, "SELECT token FROM owner") == [("another",)]


def test_a_driver_is_heard_of_while_it_computes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate may take longer than a minute; when the driver ends, so does its heart."""
    monkeypatch.setattr(driver_lock, "_BEAT_SECONDS", 0.02)
    threads = threading.active_count()
    with Ledger.open(path, SETTINGS, resume=False):
        beats = set[float]()
        ends = time.monotonic() + 20
        while len(beats) < 4 and time.monotonic() < ends:
            beats |= {row[0] for row in sql(path, "SELECT heartbeat FROM owner")}
            time.sleep(0.01)
        assert len(beats) >= 4
    assert threading.active_count() == threads
    assert sql(path, "SELECT * FROM owner") == []


def test_a_driver_in_another_namespace_is_not_displaced(path: Path) -> None:
    """Its number means another process here, or none; neither the host's name nor silence tells of its end."""
    boot, namespace, tick = driver_lock._start_of(os.getpid()).split("/")
    assert namespace == os.readlink("/proc/self/ns/pid")
    own(path, pid=2**22 + 1, started=f"{boot}/pid:[7]/{tick}", host="container", heartbeat=time.time() - 9000)
    told = r"in another container .* heard of 9000 s ago; if it has ended, gpmetric ledger free FILE$"
    with pytest.raises(LedgerError, match=told):
        Ledger.open(path, SETTINGS, resume=True)
    sql(path, "DELETE FROM owner")
    Ledger.open(path, SETTINGS, resume=True).close()


def test_a_driver_of_this_namespace_is_known_whatever_the_host_is_called(path: Path) -> None:
    """A host that was given another name since: the driver lives however long ago it wrote, or is dead at once."""
    start = driver_lock._start_of(os.getpid())
    own(path, host="elsewhere", started=start, heartbeat=0)
    with pytest.raises(LedgerError, match=f"in use by process {os.getpid()} on host elsewhere$"):
        Ledger.open(path, SETTINGS, resume=True)
    sql(path, f"UPDATE owner SET started = '{start}0', heartbeat = {time.time()}")
    Ledger.open(path, SETTINGS, resume=True).close()


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs a namespace of its own")
def test_a_living_driver_of_a_real_namespace_is_not_displaced(path: Path) -> None:
    code = f"from tests.test_ledger import *; kept = Ledger.open({str(path)!r}, SETTINGS, resume=False)"
    code += "; sql(kept.path, 'UPDATE owner SET heartbeat = 0'); print(1, flush=True); input()"
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, "-c", code]
    driver = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert driver.stdout is not None
    if driver.stdout.readline() != b"1\n":
        driver.communicate()
        pytest.skip("namespaces are not to be had here")
    with pytest.raises(LedgerError, match=r"in use by process \d+ on host .* in another container"):
        Ledger.open(path, SETTINGS, resume=True)
    driver.kill()
    driver.communicate()


def test_a_driver_that_lost_its_ledger_stops_writing(path: Path) -> None:
    with Ledger.open(path, SETTINGS, resume=False) as ledger:
        ledger.measure([])
        sql(path, "UPDATE owner SET token = 'another', host = 'elsewhere'")
        with pytest.raises(LedgerError, match="taken over by another driver"):
            ledger.record(EVALUATED, PAID)
    with Ledger.read(path) as ledger:
        assert ledger.candidates() == []


def test_reading_beside_a_driver(path: Path) -> None:
    with Ledger.open(path, SETTINGS, resume=False) as driver, Ledger.read(path) as reader:
        driver.record(EVALUATED, PAID)
        assert reader.counts()["drawn"] == 0  # a snapshot
        with Ledger.read(path) as later:
            assert later.counts()["drawn"] == 1
        with pytest.raises(LedgerError, match="open for reading only"):
            reader.record(EVALUATED, PAID)


def test_reading_in_a_folder_that_is_read_only(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    campaign(path)
    monkeypatch.setattr(os, "access", lambda *_: False)  # a test run by root has no such folder
    expected = tables(path)
    assert expected["results"]
    assert [name.name for name in path.parent.iterdir()] == [path.name]


# Bad stores


def text_file(path: Path) -> None:
    path.write_text("formula,loss\n" * 200, encoding="utf-8")


def foreign(path: Path) -> None:
    sql(path, "CREATE TABLE trials (id)")


def marked_foreign(path: Path) -> None:
    sql(path, "PRAGMA application_id = 7")


def newer(path: Path) -> None:
    campaign(path)
    sql(path, "PRAGMA user_version = 99")


def flipped_page(path: Path) -> None:
    campaign(path)
    flip(path, 2)


def flip(path: Path, page: int) -> None:
    content = bytearray(path.read_bytes())
    content[4096 * page : 4096 * (page + 1)] = bytes(255 - byte for byte in content[4096 * page : 4096 * (page + 1)])
    path.write_bytes(content)


def truncated(path: Path) -> None:
    campaign(path)
    os.truncate(path, path.stat().st_size // 2)


def missing_table(path: Path) -> None:
    campaign(path)
    sql(path, "DROP TABLE results")


def broken_record(path: Path) -> None:
    campaign(path)
    sql(path, "PRAGMA ignore_check_constraints = ON", "UPDATE generations SET rng = '[3, [12'")


def directory(path: Path) -> None:
    path.mkdir()


def inside_a_file(path: Path) -> None:
    path.parent.rmdir()
    path.parent.write_text("")


def no_folder(path: Path) -> None:
    path.parent.rmdir()


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (text_file, "cannot be used: file is not a database"),
        (foreign, "is a SQLite file of another program"),
        (marked_foreign, "is a SQLite file of another program"),
        (newer, "has schema version 99, newer than 5"),
        (flipped_page, "gpmetric ledger repair FILE -o NEW"),
        (truncated, "gpmetric ledger repair FILE -o NEW"),
        (missing_table, "no such table: results"),
        (broken_record, r"CHECK constraint failed in generations|row 0 of generations does not match"),
        (directory, "it is a directory"),
        (inside_a_file, "unable to open database file .its folder must exist"),
        (no_folder, "unable to open database file .its folder must exist"),
    ],
)
@pytest.mark.parametrize("use", ["open", "read"])
def test_bad_stores_are_refused_in_one_line(
    tmp_path: Path, make: Callable[[Path], None], complaint: str, use: str
) -> None:
    path = tmp_path / "folder" / "ledger.sqlite"
    path.parent.mkdir()
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(LedgerError, match=complaint) as caught:
        Ledger.open(path, SETTINGS, resume=True) if use == "open" else tables(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert before is None or path.read_bytes() == before


def test_no_flipped_page_does_more_than_a_refusal(tmp_path: Path) -> None:
    campaign(tmp_path / "whole", SETTINGS | {"generations": 20})
    content = (tmp_path / "whole").read_bytes()
    for page in range(len(content) // 4096):
        path = tmp_path / f"flipped{page}"
        path.write_bytes(content)
        flip(path, page)
        with pytest.raises(LedgerError), Ledger.read(path) as ledger:
            ledger.comparable_tables()


@pytest.mark.parametrize("content", [None, b""])
def test_a_missing_or_empty_file_starts_a_campaign(path: Path, content: bytes | None) -> None:
    if content is not None:
        path.write_bytes(content)
        with pytest.raises(LedgerError, match="holds no campaign"):
            Ledger.read(path)
    else:
        with pytest.raises(LedgerError, match="unable to open"):
            Ledger.read(path)
        assert not path.exists()
    campaign(path)
    with Ledger.read(path) as ledger:
        assert ledger.result() is not None


@pytest.mark.parametrize("name", ["with space", "ünïcödé 日本", "a?mode=ro", "a#b%20c", ":memory:", "file:x?mode=ro"])
def test_a_name_is_only_a_name(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    campaign(Path(name))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert tables(Path(name))["results"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_ledger_is_refused(path: Path) -> None:
    campaign(path)
    path.chmod(0o444)
    with pytest.raises(LedgerError, match="cannot be used: attempt to write a readonly database"):
        Ledger.open(path, SETTINGS, resume=True)


def test_a_lost_log_is_a_step_back_not_a_failure(tmp_path: Path) -> None:
    """The -wal file deleted beside a killed ledger: what it held is gone, and the campaign pays for it again."""
    campaign(tmp_path / "whole")
    path, copy = tmp_path / "ledger", tmp_path / "copy"
    with Ledger.open(path, SETTINGS, resume=False) as ledger:
        ledger.record(EVALUATED, PAID)
        copy.write_bytes(path.read_bytes())
    sql(copy, "DELETE FROM owner")
    campaign(copy)
    assert tables(copy) == tables(tmp_path / "whole")


def test_a_full_disk_loses_nothing_committed(path: Path) -> None:
    with Ledger.open(path, SETTINGS, resume=False) as ledger:
        ledger.record(EVALUATED, PAID)
        pages = ledger._connection.execute("PRAGMA page_count").fetchone()[0]
        ledger._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(GpmetricError, match="cannot be used: database or disk is full"):
            ledger.commit_generation(0, ["W" * 50_000], [3, [1], None])
        ledger._connection.execute("PRAGMA max_page_count = 10000")
        assert ledger.generations() == []
        ledger.commit_generation(0, ["W" * 50_000], [3, [1], None])
        assert ledger.counts()["paid"] == 1


# Checksums of rows


def test_every_row_carries_the_checksum_of_its_columns(path: Path) -> None:
    """blake2b of the table's name and the columns that are not NULL, whole numbers without a point, by hand."""
    campaign(path)
    with Ledger.open(path, SETTINGS, resume=True) as ledger:
        ledger.measure([Measurement(0, 0, "reconstruction", {"figure": 0.5}, None, 2.0)])
        ledger.hold_out(HeldOutMeasurement("W", "0.5", "test", "whole", 1.0, -0.0))
    for table in sqlite_schema.TABLES:
        rows = raw(path, table)
        assert rows, table
        for row in rows:
            found = row.pop("checksum")
            whole = {key: int(one) if one == 0 or one == 1 or one == 2 else one for key, one in row.items()}
            told = {key: one for key, one in whole.items() if one is not None}
            content = json.dumps([table, told], sort_keys=True).encode()
            assert found == hashlib.blake2b(content, digest_size=8).hexdigest(), (table, row)


@pytest.mark.parametrize("use", ["open", "read"])
@pytest.mark.parametrize(
    ("table", "change"),
    [
        ("meta", "value = '3' WHERE key = 'seed'"),
        ("generations", "evaluations = evaluations + 1 WHERE number = 1"),
        ("evaluations", """figures = replace(figures, '.', '9.') WHERE figures LIKE '%.%'"""),
        ("evaluations", "id = 900 WHERE id = (SELECT max(id) FROM evaluations WHERE status = 'failed')"),
        ("candidates", "position = 77 WHERE id = 2"),
        ("candidates", "canonical = NULL WHERE id = 2"),
        ("results", """value = replace(value, 'winner', 'winnes')"""),
    ],
)
def test_a_changed_cell_is_told(path: Path, table: str, change: str, use: str) -> None:
    campaign(path)
    sql(path, f"UPDATE {table} SET {change}")
    before = path.read_bytes()
    with pytest.raises(
        LedgerError, match=rf"is damaged: row \d+ of {table} does not match its checksum .gpmetric ledger check"
    ):
        Ledger.open(path, SETTINGS, resume=True) if use == "open" else Ledger.read(path)
    assert path.read_bytes() == before


def test_tables_that_are_not_a_ledgers_are_told(path: Path) -> None:
    campaign(path)
    sql(path, "PRAGMA writable_schema = ON", "UPDATE sqlite_master SET sql = replace(sql, 'screened', 'screenee')")
    with pytest.raises(LedgerError, match="is damaged: its tables are not those of a ledger"):
        Ledger.read(path)


# Ledgers of earlier versions

GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture(params=["finished", "unfinished"])
def golden(request: pytest.FixtureRequest, path: Path) -> Path:
    """A copy of a campaign's ledger as version 2 wrote it, stopped inside its third generation or run to its end."""
    path.write_bytes((GOLDEN / f"ledger-v2-{request.param}.sqlite").read_bytes())
    return path


def raw(path: Path, table: str) -> list[dict[str, Any]]:
    connection = sqlite3.connect(path)
    connection.row_factory = sqlite3.Row
    rows = [dict(row) for row in connection.execute(f"SELECT * FROM {table} ORDER BY rowid")]
    connection.close()
    return rows


def test_a_ledger_of_version_2_is_read_as_if_written_now(golden: Path) -> None:
    before = golden.read_bytes()
    with Ledger.read(golden) as ledger:
        evaluations, candidates, measurements = ledger.evaluations(), ledger.candidates(), ledger.measurements()
        assert [row.number for row in ledger.generations()] == [row["number"] for row in raw(golden, "generations")]
        assert ledger.settings["target"] == ["0.5", "2:4"]
    assert len(evaluations) > 5
    for row, old in zip(evaluations, raw(golden, "evaluations"), strict=True):
        figures = {"loss": json.loads(old["losses"]), "kl": json.loads(old["divergences"])}
        assert (row.id, row.formula, row.sketch, row.figures) == (old["id"], old["formula"], old["sketch"], figures)
    assert {row.status for row in candidates} == {"evaluated", "duplicate", "screened", "failed"}
    for candidate, old in zip(candidates, raw(golden, "candidates"), strict=True):
        screened = str(old["reason"]).startswith("screened out after ")
        assert candidate.status == ("screened" if screened else old["status"])
        assert (candidate.formula, candidate.reason, candidate.ranked) == (old["formula"], old["reason"], old["ranked"])
    for measured, old in zip(measurements, raw(golden, "measurements"), strict=True):
        value = json.loads(old["value"])
        assert measured.value == (value and {key: one for key, one in value.items() if key != "error"})
    assert golden.read_bytes() == before


def test_a_ledger_of_version_2_is_upgraded_where_it_is_continued(golden: Path) -> None:
    with Ledger.read(golden) as ledger:
        settings, result, expected = ledger.settings, ledger.result(), ledger.comparable_tables()
    with Ledger.open(golden, settings, resume=True) as ledger:
        assert ledger.comparable_tables() == expected
        assert ledger.result() == result
        ledger.record(Candidate(99, 0, "W", "W", "screened", reason="screened out after 1 windows"))
    new = golden.with_name("new")
    Ledger.open(new, settings, resume=False).close()
    for table in sqlite_schema.TABLES:
        columns = [{column["name"] for column in raw(one, f"pragma_table_info('{table}')")} for one in (golden, new)]
        assert columns[0] == columns[1]


def test_a_ledger_of_version_3_gets_checksums_and_it_is_told(golden: Path, caplog: pytest.LogCaptureFixture) -> None:
    sql(golden, *sqlite_schema.UPGRADES[2], "PRAGMA user_version = 3")
    with caplog.at_level("WARNING"), Ledger.read(golden) as ledger:
        settings, expected = ledger.settings, ledger.comparable_tables()
    (told,) = caplog.messages
    assert told == f"ledger {str(golden)!r} is of an earlier format, without checksums: damage to its rows is not seen"
    caplog.clear()
    Ledger.open(golden, settings, resume=True).close()
    assert caplog.messages == [told]
    with Ledger.read(golden) as ledger:
        assert ledger.comparable_tables() == expected
    assert caplog.messages == [told]  # not again
    sql(golden, "UPDATE candidates SET ranked = 'W' WHERE id = 3")
    with pytest.raises(LedgerError, match="row 3 of candidates does not match its checksum"):
        Ledger.read(golden)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("generations SET rng = x'00'", "malformed JSON|CHECK constraint failed|rng is b'.x00'"),
        ("evaluations SET formula = x'00'", "is damaged: formula is b'.x00'$"),
        ("evaluations SET figures = '7'", "is damaged: figures is '7', which is no object$"),
        ("evaluations SET nodes = 'many'", "is damaged: nodes is 'many'$"),
        ("results SET value = '7'", "is damaged: its result is no object$"),
    ],
)
def test_a_cell_of_an_earlier_version_that_is_none_is_told(path: Path, change: str, told: str) -> None:
    """Which no checksum guards: it is refused by its kind."""
    path.write_bytes((GOLDEN / "ledger-v2-finished.sqlite").read_bytes())
    sql(path, *sqlite_schema.UPGRADES[2], "PRAGMA user_version = 3")
    sql(path, "PRAGMA ignore_check_constraints = ON", f"UPDATE {change}")
    with pytest.raises(LedgerError, match=told), Ledger.read(path) as ledger:
        assert [ledger.generations(), ledger.evaluations(), ledger.result()]


def test_a_version_that_was_never_released_is_refused(path: Path) -> None:
    campaign(path)
    sql(path, "PRAGMA user_version = 1")
    for use in (lambda: Ledger.open(path, SETTINGS, resume=True), lambda: Ledger.read(path)):
        with pytest.raises(LedgerError, match="has schema version 1, which no released gpmetric wrote"):
            use()


def test_an_upgrade_that_fails_changes_nothing(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = raw(golden, "evaluations")
    steps = {2: (*sqlite_schema.UPGRADES[2], "CREATE TABLE meta (id)")}
    monkeypatch.setattr(sqlite_schema, "UPGRADES", steps)
    with pytest.raises(LedgerError, match="table meta already exists"):
        Ledger.open(golden, {}, resume=True)
    assert raw(golden, "evaluations") == before
