"""What formulas are selected by: the figures of an objective by target, and components of the formula, one row each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from gpmetric.expression import Expression
from gpmetric.operands import OPERANDS

__all__ = ["COMPONENTS", "best_of", "fitness_values", "hinge_penalty", "mean_excess", "operand_cost"]

# A metric is to be this share below a bar. On llama-05m at 2:4, gblm_l1 was 1.7 % below pruner_zero on 32 windows of
# the search text, and 0.1 % above on 128 of the validation text.
_MARGIN = 0.02


def mean_excess(excess: Mapping[str, float]) -> float:
    """Mean over targets of ln(ppl / dense ppl), in nats per token."""
    return sum(excess.values()) / len(excess)


def best_of(figures: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The lowest figure at each target; nothing of nothing."""
    bar: dict[str, float] = {}
    for row in figures:
        for target, value in row.items():
            bar[target] = min(value, bar.get(target, math.inf))
    return bar


def hinge_penalty(figures: Mapping[str, float], bar: Mapping[str, float]) -> float:
    """Sum over targets of max(0, figure - (bar - 0.02 |bar|)): 0 for a metric at least 2 % below the bar everywhere."""
    return sum(max(0.0, figures[target] - least + _MARGIN * abs(least)) for target, least in bar.items())


def operand_cost(expression: Expression) -> float:
    """What collecting the dearest operand takes, in rough multiples of a forward pass over the calibration text."""
    return max((OPERANDS[name].cost for name in expression.operands), default=0.0)


# What stands in the fitness beside the objective at each target, to be minimised, too.
COMPONENTS: dict[str, Callable[[Expression], float]] = {
    "nodes": lambda expression: float(len(expression)),
    "operand_cost": operand_cost,
}


def fitness_values(expression: Expression, figures: Mapping[str, float]) -> tuple[float, ...]:
    """The vector NSGA-II sees: the objective at each target, then COMPONENTS, all to be minimised."""
    return (*figures.values(), *(measure(expression) for measure in COMPONENTS.values()))
