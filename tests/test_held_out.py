"""From a front to a winner: finalists, the winner, the tasks of held-out text, and the interval by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpmetric.errors import GpmetricError, SolverError
from gpmetric.evolution.held_out import HeldOut, HeldOutFigures, choose_finalists, choose_winner, interval
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.multi_model import LabelledTarget
from gpmetric.evolution.selection import Individual
from gpmetric.evolution.tasks import SequentialLoss, SequentialTask
from gpmetric.executors import Serial
from gpmetric.metrics import Metric, masks_only, resolve_metric

TARGETS = tuple(LabelledTarget(target, "m", target, (8, 32)) for target in ("0.5", "2:4"))


def figures(half: float, pattern: float) -> HeldOutFigures:
    return HeldOutFigures({"0.5": half, "2:4": pattern}, {"0.5": 4 + half, "2:4": 4 + pattern})


def front(*texts: str) -> list[Individual]:
    return [Individual(resolve_metric(text), {"0.5": 0.1 * place}, {"0.5": 0.2}) for place, text in enumerate(texts)]


def winner(finalists: dict[str, HeldOutFigures], rivals: dict[str, HeldOutFigures]) -> str:
    def by_metric(rows: dict[str, HeldOutFigures]) -> dict[Metric, HeldOutFigures]:
        return {Metric(name, resolve_metric("abs(W)").expression): row for name, row in rows.items()}

    return choose_winner(by_metric(finalists), by_metric(rivals)).name


def test_the_winner_is_below_every_rival_where_one_is() -> None:
    rivals = {"wanda": figures(0.3, 0.8), "ria": figures(0.4, 0.9)}
    uneven = figures(0.05, 0.85)  # the lowest mean, but worse than Wanda at 2:4
    even = figures(0.25, 0.75)
    assert winner({"uneven": uneven, "even": even}, rivals) == "even"
    assert winner({"uneven": uneven, "worse": figures(0.4, 0.9)}, rivals) == "uneven"
    assert winner({"even": even, "better": figures(0.2, 0.7)}, rivals) == "better"
    assert winner({"equal": figures(0.3, 0.1), "uneven": uneven}, rivals) == "equal"  # no better at 0.5: by mean
    assert winner({"uneven": uneven, "even": even}, {}) == "uneven"


def test_masks_only() -> None:
    assert masks_only("wanda")
    assert not masks_only("sparsegpt")
    assert not masks_only("alps")


def finalists(rows: list[Individual], count: int) -> tuple[list[str], list[str]]:
    first, others = choose_finalists(rows, count)
    return [metric.name for metric in first], [metric.name for metric in others]


def test_finalists_differ_in_more_than_constants() -> None:
    copies = [f"abs(W)*X+{number}*abs(W)*G" for number in (2, 3, 4, 5)]
    rows = front(*copies, "sqrt(W)*X", "abs(W)")
    assert finalists(rows, 5) == ([copies[0], "sqrt(W)*X", "abs(W)"], copies[1:3])
    assert finalists(rows, 2) == ([copies[0], "sqrt(W)*X"], [*copies[1:3], "abs(W)"])


def test_one_formula_in_two_groups_is_two_finalists() -> None:
    rows = front("abs(W)*X", "layer:abs(W)*X", "block:abs(W)*X")
    assert finalists(rows, 5) == (["abs(W)*X", "layer:abs(W)*X", "block:abs(W)*X"], [])


def test_the_best_without_gradients_is_a_finalist_whatever_its_place() -> None:
    rows = front("abs(W)*G", "abs(W)*H", "W*W*H", "abs(W)*X", "abs(W)")
    assert finalists(rows, 2) == (["abs(W)*G", "abs(W)*X"], ["abs(W)*H", "W*W*H", "abs(W)"])
    assert finalists(rows, 4)[0] == ["abs(W)*G", "abs(W)*H", "W*W*H", "abs(W)*X"]
    assert finalists(rows, 1)[0] == ["abs(W)*X"]
    assert finalists(rows[:2], 1)[0] == ["abs(W)*G"]  # there is none


def test_interval_by_hand() -> None:
    """Mean 2, deviation 1, t(0.975, 2) = 4.30265: 2 -+ 4.30265 / sqrt(3). Two draws: t(0.975, 1) = 12.7062."""
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-5)
    assert interval([0.1, 0.3]) == pytest.approx((0.2 - 1.27062, 0.2 + 1.27062), abs=1e-5)
    assert interval([-0.5, -0.5, -0.5]) == (-0.5, -0.5)


@pytest.mark.parametrize("differences", [[], [1.0], [1.0, math.inf], [1.0, math.nan, 2.0]])
def test_no_interval_of_too_little(differences: list[float]) -> None:
    assert interval(differences) is None


def test_figures_tell_their_perplexities() -> None:
    told = figures(0.2, 0.6).describe()
    assert told["mean_excess"] == pytest.approx(0.4)
    assert told["ppl"] == {"0.5": pytest.approx(math.exp(4.2)), "2:4": pytest.approx(math.exp(4.6))}


def test_baselines_are_measured_as_published(ledger: Ledger) -> None:
    asked: list[SequentialTask] = []

    def answer(task: SequentialTask) -> SequentialLoss:
        asked.append(task)
        if task.metric.name == "abs(W)*G" and task.target == "2:4":
            raise SolverError("no")
        return SequentialLoss(0.25, 4.25)

    mine, wanda = metrics = [resolve_metric(text) for text in ("abs(W)*G", "wanda")]
    found = HeldOut(Serial(answer), TARGETS, "obs", "own", ledger).measure(metrics, "test", "calibration-1")
    assert [(task.metric.name, task.target, task.update) for task in asked] == [
        ("abs(W)*G", "0.5", "obs"),
        ("abs(W)*G", "2:4", "obs"),
        ("wanda", "0.5", "none"),
        ("wanda", "2:4", "none"),
    ]
    assert {(task.split, task.calibration, task.model) for task in asked} == {("test", "calibration-1", "m")}
    infinite = {"0.5": 0.25, "2:4": math.inf}
    assert found[mine] == HeldOutFigures(infinite, {"0.5": 4.25, "2:4": math.inf}, {"2:4": "no"})
    assert found[mine].describe()["error"] == "no"
    assert found[wanda].mean == 0.25
    again = HeldOut(Serial(answer), TARGETS, "obs", "own", ledger).measure(metrics, "test", "calibration-1")
    assert again == found
    assert len(asked) == 4  # the ledger has them


def test_a_baseline_in_another_group_is_still_a_published_one(ledger: Ledger) -> None:
    """And balanced for the sample of the model that it is measured on."""
    asked: list[SequentialTask] = []

    def answer(task: SequentialTask) -> SequentialLoss:
        asked.append(task)
        return SequentialLoss(0.25, 4.25)

    metrics = [resolve_metric(text) for text in ("layer:gblm_l1", "layer:abs(W)*X")]
    HeldOut(Serial(answer), TARGETS[:1], "obs", "own", ledger).measure(metrics, "test")
    assert [task.update for task in asked] == ["none", "obs"]
    assert [task.metric for task in asked] == [resolve_metric("layer:gblm_l1", 8, 32), metrics[1]]


def test_a_campaigns_fit_is_of_its_own_metrics_and_of_baselines_with_its_update(ledger: Ledger) -> None:
    """Others are measured as published."""
    asked: list[SequentialTask] = []

    def answer(task: SequentialTask) -> SequentialLoss:
        asked.append(task)
        return SequentialLoss(0.25, 4.25)

    metrics = [resolve_metric(text) for text in ("abs(W)*X", "wanda", "sparsegpt", "alps", "block:sparsegpt")]
    HeldOut(Serial(answer), TARGETS[:1], "obs-blockwise", "dense", ledger).measure(metrics, "test")
    assert [(task.update, task.fit) for task in asked] == [
        ("obs-blockwise", "dense"),
        ("none", "own"),
        ("none", "dense"),  # its update is part of the metric
        ("none", "own"),
        ("none", "dense"),
    ]


def test_baselines_have_the_rounds_of_the_campaign(ledger: Ledger) -> None:
    """But those with an update of their own."""
    asked: list[SequentialTask] = []

    def answer(task: SequentialTask) -> SequentialLoss:
        asked.append(task)
        return SequentialLoss(0.25, 4.25)

    metrics = [resolve_metric(text) for text in ("abs(W)*X", "wanda", "sparsegpt")]
    HeldOut(Serial(answer), TARGETS[:1], "block", "dense", ledger).measure(metrics, "test")
    assert [(task.metric.update or task.update, task.fit) for task in asked] == [
        ("block", "dense"),
        ("block", "dense"),
        ("obs-blockwise", "own"),
    ]


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "a", {}, resume=False) as opened:
        yield opened


def test_a_dense_model_without_a_loss_is_refused(ledger: Ledger) -> None:
    held_out = HeldOut(Serial(lambda task: {"a": 1.0, "b": math.inf}), TARGETS, "none", "own", ledger)
    with pytest.raises(GpmetricError, match="dense model's loss on the search text is not finite"):
        held_out.dense("search")
    held_out = HeldOut(Serial(lambda task: {"a": 0.0, "b": math.log(7)}), TARGETS, "none", "own", ledger)
    assert held_out.dense("search") == {"a": 1.0, "b": pytest.approx(7)}
