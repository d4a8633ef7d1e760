"""`gpmetric status`: of ledgers in use, finished, killed, stopped, of an earlier version, and of none."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gpmetric import status
from gpmetric.errors import LedgerError
from gpmetric.evolution import progress_note
from gpmetric.evolution.beside import note_file, read_note, stop_file
from gpmetric.evolution.discover import run_campaign
from gpmetric.evolution.fitness import mean_excess
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.listener import DiscoverListener
from gpmetric.evolution.progress_note import ProgressNote
from gpmetric.evolution.records import Candidate, Evaluation, HeldOutMeasurement, Measurement
from gpmetric.evolution.status import StatusListener, run_status
from gpmetric.evolution.status_request import StatusRequest
from gpmetric.terminal.status import StatusReport, print_status
from tests.watch_helpers import Calling, tiny_request

GOLDEN = Path(__file__).parent / "golden"
SETTINGS: dict[str, Any] = {"target": ["0.5"], "update": "none", "objective": "kl", "evaluations": 10}
FORMULAS = {"abs(W)": 0.9, "layer:abs(W)": 0.8, "abs(W)*X": 0.5, "abs(W)*X+7.5*abs(W)*G": 0.4, "W*W*X": 0.3}


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    return tmp_path / "a.sqlite"


def fill(book: Ledger) -> None:
    """Two generations, and two of three measurements of the third."""
    for number, formulas in enumerate((list(FORMULAS.items()), [("sqrt(W*W*X)", 0.35)])):
        for position, (formula, excess) in enumerate(formulas):
            figures = {"loss": {"0.5": excess}, "kl": {"0.5": excess}}
            paid = Evaluation(formula, formula, number, "done", formula, figures=figures, process=7, host="here")
            book.record(Candidate(number, position, formula, formula, "evaluated", fingerprint=formula), paid)
        book.commit_generation(number, list(FORMULAS), [3, [1], None])
    for position, count in enumerate((3, 5, 12)):
        reason = f"{count} of 20 scores are NaN" if position else "the worker died"
        book.record(Candidate(2, position, f"W*{position}", None, "failed", reason=reason))
    for position, process in ((3, 7), (4, 8)):
        book.measure(
            [Measurement(2, position, "reconstruction", {"fingerprint": "f"}, None, 0.5, process, position - 2)]
        )
    for metric, excess in (("wanda", 0.6), ("sparsegpt", 0.2), ("magnitude", None)):
        book.hold_out(HeldOutMeasurement(metric, "0.5", "validation", "calibration", excess, 3.0))


def test_what_a_ledger_in_use_tells(ledger: Path) -> None:
    """The driver is this process, and is not disturbed."""
    with Ledger.open(ledger, SETTINGS, resume=False) as book:
        assert status(ledger)["step"] == "calibration"
        fill(book)
        before = book.comparable_tables()
        found = status(ledger)
        assert book.comparable_tables() == before
        assert (found["state"], found["step"]) == ("running", "search")
        assert found["owner"] | {"silent_seconds": 0} == {
            "host": os.uname().nodename, "pid": os.getpid(), "alive": True, "silent_seconds": 0
        }  # fmt: skip
        assert found["spent"] == {"generations": 2, "evaluations": 6, "minutes": None}
        assert (found["budget"]["evaluations"], found["share"]) == (10, 0.6)
        assert found["speed"]["evaluations_per_generation"] == 1
        assert found["left_seconds"] == pytest.approx(4 * found["speed"]["seconds_per_generation"])
        assert found["generation"] == {"number": 2, "rungs": {"reconstruction": 2}}
        assert found["failures"] == [
            {"reason": "N of N scores are NaN", "count": 2}, {"reason": "the worker died", "count": 1}
        ]  # fmt: skip
        workers = [(one["process"], one["host"], one["measured"], one["retried"]) for one in found["workers"]]
        assert workers == [(7, "here", 1, 0), (8, None, 1, 1)]
        assert found["front"][0]["formula"] == "W*W*X"
        best = {row["name"]: row["formula"] for row in found["baselines"]}
        assert best == {
            "gblm_l1": "abs(W)*X+7.5*abs(W)*G", "wanda": "abs(W)*X",
            "magnitude": "layer:abs(W)", "magnitude_row": "abs(W)",
        }  # fmt: skip
        assert next(iter(best)) == "gblm_l1"
        assert [(row["metric"], row["kind"]) for row in found["validation"]] == [
            ("sparsegpt", "baseline"), ("wanda", "rival")
        ]  # fmt: skip
        json.dumps(found, allow_nan=False)
        assert not found["stop_asked"]
        stop_file(ledger).touch()
        assert status(ledger)["stop_asked"]
        told = shown(found)
        assert "step search" in told
        assert "gblm_l1: abs(W)*X+7.5*abs(W)*G" in told
        assert "best baseline of its kind on validation: wanda, mean excess 0.6000" in told
        assert "2 failed: N of N scores are NaN" in told
    stopped = status(ledger)
    assert (stopped["state"], stopped["owner"], stopped["left_seconds"]) == ("stopped", None, None)


def shown(document: Mapping[str, Any], width: int = 120) -> str:
    console = Console(file=StringIO(), width=width)
    print_status(console, document, StatusRequest(ledger=Path("a")))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize(
    ("change", "state"),
    [
        ("pid = 2147483646", "killed"),
        ("started = 'otherboot/ns/12', host = 'elsewhere'", "elsewhere"),
        ("started = '5', host = 'elsewhere'", "elsewhere"),
    ],
)
def test_whose_a_ledger_is(ledger: Path, change: str, state: str) -> None:
    with Ledger.open(ledger, SETTINGS, resume=False) as book:
        fill(book)
        with closing(sqlite3.connect(ledger)) as other, other:
            other.execute(f"UPDATE owner SET {change}")
        assert status(ledger)["state"] == state
        assert state in ("elsewhere", "killed")
        assert ("--resume goes on" in shown(status(ledger))) is (state == "killed")


class Looking(DiscoverListener):
    """Looks at the campaign whenever it tells something."""

    def __init__(self, ledger: Path) -> None:
        self.ledger, self.seen = ledger, []  # type: ignore[var-annotated]

    def step(self, name: str) -> None:
        self.seen.append(status(self.ledger))

    def generation(self, number: int, *_: Any) -> None:
        self.seen.append(status(self.ledger))


def test_a_campaign_is_seen_in_every_step_and_is_not_changed_by_it(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_note, "_EVERY", 0.0)
    request = tiny_request(tiny_llama, tiny_text, tmp_path, minutes=100.0)
    looking = Looking(tmp_path / "a.sqlite")
    result = run_campaign(request, looking)
    steps = list(dict.fromkeys(row["step"] for row in looking.seen))
    assert steps == ["calibration", "baselines", "search", "finalists", "test", "draws"]
    assert {row["state"] for row in looking.seen} == {"running"}
    spent = [row["spent"] for row in looking.seen]
    assert spent == sorted(spent, key=lambda row: (row["generations"], row["minutes"]))
    assert 0 < spent[0]["minutes"] < spent[-1]["minutes"] < 5
    searching = next(row for row in looking.seen if row["spent"]["generations"] == 2)
    assert searching["progress"]["what"] == "generation 1, 2 windows"
    assert searching["left_seconds"] < 6000
    assert not note_file(tmp_path / "a.sqlite").exists()
    found = status(tmp_path / "a.sqlite")
    assert (found["state"], found["step"], found["share"]) == ("finished", "finished", 1.0)
    assert found["result"]["winner"] == result["winner"]
    front = [(row["formula"], row["mean_excess"]) for row in result["front"]]
    assert [(row["formula"], row["mean_excess"]) for row in found["front"]] == front[:10]
    assert result["winner"]["formula"] in shown(found)

    unseen = tiny_request(tiny_llama, tiny_text, tmp_path, minutes=100.0, ledger=tmp_path / "b.sqlite")
    run_campaign(unseen, Calling())
    with Ledger.read(request.ledger or "") as mine, Ledger.read(unseen.ledger or "") as theirs:
        assert mine.candidates() == theirs.candidates()


@pytest.mark.parametrize(("name", "state"), [("finished", "finished"), ("unfinished", "stopped")])
def test_a_ledger_of_an_earlier_version(name: str, state: str, tmp_path: Path) -> None:
    path = tmp_path / "old.sqlite"
    shutil.copy(GOLDEN / f"ledger-v2-{name}.sqlite", path)
    found = status(path)
    assert found["state"] == state
    assert [row["name"] for row in found["baselines"]] == ["magnitude_row", "magnitude", "wanda"]
    assert found["front"][0]["mean_excess"] == mean_excess(found["front"][0]["excess"])
    for width in (40, 80):
        assert "excess" in shown(found, width)


def test_a_note_is_of_its_driver_alone(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_note, "_EVERY", 0.0)
    with Ledger.open(ledger, SETTINGS, resume=False):
        with ProgressNote(ledger, 30.0, 10.0) as note:
            note.step("finalists")
            note.progress("wanda on the validation text", 1, 4)
            found = status(ledger)
            assert (found["step"], found["progress"]["done"]) == ("finalists", 1)
            assert found["spent"]["minutes"] == pytest.approx(0.5, abs=0.4)
            kept = note_file(ledger).read_text()
        assert status(ledger)["step"] == "calibration"
        note_file(ledger).write_text(kept.replace(f'"pid": {os.getpid()}', '"pid": 1'))
        assert status(ledger)["step"] == "calibration"
        for damaged in ("", "[]", "{}", kept.replace("finalists", "\\ud800")[:-9], kept.replace('"done"', '"gone"')):
            note_file(ledger).write_text(damaged)
            assert read_note(ledger) is None
            assert status(ledger)["step"] == "calibration"
    with ProgressNote(ledger.parent / "none" / "a.sqlite", 0.0, None) as lost:  # which costs nothing
        lost.step("search")


@pytest.mark.parametrize("content", [None, b"", b"no ledger"])
def test_what_is_no_ledger_is_refused(ledger: Path, content: bytes | None) -> None:
    if content is not None:
        ledger.write_bytes(content)
    with pytest.raises(LedgerError, match=r"does not exist|holds no campaign|not a database"):
        status(ledger)


def test_watching_ends_with_the_driver(ledger: Path) -> None:
    """Every look but the last is told, a line each in a log; the last is the result."""
    told, console = [], Console(file=StringIO(), width=200)
    with Ledger.open(ledger, SETTINGS, resume=False) as book, StatusReport(console) as report:
        fill(book)

        class Watching(StatusListener):
            def status(self, document: Mapping[str, Any]) -> None:
                told.append(document["state"])
                report.status(document)
                if len(told) == 3:
                    book.close()

        last = run_status(StatusRequest(ledger=ledger, watch=0.01), Watching())
    assert (told, last["state"]) == (["running"] * 3, "stopped")
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 3
    assert "running, step search" in lines[0]
    assert "6 of 10 evaluations" in lines[0]


def test_a_terminal_is_shown_the_whole_again(ledger: Path) -> None:
    console = Console(file=StringIO(), width=100, force_terminal=True)
    with Ledger.open(ledger, SETTINGS, resume=False) as book, StatusReport(console) as report:
        fill(book)
        report.status(status(ledger))
    assert "2 failed: N of N" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_command_is_quick(ledger: Path) -> None:
    """A look imports no torch."""
    with Ledger.open(ledger, SETTINGS, resume=False) as book:
        fill(book)
        code = "import sys, gpmetric; gpmetric.status(sys.argv[1]); print('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code, str(ledger)], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "False"
        done = subprocess.run(
            [sys.executable, "-m", "gpmetric", "status", str(ledger), "--json", "-"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["state"] == "running"
