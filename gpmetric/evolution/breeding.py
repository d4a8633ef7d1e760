"""What a generation consists of: start formulas, random ones, children and neighbours, simplified layer by layer."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from gpmetric.evolution.grammar import foreign_to, is_sensible, nests
from gpmetric.evolution.plan import Plan
from gpmetric.evolution.refinement import neighbours, weighted
from gpmetric.evolution.selection import Individual, by_merit, tournament
from gpmetric.evolution.variation import Variation
from gpmetric.expression import Expression
from gpmetric.expression.canonical import cancel_opposites, canonical
from gpmetric.expression.rank import rank_form
from gpmetric.pruning.metrics import Metric, resolve_metric, spelled
from gpmetric.pruning.target import Granularity

__all__ = ["Breeder", "Draw"]

_DRAWS_PER_PLACE = 20  # draws before a place in the generation stays empty: the neighbourhood is exhausted
_REFINED = 3  # best individuals whose neighbours every _EVERY-th generation begins with
_EVERY = 3
_STEPS = (1.5, 1.2, 1.1)  # factors of the neighbours' constants, one after the other
_PARENTS = 4  # of a child; the operators that take two use the first two
_DIGITS = 4  # of a constant
_REGROUPED = 0.15  # chance of a child to compete in another group than its first parent


@dataclass(frozen=True)
class Draw:
    """One drawn metric, as text, and what is left of it after each layer of simplification.

    `form` is what is evaluated and bred from.
    """

    text: str
    opposites: str
    canonical: str
    ranked: str
    form: str


class Breeder:
    """Draws the candidates of generations; all randomness is the campaign's generator.

    Args:
        plan: what to search for.
        rng: the campaign's generator.
    """

    def __init__(self, plan: Plan, rng: random.Random) -> None:
        self._plan = plan
        self._rng = rng
        self._variation = Variation(plan.operands, plan.primitives, plan.max_nodes, rng, plan.forbidden)

    def draw(self, number: int, population: Sequence[Individual], seen: Collection[str]) -> list[Draw]:
        """Draws until the generation has `plan.population` ranked forms that are not in `seen`, or far too many.

        Every start formula is drawn, however many there are.
        """
        draws: list[Draw] = []
        least = len(self._plan.start) if number == 0 else 0
        new: set[str] = set()
        for metric in self._sources(number, population):
            draw = self._simplified(metric, exact=number == 0 and len(draws) < len(self._plan.start))
            draws.append(draw)
            if draw.ranked not in seen:
                new.add(draw.ranked)
            full = len(new) >= self._plan.population or len(draws) >= _DRAWS_PER_PLACE * self._plan.population
            if full and len(draws) >= least:
                break
        return draws

    def _sources(self, number: int, population: Sequence[Individual]) -> Iterator[Metric]:
        """The start metrics and random ones at first, neighbours of the best and children of the population later."""
        if number == 0:
            yield from (resolve_metric(text) for text in self._plan.start)
        if self._plan.breeding and number % _EVERY == _EVERY - 1:
            yield from self._neighbours(population, _STEPS[number // _EVERY % len(_STEPS)])
        while True:
            if number == 0 or not population or not self._plan.breeding:
                yield Metric("", self._variation.random_expression(), self._random_group())
            else:
                parents = [tournament(population, self._rng) for _ in range(_PARENTS)]
                first = parents[0]
                child = self._variation.vary(*(parent.expression for parent in parents))
                regrouped = len(self._plan.groups) > 1 and self._rng.random() < _REGROUPED
                yield Metric("", child, self._random_group() if regrouped else first.metric.granularity)

    def _neighbours(self, population: Sequence[Individual], factor: float) -> Iterator[Metric]:
        for individual in by_merit(population)[:_REFINED]:
            best = individual.expression
            for expression in chain(neighbours(best, factor), weighted(best, factor - 1, self._plan.operands)):
                if self._allows(expression) and is_sensible(expression):
                    yield Metric("", expression, individual.metric.granularity)

    def _random_group(self) -> Granularity:
        return self._rng.choice(self._plan.groups)

    def _allows(self, expression: Expression) -> bool:
        """Whether a formula stays inside the space that is searched."""
        return not foreign_to(self._plan, expression) and not any(
            nests(expression, *pair) for pair in self._plan.forbidden
        )

    def _simplified(self, metric: Metric, exact: bool) -> Draw:
        """Simplification shortens what is bred from, unless it leaves the space that is searched.

        Constants are rounded, but for those of a start metric, which is measured to the digit.
        """
        expression, group = metric.expression, metric.granularity
        simple = canonical(expression)
        ranked = rank_form(simple, self._plan.ranks if group == "row" else "layer")
        key = _rounded(ranked)
        usable = (one for one in (ranked if exact else key, simple) if "W" in one.operands and self._allows(one))
        layers = (expression, cancel_opposites(expression), simple, key, next(usable, expression))
        return Draw(*(spelled(layer, group) for layer in layers))


def _rounded(expression: Expression) -> Expression:
    """Constants with few digits; but none becomes a whole number, since an odd power would give W back its sign."""
    short = (float(f"{one:.{_DIGITS}g}") if isinstance(one, float) else one for one in expression.tokens)
    pairs = zip(short, expression.tokens, strict=True)
    return Expression(tuple(long if isinstance(one, float) and one.is_integer() else one for one, long in pairs))
