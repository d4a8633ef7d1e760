"""Evaluates a metric on several models at once, for a search that is to serve all of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from gpmetric.evolution.evaluator import Evaluator, open_workplace
from gpmetric.evolution.objectives import mean_excess
from gpmetric.models import Model

__all__ = ["Ensemble", "label", "open_workplaces"]

_UNIT = "wanda"  # excess is told in units of this metric's, so that no model outweighs another


def label(model: str, target: str) -> str:
    """What the figures of a target on one of several models are keyed by."""
    return f"{model} {target}"


def open_workplaces(
    places: Mapping[str, dict[str, Any]], models: Mapping[str, Model] | None = None
) -> Callable[[Mapping[str, Any]], Any]:
    """The evaluator of a worker process: of one model, or of several.

    Args:
        places: a Workplace as plain data for each model's name.
        models: those this process has already.
    """
    evaluators = {name: open_workplace(place, (models or {}).get(name)) for name, place in places.items()}
    return Ensemble(evaluators) if len(evaluators) > 1 else next(iter(evaluators.values()))


class Ensemble:
    """Answers the tasks of an `Evaluator` for several models; figures are keyed by `label`.

    Excess and divergence are in units of Wanda's mean over the targets on the same model, pruned in one shot, on all
    its search windows; `loss` of a sequential task stays in nats.

    Args:
        evaluators: by model name.
    """

    def __init__(self, evaluators: Mapping[str, Evaluator]) -> None:
        self._evaluators = evaluators

    def __call__(self, task: Mapping[str, Any]) -> Any:
        """Runs one task; errors are those of the first model that has one."""
        if task["kind"] == "sequential":
            # the longest: a folder's name may hold spaces, and begin with another's
            name = max((name for name in self._evaluators if task["target"].startswith(f"{name} ")), key=len)
            answer = self._evaluators[name]({**task, "target": task["target"].removeprefix(f"{name} ")})
            return {"excess": answer["excess"] / self._units[name]["loss"], "loss": answer["loss"]}
        answers = {name: evaluator(task) for name, evaluator in self._evaluators.items()}
        if task["kind"] == "dense":
            return {name: loss for name, answer in answers.items() for loss in answer.values()}
        if task["kind"] == "probe":
            return [_together(dict(zip(answers, one, strict=True))) for one in zip(*answers.values(), strict=True)]
        return {
            kind: {
                label(name, target): value / self._units[name][kind]
                for name, answer in answers.items()
                for target, value in answer[kind].items()
            }
            for kind in ("loss", "kl")
        }

    @cached_property
    def _units(self) -> dict[str, dict[str, float]]:
        units = {}
        for name, evaluator in self._evaluators.items():
            answer = evaluator({"kind": "excess", "metric": _UNIT, "first": 0, "last": None})
            means = {kind: mean_excess(values) for kind, values in answer.items()}
            units[name] = {kind: mean if mean > 0 and math.isfinite(mean) else 1.0 for kind, mean in means.items()}
        return units


def _together(answers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a probe tells of one metric on all models."""
    for answer in answers.values():
        if answer["error"]:
            return {"error": answer["error"]}
    digest = hashlib.sha256("".join(answer["fingerprint"] for answer in answers.values()).encode()).hexdigest()
    errors = {
        label(name, target): error
        for name, answer in answers.items()
        for target, error in answer["reconstruction"].items()
    }
    sketch = "".join(answer["sketch"] for answer in answers.values())
    return {"error": None, "fingerprint": digest, "sketch": sketch, "reconstruction": errors}
