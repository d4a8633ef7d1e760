"""From a front to a winner: finalists and baselines, pruned sequentially, are compared on text the search never saw."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpmetric.errors import GpmetricError
from gpmetric.evaluation.perplexity import perplexity
from gpmetric.evolution.executors import Executor
from gpmetric.evolution.objectives import mean_excess
from gpmetric.evolution.selection import Individual
from gpmetric.pruning.metrics import BASELINES, Update

__all__ = ["Judge", "choose_finalists", "choose_winner", "describe", "masks_only"]


class Judge:
    """Measures formulas and baselines on one split after another, relative to the dense model.

    Args:
        executor: applies an Evaluator to tasks.
        targets: in the user's spelling.
        update: the campaign's, for formulas; baselines are used as published.
        heartbeat: called after every measurement, so that a ledger's owner is seen to live.
    """

    def __init__(
        self, executor: Executor, targets: Sequence[str], update: Update, heartbeat: Callable[[], None] = lambda: None
    ) -> None:
        self._executor = executor
        self._heartbeat = heartbeat
        self._targets = targets
        self._update = update

    def dense_loss(self, split: str) -> float:
        """Mean loss of the dense model on a split, in nats per token.

        Raises:
            GpmetricError: it is not finite.
        """
        outcome = next(iter(self._executor.map_ordered([{"kind": "dense", "split": split}])))
        if outcome.error is not None or not math.isfinite(outcome.value["loss"]):
            raise GpmetricError(f"the dense model's loss on the {split} text is {outcome.error or 'not finite'}")
        return float(outcome.value["loss"])

    def excess(self, formulas: Sequence[str], split: str, dense_loss: float) -> dict[str, dict[str, float]]:
        """Excess log-loss by formula (or baseline name) and target under the sequential protocol.

        A formula that cannot be applied to the model as pruned so far has infinite excess.
        """
        tasks = [
            {
                "kind": "sequential",
                "formula": formula,
                "target": target,
                "split": split,
                "update": "none" if formula in BASELINES else self._update,
            }
            for formula in formulas
            for target in self._targets
        ]
        found: dict[str, dict[str, float]] = {formula: {} for formula in formulas}
        for task, outcome in zip(tasks, self._executor.map_ordered(tasks), strict=True):
            self._heartbeat()
            loss = math.inf if outcome.error is not None else outcome.value["loss"]
            found[task["formula"]][task["target"]] = loss - dense_loss
        return found


def masks_only(name: str) -> bool:
    """Whether a baseline leaves the kept weights as they are."""
    return BASELINES[name].update in (None, "none")


def choose_finalists(front: Sequence[Individual], count: int) -> list[str]:
    """The first of the front that differ in more than their constants: near copies would all pass or fail together.

    Args:
        front: by rising mean excess.
        count: formulas wanted at most.
    """
    chosen: dict[tuple[str, ...], str] = {}
    for individual in front:
        shape = tuple(token if isinstance(token, str) else "constant" for token in individual.expression.tokens)
        chosen.setdefault(shape, str(individual.expression))
    return list(chosen.values())[:count]


def choose_winner(finalists: Mapping[str, Mapping[str, float]], baselines: Mapping[str, Mapping[str, float]]) -> str:
    """The finalist with the lowest mean excess, preferring those below every mask-only baseline at every target.

    Args:
        finalists, baselines: excess on validation by formula or name, and target.
    """

    def beats_all(excess: Mapping[str, float]) -> bool:
        return all(
            excess[target] < value
            for name, baseline in baselines.items()
            if masks_only(name)
            for target, value in baseline.items()
        )

    return min(finalists, key=lambda formula: (not beats_all(finalists[formula]), mean_excess(finalists[formula])))


def describe(excess: Mapping[str, float], dense_loss: float) -> dict[str, Any]:
    """Excess by target, its mean, and the perplexities they amount to."""
    return {
        "excess": dict(excess),
        "mean_excess": mean_excess(excess),
        "ppl": {target: perplexity(value + dense_loss) for target, value in excess.items()},
    }
