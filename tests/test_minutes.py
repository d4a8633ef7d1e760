"""--minutes in the commands that measure: what does not fit is said to be missing, and the time is kept."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpmetric.allocation.allocate import allocate, run_allocation
from gpmetric.allocation.request import AllocateRequest
from gpmetric.allocation.time_plan import TimePlan
from gpmetric.commands import COMMANDS
from gpmetric.options import described
from gpmetric.pruning.bench import bench, bench_failures, run_bench
from gpmetric.pruning.requests import BenchRequest
from gpmetric.session import evaluate as evaluate_module
from gpmetric.session.deadline import Deadline
from gpmetric.session.evaluate import evaluate, run_evaluate
from gpmetric.session.requests import EvaluateRequest
from gpmetric.structured.request import SlimRequest
from gpmetric.structured.slim import _search_minutes

SMALL: dict[str, Any] = {"samples": 4, "windows": 4, "sequence_length": 32, "device": "cpu"}
MISSING = "not measured: there was no time left (--minutes 0.01)"


def deadline(left: float, minutes: float = 10.0) -> Deadline:
    """So many seconds before its end, on a clock that stands still."""
    return Deadline(minutes, 0.0, lambda: 60 * minutes - 5 - left)


def test_every_command_that_reads_texts_has_it_once() -> None:
    helps = {
        name: [field.help for field in described(row.request) if field.name == "minutes"]
        for name, row in COMMANDS.items()
    }
    assert {tuple(told) for told in helps.values() if told} == {
        ("Wall time of the whole command, in minutes. Above 0.",)
    }
    of_ledgers = {name for name in COMMANDS if name.startswith("ledger ")}
    others = {"export", "analyse", "layers", "pack", "unpack", "status", "list", "report"}
    assert {name for name, told in helps.items() if not told} == others | of_ledgers


def test_bench_measures_its_first_row_and_names_the_others(tiny_llama: Path, tiny_text: Path) -> None:
    names = {"calibration": str(tiny_text), "text": (str(tiny_text),), "metric": ("wanda", "ria")}
    request = BenchRequest(model=str(tiny_llama), target=("0.5", "2:4"), minutes=0.01, **names, **SMALL)
    result = run_bench(request, started=time.monotonic() - 60)
    assert [row["error"] for row in result["results"]] == [None, MISSING, MISSING, MISSING]
    assert bench_failures(result) == [MISSING] * 3
    assert bench(request.model, minutes=60, **names, **SMALL)["results"][1]["error"] is None


def test_bench_of_several_models_leaves_what_is_missing_out_of_the_losses(
    tiny_llama: Path, tiny_gpt2: Path, tiny_text: Path
) -> None:
    names = {"calibration": str(tiny_text), "text": (str(tiny_text),), "metric": ("wanda", "ria")}
    request = BenchRequest(model=(str(tiny_llama), str(tiny_gpt2)), minutes=0.01, **names, **SMALL)
    result = run_bench(request, started=time.monotonic() - 60)
    assert [one["error"] for one in result["models"]] == [MISSING, MISSING]
    assert (len(result["models"][0]["results"]), result["transfer"]) == (2, [])


def test_evaluate_measures_at_least_a_batch_of_each_text(
    tiny_llama: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_module, "batches", lambda model, tokens: iter(tokens.split(3)))
    asked: dict[str, Any] = {"text": (str(tiny_text),), "sequence_length": 32, "device": "cpu"}
    request = EvaluateRequest(model=str(tiny_llama), minutes=0.01, windows=8, **asked)
    result = run_evaluate(request, started=time.monotonic() - 60)
    assert (result["windows"], result["windows_in_all"], result["tokens"]) == (3, 8, 96)
    assert result["texts"][0]["windows"] == 3
    assert result["ppl"] == pytest.approx(evaluate(request.model, windows=3, **asked)["ppl"])
    whole = evaluate(request.model, minutes=60, windows=8, **asked)
    assert (whole["windows"], whole["windows_in_all"]) == (8, 8)
    assert whole["ppl"] == pytest.approx(evaluate(request.model, windows=8, **asked)["ppl"])


def test_a_search_of_allocations_has_what_validation_leaves() -> None:
    """By hand, of ten minutes: 60 passes of 2 s and 10 s of calibration, times 1.3: 169 s; then half; then the bone."""
    assert TimePlan(Deadline(None, 0.0), 10, 2).search_minutes() is None
    assert TimePlan(deadline(590), 10, 2).search_minutes() == pytest.approx((590 - 169) / 60)
    assert TimePlan(deadline(590), 10, 2, survivors=10).search_minutes() == pytest.approx((590 - 195) / 60)
    assert TimePlan(deadline(420), 10, 2).search_minutes() == 5
    assert TimePlan(deadline(320), 10, 2).search_minutes() == pytest.approx((320 - 1.3 * 22) / 60)
    assert 0 < TimePlan(deadline(10), 10, 2).search_minutes() < 1e-4  # type: ignore[operator]


def test_allocations_in_use_have_their_share() -> None:
    """By hand, of ten minutes, 5 of which are to be kept: as above and 6 of 4 s, 1.3 times; a quarter at most."""
    plan = TimePlan(deadline(590), 10, 2, use=4, uses=6)
    assert plan.in_use == pytest.approx(31.2)
    assert plan.search_minutes() == pytest.approx((590 - 169 - 31.2) / 60)
    assert TimePlan(deadline(590), 10, 2, use=40, uses=6).in_use == 150
    assert TimePlan(deadline(50), 10, 2, use=40, uses=6).in_use == 25  # of what is left, half
    assert TimePlan(deadline(320), 10, 2, use=4, uses=6).search_minutes() == pytest.approx((320 - 1.3 * 26) / 60)
    assert TimePlan(Deadline(None, 0.0), use=4, uses=6).affordable_uses > 10**9
    assert TimePlan(deadline(27), use=2, uses=6).affordable_uses == 10
    assert TimePlan(deadline(27), use=math.inf).affordable_uses == 0
    assert (plan.affords_beside_use(429), plan.affords_beside_use(430)) == (True, False)  # of 590 - 31.2 seconds
    found = [(number,) for number in range(11)]
    assert len(TimePlan(deadline(40), 0, 2, use=2, uses=5).fitting(found)) == 5  # of (40 - 13) / 2 seconds


def test_a_front_is_thinned_evenly() -> None:
    found = [(number,) for number in range(11)]
    assert TimePlan(Deadline(None, 0.0)).fitting(found) == found
    plan = TimePlan(deadline(26), 0, 2)
    assert plan.fitting(found) == [(0,), (2,), (5,), (8,), (10,)]
    assert plan.cut == ["front on validation: 5 of 11 members"]
    assert TimePlan(deadline(1), 0, 2).fitting(found) == [(0,), (10,)]


def test_allocate_keeps_its_minutes(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    options = {"calibration": str(tiny_text), "search_windows": 8, "sparsity": 0.6, "ledger": tmp_path / "a", **SMALL}
    started = time.monotonic()
    request = AllocateRequest(model=str(tiny_llama), minutes=0.1, **options)
    first = run_allocation(request, started=started)
    assert time.monotonic() - started <= 6
    assert first["picked"] is not None
    again = allocate(request.model, minutes=0.1, resume=True, **options)
    assert again["hypervolume"] == first["hypervolume"]  # as far as the first time, whatever this run's times are
    options["ledger"] = tmp_path / "b"
    late = run_allocation(AllocateRequest(model=str(tiny_llama), minutes=0.01, **options), started=started - 60)
    assert late["picked"] is not None
    assert late["cut"]


def test_a_search_of_what_stays_leaves_time_to_write() -> None:
    """By hand, times 1.3: 20 s to open, 5 times 10 windows of validation of 0.1 s each, 32.5 s; a policy is judged at 5
    shares of 64 windows, too: 74.1 s."""
    units: Any = SimpleNamespace(
        session=SimpleNamespace(
            windows={"search": SimpleNamespace(tokens=range(100)), "validation": SimpleNamespace(tokens=range(10))}
        )
    )
    request = SlimRequest(minutes=10.0)
    assert _search_minutes(SlimRequest(), units, Deadline(None, 0.0), 20, 0.1) is None
    assert _search_minutes(request, units, deadline(500), 20, 0.1) == pytest.approx((500 - 32.5) / 60)
    policy = replace(request, estimator="rloo")
    assert _search_minutes(policy, units, deadline(500), 20, 0.1) == pytest.approx((500 - 74.1) / 60)
    assert _search_minutes(policy, units, deadline(100), 20, 0.1) == pytest.approx(50 / 60)
