"""Several models as one: relative units by hand, errors, keys, and which model a task goes to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

from gpmetric.errors import MaskError
from gpmetric.evolution.multi_model import MultiModel
from gpmetric.evolution.tasks import (
    DenseTask,
    ExcessTask,
    MaskFingerprint,
    NoMasks,
    ProbeTask,
    SequentialLoss,
    SequentialTask,
    Task,
)
from gpmetric.executors import Serial
from gpmetric.metrics import Metric, resolve_metric

TARGETS = ("0.5", "2:4")


class Model:
    """An evaluator whose excess is a number per metric, doubled at 2:4; its divergence is a tenth."""

    def __init__(self, name: str, excess: Mapping[str, float]) -> None:
        self.name = name
        self.excess = excess
        self.tasks: list[Task] = []

    def __call__(self, task: Task) -> Any:
        self.tasks.append(task)
        if isinstance(task, DenseTask):
            return {f"/models/{self.name}": 3.0}
        if isinstance(task, ProbeTask):
            return [self._probe(metric.name) for metric in task.metrics]
        value = self.excess[task.metric.name]
        if math.isnan(value):
            raise MaskError(f"no mask on {self.name}")
        if isinstance(task, SequentialTask):
            return SequentialLoss(value * (1 + TARGETS.index(task.target)), 3 + value)
        return {kind: {"0.5": scale * value, "2:4": 2 * scale * value} for kind, scale in (("loss", 1.0), ("kl", 0.1))}

    def _probe(self, text: str) -> MaskFingerprint | NoMasks:
        if math.isnan(self.excess[text]):
            return NoMasks(f"no mask on {self.name}")
        return MaskFingerprint(f"{self.excess[text]}", self.name, dict.fromkeys(TARGETS, self.excess[text]))


class Both(MultiModel):
    """Models of known worth in this process; called with a task, gives its value or raises its error."""

    def __init__(self, **worth: Mapping[str, float]) -> None:
        self.models = {name: Model(name, excess) for name, excess in worth.items()}
        super().__init__(Serial(lambda one: self.models[one.place](one.task)), self.models)

    def __call__(self, task: Task) -> Any:
        (outcome,) = self.map_ordered([task])
        if outcome.error is not None:
            raise MaskError(outcome.error)
        return outcome.value


together = Both


def named(text: str) -> Metric:
    return Metric(text, resolve_metric("abs(W)").expression)


def excess(text: str) -> ExcessTask:
    return ExcessTask(named(text), 0, 2)


def test_units_are_those_of_wanda_on_the_same_model() -> None:
    """Wanda's mean excess is (0.2 + 0.4) / 2 = 0.3 on the one and 3 on the other, its divergence a tenth of that."""
    both = together(small={"wanda": 0.2, "m": 0.3}, large={"wanda": 2.0, "m": 1.5})
    expected = {"small 0.5": 1.0, "small 2:4": 2.0, "large 0.5": 0.5, "large 2:4": 1.0}
    assert both(excess("m")) == {"loss": pytest.approx(expected), "kl": pytest.approx(expected)}


def test_the_unit_is_measured_once_on_all_windows() -> None:
    both = together(a={"wanda": 1.0, "m": 1.0}, b={"wanda": 1.0, "m": 1.0})
    for _ in range(3):
        both(excess("m"))
    for model in both.models.values():
        tasks = [task for task in model.tasks if isinstance(task, ExcessTask)]
        asked = [(task.metric.name, task.first, task.last) for task in tasks]
        assert asked.count(("wanda", 0, None)) == 1
        assert asked.count(("m", 0, 2)) == 3


@pytest.mark.parametrize("unit", [0.0, -0.1, math.inf])
def test_a_unit_that_is_none_is_left_out(unit: float) -> None:
    """Wanda costs nothing on a random model, or everything: excess stays in nats."""
    both = together(a={"wanda": unit, "m": 0.5}, b={"wanda": 2 / 3, "m": 0.5})
    assert both(excess("m"))["loss"] == pytest.approx({"a 0.5": 0.5, "a 2:4": 1.0, "b 0.5": 0.5, "b 2:4": 1.0})


def test_a_sequential_task_goes_to_its_model() -> None:
    both = together(tiny={"wanda": 0.2, "m": 0.3}, **{"tiny 2": {"wanda": 2.0, "m": 1.5}})
    tasks = [SequentialTask(named("m"), "2:4", "test", "calibration-1", "none", name) for name in ("tiny", "tiny 2")]
    assert [both(task) for task in tasks] == [
        SequentialLoss(pytest.approx(2.0), 3.3),
        SequentialLoss(pytest.approx(1.0), 4.5),
    ]
    for task, model in zip(tasks, both.models.values(), strict=True):
        assert [one for one in model.tasks if isinstance(one, SequentialTask)] == [task]


def test_the_error_of_one_model_is_the_metrics() -> None:
    both = together(a={"wanda": 1.0, "m": 1.0, "n": 1.0}, b={"wanda": 1.0, "m": math.nan, "n": 1.0})
    with pytest.raises(MaskError, match="no mask on b"):
        both(excess("m"))
    failed, fine = both(ProbeTask((named("m"), named("n"))))
    assert failed == NoMasks("no mask on b")
    assert isinstance(fine, MaskFingerprint)


def test_a_probe_tells_of_all_models() -> None:
    def answers(**worth: float) -> MaskFingerprint:
        (answer,) = together(**{name: {"m": value} for name, value in worth.items()})(ProbeTask((named("m"),)))
        assert isinstance(answer, MaskFingerprint)
        return answer

    first = answers(a=0.1, b=0.2)
    assert first.reconstruction == {"a 0.5": 0.1, "a 2:4": 0.1, "b 0.5": 0.2, "b 2:4": 0.2}
    assert first.sketch == "ab"
    assert answers(a=0.1, b=0.2).fingerprint == first.fingerprint
    for other in (answers(a=0.1, b=0.3), answers(a=0.2, b=0.2), answers(a=0.2, b=0.1)):
        assert other.fingerprint != first.fingerprint


def test_dense_is_by_short_name() -> None:
    assert together(a={}, b={})(DenseTask("test")) == {"a": 3.0, "b": 3.0}
