"""From a front to a winner: finalists and baselines, pruned sequentially, are compared on text the search never saw."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t

from gpmetric.errors import GpmetricError
from gpmetric.evaluation.perplexity import perplexity
from gpmetric.evolution.executors import Executor
from gpmetric.evolution.objectives import mean_excess
from gpmetric.evolution.selection import Individual
from gpmetric.pruning.metrics import BASELINES, Update

__all__ = ["Judge", "Verdict", "choose_finalists", "choose_winner", "interval", "masks_only"]


@dataclass(frozen=True)
class Verdict:
    """What one metric costs on one split: excess log-loss and mean loss by target, in nats per token."""

    excess: dict[str, float]
    losses: dict[str, float]

    @property
    def mean(self) -> float:
        """Mean excess over the targets."""
        return mean_excess(self.excess)

    def describe(self) -> dict[str, Any]:
        """Excess by target, its mean, and the perplexities."""
        ppl = {target: perplexity(loss) for target, loss in self.losses.items()}
        return {"excess": self.excess, "mean_excess": self.mean, "ppl": ppl}


class Judge:
    """Measures metrics on one split after another under the sequential protocol.

    Args:
        executor: applies an Evaluator to tasks.
        targets: what figures are keyed by.
        update: the campaign's, for discovered metrics; baselines are used as published.
        heartbeat: called after every measurement, so that a ledger's owner is seen to live.
    """

    def __init__(
        self, executor: Executor, targets: Sequence[str], update: Update, heartbeat: Callable[[], None] = lambda: None
    ) -> None:
        self._executor = executor
        self._heartbeat = heartbeat
        self._targets = targets
        self._update = update

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
        tasks = [
            {
                "kind": "sequential",
                "metric": metric,
                "target": target,
                "split": split,
                "calibration": calibration,
                "update": "none" if metric in BASELINES else self._update,
            }
            for metric in metrics
            for target in self._targets
        ]
        found = {metric: Verdict({}, {}) for metric in metrics}
        for task, outcome in zip(tasks, self._executor.map_ordered(tasks), strict=True):
            self._heartbeat()
            verdict, value = found[task["metric"]], outcome.value or {"excess": math.inf, "loss": math.inf}
            verdict.excess[task["target"]], verdict.losses[task["target"]] = value["excess"], value["loss"]
        return found


def masks_only(name: str) -> bool:
    """Whether a baseline leaves the kept weights as they are."""
    return BASELINES[name].update in (None, "none")


def choose_finalists(front: Sequence[Individual], count: int) -> list[str]:
    """The first of the front that differ in more than their constants: near copies would all pass or fail together.

    The best metric without gradients is among them, whatever its place.

    Args:
        front: the best first.
        count: metrics wanted at most.
    """
    chosen: dict[tuple[str, ...], str] = {}
    for individual in front:
        chosen.setdefault(individual.shape, individual.text)
    free = next((individual.text for individual in front if not individual.metric.needs_gradients), None)
    finalists = list(chosen.values())[:count]
    return finalists if free is None or free in finalists else [*finalists[: count - 1], free]


def choose_winner(finalists: Mapping[str, Verdict], rivals: Mapping[str, Verdict]) -> str:
    """The finalist with the lowest mean excess, preferring those below every rival at every target.

    Args:
        finalists: on validation.
        rivals: baselines of the same kind, on validation: those that only mask, unless the campaign updates weights.
    """

    def beats_all(excess: Mapping[str, float]) -> bool:
        return all(excess[target] < value for rival in rivals.values() for target, value in rival.excess.items())

    return min(finalists, key=lambda metric: (not beats_all(finalists[metric].excess), finalists[metric].mean))


def interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """95 % confidence interval of the mean of a few independent draws, by Student's t; None below two of them."""
    if len(differences) < 2 or not all(math.isfinite(value) for value in differences):
        return None
    half = float(t.ppf(0.975, len(differences) - 1)) * stdev(differences) / math.sqrt(len(differences))
    return fmean(differences) - half, fmean(differences) + half
