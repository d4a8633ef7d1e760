"""Survival and mating: NSGA-II over all objectives, with the best by mean excess never lost."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from deap import base, tools

from gpmetric.evolution.objectives import fitness_values, mean_excess
from gpmetric.expression import Expression
from gpmetric.pareto import pareto_front

__all__ = ["Individual", "pareto_individuals", "select_survivors", "tournament"]

_ELITE_SHARE = 0.25  # of the survivors, taken by mean excess before NSGA-II fills the rest
_TOURNAMENT_SIZE = 3


@dataclass(frozen=True)
class Individual:
    """A formula with its excess log-loss by target, ln(ppl / dense ppl) on the search windows."""

    expression: Expression
    excess: dict[str, float]
    fitness: Any = field(init=False, compare=False, repr=False)  # DEAP reads it

    def __post_init__(self) -> None:
        values = fitness_values(self.expression, self.excess, list(self.excess))
        kind = type("Minimised", (base.Fitness,), {"weights": (-1.0,) * len(values)})
        object.__setattr__(self, "fitness", kind(values))

    @property
    def mean(self) -> float:
        """Mean excess over the targets, in nats per token."""
        return mean_excess(self.excess)


def select_survivors(individuals: Sequence[Individual], count: int) -> list[Individual]:
    """At most `count` individuals: the best by mean excess, then the survivors of NSGA-II among the others.

    Source: Deb et al. 2002; elitism on the mean, since a front of many objectives holds nearly everyone.
    """
    ranked = sorted(individuals, key=lambda individual: (individual.mean, str(individual.expression)))
    elite = ranked[: max(1, int(count * _ELITE_SHARE))]
    others = ranked[len(elite) :]
    if len(others) > count - len(elite):
        others = tools.selNSGA2(others, count - len(elite), nd="log")
    return [*elite, *others]


def tournament(population: Sequence[Individual], rng: random.Random) -> Individual:
    """The lowest mean excess among a few drawn at random."""
    return min(rng.choices(population, k=_TOURNAMENT_SIZE), key=lambda individual: individual.mean)


def pareto_individuals(individuals: Sequence[Individual]) -> list[Individual]:
    """Those no other individual beats in every objective, by rising mean excess."""
    front = [individuals[index] for index in pareto_front([one.fitness.values for one in individuals])]
    return sorted(front, key=lambda individual: (individual.mean, str(individual.expression)))
