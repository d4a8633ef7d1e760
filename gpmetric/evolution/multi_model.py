"""Evaluates a metric on several models, for a search that is to serve all of them: each worker holds some of them."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from gpmetric.errors import GpmetricError
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
from gpmetric.executors import Executor, Outcome, TaskClock
from gpmetric.metrics import resolve_metric
from gpmetric.session.session import Session

__all__ = ["LabelledTarget", "MultiModel", "OneModel", "label_targets"]

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


@dataclass(frozen=True)
class OneModel:
    """A task on one of the models, which is the place where a worker that holds it can do it."""

    place: str
    task: Task

    @property
    def effort(self) -> tuple[str, float]:
        """Models differ in what they take."""
        kind, amount = self.task.effort
        return f"{kind} {self.place}", amount


class MultiModel(Executor):
    """Has the tasks of an `Evaluator` done on several models; figures are keyed by the label of a target.

    They are in units of Wanda's mean over the targets on the same model, pruned in one shot, on all its search windows;
    the loss of a sequential task stays in nats.

    Args:
        executor: of `OneModel` tasks.
        models: by name.
    """

    def __init__(self, executor: Executor, models: Iterable[str]) -> None:
        self._executor, self._models = executor, tuple(models)
        self._units: dict[str, dict[str, float]] = {}

    @property
    def workers(self) -> int:  # type: ignore[override]
        """Tasks on one model at once."""
        return self._executor.workers

    @property
    def clock(self) -> TaskClock:
        """That of the executor, which knows what tasks take on each model, and on all."""
        return self._executor.clock

    @clock.setter
    def clock(self, clock: TaskClock) -> None:
        self._executor.clock = clock

    def close(self) -> None:
        self._executor.close()

    def map_ordered(self, candidates: Iterable[Task]) -> Generator[Outcome]:
        """One outcome per task; its error is that of the first model that has one, its seconds are of all models."""
        tasks = iter(candidates)
        first = list(islice(tasks, 1))
        if not self._units and any(isinstance(task, ExcessTask | UseTask | SequentialTask) for task in first):
            self._units = self._measured_units()
        asked: deque[Task] = deque()

        def parts() -> Iterator[OneModel]:
            for task in chain(first, tasks):
                asked.append(task)
                yield from self._parts(task)

        with closing(self._executor.map_ordered(parts())) as outcomes:
            for outcome in outcomes:
                task = asked.popleft()
                names = [part.place for part in self._parts(task)]
                joined = self._joined(task, dict(zip(names, [outcome, *islice(outcomes, len(names) - 1)], strict=True)))
                self.clock.note(task, joined.seconds)
                yield joined

    def _parts(self, task: Task) -> list[OneModel]:
        names = (task.model,) if isinstance(task, SequentialTask) else self._models
        return [OneModel(name, task) for name in names]

    def _joined(self, task: Task, outcomes: Mapping[str, Outcome]) -> Outcome:
        failed = next((one for one in outcomes.values() if one.error is not None), None)
        last = failed or max(outcomes.values(), key=lambda one: one.attempt)
        value = None if failed else self._value(task, {name: one.value for name, one in outcomes.items()})
        return replace(last, value=value, seconds=sum(one.seconds for one in outcomes.values()))

    def _value(self, task: Task, answers: Mapping[str, Any]) -> Any:
        match task:
            case SequentialTask(model=model):
                answer = answers[model]
                return replace(answer, excess=answer.excess / self._units[model]["loss"])
            case DenseTask():
                return {name: loss for name, answer in answers.items() for loss in answer.values()}
            case ExcessTask() | UseTask():
                return self._in_units(answers)
            case _:
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

    def _measured_units(self) -> dict[str, dict[str, float]]:
        task = ExcessTask(resolve_metric(_UNIT))
        units = {}
        outcomes = self._executor.map_ordered([OneModel(name, task) for name in self._models])
        for name, outcome in zip(self._models, outcomes, strict=True):
            if outcome.error is not None:
                raise GpmetricError(f"{_UNIT}, whose figures are the unit, fails on {name}: {outcome.error}")
            means = {objective: mean_excess(by_target) for objective, by_target in outcome.value.items()}
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
