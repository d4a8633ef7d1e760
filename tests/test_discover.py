"""`gpmetric discover` whole, on a tiny random model: the document, splits, workers, resuming, stopping."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gpmetric.errors import DataError, InputError, LedgerError
from gpmetric.evolution.discover import discover, run_campaign
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.request import Request
from gpmetric.evolution.selection import Individual
from gpmetric.evolution.verdict import choose_finalists, choose_winner
from gpmetric.expression import parse
from gpmetric.pruning.metrics import BASELINES


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def request_for(tiny_llama: Path, tiny_text: Path, cache: Path) -> Any:
    def make(**changes: Any) -> Request:
        values: dict[str, Any] = {
            "model": str(tiny_llama),
            "text": str(tiny_text),
            "target": ("0.5", "2:4"),
            "population": 6,
            "evaluations": 14,
            "samples": 4,
            "search_windows": 2,
            "windows": 2,
            "sequence_length": 32,
            "cache": cache,
            "workers": 1,
        }
        return Request(**(values | changes))

    return make


def without_seconds(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "seconds"}


def test_document_names_winner_front_baselines_splits(request_for: Any, tmp_path: Path) -> None:
    result = run_campaign(request_for(), tmp_path / "a.sqlite")
    assert set(result["baselines"]) == set(BASELINES)
    assert result["evaluations"] == 14
    assert result["unique_masks"] == 14
    assert [row["text"].rpartition("#")[2] for row in result["splits"].values()] == list(result["splits"])
    assert set(result["dense"]) == {"search", "validation", "test"}
    winner = result["winner"]
    assert winner["formula"] in [row["formula"] for row in result["front"]]
    assert set(winner["ppl"]) == {"0.5", "2:4"}
    assert winner["mean_excess"] == pytest.approx(sum(winner["excess"].values()) / 2)
    assert set(result["seconds"]["per_evaluation"]) == {"score_and_mask", "prune_and_loss"}
    json.dumps(result, allow_nan=False)


def test_two_workers_and_one_write_the_same_ledger(request_for: Any, tmp_path: Path) -> None:
    results, tables = [], []
    for workers in (1, 2):
        path = tmp_path / f"{workers}.sqlite"
        results.append(without_seconds(run_campaign(request_for(workers=workers), path)))
        with Ledger.read(path) as ledger:
            tables.append(ledger.comparable_tables())
    assert results[0] == results[1]
    assert tables[0] == tables[1]


def test_a_finished_campaign_gives_its_result_again(request_for: Any, tmp_path: Path) -> None:
    first = run_campaign(request_for(), tmp_path / "a.sqlite")
    assert run_campaign(request_for(), tmp_path / "a.sqlite", resume=True) == first
    with pytest.raises(LedgerError, match="--resume"):
        run_campaign(request_for(), tmp_path / "a.sqlite")


@pytest.mark.parametrize("change", [{"seed": 5}, {"target": ("0.5",)}, {"samples": 3}, {"start": ("abs(W)*D",)}])
def test_a_ledger_of_another_campaign_is_refused(request_for: Any, tmp_path: Path, change: dict[str, Any]) -> None:
    run_campaign(request_for(evaluations=4), tmp_path / "a.sqlite")
    with pytest.raises(LedgerError, match="another campaign"):
        run_campaign(request_for(evaluations=4, **change), tmp_path / "a.sqlite", resume=True)


def test_without_gradients_their_baselines_are_left_out(request_for: Any, tmp_path: Path) -> None:
    result = run_campaign(request_for(operands=("W", "X"), evaluations=6), tmp_path / "a.sqlite")
    assert set(result["baselines"]) == {"magnitude", "magnitude_row", "wanda", "ria", "sparsegpt"}
    assert all(set(row["operands"]) <= {"W", "X"} for row in result["front"])


def test_fewer_primitives_leave_out_the_start_formulas_they_cannot_make(request_for: Any, tmp_path: Path) -> None:
    few = {"operands": ("W", "X"), "primitives": ("abs", "mul", "add", "sqr"), "evaluations": None, "generations": 3}
    result = run_campaign(request_for(**few), tmp_path / "a.sqlite")
    assert not any("sqrt" in row["formula"] for row in result["front"])
    assert "ria" in result["baselines"]


def test_the_function_takes_the_options_as_keywords(request_for: Any, tmp_path: Path) -> None:
    request = request_for(evaluations=4)
    options = {name: value for name, value in vars(request).items() if name != "model"}
    result = discover(request.model, ledger=tmp_path / "a.sqlite", **options)
    assert without_seconds(result) == without_seconds(run_campaign(request, tmp_path / "b.sqlite"))


@pytest.mark.parametrize("update", ["obs", "obs-blockwise"])
def test_search_in_the_use_a_metric_will_have(request_for: Any, tmp_path: Path, update: str) -> None:
    result = run_campaign(request_for(update=update, evaluations=6), tmp_path / "a.sqlite")
    plain = run_campaign(request_for(evaluations=6), tmp_path / "b.sqlite")
    assert result["update"] == update
    shared = {row["formula"]: row["excess"] for row in plain["front"]}
    assert any(shared.get(row["formula"], row["excess"]) != row["excess"] for row in result["front"])


def test_minutes_end_the_search_and_a_resume_goes_on(request_for: Any, tmp_path: Path) -> None:
    short = run_campaign(request_for(evaluations=None, minutes=0.001), tmp_path / "a.sqlite")
    assert 1 <= short["evaluations"] < 14
    longer = run_campaign(request_for(), tmp_path / "a.sqlite", resume=True)
    assert without_seconds(longer) == without_seconds(run_campaign(request_for(), tmp_path / "b.sqlite"))


def test_the_same_text_for_two_splits_is_refused(request_for: Any, tiny_text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("another text altogether, " * 200)
    for test in (other, tiny_text):
        sources = dict.fromkeys(("calibration", "search", "validation"), str(tiny_text)) | {"test": str(test)}
        with pytest.raises(DataError, match="same text"):
            run_campaign(request_for(text=None, **sources), tmp_path / "a.sqlite")
    assert not (tmp_path / "a.sqlite").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"operands": ("X",)}, "--operands must hold W"),
        ({"operands": ("W", "Q")}, "unknown name 'Q'"),
        ({"primitives": ("abs", "sqrtt")}, "did you mean 'sqrt'"),
        ({"target": ("1.5",)}, "1.5"),
        ({"update": "obs-block"}, "--update"),
        ({"population": 0}, "--population must be at least 4"),
        ({"minutes": -1.0}, "--minutes"),
        ({"workers": 0}, "--workers"),
        ({"start": ("abs(W)*Y",)}, "Y"),
        ({"start": ("abs(W)*D",), "operands": ("W", "X")}, "leaves out"),
        ({"start": ("abs(W)*X*X*X*X",), "max_nodes": 5}, "--max-nodes"),
        ({"search": "other.txt"}, "--text is cut into all four splits"),
        ({"text": None}, "--calibration is needed"),
        ({"model": "no/such/model"}, "no/such/model"),
        ({"target": ("7:11",)}, "not divisible by 11"),
        ({"sequence_length": 100000}, "--sequence-length"),
    ],
)
def test_bad_requests(request_for: Any, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        run_campaign(request_for(**change), tmp_path / "a.sqlite")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "a.sqlite").exists()


def test_ctrl_c_stops_cleanly_and_prints_how_to_go_on(
    tiny_llama: Path, tiny_text: Path, cache: Path, tmp_path: Path
) -> None:
    ledger = tmp_path / "a.sqlite"
    options = {"--model": tiny_llama, "--text": tiny_text, "--ledger": ledger, "--cache": cache, "--target": "0.5",
               "--samples": 4, "--search-windows": 4, "--windows": 2, "--sequence-length": 32, "--workers": 2,
               "--evaluations": 100000}  # fmt: skip
    words = [str(word) for pair in options.items() for word in pair]
    command = [sys.executable, "-m", "gpmetric", "discover", *words]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
        if ledger.exists() and ledger.stat().st_size:
            with Ledger.read(ledger) as book:
                if book.generations():
                    break
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert f"--ledger {ledger}" in errors
    assert "--resume" in errors
    with Ledger.read(ledger) as book:
        assert book.evaluations("done")


def test_the_winner_is_below_every_mask_only_baseline_where_one_is() -> None:
    baselines = {"wanda": {"0.5": 0.3, "2:4": 0.8}, "sparsegpt": {"0.5": 0.1, "2:4": 0.2}}
    uneven = {"0.5": 0.05, "2:4": 0.85}  # the lowest mean, but worse than Wanda at 2:4
    even = {"0.5": 0.25, "2:4": 0.75}
    assert choose_winner({"uneven": uneven, "even": even}, baselines) == "even"
    assert choose_winner({"uneven": uneven, "worse": {"0.5": 0.4, "2:4": 0.9}}, baselines) == "uneven"


def test_finalists_differ_in_more_than_constants() -> None:
    formulas = ["abs(W)*X + 2*abs(W)*G", "abs(W)*X + 3*abs(W)*G", "sqrt(W)*X", "abs(W)"]
    front = [Individual(parse(formula), {"0.5": 0.1 * place}) for place, formula in enumerate(formulas)]
    expected = [str(parse(formula)) for formula in ("abs(W)*X + 2*abs(W)*G", "sqrt(W)*X", "abs(W)")]
    assert choose_finalists(front, 5) == expected
    assert choose_finalists(front, 2) == expected[:2]
