"""What a generation consists of: start formulas, random ones, children and neighbours, simplified layer by layer."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from gpmetric.evolution.grammar import foreign_to, is_sensible
from gpmetric.evolution.refinement import neighbours, weighted
from gpmetric.evolution.search_config import SearchConfig, named
from gpmetric.evolution.selection import Individual, by_merit, tournament
from gpmetric.evolution.variation import Variation
from gpmetric.expression import Expression
from gpmetric.expression.canonical import cancel_opposites, canonical
from gpmetric.expression.rank import rank_form
from gpmetric.metrics import Metric, spelled
from gpmetric.targets import GRANULARITIES

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
    """One drawn metric, and what is left of its formula after each layer of simplification.

    Attributes:
        metric: as it was drawn.
        opposites, canonical, ranked: its formula once opposite operations cancel, in sympy's canonical form, and
            without what changes no order of scores in its comparison group.
        form: what is evaluated and bred from.
    """

    metric: Metric
    opposites: Expression
    canonical: Expression
    ranked: Expression
    form: Metric

    @cached_property
    def key(self) -> str:
        """What draws of one order of scores have in common."""
        return self.spelled(self.ranked)

    def spelled(self, expression: Expression) -> str:
        """A simplified formula with the comparison group of the draw."""
        return spelled(expression, self.metric.granularity)


class Breeder:
    """Draws the candidates of generations; all randomness is the campaign's generator."""

    def __init__(self, config: SearchConfig, rng: random.Random) -> None:
        self._config = config
        self._rng = rng
        self._variation = Variation(config.operands, config.primitives, config.max_nodes, rng, config.forbidden)

    def draw(self, number: int, population: Sequence[Individual], seen: Collection[str]) -> Iterator[Draw]:
        """The draws of a generation, each made when it is asked for.

        They end when there are `config.population` ranked forms that are not in `seen`, or far too many draws. Every
        start formula is drawn, however many there are.
        """
        least = len(self._config.start) if number == 0 else 0
        new: set[str] = set()
        for count, metric in enumerate(self._sources(number, population), start=1):
            draw = self._simplified(metric, exact=count <= least)
            yield draw
            if draw.key not in seen:
                new.add(draw.key)
            full = len(new) >= self._config.population or count >= _DRAWS_PER_PLACE * self._config.population
            if full and count >= least:
                break

    def _sources(self, number: int, population: Sequence[Individual]) -> Iterator[Metric]:
        """The start metrics and random ones at first, neighbours of the best and children of the population later."""
        if number == 0:
            yield from self._config.start
        if self._config.breeding and number % _EVERY == _EVERY - 1:
            yield from self._neighbours(population, _STEPS[number // _EVERY % len(_STEPS)])
        while True:
            if number == 0 or not population or not self._config.breeding:
                yield named(self._variation.random_expression(), self._rng.choice(self._config.groups))
            else:
                parents = [tournament(population, self._rng) for _ in range(_PARENTS)]
                child = self._variation.vary(*(parent.expression for parent in parents))
                regrouped = len(self._config.groups) > 1 and self._rng.random() < _REGROUPED
                group = self._rng.choice(self._config.groups) if regrouped else parents[0].metric.granularity
                yield named(child, group)

    def _neighbours(self, population: Sequence[Individual], factor: float) -> Iterator[Metric]:
        for individual in by_merit(population)[:_REFINED]:
            best = individual.expression
            for expression in chain(neighbours(best, factor), weighted(best, factor - 1, self._config.operands)):
                if not foreign_to(self._config, expression) and is_sensible(expression):
                    yield named(expression, individual.metric.granularity)

    def _simplified(self, metric: Metric, exact: bool) -> Draw:
        """Simplification shortens what is bred from, unless it leaves the space that is searched.

        Constants are rounded, but for those of a start metric, which is measured to the digit.
        """
        expression, group = metric.expression, metric.granularity
        simple = canonical(expression)
        ranked = rank_form(simple, "layer" if GRANULARITIES[group].across_rows else self._config.rank_group)
        key = _rounded(ranked)
        forms = (ranked if exact else key, simple)
        usable = (one for one in forms if "W" in one.operands and not foreign_to(self._config, one))
        form = named(next(usable, expression), group)
        return Draw(named(expression, group), cancel_opposites(expression), simple, key, form)


def _rounded(expression: Expression) -> Expression:
    """Constants with few digits; but none becomes a whole number, since an odd power would give W back its sign."""
    short = (float(f"{one:.{_DIGITS}g}") if isinstance(one, float) else one for one in expression.tokens)
    pairs = zip(short, expression.tokens, strict=True)
    return Expression(tuple(long if isinstance(one, float) and one.is_integer() else one for one, long in pairs))
