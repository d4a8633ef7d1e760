"""From a front to a winner: finalists and baselines, pruned sequentially, are compared on text the search never saw."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t

from gpmetric.errors import GpmetricError
from gpmetric.evaluation.perplexity import perplexity
from gpmetric.evolution.fitness import best_of, mean_excess
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.multi_model import LabelledTarget
from gpmetric.evolution.records import HeldOutMeasurement
from gpmetric.evolution.selection import ALIKE, Individual, few_alike
from gpmetric.evolution.tasks import DenseTask, SequentialLoss, SequentialTask
from gpmetric.executors import Executor, Outcome, OutOfTime
from gpmetric.metrics import BASELINES, Metric, resolve_metric
from gpmetric.pruning.updaters import UPDATERS
from gpmetric.session.listeners import Progress, silent

__all__ = ["HeldOut", "HeldOutFigures", "choose_finalists", "choose_winner", "interval"]


Measured = dict[Metric, "HeldOutFigures"]
_TIMING = "how long a baseline takes"


@dataclass(frozen=True)
class HeldOutFigures:
    """What one metric costs on one split: excess log-loss and mean loss by target, in nats per token.

    With several models the excess is in units of Wanda's on the same model; see `MultiModel`. `errors` says by target
    why a metric could not be applied; its figures are infinite then.
    """

    excess: dict[str, float]
    losses: dict[str, float]
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean excess over the targets."""
        return mean_excess(self.excess)

    @classmethod
    def of(cls, rows: Iterable[HeldOutMeasurement]) -> HeldOutFigures:
        """What was measured at each target."""
        found = cls({}, {})
        for row in rows:
            found.excess[row.target] = math.inf if row.excess is None else row.excess
            found.losses[row.target] = math.inf if row.loss is None else row.loss
            if row.error is not None:
                found.errors[row.target] = row.error
        return found

    @classmethod
    def missing(cls, targets: Iterable[str]) -> HeldOutFigures:
        """Of a metric that there was no time to measure."""
        labels = tuple(targets)
        unknown = dict.fromkeys(labels, math.inf)
        return cls(unknown, dict(unknown), dict.fromkeys(labels, "not measured: there was no time left (--minutes)"))

    def describe(self) -> dict[str, Any]:
        """Excess by target, its mean, the perplexities, and the first error or None."""
        ppl = {target: perplexity(loss) for target, loss in self.losses.items()}
        error = next(iter(self.errors.values()), None)
        return {"excess": self.excess, "mean_excess": self.mean, "ppl": ppl, "error": error}


@dataclass
class HeldOut:
    """Measures metrics on one split after another under the sequential protocol.

    Attributes:
        update, fit: the campaign's, for discovered metrics; baselines, in whatever group, are used as published, but
            one of the same update with the campaign's fit. Where the update fits blocks, baselines that only mask have
            it, too: rounds are worth more than any metric, so that whatever has them would win.
        ledger: takes every measurement as soon as it is there; one it has is not made again.
        fewest_windows: of validation, test or calibration.
        part: only 1/part of the windows is read, of text as of calibration.
        progress: told of measurements.
    """

    executor: Executor
    targets: Sequence[LabelledTarget]
    update: str
    fit: str
    ledger: Ledger
    fewest_windows: int = 1
    part: int = 1
    progress: Progress = silent

    def dense(self, split: str) -> dict[str, float]:
        """Perplexity of the dense model on a split, by model; a GpmetricError where it is not finite."""
        what = f"dense model on the {split} text"
        self.progress(what, 0, 1)
        (outcome,) = self.executor.map_ordered([DenseTask(split, 1 if split == "search" else self.part)])
        self.progress(what, 1, 1)
        losses: dict[str, float] = {} if outcome.error is not None else outcome.value
        if not losses or not all(math.isfinite(loss) for loss in losses.values()):
            raise GpmetricError(f"the dense model's loss on the {split} text is {outcome.error or 'not finite'}")
        return {model: perplexity(loss) for model, loss in losses.items()}

    def measure(self, metrics: Iterable[Metric], split: str, calibration: str = "calibration") -> Measured:
        """What each metric costs, a baseline known by its name; one that cannot be applied costs infinitely much.

        A metric that time is out for, by the executor's clock, at some target is left out.
        """
        asked = [(metric, at) for metric in dict.fromkeys(metrics) for at in self.targets]
        known = self._known(split, calibration)
        missing = [(metric, at) for metric, at in asked if (metric.name, at.label) not in known]
        tasks = [self._task(metric, at, split, calibration) for metric, at in missing]
        names = list(dict.fromkeys(metric.name for metric, _ in missing))
        what = f"{names[0] if len(names) == 1 else f'{len(names)} metrics'} on the {split} text"
        if missing:
            self.progress(what, 0, len(missing))
        with suppress(OutOfTime):
            outcomes = zip(missing, self.executor.map_ordered(tasks), strict=True)
            for done, ((metric, at), outcome) in enumerate(outcomes):
                self.progress(what, done + 1, len(missing))
                row = self._row(metric, at, split, calibration, outcome)
                self.ledger.hold_out(row)
                known[metric.name, at.label] = row
        found: Measured = {}
        for metric in dict.fromkeys(metric for metric, _ in asked):
            rows = [known.get((metric.name, at.label)) for at in self.targets]
            if None not in rows:
                found[metric] = HeldOutFigures.of(row for row in rows if row is not None)
        return found

    def measure_again(self, metric: Metric) -> float:
        """Seconds that a metric takes on validation at the first target, known or not; infinite if time is out."""
        at, started = self.targets[0], self.executor.clock.now()
        with suppress(OutOfTime):
            self.progress(_TIMING, 0, 1)
            (outcome,) = self.executor.map_ordered([self._task(metric, at, "validation", "calibration")])
            self.ledger.hold_out(self._row(metric, at, "validation", "calibration", outcome))
            self.progress(_TIMING, 1, 1)
            return self.executor.clock.now() - started
        return math.inf

    def expected(self, metric: Metric, split: str) -> float:
        """Seconds that the metric is thought to take at the targets that it was not measured at."""
        known = self._known(split, "calibration")
        tasks = [self._task(metric, at, split, "calibration") for at in self.targets]
        missing = [task for task, at in zip(tasks, self.targets, strict=True) if (metric.name, at.label) not in known]
        rounds = math.ceil(len(missing) / self.executor.workers)
        return rounds * max(map(self.executor.clock.expected, missing), default=0.0)

    @property
    def rounds(self) -> int:
        """How often workers take a task when a metric is measured at all targets."""
        return math.ceil(len(self.targets) / self.executor.workers)

    def row_seconds(self) -> float:
        """Seconds that a discovered metric is thought to take at all targets."""
        task = self._task(resolve_metric("abs(W)"), self.targets[0], "validation", "calibration")
        return self.rounds * self.executor.clock.expected(task)

    def _known(self, split: str, calibration: str) -> dict[tuple[str, str], HeldOutMeasurement]:
        rows = self.ledger.held_out(self._spelled(split), calibration)
        return {(row.metric, row.target): row for row in rows}

    def _spelled(self, split: str) -> str:
        """A split as the ledger knows it: figures on few windows and on all are not compared."""
        return split if self.part == 1 else f"{split}/{self.part}"

    def _row(
        self, metric: Metric, at: LabelledTarget, split: str, calibration: str, outcome: Outcome
    ) -> HeldOutMeasurement:
        figures = outcome.value or SequentialLoss(math.inf, math.inf)
        excess, loss = (one if math.isfinite(one) else None for one in (figures.excess, figures.loss))
        place = metric.name, at.label, self._spelled(split), calibration
        return HeldOutMeasurement(*place, excess, loss, outcome.error)

    def _task(self, metric: Metric, at: LabelledTarget, split: str, calibration: str) -> SequentialTask:
        update, fit = self.update, self.fit
        if metric.name.rpartition(":")[2] in BASELINES:
            metric = resolve_metric(metric.name, *at.sample)
            update = self.update if UPDATERS[self.update].fits_blocks else "none"
            fit = fit if (metric.update or update) == self.update else "own"
        return SequentialTask(metric, at.target, split, calibration, update, at.model, self.part, fit)


def choose_finalists(front: Sequence[Individual], count: int) -> tuple[list[Metric], list[Metric]]:
    """The first `count` of the front that differ in more than constants, and the next ones for when there is time.

    The best metric without gradients is among the first, whatever its place. Under the sequential protocol near copies
    differ by about 1 % for good, since other masks give the blocks after them other inputs: a few are among the others.
    """
    finalists = [individual.metric for individual in few_alike(front, 1)][:count]
    free = next((individual.metric for individual in front if not individual.metric.needs_gradients), None)
    if free is not None and free not in finalists:
        finalists = [*finalists[: count - 1], free]
    return finalists, [one.metric for one in few_alike(front, ALIKE) if one.metric not in finalists]


def choose_winner(finalists: Mapping[Metric, HeldOutFigures], rivals: Mapping[Metric, HeldOutFigures]) -> Metric:
    """The finalist with the lowest mean excess, preferring those below every rival at every target.

    Rivals are baselines of the same kind: those that only mask, unless the campaign updates weights.
    """
    bar = best_of(rival.excess for rival in rivals.values())

    def rank(metric: Metric) -> tuple[bool, float]:
        figures = finalists[metric]
        beats_all = all(figures.excess[target] < least for target, least in bar.items())
        return not beats_all, figures.mean

    return min(finalists, key=rank)


def interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """95 % confidence interval of the mean of a few independent draws, by Student's t; None below two of them."""
    if len(differences) < 2 or not all(math.isfinite(value) for value in differences):
        return None
    half = float(t.ppf(0.975, len(differences) - 1)) * stdev(differences) / math.sqrt(len(differences))
    return fmean(differences) - half, fmean(differences) + half
