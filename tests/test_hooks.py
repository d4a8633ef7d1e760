"""A user's command, or function, after each generation."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gpmetric
from gpmetric.errors import InputError
from gpmetric.evolution.discover import run_campaign
from gpmetric.evolution.generation_hook import GenerationHook
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.request import DiscoverRequest
from gpmetric.evolution.selection import Individual
from gpmetric.metrics import resolve_metric
from tests.watch_helpers import Calling, tiny_request

COUNTS = {"paid": 3, "drawn": 9}
NOTING = """
import json, os, sys
told = {name: value for name, value in os.environ.items() if name.startswith("GPMETRIC_") and name != "GPMETRIC_SHARED"}
with open(sys.argv[1], "a") as file:
    print(json.dumps([sys.argv[2:], told, json.load(sys.stdin)]), file=file)
"""


@pytest.fixture
def command(tmp_path: Path) -> Callable[[str], str]:
    """A command line that runs a piece of Python."""

    def make(code: str, *words: str) -> str:
        script = tmp_path / "a hook.py"
        script.write_text(code)
        return shlex.join([sys.executable, str(script), *words])

    return make


def one(text: str = "abs(W)*X", excess: float = 0.25) -> Individual:
    return Individual(resolve_metric(text), {"0.5": excess}, {"0.5": excess})


def test_the_command_is_told_of_every_generation(
    command: Any, tmp_path: Path, tiny_llama: Path, tiny_text: Path
) -> None:
    """What it writes is no part of the campaign, which is the same as without it."""
    notes = tmp_path / "notes"
    line = command(NOTING + "sys.exit(1 if told['GPMETRIC_GENERATION'] == '0' else 0)", str(notes), "$HOME", "a b")
    request = tiny_request(tiny_llama, tiny_text, tmp_path, on_generation=line)
    heard = Calling(lambda number: time.sleep(1))  # so that each command ends before the next generation
    result = run_campaign(request, heard)
    rows = [json.loads(row) for row in notes.read_text().splitlines()]
    assert [row[1]["GPMETRIC_GENERATION"] for row in rows] == list(map(str, heard.generations))
    assert {tuple(row[0]) for row in rows} == {("$HOME", "a b")}  # no shell has seen them
    _, known, document = rows[-1]
    assert known["GPMETRIC_LEDGER"] == document["ledger"] == str(tmp_path / "a.sqlite")
    assert known["GPMETRIC_FORMULA"] == document["front"][0]["formula"] == result["front"][0]["formula"]
    assert float(known["GPMETRIC_MEAN_EXCESS"]) == result["front"][0]["mean_excess"]
    assert document["counts"]["paid"] == int(known["GPMETRIC_EVALUATIONS"])

    plain = tiny_request(tiny_llama, tiny_text, tmp_path, ledger=tmp_path / "b.sqlite")
    run_campaign(plain)
    with Ledger.read(tmp_path / "a.sqlite") as mine, Ledger.read(tmp_path / "b.sqlite") as theirs:
        assert mine.comparable_tables() == theirs.comparable_tables()


def test_a_failure_is_told_once(command: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with GenerationHook(command("raise SystemExit(7)"), tmp_path / "a.sqlite") as hook:
        for number in range(3):
            hook.generation(number, [one()], COUNTS)
            assert hook._process is not None
            hook._process.wait()
    (line,) = caplog.messages
    assert "failed after generation 0, with exit status 7" in line


def test_a_slow_command_holds_nothing_up(
    command: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpmetric.evolution.generation_hook._PARTING", 0.1)
    begun = time.monotonic()
    with GenerationHook(command("import time; time.sleep(20)"), tmp_path / "a.sqlite") as hook:
        front = [one(excess=float("inf"))] * 5000  # more than a pipe takes
        for number in range(3):
            hook.generation(number, front, COUNTS)
        assert hook._process is not None
        process = hook._process
    assert time.monotonic() - begun < 5
    (line,) = caplog.messages
    assert "still runs after generation 0" in line
    process.kill()


def test_a_program_that_is_gone_costs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with GenerationHook(str(tmp_path / "gone"), tmp_path / "a.sqlite") as hook:
        hook.generation(0, [], COUNTS)
        hook.generation(1, [], COUNTS)
    (line,) = caplog.messages
    assert "cannot be started: No such file" in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("'unclosed", "No closing quotation"),
        ("", "there is no program ''"),
        ("no-such-program -x", "no program 'no-such"),
    ],
)
def test_what_is_no_command_is_refused_before_any_work(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        DiscoverRequest(on_generation=text).check()


def test_a_function_listens(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    """As the README has it."""
    told = []

    class Watching(gpmetric.DiscoverListener):
        def generation(self, number: int, front: Any, counts: Any) -> None:
            told.append((number, front[0].text, counts["paid"]))

    request = tiny_request(tiny_llama, tiny_text, tmp_path)
    options = {name: getattr(request, name) for name in ("model", "text", "target", "population", "samples", "windows")}
    options |= {"search_windows": 2, "sequence_length": 32, "include": r"\.0\.", "calibration_seeds": 0, "workers": 1}
    result = gpmetric.discover(
        **options, operands="W,X", generations=2, ledger=tmp_path / "c.sqlite", cache=tmp_path, listener=Watching()
    )
    assert [number for number, _, _ in told] == [0, 1]
    assert told[-1][1:] == (result["front"][0]["formula"], result["evaluations"])
