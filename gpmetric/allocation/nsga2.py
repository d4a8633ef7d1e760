"""NSGA-II over allocations: the front between sparsity and loss, all of it for about the price of one sparsity.

Three things make it cheap. The first candidates are no noise, but published rules at every sparsity. Those of a
generation are compared on common windows: few for all, more for the better half, more in later rounds, when survivors
are measured again. And one backward pass over a parent tells what a change of any gene would cost: most children are
made of switches that pay by it.

Source: Deb et al. 2002 (NSGA-II); the level switch is EvoPress's (Sieberling et al. 2025).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from deap import base, tools

from gpmetric.allocation.allocators import OnGeneration, Problem, diagonal, uniform
from gpmetric.allocation.evaluation_log import BACKWARD, BARREN, RADIUS, EvaluationLog, Measured
from gpmetric.allocation.levels import Levels, LevelTable
from gpmetric.allocation.profile_transfer import transferred
from gpmetric.allocation.request import AllocateRequest
from gpmetric.allocation.search_budget import Budget
from gpmetric.allocation.variation import crossover, guided_switches, repair, switch
from gpmetric.pareto import pareto_front
from gpmetric.pruning.allocation import Allocation

__all__ = ["REFERENCE", "FrontSettings", "evolve", "front", "hypervolume", "search_front"]

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
_ATTENTION, _DRAWN = 0.5, 6  # share of the parents taken near the focus: the nearest of so many
_BEGUN = 0.5  # share of the minutes that the first candidates may take
_NEIGHBOURS = 8  # in sparsity, among which the second parent is


class _Fitness(base.Fitness):  # type: ignore[misc]
    weights = (-1.0, -1.0)  # logarithm of the objective, negated sparsity


@dataclass(frozen=True)
class FrontSettings:
    """How to search."""

    population: int = 24  # survivors of a generation, and children besides those of slopes
    lowest: float = 0.4  # sparsity of the front
    highest: float = 0.8
    focus: float | None = None  # sparsity that is to be picked, if one is; half of the parents are taken near it


class _Individual:
    def __init__(self, candidate: Measured, batches: int) -> None:
        self.candidate = candidate
        self.fitness = _Fitness((candidate.log(batches), -candidate.sparsity))


def search_front(
    problem: Problem, request: AllocateRequest, profiles: Sequence[Allocation], on_generation: OnGeneration
) -> list[Levels]:
    """The candidates of the front, the least sparse first; arguments as of `search`."""
    focus = problem.log.focus
    sparsities = diagonal(request, focus)
    first = _first_candidates(problem, request, profiles, sparsities)
    settings = FrontSettings(request.population, min(sparsities), max(sparsities), focus)
    rng = random.Random(request.seed)
    return [one.levels for one in evolve(problem.log, first, settings, request.budget, rng, on_generation)]


def _first_candidates(
    problem: Problem, request: AllocateRequest, profiles: Sequence[Allocation], sparsities: Sequence[float]
) -> list[Levels]:
    """Every rule at every sparsity; of rules that measure candidates, and of profiles, one shape that is shifted."""
    table, focus = problem.table, problem.log.focus
    centre = (request.lowest + request.highest) / 2 if focus is None else focus
    affordable = {"nothing", "genes"} if _affords_probes(problem, request.budget, sparsities) else {"nothing"}
    first, shapes = [], []
    starting = [row for row in problem.rules.values() if row.starts_masks or problem.solves]
    for row in starting:
        assert row.rule is not None
        if row.measures in affordable:
            first += [row.rule(problem, sparsity) for sparsity in sparsities]
    for row in starting:
        if row.rule is not None and row.measures == "candidates":
            shapes.append(table.profile(row.rule(problem, centre)))
    shapes += [transferred(profile, table, len(problem.evidence.outliers)) for profile in profiles]
    for shape in map(np.array, shapes):
        shifts = [sparsity - np.average(shape, weights=table.sizes) for sparsity in sparsities]
        first += [problem.at_budget(shape + shift, one) for shift, one in zip(shifts, sparsities, strict=True)]
    return first


def _affords_probes(problem: Problem, budget: Budget, sparsities: Sequence[float]) -> bool:
    """Whether the probes of every gene alone take at most half of the budget, minutes as uniform candidates take."""
    log = problem.log
    evaluations, tokens = problem.cost_of_probes()
    minutes = 0.0
    if budget.minutes is not None:
        list(log.measure_all([uniform(problem, sparsity) for sparsity in sparsities], 1))
        minutes = log.spent(Budget(minutes=1)) * tokens / log.tokens
    limits = ((evaluations, budget.evaluations), (tokens, budget.tokens), (minutes, budget.minutes))
    return all(limit is None or 2 * cost <= limit for cost, limit in limits)


def evolve(
    log: EvaluationLog,
    first: Iterable[Levels],
    settings: FrontSettings,
    budget: Budget,
    rng: random.Random,
    on_generation: OnGeneration = lambda *told: None,
) -> list[Measured]:
    """The front of all that was measured on all windows when the budget is spent, the least sparse first.

    Args:
        first: candidates to begin with.
        budget: when to end. A generation that would not fit is cut down or not begun. The first candidates are
            measured whatever it is, but for minutes: of these, as many as they allow for, and two at least.
        on_generation: called with its number, the population, the batches that it is measured on, and the share of
            the budget that was spent when it began.
    """
    begun = list(dict.fromkeys(first))
    population = list(log.measure_all(begun[: _affordable(log, budget, begun, 1, _BEGUN)], 1))
    generation = 0
    for end, part in _ROUNDS:
        batches = max(1, log.batches // part)
        levels = [one.levels for one in population]
        if _affordable(log, budget, levels, batches) < len(population):
            break
        population = _survivors(log, population, batches, settings.population)
        barren, size, before = 0, 1.0, None  # generations in a row; of a whole generation
        while barren < BARREN:
            spent = log.spent(budget)
            # of the budget, what a whole one takes
            share = _first_share(log, budget, settings, batches) if before is None else (spent - before) / size
            before = spent
            size = min(1.0, (end - spent) / share) if share > 0 else 1.0
            if spent >= end or size < (_LEAST if end == 1 else 1):
                break
            room = None if budget.evaluations is None else budget.evaluations - log.evaluations
            children = _bred(log, population, batches, settings, rng, size, room)
            barren = 0 if children else barren + 1
            population = _survivors(log, [*population, *children], batches, settings.population)
            on_generation(generation, population, batches, spent)
            generation += 1
    last = [one.levels for one in sorted(population, key=lambda one: one.sparsity)]
    count = _affordable(log, budget, last, log.batches)
    evenly = {round(place * (len(last) - 1) / (count - 1)) for place in range(count)} if count > 1 else {0}
    list(log.measure_all([last[place] for place in sorted(evenly)], log.batches))
    low, high = settings.lowest - _SHIFT, settings.highest + _SHIFT
    whole = [one for one in log.candidates.values() if len(one.values) == log.batches]
    return front((one for one in whole if low <= one.sparsity <= high), log.batches)


def _affordable(
    log: EvaluationLog, budget: Budget, candidates: Sequence[Levels], batches: int, share: float = 1.0
) -> int:
    """How many of these the minutes up to a share of the budget allow to be measured on so many batches, two at least.

    By what a token has taken so far; where none was measured, the minutes say nothing yet.
    """
    least = min(2, len(candidates))
    if budget.minutes is None or not log.tokens:
        return len(candidates)
    spent, tokens = log.spent(Budget(minutes=budget.minutes)), log.tokens  # before what is measured next
    allowed = (share - spent) * tokens / max(spent, 1e-9)
    known = (log.candidates.get(levels) for levels in candidates)
    costs = [max(0, log.tokens_of(batches) - log.tokens_of(0 if one is None else len(one.values))) for one in known]
    within = sum(total <= allowed for total in accumulate(costs))
    return max(least, within)


def _first_share(log: EvaluationLog, budget: Budget, settings: FrontSettings, batches: int) -> float:
    """What a whole generation takes of the minutes, by what a token has taken so far; 0 where there are none."""
    if budget.minutes is None or not log.tokens:
        return 0.0
    few, sloped = (log.tokens_of(max(1, batches // part)) for part in (_SCREEN, _SLOPED))
    children = _GUIDED * len(_RADII) + settings.population
    tokens = children * (few + log.tokens_of(batches)) / 2 + _GUIDED * BACKWARD * sloped
    return tokens * log.spent(Budget(minutes=budget.minutes)) / log.tokens


def front(candidates: Iterable[Measured], batches: int) -> list[Measured]:
    """Those that no other beats in objective and sparsity, the least sparse first."""
    known = list(candidates)
    chosen = pareto_front([(one.log(batches), -one.sparsity) for one in known])
    return sorted((known[index] for index in chosen), key=lambda one: one.sparsity)


def hypervolume(candidates: Iterable[Measured], batches: int) -> float:
    """Area between the front and the reference point (objective REFERENCE, sparsity 0), in nats per prediction."""
    area, reached = 0.0, 0.0
    for one in front(candidates, batches):
        area += max(0.0, REFERENCE - one.value(batches)) * (one.sparsity - reached)
        reached = one.sparsity
    return area


def _survivors(log: EvaluationLog, candidates: Iterable[Measured], batches: int, count: int) -> list[Measured]:
    """The survivors of NSGA-II, measured on so many batches."""
    distinct = sorted({one.levels for one in candidates})
    individuals = [_Individual(one, batches) for one in log.measure_all(distinct, batches)]
    if len(individuals) > count:
        individuals = tools.selNSGA2(individuals, count, nd="log")
    return [one.candidate for one in individuals]


def _bred(
    log: EvaluationLog,
    population: Sequence[Measured],
    batches: int,
    settings: FrontSettings,
    rng: random.Random,
    size: float,
    room: int | None,
) -> list[Measured]:
    """At most `room` children never measured before, the better half of a first comparison on few windows.

    A whole generation has `size` 1.
    """
    table = log.table
    parents = [_Individual(one, batches) for one in population]
    children: dict[Levels, None] = {}
    for _ in range(round(size * _GUIDED)):
        parent = _parent(parents, settings, rng)
        slopes = log.slopes(parent.levels, max(1, batches // _SLOPED))
        for radius in map(table.scaled, _RADII):
            child = guided_switches(parent.levels, slopes, radius, rng)
            removed = (
                _shifted(table, parent, settings, rng) if rng.random() < _SHIFTED else table.removes(parent.levels)
            )
            children[repair(table, child, removed, rng)] = None
    for _ in range(round(size * settings.population)):
        parent = _parent(parents, settings, rng)
        levels, removed = parent.levels, table.removes(parent.levels)
        if rng.random() < _CROSSED:
            near = sorted(population, key=lambda one: (abs(one.sparsity - parent.sparsity), one.levels))
            levels = crossover(levels, rng.choice(near[: _NEIGHBOURS + 1]).levels, rng)
        if rng.random() < _SHIFTED:
            removed = _shifted(table, parent, settings, rng)
        else:
            levels = switch(table, levels, rng)
        children[repair(table, levels, removed, rng)] = None
    new = sorted([levels for levels in children if levels not in log.candidates][:room])
    few = max(1, batches // _SCREEN)
    screened = list(log.measure_all(new, few))
    return _better_half(screened, front(population, few), few)


def _parent(parents: Sequence[_Individual], settings: FrontSettings, rng: random.Random) -> Measured:
    """The winner of a tournament of two, or the nearest of a few to the sparsity that is to be picked."""
    focus = settings.focus
    if focus is not None and rng.random() < _ATTENTION:
        drawn = rng.sample(parents, min(_DRAWN, len(parents)))
        return min(drawn, key=lambda one: abs(one.candidate.sparsity - focus)).candidate
    first, second = rng.choice(parents), rng.choice(parents)
    return (second if second.fitness.dominates(first.fitness) else first).candidate


def _shifted(table: LevelTable, parent: Measured, settings: FrontSettings, rng: random.Random) -> int:
    """Weights to remove at a sparsity near the parent's, within the range of the front."""
    sparsity = min(settings.highest, max(settings.lowest, parent.sparsity + rng.gauss(0, _SHIFT)))
    return int(table.entries * sparsity)


def _better_half(children: Sequence[Measured], known: Sequence[Measured], batches: int) -> list[Measured]:
    """By how far they are below or above the front that is known at their sparsity."""
    expected = np.interp(
        [one.sparsity for one in children], [one.sparsity for one in known], [one.log(batches) for one in known]
    )
    beyond = [one.log(batches) - level for one, level in zip(children, expected, strict=True)]
    order = np.argsort(beyond, kind="stable")
    return [children[index] for index in order[: -(-len(children) // 2)]]
