"""What a campaign minimises: one row per objective, each a number of one evaluated formula."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gpmetric.expression import Expression
from gpmetric.operands import OPERANDS

__all__ = [
    "OBJECTIVES",
    "SEARCHED",
    "Objective",
    "Searched",
    "best_of",
    "fitness_values",
    "mean_excess",
    "operand_cost",
    "surcharge",
]

Searched = Literal["kl", "loss"]

# what candidates are compared by on the search text, in nats per token and target. Over 40 formulas on the demo model,
# the rank correlation with the loss on 192 other windows was 0.86 for the divergence on 8 windows, 0.88 for the loss on
# 128; among the best 20 formulas 0.55 and 0.54.
SEARCHED: dict[Searched, str] = {
    "kl": "Kullback-Leibler divergence of the pruned model's predictions from the dense model's",
    "loss": "excess log-loss ln(ppl / dense ppl)",
}

# of a bar: what a metric is to be below it by. On llama-05m at 2:4, gblm_l1 was 1.7 % below pruner_zero on 32 windows
# of the search text, and 0.1 % above on 128 of the validation text.
_MARGIN = 0.02

# What collecting the dearest operand takes, in rough multiples of a forward pass over the calibration text.
_COSTS = {"none": 0.0, "activations": 1.0, "curvature": 2.0, "gradients": 3.0}


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


def surcharge(figures: Mapping[str, float], bar: Mapping[str, float]) -> float:
    """What a metric is above, or not clearly below, a bar: the sum over targets of figure - (bar - 2 %)."""
    return sum(max(0.0, figures[target] - least + _MARGIN * abs(least)) for target, least in bar.items())


def operand_cost(expression: Expression) -> float:
    """Cost class of the dearest operand: 0 none, 1 activations, 2 curvature, 3 gradients."""
    return max((_COSTS[OPERANDS[name].cost] for name in expression.operands), default=0.0)


@dataclass(frozen=True)
class Objective:
    """One quantity to minimise, read off a formula and its excess log-loss by target."""

    name: str
    measure: Callable[[Expression, Mapping[str, float]], float]


# The figure searched is one objective per target; these stand beside them.
OBJECTIVES: tuple[Objective, ...] = (
    Objective("nodes", lambda expression, excess: float(len(expression))),
    Objective("operand_cost", lambda expression, excess: operand_cost(expression)),
)


def fitness_values(expression: Expression, excess: Mapping[str, float], targets: Sequence[str]) -> tuple[float, ...]:
    """The vector NSGA-II sees: what is searched at each target, then OBJECTIVES, all to be minimised."""
    return (*(excess[target] for target in targets), *(row.measure(expression, excess) for row in OBJECTIVES))
