"""Several models as one: relative units by hand, errors, keys, and which model a task goes to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

from gpmetric.errors import MaskError
from gpmetric.evolution.ensemble import Ensemble, label

TARGETS = ("0.5", "2:4")


class Model:
    """An evaluator whose excess is a number per metric, doubled at 2:4; its divergence is a tenth."""

    def __init__(self, name: str, excess: Mapping[str, float]) -> None:
        self.name = name
        self.excess = excess
        self.tasks: list[Mapping[str, Any]] = []

    def __call__(self, task: Mapping[str, Any]) -> Any:
        self.tasks.append(task)
        if task["kind"] == "dense":
            return {f"/models/{self.name}": 3.0}
        if task["kind"] == "probe":
            return [self._probe(text) for text in task["metrics"]]
        value = self.excess[task["metric"]]
        if math.isnan(value):
            raise MaskError(f"no mask on {self.name}")
        if task["kind"] == "sequential":
            return {"excess": value * (1 + TARGETS.index(task["target"])), "loss": 3 + value}
        return {kind: {"0.5": scale * value, "2:4": 2 * scale * value} for kind, scale in (("loss", 1.0), ("kl", 0.1))}

    def _probe(self, text: str) -> dict[str, Any]:
        if math.isnan(self.excess[text]):
            return {"error": f"no mask on {self.name}"}
        reconstruction = dict.fromkeys(TARGETS, self.excess[text])
        return {
            "error": None,
            "fingerprint": f"{self.excess[text]}",
            "sketch": self.name,
            "reconstruction": reconstruction,
        }


def ensemble(**worth: Mapping[str, float]) -> Ensemble:
    return Ensemble({name: Model(name, excess) for name, excess in worth.items()})  # type: ignore[arg-type]


def excess(metric: str) -> dict[str, Any]:
    return {"kind": "excess", "metric": metric, "first": 0, "last": 2}


def test_units_are_those_of_wanda_on_the_same_model() -> None:
    """Wanda's mean excess is (0.2 + 0.4) / 2 = 0.3 on the one and 3 on the other, its divergence a tenth of that."""
    both = ensemble(small={"wanda": 0.2, "m": 0.3}, large={"wanda": 2.0, "m": 1.5})
    expected = {"small 0.5": 1.0, "small 2:4": 2.0, "large 0.5": 0.5, "large 2:4": 1.0}
    assert both(excess("m")) == {"loss": pytest.approx(expected), "kl": pytest.approx(expected)}


def test_the_unit_is_measured_once_on_all_windows() -> None:
    both = ensemble(a={"wanda": 1.0, "m": 1.0}, b={"wanda": 1.0, "m": 1.0})
    for _ in range(3):
        both(excess("m"))
    for model in both._evaluators.values():
        asked = [(task["metric"], task["first"], task["last"]) for task in model.tasks]  # type: ignore[attr-defined]
        assert asked.count(("wanda", 0, None)) == 1
        assert asked.count(("m", 0, 2)) == 3


@pytest.mark.parametrize("unit", [0.0, -0.1, math.inf])
def test_a_unit_that_is_none_is_left_out(unit: float) -> None:
    """Wanda costs nothing on a random model, or everything: excess stays in nats."""
    both = ensemble(a={"wanda": unit, "m": 0.5}, b={"wanda": 2 / 3, "m": 0.5})
    assert both(excess("m"))["loss"] == pytest.approx({"a 0.5": 0.5, "a 2:4": 1.0, "b 0.5": 0.5, "b 2:4": 1.0})


def test_a_sequential_task_goes_to_its_model() -> None:
    both = ensemble(tiny={"wanda": 0.2, "m": 0.3}, **{"tiny 2": {"wanda": 2.0, "m": 1.5}})
    task = {"kind": "sequential", "metric": "m", "split": "test", "calibration": "calibration-1", "update": "none"}
    assert both(task | {"target": label("tiny", "2:4")}) == {"excess": pytest.approx(2.0), "loss": 3.3}
    assert both(task | {"target": label("tiny 2", "2:4")}) == {"excess": pytest.approx(1.0), "loss": 4.5}
    first, second = both._evaluators.values()
    for model in (first, second):
        (own,) = [one for one in model.tasks if one["kind"] == "sequential"]  # type: ignore[attr-defined]
        assert own == task | {"target": "2:4"}


def test_the_error_of_one_model_is_the_metrics() -> None:
    both = ensemble(a={"wanda": 1.0, "m": 1.0, "n": 1.0}, b={"wanda": 1.0, "m": math.nan, "n": 1.0})
    with pytest.raises(MaskError, match="no mask on b"):
        both(excess("m"))
    failed, fine = both({"kind": "probe", "metrics": ["m", "n"]})
    assert failed == {"error": "no mask on b"}
    assert fine["error"] is None


def test_a_probe_tells_of_all_models() -> None:
    def answers(**worth: float) -> dict[str, Any]:
        (answer,) = ensemble(**{name: {"m": value} for name, value in worth.items()})(
            {"kind": "probe", "metrics": ["m"]}
        )
        return dict(answer)

    first = answers(a=0.1, b=0.2)
    assert first["reconstruction"] == {"a 0.5": 0.1, "a 2:4": 0.1, "b 0.5": 0.2, "b 2:4": 0.2}
    assert first["sketch"] == "ab"
    assert answers(a=0.1, b=0.2)["fingerprint"] == first["fingerprint"]
    for other in (answers(a=0.1, b=0.3), answers(a=0.2, b=0.2), answers(a=0.2, b=0.1)):
        assert other["fingerprint"] != first["fingerprint"]


def test_dense_is_by_short_name() -> None:
    assert ensemble(a={}, b={})({"kind": "dense", "split": "test"}) == {"a": 3.0, "b": 3.0}
