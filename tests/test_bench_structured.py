"""The benchmark of structured pruning: a small run, killed and resumed, and the size and speed of what is written."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gpmetric.structured.groups import find_groups

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SIZE = ["--samples", "4", "--search-windows", "4", "--windows", "4", "--sequence-length", "16", "--steps", "5"]


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """The folder of benchmarks on the path, as when one of them is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("bench_structured")


@pytest.fixture(scope="module")
def command(tiny_llama: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    other = tmp_path_factory.mktemp("text") / "other.txt"
    other.write_text(" ".join(reversed(tiny_text.read_text(encoding="utf-8").split())), encoding="utf-8")
    return [str(tiny_llama), "--calibration", str(tiny_text), "--test", str(other), *SIZE, "--sparsity", "0.4"]


def read(path: Path) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["runs"]
    return [{name: value for name, value in run.items() if name != "seconds"} for run in runs]


def test_every_method_at_the_same_size(bench: ModuleType, command: list[str], tmp_path: Path) -> None:
    """Two seeds, the second of them resumed to the same figures."""
    path, table = tmp_path / "b.json", tmp_path / "b.csv"
    files = ["--csv", str(table), "--plot", str(tmp_path / "b.png"), "--start", "W*W*D"]
    assert bench.main([*command, "--seeds", "2", "--json", str(path), *files]) == 0
    runs = read(path)
    assert {run["method"] for run in runs} == {*bench.METHODS, "start:W*W*D"}
    searches = importlib.import_module("structured_runs").SEARCHES
    groups = find_groups(importlib.import_module("gpmetric.loading").load_model(command[0], device="cpu"))
    for run in runs:
        most = 3 if run["method"] in ("uniform", "wanda_sp", "magnitude_sp") else 1
        least = 0.4 - most * groups.sublayers[1].cost / groups.parameters
        assert least <= run["removed"] <= 0.4 + sum(one.rest for one in groups.sublayers) / groups.parameters
        assert (run["tokens"] > 0) == (run["method"] in (*searches, "uniform", "start:W*W*D"))
    spent = {run["tokens"] for run in runs if run["tokens"] and run["method"] != "exchange"}
    assert len(spent) == 1
    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    assert len(rows) == len(bench.METHODS) + 1
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    document = json.loads(path.read_text(encoding="utf-8"))
    document["runs"] = [run for run in document["runs"] if run["seed"] == 0]
    path.write_text(json.dumps(document), encoding="utf-8")
    assert (
        bench.main([*command, "--seeds", "2", "--json", str(path), "--resume", "--csv", "-", "--start", "W*W*D"]) == 0
    )
    assert read(path) == runs


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--sparsity", "1.5"], "--sparsity must be above 0 and below 1"),
        (["--start", "foo"], "foo"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--steps", "-1"], "--steps must be at least 0"),
        (["--resume"], "--json"),
        (["--speed", "--width", "100"], "--width must be a multiple of 256"),
        (["--plot", "b.jpg"], "must end in .png or .pdf"),
        (["--json", "nowhere/b.json"], "does not exist"),
    ],
)
def test_bad_input_is_exit_2(
    bench: ModuleType, command: list[str], capsys: pytest.CaptureFixture[str], wrong: list[str], told: str
) -> None:
    assert bench.main([*command, "--csv", "-", *wrong]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench_structured: error: ")
    assert error.count("\n") == 1
    assert told in error


@pytest.mark.usefixtures("here")
def test_size_and_speed_of_a_small_llama(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smaller ones have fewer parameters and smaller files; all in this process, to save the time of others."""
    speed = importlib.import_module("structured_speed")
    monkeypatch.setattr(speed, "in_process", lambda folder, repeats: speed.measure(str(folder), repeats))
    table = tmp_path / "b.csv"
    small = ["--speed", "0.4", "--blocks", "2", "--width", "256", "--repeats", "1", "--csv", str(table)]
    assert bench.main(small) == 0
    rows = {
        row["case"].rpartition(": ")[2]: row for row in csv.DictReader(table.read_text(encoding="utf-8").splitlines())
    }
    for form in ("hetero", "uniform"):
        assert float(rows[f"{form}, parameters"]["ratio"]) < 0.95
        assert float(rows[f"{form}, bytes"]["ratio"]) < 0.95
        assert float(rows[f"{form}, tokens/s"]["median"]) > 0
        assert float(rows[f"{form}, tokens/s decoded"]["median"]) > 0


def test_what_sparsity_buys(
    tiny_llama: Path,
    tiny_gpt2: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each beside the dense model: sizes of files and archives as they are."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    script = importlib.import_module("what_sparsity_buys")
    speed = importlib.import_module("structured_speed")
    monkeypatch.setattr(script, "in_process", lambda folder, repeats: speed.measure(str(folder), repeats))
    monkeypatch.setattr(speed, "DECODED", 2)
    table = tmp_path / "b.csv"
    monkeypatch.setattr(sys, "argv", ["", str(tiny_llama), str(tiny_gpt2), "--repeats", "1", "--csv", str(table)])
    assert script.main() == 0
    rows = {row["case"]: row for row in csv.DictReader(table.read_text(encoding="utf-8").splitlines())}
    dense, other = ((one / "model.safetensors").stat().st_size for one in (tiny_llama, tiny_gpt2))
    found = rows[f"{tiny_gpt2.name}, bytes"]
    assert (float(found["median"]), float(found["ratio"])) == pytest.approx((other, other / dense), rel=0.01)
    assert f"| {tiny_llama.name} | 1.00 | " in capsys.readouterr().out
