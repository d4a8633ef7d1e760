"""Variation of candidates: level switches that keep the budget, blind or guided, crossover, repair of a budget."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from gpmetric.allocation.levels import Levels, LevelTable, Numbers

__all__ = ["STEPS", "crossover", "guided_switches", "repair", "switch"]

STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24)  # levels that a switch moves from one gene to another
_SWITCHES = 3  # at most, in one mutation
_ATTEMPTS = 300  # switches proposed to the slopes


def switch(table: LevelTable, levels: Levels, rng: random.Random, steps: Sequence[int] = STEPS) -> Levels:
    """A few times, as many levels up in one gene as down in another.

    Source: Sieberling et al. 2025 (EvoPress), section 4; their level is a step of one size.
    """
    changed = list(levels)
    if len(changed) < 2:
        return levels
    for _ in range(min(rng.randint(1, _SWITCHES), rng.randint(1, _SWITCHES))):
        up, down = rng.sample(range(len(changed)), 2)
        step = min(table.scaled(rng.choice(steps)), len(table.removed[up]) - 1 - changed[up], changed[down])
        changed[up] += step
        changed[down] -= step
    return tuple(changed)


def guided_switches(levels: Levels, slopes: Sequence[Numbers], radius: int, rng: random.Random) -> Levels:
    """Random switches, those kept of which the slopes say that they pay, no gene going further than `radius` levels."""
    changed = list(levels)
    if len(changed) < 2:
        return levels
    steps = [step for step in STEPS if step <= radius]
    for _ in range(_ATTEMPTS):
        step = rng.choice(steps)
        up, down = rng.sample(range(len(changed)), 2)
        above, below = changed[up] + step, changed[down] - step
        if above >= len(slopes[up]) or below < 0 or above > levels[up] + radius or below < levels[down] - radius:
            continue
        if slopes[up][above] - slopes[up][changed[up]] + slopes[down][below] - slopes[down][changed[down]] < 0:
            changed[up], changed[down] = above, below
    return tuple(changed)


def crossover(first: Levels, second: Levels, rng: random.Random) -> Levels:
    """Each gene from one parent or the other."""
    return tuple(rng.choice(pair) for pair in zip(first, second, strict=True))


def repair(table: LevelTable, levels: Levels, removed: int, rng: random.Random) -> Levels:
    """Single levels up or down in random genes, until no such step brings a candidate nearer to `removed` weights."""
    changed = list(levels)
    gap = removed - table.removes(changed)
    genes = list(range(len(changed)))
    while True:
        rng.shuffle(genes)
        moved = False
        for gene in genes:
            level = changed[gene] + (1 if gap > 0 else -1)
            counts = table.removed[gene]
            if not 0 <= level < len(counts):
                continue
            step = int(counts[level] - counts[changed[gene]])
            if abs(gap - step) < abs(gap) or (step == 0 and gap != 0 and _further(counts, changed[gene], gap)):
                changed[gene], gap, moved = level, gap - step, True
        if not moved:
            return tuple(changed)


def _further(counts: Numbers, level: int, gap: int) -> bool:
    """Whether levels beyond equal ones would bring a gene nearer to the budget."""
    beyond = counts[level:] if gap > 0 else counts[: level + 1][::-1]
    steps = np.abs(beyond.astype(np.int64) - int(counts[level]))
    different = steps[steps > 0]
    return bool(different.size) and abs(abs(gap) - int(different[0])) < abs(gap)
