"""The benchmark of the kernels: its checks see what is wrong, its figures are as worked by hand."""

from __future__ import annotations

import csv
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gpmetric.expression import parse
from gpmetric.expression.evaluate import evaluate
from gpmetric.targets import Target, parse_target

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SHAPES = [(6, 40), (3, 123)]

# All that a GPU is asked for, by another clock, of kernels in the interpreter.
STAND_IN = """
import sys
from pathlib import Path

import numpy as np
import bench_kernels
from published import OTHERS


class Machine:
    name, device, cache = "stand-in", "cpu", 0

    def seconds(self, runs, repeats, before=None, *, queued=True):
        for run in [before] * (before is not None) + list(runs):
            run()
        return np.full(repeats, 1e-3 * len(runs))

    def peak(self, run):
        run()
        return 0


bench_kernels.MODELS = {"Llama-2-7B": (2, [(1, 64), (1, 64)])}
ways = OTHERS["row"]
ways.pop("torch.compile")  # for which there may be no compiler
results = bench_kernels.bench_gpu(Machine(), ["Llama-2-7B"], Path(sys.argv[1]))
bench_kernels.draw_plot(results, "stand-in", Path(sys.argv[2]))
"""


@pytest.fixture(scope="module", autouse=True)
def benchmarks() -> Iterator[None]:
    """The folder of benchmarks on the path, as when one of them is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield


@pytest.fixture(scope="module")
def kernel_checks() -> ModuleType:
    return importlib.import_module("kernel_checks")


@pytest.fixture(scope="module")
def kernel_times() -> ModuleType:
    pytest.importorskip("triton", reason="Triton is for Linux")
    return importlib.import_module("kernel_times")


@pytest.fixture
def bench_kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = importlib.import_module("bench_kernels")
    monkeypatch.setattr(module, "CPU_SHAPES", SHAPES)
    monkeypatch.setattr(module, "CPU_CASES", [((6, 40), "0.5"), ((6, 40), "2:4"), ((6, 40), "layer:0.5")])
    monkeypatch.setattr(module, "WIDTHS", (4, 512))
    return module


def test_a_run_on_the_cpu(bench_kernels: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, plot = tmp_path / "results.csv", tmp_path / "new" / "kernels.png"
    bench_kernels.main(["--device", "cpu", "--quick", "--csv", str(table), "--plot", str(plot)])
    told = capsys.readouterr().out
    assert "6x40 bf16: 30 prunings as a stable sort has them" in told  # six more formulas, five targets
    assert "3x123 fp32: 9 prunings as a stable sort has them" in told  # N:M does not divide 123
    with table.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["benchmark"] for row in rows] == ["select_mask"] * 3 + ["partition", "ranks"] * 2 + ["partition"] * 2
    assert all(float(row["p20"]) <= float(row["median"]) <= float(row["p80"]) for row in rows)
    assert plot.stat().st_size > 0


def test_a_wrong_mask_ends_it(
    bench_kernels: ModuleType, kernel_checks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One weight too many in one of the rows; nothing is written."""
    right = kernel_checks.select_mask

    def wrong(scores: Tensor, target: Target) -> Tensor:
        mask = right(scores, target)
        mask[-1, mask[-1].nonzero()[0]] = False
        return mask

    monkeypatch.setattr(kernel_checks, "select_mask", wrong)
    with pytest.raises(SystemExit, match=r"check failed: 6x40 bf16, 0.5 .*: 1 weights in 16.67% of the groups"):
        bench_kernels.main(["--device", "cpu", "--csv", str(tmp_path / "results.csv")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("formula", "by", "right"), [
    ("rowsum(W)*0+abs(W)*X", 4 * 2**-23, True),
    ("rowsum(W)*0+abs(W)*X", 1e-3, False),
    ("abs(W)*X", 4 * 2**-23, False),
])  # fmt: skip
def test_only_sums_may_differ_and_by_little(kernel_checks: ModuleType, formula: str, by: float, right: bool) -> None:
    """Scores in pairs that are `by` apart, pruned in the opposite order."""
    named = {"W": torch.ones(2, 8), "X": torch.ones(8)}
    named["W"][:, 1::2] += by
    expression, target = parse(formula), parse_target("0.5")

    def prune(operands: Any, target: Target) -> Tensor:
        return operands["W"].where(kernel_checks.stable_mask(-evaluate(expression, operands), target), 0)

    if right:
        share, ulps = kernel_checks.check("pairs", prune, expression, named, target)
        assert (share, ulps) == (1.0, 4.0)
    else:
        with pytest.raises(kernel_checks.CheckError, match=r"pairs: 16 weights in 100.00% of the groups"):
            kernel_checks.check("pairs", prune, expression, named, target)


@pytest.mark.parametrize("text", ["0.5", "0.7", "2:4", "3:4", "layer:0.5"])
def test_published_steps_choose_as_a_stable_sort(kernel_checks: ModuleType, text: str) -> None:
    published = importlib.import_module("published")
    named, target = kernel_checks.draw((6, 40), torch.float32, "cpu"), parse_target(text).resolved("row")
    expected = named["W"].where(kernel_checks.stable_mask(named["W"].abs() * named["X"], target), 0)
    for step in {
        "row": [published.published, published.kthvalue],
        "n:m": [published.published, published.one_topk],
        "layer": [published.published],
    }[target.granularity]:
        weight = named["W"].clone()
        step(weight, named["X"].square(), target)
        assert torch.equal(weight, expected)


def test_bytes_by_hand(kernel_times: ModuleType) -> None:
    weight, X, G = torch.ones(4, 8, dtype=torch.bfloat16), torch.ones(8), torch.ones(4, 8)
    moved = [
        kernel_times.moved_bytes(weight, others, parse_target(text))
        for others in ([X], [G])
        for text in ("0.5", "2:4", "layer:0.5")
    ]
    assert moved == [64 + 32 + 64] * 2 + [2 * (64 + 32) + 64] + [64 + 128 + 64] * 2 + [2 * (64 + 128) + 64]


def test_figures_by_hand(bench_kernels: ModuleType, kernel_times: ModuleType) -> None:
    """300 bytes in 3 s beside a copy of 200 in 1 s: half its bandwidth; the published step takes 30 times as long."""
    others = {kernel_times.PUBLISHED: 90.0}
    case = ("abs(W)*X", "0.5", torch.bfloat16)
    result = kernel_times.Result(case, (2, 4096), 300, np.full(5, 3.0), 200, np.ones(5), others, {"ours": 0})
    assert (result.bandwidth, result.share, result.speedup) == (100.0, 0.5, 30.0)
    assert [met for _, met in bench_kernels.goals([result])] == [True, True, True]
    copy, published, memory = result.rows("kernels", "a device, triton 9")
    assert (copy["baseline"], copy["ratio"]) == ("1.5", "2")
    assert (published["baseline"], published["ratio"]) == ("90", "0.0333")
    assert (memory["unit"], memory["median"], memory["device"]) == ("B", "0", "a device, triton 9")
    slower = kernel_times.Result(case, (2, 8192), 300, np.full(5, 3.1), 200, np.ones(5), others, {"ours": 1})
    assert [met for _, met in bench_kernels.goals([slower])] == [False, False, False]


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.interpret
def test_what_a_gpu_does_with_a_clock_that_stands_in(tmp_path: Path, kernel_times: ModuleType) -> None:
    table, plot = tmp_path / "results.csv", tmp_path / "kernels.png"
    environment = os.environ | {
        "TRITON_INTERPRET": "1", "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": f"{BENCHMARKS}:{BENCHMARKS.parent}"
    }  # fmt: skip
    command = [sys.executable, "-W", "ignore", "-c", STAND_IN, str(table), str(plot)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Llama-2-7B, 4 linear layers, 0.5 abs(W)*X bf16, as called: 4.00 ms, 15 ms wanted" in done.stdout
    assert "failed" not in done.stdout
    with table.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["device"] for row in rows} == {"stand-in"}
    assert len([row for row in rows if row["unit"] == "B"]) == 7
    assert len([row for row in rows if "against the published step" in row["case"]]) == 5
    assert plot.stat().st_size > 0
