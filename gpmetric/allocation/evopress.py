"""EvoPress: a (1 + lambda) search of one sparsity by level switches."""

from __future__ import annotations

import random
from collections.abc import Sequence

from gpmetric.allocation.allocators import OnGeneration, Problem, uniform
from gpmetric.allocation.evaluation_log import BARREN
from gpmetric.allocation.levels import Levels
from gpmetric.allocation.request import AllocateRequest
from gpmetric.allocation.variation import repair, switch
from gpmetric.pruning.allocation import Allocation

__all__ = ["search_sparsity"]

_OFFSPRING = 16
_STAGES = ((2, 4), (2, 2), (1, 1))  # (survivors, 1/part of the windows they are compared on)
_JUMPS = (4, 8)  # levels that a switch moves: 2 to 3 % of the largest matrix, as in the published grid


def search_sparsity(
    problem: Problem, request: AllocateRequest, profiles: Sequence[Allocation], on_generation: OnGeneration
) -> list[Levels]:
    """The best candidate at one sparsity, from the uniform allocation on, offspring halved on ever more windows.

    All offspring of a generation are compared on the same windows, the parent with the last of them.

    Source: Sieberling et al. 2025 (EvoPress), algorithm 1; 16 offspring and a quarter, half and all of the windows,
    since at the few million tokens of a small model their 64 offspring would see ten generations.
    """
    assert request.sparsity is not None
    log, table, rng = problem.log, problem.table, random.Random(request.seed)
    parent = log.measure(uniform(problem, request.sparsity), log.batches)
    removed = problem.budget(request.sparsity)
    barren = 0
    while (spent := log.spent(request.budget)) < 1 and barren < BARREN:
        problem.searched(spent)
        before = log.evaluations
        drawn = [repair(table, switch(table, parent.levels, rng, _JUMPS), removed, rng) for _ in range(_OFFSPRING)]
        rest = list(dict.fromkeys(levels for levels in drawn if levels != parent.levels))
        for survivors, part in _STAGES:
            batches = max(1, log.batches // part)
            measured = list(log.measure_all(rest, batches))
            measured += [parent] if survivors == 1 else []
            measured.sort(key=lambda one: one.value(batches))
            rest = [one.levels for one in measured[:survivors]]
        parent = log.measure(rest[0], log.batches)
        barren = 0 if log.evaluations > before else barren + 1
    return [parent.levels]
