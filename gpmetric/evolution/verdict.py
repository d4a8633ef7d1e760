"""From a front to a winner: finalists and baselines, pruned sequentially, are compared on text the search never saw."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t

from gpmetric.errors import GpmetricError
from gpmetric.evaluation.perplexity import perplexity
from gpmetric.evolution.executors import Executor
from gpmetric.evolution.ledger import Judgement, Ledger
from gpmetric.evolution.objectives import best_of, mean_excess
from gpmetric.evolution.selection import ALIKE, Individual, few_alike
from gpmetric.pruning.metrics import BASELINES, Update

__all__ = ["Judge", "Place", "Verdict", "choose_finalists", "choose_winner", "interval"]


Place = tuple[str, str, str, str]  # metric, target, split, calibration


@dataclass(frozen=True)
class Verdict:
    """What one metric costs on one split: excess log-loss and mean loss by target, in nats per token.

    With several models the excess is in units of Wanda's on the same model; see `Ensemble`.

    `errors` says by target why a metric could not be applied; its figures are infinite then.
    """

    excess: dict[str, float]
    losses: dict[str, float]
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean excess over the targets."""
        return mean_excess(self.excess)

    def describe(self) -> dict[str, Any]:
        """Excess by target, its mean, the perplexities, and the first error or None."""
        ppl = {target: perplexity(loss) for target, loss in self.losses.items()}
        error = next(iter(self.errors.values()), None)
        return {"excess": self.excess, "mean_excess": self.mean, "ppl": ppl, "error": error}


class Judge:
    """Measures metrics on one split after another under the sequential protocol.

    Args:
        executor: applies an Evaluator to tasks.
        targets: what figures are keyed by.
        update: the campaign's, for discovered metrics; baselines, in whatever group, are used as published.
        ledger: takes every judgement as soon as it is there; one it has is not made again.
    """

    def __init__(self, executor: Executor, targets: Sequence[str], update: Update, ledger: Ledger) -> None:
        self._executor = executor
        self._targets = targets
        self._update = update
        self._ledger = ledger
        self._known = {_place(row): row for row in ledger.judgements()}

    def dense(self, split: str) -> dict[str, float]:
        """Perplexity of the dense model on a split, by model.

        Raises:
            GpmetricError: it is not finite.
        """
        (outcome,) = self._executor.map_ordered([{"kind": "dense", "split": split}])
        losses = {} if outcome.error is not None else outcome.value
        if not losses or not all(math.isfinite(loss) for loss in losses.values()):
            raise GpmetricError(f"the dense model's loss on the {split} text is {outcome.error or 'not finite'}")
        return {model: perplexity(loss) for model, loss in losses.items()}

    def measure(self, metrics: Collection[str], split: str, calibration: str = "calibration") -> dict[str, Verdict]:
        """What each metric (or baseline name) costs; one that cannot be applied costs infinitely much.

        Args:
            metrics: as text.
            split: the windows losses are measured on.
            calibration: the windows statistics come from.
        """
        wanted = [(metric, target, split, calibration) for metric in metrics for target in self._targets]
        missing = [place for place in wanted if place not in self._known]
        for place, outcome in zip(missing, self._executor.map_ordered(map(self._task, missing)), strict=True):
            figures = outcome.value or {"excess": math.inf, "loss": math.inf}
            known = {name: value if math.isfinite(value) else None for name, value in figures.items()}
            self._known[place] = Judgement(*place, known["excess"], known["loss"], outcome.error)
            self._ledger.judge(self._known[place])
        found = {metric: Verdict({}, {}) for metric in metrics}
        for row in map(self._known.__getitem__, wanted):
            verdict = found[row.metric]
            verdict.excess[row.target] = math.inf if row.excess is None else row.excess
            verdict.losses[row.target] = math.inf if row.loss is None else row.loss
            if row.error is not None:
                verdict.errors[row.target] = row.error
        return found

    def _task(self, place: Place) -> dict[str, str]:
        metric, target, split, calibration = place
        update = "none" if metric.rpartition(":")[2] in BASELINES else self._update
        names = {"metric": metric, "target": target, "split": split, "calibration": calibration}
        return {"kind": "sequential", **names, "update": update}


def _place(row: Judgement) -> Place:
    return row.metric, row.target, row.split, row.calibration


def choose_finalists(front: Sequence[Individual], count: int) -> tuple[list[str], list[str]]:
    """The first of the front that differ in more than their constants, and the next ones where there is time for more.

    The best metric without gradients is among the first, whatever its place. Under the sequential protocol near copies
    differ by about 1 % for good, since other masks give the blocks after them other inputs: a few are among the others.

    Args:
        front: the best first.
        count: metrics wanted at most, apart from the others.
    """
    distinct = [individual.text for individual in few_alike(front, 1)][:count]
    free = next((individual.text for individual in front if not individual.metric.needs_gradients), None)
    finalists = distinct if free is None or free in distinct else [*distinct[: count - 1], free]
    return finalists, [one.text for one in few_alike(front, ALIKE) if one.text not in finalists]


def choose_winner(finalists: Mapping[str, Verdict], rivals: Mapping[str, Verdict]) -> str:
    """The finalist with the lowest mean excess, preferring those below every rival at every target.

    Args:
        finalists: on validation.
        rivals: baselines of the same kind, on validation: those that only mask, unless the campaign updates weights.
    """

    bar = best_of(rival.excess for rival in rivals.values())

    def rank(metric: str) -> tuple[bool, float]:
        excess = finalists[metric].excess
        beats_all = all(excess[target] < least for target, least in bar.items())
        return not beats_all, mean_excess(excess)

    return min(finalists, key=rank)


def interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """95 % confidence interval of the mean of a few independent draws, by Student's t; None below two of them."""
    if len(differences) < 2 or not all(math.isfinite(value) for value in differences):
        return None
    half = float(t.ppf(0.975, len(differences) - 1)) * stdev(differences) / math.sqrt(len(differences))
    return fmean(differences) - half, fmean(differences) + half
