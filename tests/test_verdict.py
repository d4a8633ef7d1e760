"""From a front to a winner: finalists, the winner, the judge's tasks, and the interval by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from gpmetric.errors import GpmetricError, SolverError
from gpmetric.evolution.executors import Serial
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.selection import Individual
from gpmetric.evolution.verdict import Judge, Verdict, choose_finalists, choose_winner, interval
from gpmetric.pruning.metrics import masks_only


def verdict(half: float, pattern: float) -> Verdict:
    return Verdict({"0.5": half, "2:4": pattern}, {"0.5": 4 + half, "2:4": 4 + pattern})


def front(*texts: str) -> list[Individual]:
    return [Individual(text, {"0.5": 0.1 * place}, {"0.5": 0.2}) for place, text in enumerate(texts)]


def test_the_winner_is_below_every_rival_where_one_is() -> None:
    rivals = {"wanda": verdict(0.3, 0.8), "ria": verdict(0.4, 0.9)}
    uneven = verdict(0.05, 0.85)  # the lowest mean, but worse than Wanda at 2:4
    even = verdict(0.25, 0.75)
    assert choose_winner({"uneven": uneven, "even": even}, rivals) == "even"
    assert choose_winner({"uneven": uneven, "worse": verdict(0.4, 0.9)}, rivals) == "uneven"
    assert choose_winner({"even": even, "better": verdict(0.2, 0.7)}, rivals) == "better"
    assert choose_winner({"equal": verdict(0.3, 0.1), "uneven": uneven}, rivals) == "equal"  # no better at 0.5: by mean
    assert choose_winner({"uneven": uneven, "even": even}, {}) == "uneven"


def test_masks_only() -> None:
    assert masks_only("wanda")
    assert not masks_only("sparsegpt")


def test_finalists_differ_in_more_than_constants() -> None:
    copies = [f"abs(W)*X+{number}*abs(W)*G" for number in (2, 3, 4, 5)]
    rows = front(*copies, "sqrt(W)*X", "abs(W)")
    assert choose_finalists(rows, 5) == ([copies[0], "sqrt(W)*X", "abs(W)"], copies[1:3])
    assert choose_finalists(rows, 2) == ([copies[0], "sqrt(W)*X"], [*copies[1:3], "abs(W)"])


def test_one_formula_in_two_groups_is_two_finalists() -> None:
    rows = front("abs(W)*X", "layer:abs(W)*X", "block:abs(W)*X")
    assert choose_finalists(rows, 5) == (["abs(W)*X", "layer:abs(W)*X", "block:abs(W)*X"], [])


def test_the_best_without_gradients_is_a_finalist_whatever_its_place() -> None:
    rows = front("abs(W)*G", "abs(W)*H", "W*W*H", "abs(W)*X", "abs(W)")
    assert choose_finalists(rows, 2) == (["abs(W)*G", "abs(W)*X"], ["abs(W)*H", "W*W*H", "abs(W)"])
    assert choose_finalists(rows, 4)[0] == ["abs(W)*G", "abs(W)*H", "W*W*H", "abs(W)*X"]
    assert choose_finalists(rows, 1)[0] == ["abs(W)*X"]
    assert choose_finalists(rows[:2], 1)[0] == ["abs(W)*G"]  # there is none


def test_interval_by_hand() -> None:
    """Mean 2, deviation 1, t(0.975, 2) = 4.30265: 2 -+ 4.30265 / sqrt(3). Two draws: t(0.975, 1) = 12.7062."""
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-5)
    assert interval([0.1, 0.3]) == pytest.approx((0.2 - 1.27062, 0.2 + 1.27062), abs=1e-5)
    assert interval([-0.5, -0.5, -0.5]) == (-0.5, -0.5)


@pytest.mark.parametrize("differences", [[], [1.0], [1.0, math.inf], [1.0, math.nan, 2.0]])
def test_no_interval_of_too_little(differences: list[float]) -> None:
    assert interval(differences) is None


def test_a_verdict_tells_its_perplexities() -> None:
    told = verdict(0.2, 0.6).describe()
    assert told["mean_excess"] == pytest.approx(0.4)
    assert told["ppl"] == {"0.5": pytest.approx(math.exp(4.2)), "2:4": pytest.approx(math.exp(4.6))}


def test_the_judge_asks_for_baselines_as_published(ledger: Ledger) -> None:
    asked: list[dict[str, Any]] = []

    def answer(task: Mapping[str, Any]) -> Any:
        asked.append(dict(task))
        if task["metric"] == "abs(W)*G" and task["target"] == "2:4":
            raise SolverError("no")
        return {"excess": 0.25, "loss": 4.25}

    judge = Judge(Serial(answer), ("0.5", "2:4"), "obs", ledger)
    found = judge.measure(["abs(W)*G", "wanda"], "test", "calibration-1")
    assert [(task["metric"], task["target"], task["update"]) for task in asked] == [
        ("abs(W)*G", "0.5", "obs"),
        ("abs(W)*G", "2:4", "obs"),
        ("wanda", "0.5", "none"),
        ("wanda", "2:4", "none"),
    ]
    assert {(task["split"], task["calibration"]) for task in asked} == {("test", "calibration-1")}
    infinite = {"0.5": 0.25, "2:4": math.inf}
    assert found["abs(W)*G"] == Verdict(infinite, {"0.5": 4.25, "2:4": math.inf}, {"2:4": "no"})
    assert found["abs(W)*G"].describe()["error"] == "no"
    assert found["wanda"].mean == 0.25
    again = Judge(Serial(answer), ("0.5", "2:4"), "obs", ledger).measure(["abs(W)*G", "wanda"], "test", "calibration-1")
    assert again == found
    assert len(asked) == 4  # the ledger has them


def test_a_baseline_in_another_group_is_still_a_published_one(ledger: Ledger) -> None:
    asked: list[str] = []

    def answer(task: Mapping[str, Any]) -> Any:
        asked.append(task["update"])
        return {"excess": 0.25, "loss": 4.25}

    Judge(Serial(answer), ("0.5",), "obs", ledger).measure(["layer:wanda", "layer:abs(W)*X"], "test")
    assert asked == ["none", "obs"]


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "a", {}, resume=False) as opened:
        yield opened


def test_a_dense_model_without_a_loss_is_refused(ledger: Ledger) -> None:
    judge = Judge(Serial(lambda task: {"a": 1.0, "b": math.inf}), ("0.5",), "none", ledger)
    with pytest.raises(GpmetricError, match="dense model's loss on the search text is not finite"):
        judge.dense("search")
    judge = Judge(Serial(lambda task: {"a": 0.0, "b": math.log(7)}), ("0.5",), "none", ledger)
    assert judge.dense("search") == {"a": 1.0, "b": pytest.approx(7)}
