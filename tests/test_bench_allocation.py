"""The benchmark of allocators: a small run judged again by hand, killed and resumed; summaries worked by hand."""

from __future__ import annotations

import csv
import importlib
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gpmetric.allocation.request import ALLOCATORS, AllocateRequest
from gpmetric.evaluation.perplexity import mean_loss
from gpmetric.pruning.protocol import Protocol, Rule
from gpmetric.session.session import open_session
from gpmetric.session.splits import open_text, read_windows
from gpmetric.targets import parse_target

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SIZE = ["--samples", "4", "--search-windows", "4", "--windows", "4", "--sequence-length", "16", "--tokens", "1000"]
CASE = ("allocator", "sparsity", "update", "protocol", "text")
CLOCKED = ("seconds",)
PRUNABLE = 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 44 * 32)  # weights of the tiny Llama that may be pruned


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[pytest.MonkeyPatch]:
    """The folder of benchmarks on the path, as when one of them is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield patch


@pytest.fixture(scope="module")
def bench(benchmarks: pytest.MonkeyPatch) -> ModuleType:
    return importlib.import_module("bench_allocation")


@pytest.fixture(scope="module")
def costs(bench: ModuleType) -> ModuleType:
    return importlib.import_module("allocation_costs")


@pytest.fixture(scope="module")
def other_text(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The words of `tiny_text` in another order."""
    path = tmp_path_factory.mktemp("text") / "other.txt"
    path.write_text(" ".join(reversed(tiny_text.read_text(encoding="utf-8").split())), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def command(tiny_llama: Path, tiny_text: Path, other_text: Path) -> list[str]:
    texts = ["--calibration", str(tiny_text), "--test", str(other_text)]
    return [str(tiny_llama), *texts, *SIZE, "--metric", "wanda", "--sparsity", "0.5", "0.7"]


@pytest.fixture(scope="module")
def whole(bench: ModuleType, command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the JSON, the rows and the plot of an uninterrupted run of two seeds."""
    folder = tmp_path_factory.mktemp("whole")
    files = ["--json", str(folder / "b.json"), "--csv", str(folder / "b.csv"), "--plot", str(folder / "b.png")]
    assert bench.main([*command, "--seeds", "2", "--update", "none", "obs", *files]) == 0
    return folder


@pytest.fixture(scope="module")
def runs(whole: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read(whole / "b.json")["runs"]
    return found


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def unclocked(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in run.items() if name not in CLOCKED} for run in runs]


def test_every_allocator_is_judged_in_every_way(runs: list[dict[str, Any]]) -> None:
    """Each at both sparsities but evopress, which is at the one nearest to the focus."""
    places = len(ALLOCATORS) * 2 - 1
    assert len({(run["seed"], *(run[name] for name in CASE)) for run in runs}) == len(runs) == 2 * 2 * 2 * places
    assert {run["allocator"] for run in runs} == set(ALLOCATORS)
    assert {run["sparsity"] for run in runs if run["allocator"] == "evopress"} == {0.7}
    for run in runs:
        assert run["excess"] == pytest.approx(run["loss"] - math.log(run["dense_perplexity"]))
        assert abs(run["removed"] - run["budget"]) <= 8  # half of the least number of rows of a matrix
        assert run["removed"] + run["kept_prunable"] == PRUNABLE


def test_searches_pay_their_budget_and_uniform_pays_nothing(runs: list[dict[str, Any]]) -> None:
    tokens = {(run["allocator"], run["seed"]): run["tokens"] for run in runs}
    for seed in (0, 1):
        assert tokens["uniform", seed] == tokens["owl", seed] == 0
        assert tokens["evopress", seed] >= 1000
        assert tokens["nsga2", seed] >= 1000
    assert {run["bought"] for run in runs if run["allocator"] == "evopress"} == {1}
    assert {run["bought"] for run in runs if run["allocator"] != "evopress"} == {2}


@pytest.mark.parametrize("protocol", ["one-shot", "sequential"])
@pytest.mark.parametrize("update", ["none", "obs"])
def test_uniform_is_the_plain_target(
    runs: list[dict[str, Any]], tiny_llama: Path, tiny_text: Path, other_text: Path, protocol: str, update: Any
) -> None:
    """As `gpmetric bench` would measure it on the same windows."""
    size: dict[str, Any] = {"sequence_length": 16, "samples": 4, "search_windows": 4, "windows": 1, "shuffle": True}
    session = open_session(AllocateRequest(model=str(tiny_llama), calibration=str(tiny_text), **size))
    model, rule = session.model, Rule(session.metric("wanda"), parse_target("0.7"), update)
    tokens = read_windows(model, open_text(str(other_text)), 16, 4).tokens
    judge = Protocol(session, one_shot=protocol == "one-shot")
    judge.prepare([rule.metric], update)
    (measured,) = judge.measure([rule], [tokens])
    wanted = {"allocator": "uniform", "sparsity": 0.7, "seed": 0, "protocol": protocol, "update": update}
    (run,) = [run for run in runs if wanted.items() <= run.items()]
    assert run["loss"] == pytest.approx(measured.losses[0], rel=1e-6)
    assert run["dense_perplexity"] == pytest.approx(math.exp(mean_loss(model, tokens)))
    assert run["kept_total"] == sum(one.numel() for one in model.module.parameters()) - run["removed"]


def test_a_resumed_run_equals_an_uninterrupted_one(
    bench: ModuleType, command: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the first seed; what is done is not done again."""
    document = read(whole / "b.json")
    cut = {name: [one for one in document[name] if one["seed"] == 0] for name in ("runs", "allocations")}
    path = tmp_path / "b.json"
    path.write_text(json.dumps(document | cut), encoding="utf-8")
    seeds = []
    run_case = bench.run_case
    monkeypatch.setattr(bench, "run_case", lambda *case: (seeds.append(case[-1]), run_case(*case))[1])
    again = [*command, "--seeds", "2", "--update", "none", "obs", "--json", str(path), "--resume", "--csv", "-"]
    assert bench.main(again) == 0
    assert seeds == [1]
    assert unclocked(read(path)["runs"]) == unclocked(document["runs"])
    assert read(path)["allocations"] == document["allocations"]


def test_rows_and_plot(whole: Path) -> None:
    with (whole / "b.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * (2 * len(ALLOCATORS) - 1)
    assert {row["benchmark"] for row in rows} == {"allocation"}
    assert {row["ratio"] for row in rows if row["case"].endswith("uniform")} == {"1"}
    assert (whole / "b.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.nightly
@pytest.mark.slow
def test_processes_give_what_one_gives(
    bench: ModuleType, command: list[str], runs: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "b.json"
    options = ["--seeds", "2", "--update", "none", "obs", "--json", str(path), "--csv", "-", "--jobs", "2"]
    assert bench.main([*command, *options]) == 0
    found = sorted(read(path)["runs"], key=lambda run: run["seed"])
    assert unclocked(found) == unclocked(runs)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--sparsity", "1.5"], "above 0 and below 1"),
        (["--metric", "foo"], "foo"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--tokens", "0"], "--tokens must be at least 1"),
        (["--evopress-sparsity", "0.9"], "must be one of --sparsity"),
        (["--resume"], "--json"),
        (["--test", "{calibration}"], "the same text as --calibration"),
        (["--json", "{calibration}"], "exists"),
        (["--json", "nowhere/b.json"], "does not exist"),
        (["--plot", "b.jpg"], "must end in .png or .pdf"),
        (["--json", "{calibration}", "--resume"], "is no document"),
        (["--test", "nowhere.txt"], "does not exist"),
        (["--sequence-length", "1"], "--sequence-length"),
    ],
)
def test_bad_input_is_exit_2(
    bench: ModuleType, command: list[str], tiny_text: Path, capsys: pytest.CaptureFixture[str], wrong: Any, told: str
) -> None:
    assert bench.main([*command, "--csv", "-", *(one.format(calibration=tiny_text) for one in wrong)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench_allocation: error: ")
    assert error.count("\n") == 1
    assert told in error


def test_a_case_that_fails_ends_no_other(
    bench: ModuleType, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scores beyond fp32."""
    path = tmp_path / "b.json"
    cases = [*command, "--seeds", "1", "--allocator", "owl", "--protocol", "one-shot", "--metric", "1e29*W*1e29*abs(W)"]
    assert bench.main([*cases, "--json", str(path), "--csv", "-"]) == 1
    error = capsys.readouterr().err
    assert "1 of 2 cases failed: " in error
    assert "1e29*W*1e29*abs(W), seed 0: metric" in error
    assert {run["metric"] for run in read(path)["runs"]} == {"wanda"}


def test_another_runs_document_is_refused(
    bench: ModuleType, command: list[str], whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was made with two updates, not one."""
    assert bench.main([*command, "--json", str(whole / "b.json"), "--resume", "--csv", "-"]) == 2
    assert "update is ['none', 'obs'] there, ['none'] here" in capsys.readouterr().err


def test_summary_of_two_seeds_by_hand(bench: ModuleType) -> None:
    """Means over texts first, then ratios seed by seed."""
    shared = {"model": "m", "metric": "wanda", "protocol": "one-shot", "update": "none", "sparsity": 0.7}
    shared |= {"tokens": 5, "seconds": 1.0, "bought": 1, "removed": 9, "budget": 10}
    excess = {"uniform": {0: (1.0, 3.0), 1: (2.0, 6.0)}, "nsga2": {0: (1.0, 1.0), 1: (1.0, 5.0)}}
    runs = [
        shared | {"allocator": allocator, "seed": seed, "excess": value}
        for allocator, by_seed in excess.items()
        for seed, values in by_seed.items()
        for value in values
    ]
    uniform, nsga2 = bench.summarise(runs)
    assert (uniform.excess, uniform.ratio) == ([2.0, 4.0], [1.0, 1.0])
    assert (nsga2.excess, nsga2.ratio) == ([1.0, 3.0], [0.5, 0.75])
    assert nsga2.gap == -1
    (_, row) = bench.rows([uniform, nsga2], "device")
    assert (row["median"], row["baseline"], row["ratio"]) == ("2", "3", "0.667")


def test_steps_of_an_evaluation(costs: ModuleType, bench: ModuleType, command: list[str]) -> None:
    options = bench.read_options(command)
    bench.check(options)
    rows = costs.split_rows(bench.make_request(vars(options), options.models[0], "wanda", 0), 2)
    assert [row["benchmark"] for row in rows] == ["allocation step"] * 5
    assert all(float(row["median"]) > 0 for row in rows)


@pytest.mark.nightly
@pytest.mark.slow
def test_memory_of_a_random_gpt2(costs: ModuleType) -> None:
    """12 matrices in 3 blocks; beyond what was there before, at least the logits of a window and their gradients.

    In a process of its own: this one may still hold the memory that tests before have freed.
    """
    assert [len(block.layers) for block in costs.random_gpt2(3, 64).blocks] == [4, 4, 4]
    code = "import json, allocation_costs as it; print(json.dumps(it.measure_calibration(1, 64, 'block by block')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    assert measured["before"] > 0
    assert measured["peak"] > 2 * 64 * 50257 * 4 / 2**20


def test_the_search_of_the_front_is_told_its_focus(
    bench: ModuleType, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sparsity that is not among those of a front without a focus."""
    nsga2, told = importlib.import_module("gpmetric.allocation.nsga2"), []
    evolve = nsga2.evolve
    spy = lambda log, first, settings, *rest: (told.append(settings), evolve(log, first, settings, *rest))[1]  # noqa: E731
    monkeypatch.setattr(nsga2, "evolve", spy)
    options = ["--seeds", "1", "--allocator", "nsga2", "--focus", "0.63", "--protocol", "one-shot", "--csv", "-"]
    assert bench.main([*command, *options]) == 0
    assert [(one.focus, one.lowest, one.highest) for one in told] == [(0.63, 0.4, 0.8)]
