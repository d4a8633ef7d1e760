"""Metrics over several models: comparisons worked by hand, their table, and `gpmetric bench --model A --model B`."""

from __future__ import annotations

import io
import json
import math
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gpmetric import cli
from gpmetric.pruning.bench import BenchRow
from gpmetric.pruning.requests import BenchRequest
from gpmetric.pruning.win_loss import win_loss
from gpmetric.terminal.bench import print_bench

FORMULA = "abs(W)*[X]"  # no formula, but markup to rich
Excess = Mapping[str, tuple[float, ...]]  # by metric, one for each target


def document(model: str, excess: Excess, *, error: str | None = None) -> dict[str, Any]:
    """A bench of one model with a dense perplexity of 10 and the excess log-losses given; infinite ones failed."""
    rows = []
    for name, values in excess.items():
        for target, value in zip(("0.5", "2:4"), values, strict=True):
            reason = "NaN" if value == math.inf else None
            update: Any = "obs-blockwise" if name == "sparsegpt" else "none"
            rows.append(BenchRow(name, target, update, name, {"t": 10 * math.exp(value)}, 1.0, 0.5, reason))
    made = {"model": model, "protocol": "sequential", "dense": {"t": 10.0}, "results": [asdict(row) for row in rows]}
    return made | ({"error": error} if error else {})


def by_name(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["metric"]: row for row in rows}


def test_worked_by_hand() -> None:
    """Four places: the formula wins two, ties one, loses one; ratios 0.5, 1, 2, 0.5 have the mean 1."""
    rows = win_loss(
        [
            document("a", {FORMULA: (0.1, 0.4), "ria": (0.3, 0.3), "wanda": (0.2, 0.4)}),
            document("b", {FORMULA: (0.6, 0.25), "ria": (0.3, 0.3), "wanda": (0.3, 0.5)}),
        ]
    )
    assert [row["metric"] for row in rows] == [FORMULA, "ria", "wanda"]
    mine = rows[0]
    assert mine["update"] == "none"
    assert [(one["model"], one["target"], one["text"]) for one in mine["excess"]] == [
        ("a", "0.5", "t"), ("a", "2:4", "t"), ("b", "0.5", "t"), ("b", "2:4", "t")
    ]  # fmt: skip
    assert [one["excess"] for one in mine["excess"]] == pytest.approx([0.1, 0.4, 0.6, 0.25])
    assert mine["mean_excess"] == pytest.approx({"a": 0.25, "b": 0.425})
    wanda, ria = mine["against"]
    assert (wanda["metric"], ria["metric"]) == ("wanda", "ria"), "Wanda first, whatever the order"
    assert (wanda["wins"], wanda["losses"], wanda["ties"]) == (2, 1, 1)
    assert wanda["mean_ratio"] == pytest.approx(1)
    [lost] = wanda["lost_at"]
    assert (lost["model"], lost["target"], lost["text"]) == ("b", "0.5", "t")
    assert (lost["excess"], lost["rival_excess"]) == pytest.approx((0.6, 0.3))
    assert (ria["wins"], ria["losses"], ria["ties"]) == (2, 2, 0)
    assert [(one["model"], one["target"]) for one in ria["lost_at"]] == [("a", "2:4"), ("b", "0.5")]
    assert ria["mean_ratio"] == pytest.approx((1 / 3 + 4 / 3 + 2 + 5 / 6) / 4)
    assert [one["metric"] for one in rows[2]["against"]] == ["ria"], "a formula is nobody's reference"


def test_a_failure_loses_to_a_figure_and_ties_with_a_failure() -> None:
    rows = by_name(win_loss([document("a", {"magnitude": (math.inf, math.inf), "wanda": (0.2, math.inf)})]))
    [duel] = rows["magnitude"]["against"]
    assert (duel["wins"], duel["losses"], duel["ties"], duel["mean_ratio"]) == (0, 1, 1, None)
    [lost] = duel["lost_at"]
    assert (lost["excess"], lost["rival_excess"]) == (math.inf, pytest.approx(0.2))
    assert rows["magnitude"]["mean_excess"] == {"a": math.inf}
    [duel] = rows["wanda"]["against"]
    assert (duel["wins"], duel["losses"], duel["ties"], duel["mean_ratio"]) == (1, 0, 1, None)


def test_no_ratio_to_a_rival_that_loses_nothing() -> None:
    """At a light target pruning may even help."""
    for value in (0.0, -0.01):
        [duel] = by_name(win_loss([document("a", {"ria": (0.1, 0.2), "wanda": (value, 0.2)})]))["ria"]["against"]
        assert (duel["losses"], duel["ties"], duel["mean_ratio"]) == (1, 1, None)


def test_updates_are_told() -> None:
    rows = by_name(win_loss([document("a", {"sparsegpt": (0.1, 0.1), "wanda": (0.2, 0.2)})]))
    assert rows["sparsegpt"]["update"] == "obs-blockwise"
    assert rows["wanda"]["against"][0]["update"] == "obs-blockwise"


def test_a_model_that_failed_is_not_compared() -> None:
    good = document("a", {"ria": (0.1, 0.1), "wanda": (0.2, 0.2)})
    broken = document("b", {"ria": (0.9, 0.9)}, error="out of memory")
    assert win_loss([good, broken, {"model": "c", "error": "gone"}]) == win_loss([good])
    assert win_loss([broken]) == []


def printed(*documents: dict[str, Any]) -> str:
    out = io.StringIO()
    result = {"models": list(documents), "transfer": win_loss(documents)}
    print_bench(Console(file=out, width=120), result, BenchRequest())
    return out.getvalue()


def test_the_table() -> None:
    excess = {FORMULA: (0.1, 0.4), "magnitude": (math.inf, 0.9), "wanda": (0.2, 0.4)}
    out = printed(document("x/a", excess), document("x/b", excess), {"model": "x/c", "error": "[red]gone"})
    table = out[out.index("mean excess log-loss") :]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if line.startswith("│")]
    assert [row[0] for row in cells] == ["1", "2", "3"]
    rows = {row[1]: row[2:] for row in cells}
    assert rows == {
        FORMULA: ["none", "0.2500 *", "0.2500 *", "2", "0", "2", "0.750"],
        "magnitude": ["none", "inf", "inf", "0", "4", "0", ""],
        "wanda": ["none", "0.3000", "0.3000", "", "", "", ""],
    }
    assert table.splitlines()[-1] == "magnitude loses to wanda on a 0.5, 2:4; b 0.5, 2:4"
    assert "x/c failed: [red]gone" in out
    assert out.count("perplexity, x/") == 2


def test_models_of_one_name_have_their_whole_name_and_without_wanda_there_are_means_only() -> None:
    excess = {"ria": (0.1, 0.2), "magnitude": (0.3, 0.4)}
    out = printed(document("x/a", excess), document("y/a", excess))
    table = out[out.index("mean excess log-loss") :]
    assert "x/a" in table
    assert "y/a" in table
    assert "lost" not in table


# The command


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_text: Path
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """`gpmetric bench` with options that take a tenth of a second: exit status, output, errors."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("COLUMNS", "250")
    quick = ["--calibration", str(tiny_text), "--text", str(tiny_text), "--samples", "2", "--windows", "2"]

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        words = ["gpmetric", "bench", *quick, "--sequence-length", "32", "--device", "cpu", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert isinstance(caught.value.code, int)
        return caught.value.code, *capsys.readouterr()

    yield call
    signal.signal(signal.SIGTERM, before)


def test_two_models(run: Callable[..., Any], tiny_llama: Path, tiny_gpt2: Path, tmp_path: Path) -> None:
    options = ["--metric", "wanda", "--metric", "abs(W)*G", "--target", "0.5", "--target", "2:4"]
    code, out, err = run("--model", tiny_llama, "--model", tiny_gpt2, *options, "--json", tmp_path / "x.json")
    assert code == 0, err
    result = json.loads((tmp_path / "x.json").read_text())
    assert [one["model"] for one in result["models"]] == [str(tiny_llama), str(tiny_gpt2)]
    assert [len(one["results"]) for one in result["models"]] == [4, 4]
    [duel] = by_name(result["transfer"])["abs(W)*G"]["against"]
    assert duel["wins"] + duel["losses"] + duel["ties"] == 4
    assert len(duel["lost_at"]) == duel["losses"]
    assert [line for line in err.splitlines() if line.startswith("model ")] == [
        f"model {tiny_llama}",
        f"model {tiny_gpt2}",
    ]
    assert "mean excess log-loss" in out


@pytest.mark.slow
def test_a_failing_metric_and_a_failing_model_are_status_1(
    run: Callable[..., Any], tiny_llama: Path, tiny_gpt2: Path, tmp_path: Path
) -> None:
    path, formula = tmp_path / "x.json", "abs(W)*exp(W*1e9)*1e29"
    models = ["--model", tiny_llama, "--model", tiny_gpt2]
    code, _, err = run(*models, "--metric", formula, "--metric", "wanda", "--json", path)
    assert code == 1
    assert err.splitlines()[-1].startswith(f"gpmetric: error: {tiny_llama}: metric {formula} at 0.5: ")
    [duel] = by_name(json.loads(path.read_text())["transfer"])[formula]["against"]
    assert (duel["losses"], duel["mean_ratio"]) == (2, None)
    assert duel["lost_at"][0]["excess"] is None
    assert duel["lost_at"][0]["rival_excess"] is not None

    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    code, out, err = run(*models, "--model", tmp_path / "broken", "--metric", "wanda", "--json", path)
    assert code == 1
    assert err.splitlines()[-1].startswith(f"gpmetric: error: {tmp_path / 'broken'}: ")
    assert ["error" in one for one in json.loads(path.read_text())["models"]] == [False, False, True]
    assert out.count("perplexity, ") == 2


def test_bad_input_is_status_2_and_writes_nothing(
    run: Callable[..., Any], tiny_llama: Path, tiny_gpt2: Path, tmp_path: Path
) -> None:
    for more in (["/no/such/model"], [tiny_gpt2, "--text", "/no/such/text"]):
        code, out, err = run("--model", tiny_llama, "--model", *more, "--json", tmp_path / "x.json")
        assert (code, out) == (2, "")
        assert "does not exist" in err
        assert not list(tmp_path.iterdir())
