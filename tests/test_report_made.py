"""Pages of what commands give now, and of campaigns while they run, on a tiny random model."""

from __future__ import annotations

import json
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gpmetric
from gpmetric.errors import InputError
from gpmetric.evolution.discover import run_campaign
from gpmetric.evolution.ledger import Ledger
from gpmetric.files import write_json
from tests.watch_helpers import Calling, tiny_request

pytestmark = pytest.mark.slow
SMALL: dict[str, Any] = {"device": "cpu", "samples": 4, "windows": 2, "sequence_length": 32}
MADE: dict[str, tuple[Callable[..., dict[str, Any]], dict[str, Any], str]] = {
    "bench": (gpmetric.bench, {"metric": ("wanda", "magnitude"), "target": "0.5"}, "model-0"),
    "prune": (gpmetric.prune, {"output": "pruned", "target": "2:4"}, "sparsity"),
    "slim": (gpmetric.slim, {"output": "slimmed", "sparsity": 0.3, "steps": 2}, "stays"),
    "allocate": (gpmetric.allocate, {"sparsity": 0.5, "evaluations": 8, "search_windows": 2}, "sparsity"),
    "tune": (
        gpmetric.tune,
        {"output": "tuned", "target": "2:4", "evolve": False, "search_windows": 2},
        "parts",
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_pages_of_what_commands_give_now(
    name: str, tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run, options, section = MADE[name]
    options = {key: str(tmp_path / value) if key == "output" else value for key, value in options.items()}
    if name in ("bench", "prune"):
        options["text"] = str(tiny_text)
    document = run(str(tiny_llama), calibration=str(tiny_text), **SMALL | options)
    write_json(tmp_path / "a.json", document)
    told = gpmetric.report(tmp_path / "a.json")
    assert Path(told["output"]) == tmp_path / "a.html"
    assert section in told["sections"]
    assert any(one.startswith("provenance") for one in told["sections"])


def test_a_campaign_with_a_live_page_is_that_without(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    class Watching(Calling):
        address, pages = "", []  # type: ignore[var-annotated]

        def serving(self, address: str) -> None:
            self.address = address

    def look(number: int) -> None:
        with urllib.request.urlopen(told.address, timeout=60) as answer:
            told.pages.append(answer.read().decode())

    told = Watching(look)
    for name, live, listener in (("plain", None, None), ("live", 0, told)):
        (tmp_path / name).mkdir()
        run_campaign(tiny_request(tiny_llama, tiny_text, tmp_path / name, live=live), listener)
    with Ledger.read(tmp_path / "plain" / "a.sqlite") as plain, Ledger.read(tmp_path / "live" / "a.sqlite") as mine:
        assert mine.comparable_tables() == plain.comparable_tables()
    assert len(told.pages) == len(told.generations) > 2
    assert "Campaign a.sqlite" in told.pages[-1]
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(told.address, timeout=5)
    write_json(tmp_path / "a.json", told.results[0] | {"seconds": {"per_evaluation": {"rungs": {}}}})
    for source in (tmp_path / "live" / "a.sqlite", tmp_path / "a.json"):
        assert {"winner", "test", "front", "saved"} <= set(
            gpmetric.report(source, output=tmp_path / "a.html")["sections"]
        )
    assert json.loads((tmp_path / "a.json").read_text())["winner"]


def test_a_port_in_use_begins_no_campaign(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        request = tiny_request(tiny_llama, tiny_text, tmp_path, live=taken.getsockname()[1])
        with pytest.raises(InputError, match="Address already in use"):
            run_campaign(request)
    assert not (tmp_path / "a.sqlite").exists()
