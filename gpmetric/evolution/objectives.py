"""What a campaign minimises: one row per objective, each a number of one evaluated formula."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gpmetric.expression import Expression
from gpmetric.operands import OPERANDS

__all__ = ["OBJECTIVES", "Objective", "fitness_values", "mean_excess", "operand_cost"]

# What collecting the dearest operand takes, in rough multiples of a forward pass over the calibration text.
_COSTS = {"none": 0.0, "activations": 1.0, "curvature": 2.0, "gradients": 3.0}


def mean_excess(excess: Mapping[str, float]) -> float:
    """Mean over targets of ln(ppl / dense ppl), in nats per token."""
    return sum(excess.values()) / len(excess)


def operand_cost(expression: Expression) -> float:
    """Cost class of the dearest operand: 0 none, 1 activations, 2 curvature, 3 gradients."""
    return max((_COSTS[OPERANDS[name].cost] for name in expression.operands), default=0.0)


@dataclass(frozen=True)
class Objective:
    """One quantity to minimise, read off a formula and its excess log-loss by target."""

    name: str
    measure: Callable[[Expression, Mapping[str, float]], float]


# Excess at each target is one objective per target; these stand beside them.
OBJECTIVES: tuple[Objective, ...] = (
    Objective("nodes", lambda expression, excess: float(len(expression))),
    Objective("operand_cost", lambda expression, excess: operand_cost(expression)),
)


def fitness_values(expression: Expression, excess: Mapping[str, float], targets: Sequence[str]) -> tuple[float, ...]:
    """The vector NSGA-II sees: excess at each target, then OBJECTIVES, all to be minimised."""
    return (*(excess[target] for target in targets), *(row.measure(expression, excess) for row in OBJECTIVES))
