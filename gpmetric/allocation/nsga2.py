"""NSGA-II over allocations: the front between sparsity and loss, all of it for about the price of one sparsity.

Three things make it cheap. The first candidates are no noise, but published rules at every sparsity. Those of a
generation are compared on common windows: few for all, more for the better half, more in later rounds, when survivors
are measured again. And one backward pass over a parent tells what a change of any gene would cost: most children are
made of switches that pay by it.

Source: Deb et al. 2002 (NSGA-II); the level switch is EvoPress's (Sieberling et al. 2025).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from deap import base, tools

from gpmetric.allocation.archive import BARREN, RADIUS, Archive, Budget, Candidate
from gpmetric.allocation.levels import Ladder, Levels
from gpmetric.allocation.variation import crossover, guided_switches, repair, switch
from gpmetric.pareto import pareto_front

__all__ = ["REFERENCE", "Settings", "evolve", "front", "hypervolume"]

REFERENCE = 2.0  # objective of the reference point of the hypervolume, in nats per prediction; its sparsity is 0

# (share of the budget at which it ends, 1/part of the windows that it measures on)
_ROUNDS = ((0.35, 4), (0.7, 2), (1.0, 1))
_SCREEN = 4  # of a round's windows, all children are measured on 1/_SCREEN, the better half on all
_SLOPED = 2  # slopes are taken on 1/_SLOPED of a round's windows
_LEAST = 0.2  # of a generation, which the last one may be cut down to for what is left of the budget
_GUIDED = 8  # parents per generation whose slopes are taken
_RADII = (4, 8, RADIUS)  # levels that a child of slopes may be away: one child each
_CROSSED, _SHIFTED = 0.7, 0.35  # of the other children: have two parents; change their sparsity, the others switch
_SHIFT = 0.02  # standard deviation of a change of sparsity
_DRAWN = 6  # parents, of which the nearest to the focus is taken
_NEIGHBOURS = 8  # in sparsity, among which the second parent is


class _Fitness(base.Fitness):
    weights = (-1.0, -1.0)  # logarithm of the objective, negated sparsity


@dataclass(frozen=True)
class Settings:
    """How to search.

    Attributes:
        population: survivors of a generation, and children besides those of slopes.
        lowest, highest: sparsities of the front.
        focus: sparsity that is to be picked, if one is.
        attention: share of the parents that are taken near it.
    """

    population: int = 24
    lowest: float = 0.4
    highest: float = 0.8
    focus: float | None = None
    attention: float = 0.5


class _Individual:
    def __init__(self, candidate: Candidate, batches: int) -> None:
        self.candidate = candidate
        self.fitness = _Fitness((candidate.log(batches), -candidate.sparsity))


def evolve(
    archive: Archive,
    first: Iterable[Levels],
    settings: Settings,
    budget: Budget,
    rng: random.Random,
    on_generation: Callable[[int, Sequence[Candidate], int, float], None] = lambda *told: None,
) -> list[Candidate]:
    """The front of all that was measured on all windows when the budget is spent, the least sparse first.

    Args:
        archive: measures candidates.
        first: candidates to begin with.
        settings: how to search.
        budget: when to end. The first candidates are measured whatever it is; a generation that would not fit is cut
            down or not begun.
        rng: source of everything random.
        on_generation: called with its number, the population, the batches that it is measured on, and the share of
            the budget that was spent when it began.
    """
    population = [archive.measure(levels, 1) for levels in dict.fromkeys(first)]
    generation = 0
    for end, part in _ROUNDS:
        batches = max(1, archive.batches // part)
        population = _survivors(archive, population, batches, settings.population)
        barren, size, before = 0, 1.0, None  # generations in a row; of a whole generation
        while barren < BARREN:
            spent = archive.spent(budget)
            share = 0.0 if before is None else (spent - before) / size  # of the budget, what a whole one takes
            before = spent
            size = min(1.0, (end - spent) / share) if share > 0 else 1.0
            if spent >= end or size < (_LEAST if end == 1 else 1):
                break
            room = None if budget.evaluations is None else budget.evaluations - archive.evaluations
            children = _bred(archive, population, batches, settings, rng, size, room)
            barren = 0 if children else barren + 1
            population = _survivors(archive, [*population, *children], batches, settings.population)
            on_generation(generation, population, batches, spent)
            generation += 1
    for one in population:
        archive.measure(one.levels, archive.batches)
    low, high = settings.lowest - _SHIFT, settings.highest + _SHIFT
    whole = [one for one in archive.candidates.values() if len(one.values) == archive.batches]
    return front((one for one in whole if low <= one.sparsity <= high), archive.batches)


def front(candidates: Iterable[Candidate], batches: int) -> list[Candidate]:
    """Those that no other beats in objective and sparsity, the least sparse first."""
    known = list(candidates)
    chosen = pareto_front([(one.log(batches), -one.sparsity) for one in known])
    return sorted((known[index] for index in chosen), key=lambda one: one.sparsity)


def hypervolume(candidates: Iterable[Candidate], batches: int) -> float:
    """Area between the front and the reference point (objective REFERENCE, sparsity 0), in nats per prediction."""
    area, reached = 0.0, 0.0
    for one in front(candidates, batches):
        area += max(0.0, REFERENCE - one.value(batches)) * (one.sparsity - reached)
        reached = one.sparsity
    return area


def _survivors(archive: Archive, candidates: Iterable[Candidate], batches: int, count: int) -> list[Candidate]:
    """The survivors of NSGA-II, measured on so many batches."""
    distinct = dict.fromkeys(one.levels for one in candidates)
    individuals = [_Individual(archive.measure(levels, batches), batches) for levels in sorted(distinct)]
    if len(individuals) > count:
        individuals = tools.selNSGA2(individuals, count, nd="log")
    return [one.candidate for one in individuals]


def _bred(
    archive: Archive,
    population: Sequence[Candidate],
    batches: int,
    settings: Settings,
    rng: random.Random,
    size: float,
    room: int | None,
) -> list[Candidate]:
    """At most `room` children never measured before, the better half of a first comparison on few windows.

    Args:
        size: of the generation, 1 for a whole one.
    """
    ladder = archive.ladder
    parents = [_Individual(one, batches) for one in population]
    children: dict[Levels, None] = {}
    for _ in range(round(size * _GUIDED)):
        parent = _parent(parents, settings, rng)
        slopes = archive.slopes(parent.levels, max(1, batches // _SLOPED))
        for radius in _RADII:
            child = guided_switches(parent.levels, slopes, radius, rng)
            removed = (
                _shifted(ladder, parent, settings, rng) if rng.random() < _SHIFTED else ladder.removes(parent.levels)
            )
            children[repair(ladder, child, removed, rng)] = None
    for _ in range(round(size * settings.population)):
        parent = _parent(parents, settings, rng)
        levels, removed = parent.levels, ladder.removes(parent.levels)
        if rng.random() < _CROSSED:
            near = sorted(population, key=lambda one: (abs(one.sparsity - parent.sparsity), one.levels))
            levels = crossover(levels, rng.choice(near[: _NEIGHBOURS + 1]).levels, rng)
        if rng.random() < _SHIFTED:
            removed = _shifted(ladder, parent, settings, rng)
        else:
            levels = switch(ladder, levels, rng)
        children[repair(ladder, levels, removed, rng)] = None
    new = sorted([levels for levels in children if levels not in archive.candidates][:room])
    few = max(1, batches // _SCREEN)
    screened = [archive.measure(levels, few) for levels in new]
    return _better_half(screened, front(population, few), few)


def _parent(parents: Sequence[_Individual], settings: Settings, rng: random.Random) -> Candidate:
    """The winner of a tournament of two, or the nearest of a few to the sparsity that is to be picked."""
    focus = settings.focus
    if focus is not None and rng.random() < settings.attention:
        drawn = rng.sample(parents, min(_DRAWN, len(parents)))
        return min(drawn, key=lambda one: abs(one.candidate.sparsity - focus)).candidate
    first, second = rng.choice(parents), rng.choice(parents)
    return (second if second.fitness.dominates(first.fitness) else first).candidate


def _shifted(ladder: Ladder, parent: Candidate, settings: Settings, rng: random.Random) -> int:
    """Weights to remove at a sparsity near the parent's, within the range of the front."""
    sparsity = min(settings.highest, max(settings.lowest, parent.sparsity + rng.gauss(0, _SHIFT)))
    return int(ladder.entries * sparsity)


def _better_half(children: Sequence[Candidate], known: Sequence[Candidate], batches: int) -> list[Candidate]:
    """By how far they are below or above the front that is known at their sparsity."""
    expected = np.interp(
        [one.sparsity for one in children], [one.sparsity for one in known], [one.log(batches) for one in known]
    )
    beyond = [one.log(batches) - level for one, level in zip(children, expected, strict=True)]
    order = np.argsort(beyond, kind="stable")
    return [children[index] for index in order[: -(-len(children) // 2)]]
