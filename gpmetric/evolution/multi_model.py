"""Evaluates a metric on several models at once, for a search that is to serve all of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from gpmetric.evolution.fitness import mean_excess
from gpmetric.evolution.tasks import (
    DenseTask,
    ExcessTask,
    Figures,
    MaskFingerprint,
    NoMasks,
    SequentialTask,
    Task,
    UseTask,
)
from gpmetric.metrics import resolve_metric
from gpmetric.session.session import Session

__all__ = ["LabelledTarget", "MultiModel", "label_targets"]

_UNIT = "wanda"  # figures are told in units of this metric's, so that no model outweighs another


@dataclass(frozen=True)
class LabelledTarget:
    """A target, in the user's spelling, on one of a campaign's models."""

    label: str  # what its figures are keyed by: the target, behind the model's name where there are several
    model: str
    target: str
    sample: tuple[int, int]  # sequences and tokens of each in the model's calibration, for GBLM's balance


def label_targets(targets: Sequence[str], sessions: Mapping[str, Session]) -> tuple[LabelledTarget, ...]:
    """Each target on each model."""
    labelled = []
    for name, session in sessions.items():
        sequences, length = session.tokens.shape
        for target in targets:
            label = f"{name} {target}" if len(sessions) > 1 else target
            labelled.append(LabelledTarget(label, name, target, (sequences, length)))
    return tuple(labelled)


class MultiModel:
    """Answers the tasks of an `Evaluator` for several models; figures are keyed by the label of a target.

    They are in units of Wanda's mean over the targets on the same model, pruned in one shot, on all its search windows;
    the loss of a sequential task stays in nats.

    Args:
        evaluators: by model name.
    """

    def __init__(self, evaluators: Mapping[str, Callable[[Task], Any]]) -> None:
        self._evaluators = evaluators

    def __call__(self, task: Task) -> Any:
        """The answer to a task; errors are those of the first model that has one."""
        if isinstance(task, SequentialTask):
            answer = self._evaluators[task.model](task)
            return replace(answer, excess=answer.excess / self._units[task.model]["loss"])
        answers = {name: evaluator(task) for name, evaluator in self._evaluators.items()}
        if isinstance(task, DenseTask):
            return {name: loss for name, answer in answers.items() for loss in answer.values()}
        if isinstance(task, ExcessTask | UseTask):
            return self._in_units(answers)
        return [_together(dict(zip(answers, one, strict=True))) for one in zip(*answers.values(), strict=True)]

    def _in_units(self, answers: Mapping[str, Figures]) -> Figures:
        return {
            objective: {
                f"{name} {target}": value / self._units[name][objective]
                for name, answer in answers.items()
                for target, value in answer[objective].items()
            }
            for objective in next(iter(answers.values()))
        }

    @cached_property
    def _units(self) -> dict[str, dict[str, float]]:
        units = {}
        for name, evaluator in self._evaluators.items():
            figures: Figures = evaluator(ExcessTask(resolve_metric(_UNIT)))
            means = {objective: mean_excess(by_target) for objective, by_target in figures.items()}
            units[name] = {key: mean if mean > 0 and math.isfinite(mean) else 1.0 for key, mean in means.items()}
        return units


def _together(answers: Mapping[str, MaskFingerprint | NoMasks]) -> MaskFingerprint | NoMasks:
    """What is told of one metric's masks on all models."""
    found: dict[str, MaskFingerprint] = {}
    for name, answer in answers.items():
        if isinstance(answer, NoMasks):
            return answer
        found[name] = answer
    digest = hashlib.sha256("".join(one.fingerprint for one in found.values()).encode()).hexdigest()
    sketch = "".join(one.sketch for one in found.values())
    errors = {f"{name} {target}": error for name, one in found.items() for target, error in one.reconstruction.items()}
    return MaskFingerprint(digest, sketch, errors)
