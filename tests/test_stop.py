"""Ending a search after its present generation: by a file beside the ledger, or by a signal."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gpmetric.evolution.beside import stop_file
from gpmetric.evolution.discover import run_campaign
from gpmetric.evolution.ledger import Ledger, result_of
from gpmetric.evolution.listener import STEPS
from gpmetric.evolution.status import status
from gpmetric.evolution.status_request import StatusRequest
from gpmetric.evolution.stop_request import StopRequest
from gpmetric.terminal.status import print_status
from gpmetric.terminal.tables import print_discover
from tests.watch_helpers import Calling, tiny_request


@pytest.fixture
def request_for(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> Any:
    return partial(tiny_request, tiny_llama, tiny_text, tmp_path)


def ask_by_file(ledger: Path) -> None:
    stop_file(ledger).touch()


def ask_by_signal(ledger: Path) -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


@pytest.mark.every(2)
@pytest.mark.parametrize("ask", [ask_by_file, ask_by_signal])
def test_a_search_ends_after_its_generation_and_goes_on_when_resumed(
    request_for: Any, tmp_path: Path, ask: Any
) -> None:
    """It has a result then; resumed under the same budget it ends as one that nobody stopped."""
    request, before = request_for(), signal.getsignal(signal.SIGUSR1)
    heard = Calling(lambda number: ask(request.ledger) if number == 0 else None)
    short = run_campaign(request, heard)
    assert (short["stopped"], heard.generations, heard.steps) == (0, [0], list(STEPS))
    assert heard.results[0]["winner"] == short["winner"]
    assert "search: ended after generation 0, as was asked" in short["cut"]
    assert short["evaluations"] < 24
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.sqlite", "cache"]
    assert result_of(request.ledger)["winner"]["formula"] == short["winner"]["formula"]
    assert signal.getsignal(signal.SIGUSR1) == before
    console = Console(file=StringIO(), width=200)
    print_discover(console, short, request)
    assert "--resume" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "--evaluations 24" in console.file.getvalue()  # type: ignore[attr-defined]

    found = status(request.ledger)
    assert (found["state"], found["result"]["stopped"]) == ("stopped", 0)
    print_status(console, found, StatusRequest(ledger=request.ledger))
    assert "its search ended after generation 0, as was asked" in console.file.getvalue()  # type: ignore[attr-defined]

    heard = Calling()
    longer = run_campaign(replace(request, resume=True), heard)
    assert heard.generations[0] == 1
    assert longer["stopped"] is None
    other = request_for(ledger=tmp_path / "b.sqlite")
    whole = run_campaign(other)
    assert {**longer, "seconds": 0} == {**whole, "seconds": 0}
    with Ledger.read(request.ledger) as mine, Ledger.read(other.ledger) as theirs:
        tables = [book.comparable_tables() for book in (mine, theirs)]
        held_out = [{tuple(row.items()) for row in one.pop("judgements")} for one in tables]
    assert tables[0] == tables[1]
    assert held_out[0] >= held_out[1]  # the finalists of the first result, too


def test_a_stop_that_comes_when_the_search_is_over_is_none(request_for: Any) -> None:
    request = request_for(generations=1, evaluations=None)
    result = run_campaign(request, Calling(lambda number: ask_by_file(request.ledger)))
    assert result["stopped"] is None
    assert not stop_file(request.ledger).exists()


def test_a_file_from_before_is_removed(request_for: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    ask_by_file(tmp_path / "a.sqlite")
    with StopRequest(tmp_path / "a.sqlite") as asked:
        assert "is from before this command" in caplog.text
        assert not asked()
        ask_by_file(tmp_path / "a.sqlite")
        assert asked()
        assert asked()  # once asked for, it stays so
    assert not list(tmp_path.iterdir())
