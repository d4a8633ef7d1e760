"""Named allocators: from a mean sparsity to the level of every gene, all at the budget of a uniform mask."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from gpmetric.allocation.archive import BARREN, Archive, Budget
from gpmetric.allocation.levels import Ladder, Levels
from gpmetric.allocation.request import Allocator
from gpmetric.allocation.variation import repair, switch
from gpmetric.models import Model

__all__ = ["RULES", "Problem", "arithmetic", "evopress", "outlier_shares", "owl", "sensitivity", "uniform"]

_OUTLIER, _SPREAD = 5.0, 0.08  # OWL's M and lambda
_STEPS = 9  # of an arithmetic progression that are tried, 0 among them
_PROBES = (0.4, 0.6, 0.8, 0.95)  # sparsities that a gene is probed at, the others dense
_HIGHEST = 0.99  # sparsity of a gene that a rule may ask for

_OFFSPRING = 16
_STAGES = ((2, 4), (2, 2), (1, 1))  # (survivors, 1/part of the windows they are compared on)
_JUMPS = (4, 8)  # levels that a switch moves: 2 to 3 % of the largest matrix, as in the published grid


@dataclass(frozen=True)
class Problem:
    """What an allocator works with.

    Attributes:
        archive: measures candidates, and knows the ladder.
        blocks: by gene, the block it is in.
        outliers: by block, OWL's outlier share in per cent.
        budget: from a sparsity to the weights that the uniform mask of the same granularity removes.
        progress: is told what has come how far: (what, done, total).
    """

    archive: Archive
    blocks: Sequence[int]
    outliers: Sequence[float]
    budget: Callable[[float], int]
    progress: Callable[[str, int, int], None] = lambda *told: None

    @property
    def ladder(self) -> Ladder:
        return self.archive.ladder

    def at_budget(self, sparsities: Sequence[float] | np.ndarray, sparsity: float) -> Levels:
        """The candidate nearest to the sparsities of its genes, all shifted alike, at the budget of a mean sparsity."""
        shifted = np.asarray(sparsities) + sparsity - np.average(sparsities, weights=self.ladder.sizes)
        levels = self.ladder.nearest(np.clip(shifted, 0.0, _HIGHEST).tolist())
        return repair(self.ladder, levels, self.budget(sparsity), random.Random(0))

    def cost_of_probes(self) -> tuple[int, int]:
        """Evaluations and tokens that `costs` takes."""
        evaluations = len(_PROBES) * len(self.ladder.genes)
        return evaluations, evaluations * self.archive.tokens_of(self.probe_batches)

    @property
    def probe_batches(self) -> int:
        """Batches that a gene alone is measured on."""
        return max(1, self.archive.batches // 4)

    @cached_property
    def costs(self) -> list[np.ndarray]:
        """By gene, what each of its levels costs with the others dense, in nats per prediction, interpolated."""
        dense = tuple(0 for _ in self.ladder.genes)
        batches = self.probe_batches
        found = []
        for gene, (table, size) in enumerate(zip(self.ladder.removed, self.ladder.sizes, strict=True)):
            probed = sorted({int(np.abs(table - share * size).argmin()) for share in _PROBES})
            values = [
                self.archive.measure((*dense[:gene], level, *dense[gene + 1 :]), batches).value(batches)
                for level in probed
            ]
            costs = np.interp(table, [0, *table[probed]], [0.0, *np.maximum.accumulate(values)])
            beyond = table > table[probed[-1]]
            costs[beyond] = np.inf  # never measured
            found.append(costs)
            self.progress("genes alone", gene + 1, len(self.ladder.genes))
        return found


def uniform(problem: Problem, sparsity: float) -> Levels:
    """Every gene at the mean sparsity."""
    return problem.at_budget([sparsity] * len(problem.ladder.genes), sparsity)


def owl(problem: Problem, sparsity: float) -> Levels:
    """Blocks with more outliers keep more, within 2 lambda.

    Source: Yin et al. 2024 (OWL), section 3; the shares of all linear layers of a block together, as in their code.
    """
    present = sorted(set(problem.blocks))  # others have no layer that is pruned
    shares = np.asarray([problem.outliers[block] for block in present])
    spread = float(np.ptp(shares))
    keep = 2 * _SPREAD * (shares - shares.min()) / spread if spread else np.zeros(len(shares))
    by_block = dict(zip(present, sparsity - (keep - keep.mean()), strict=True))
    return problem.at_budget([by_block[block] for block in problem.blocks], sparsity)


def arithmetic(problem: Problem, sparsity: float) -> Levels:
    """Sparsity that rises from block to block by the step that does best on half of the windows.

    Source: Huang et al. 2025 (ATP), equation 6: the step is at most what keeps all blocks between 0 and 1.
    """
    blocks = np.unique(problem.blocks, return_inverse=True)[1]  # the first block with a layer is 0
    last = int(blocks.max())
    steepest = 2 * min(sparsity, 1 - sparsity) / last if last else 0.0
    tried = [
        problem.at_budget((sparsity + step * (blocks - last / 2)).tolist(), sparsity)
        for step in np.linspace(0, steepest, _STEPS)
    ]
    batches = max(1, problem.archive.batches // 2)
    measured = [problem.archive.measure(levels, batches) for levels in dict.fromkeys(tried)]
    return min(measured, key=lambda one: one.value(batches)).levels


def sensitivity(problem: Problem, sparsity: float) -> Levels:
    """From the dense model on, always the level that costs least per weight, by what each gene costs alone."""
    costs, tables = problem.costs, problem.ladder.removed
    levels = [0] * len(tables)
    removed, budget = 0, problem.budget(sparsity)
    ahead = [_cheapest(cost, table, 0) for cost, table in zip(costs, tables, strict=True)]
    while removed < budget:
        gene = min(range(len(ahead)), key=lambda one: ahead[one][0])
        price, level = ahead[gene]
        if not np.isfinite(price):
            break
        removed += int(tables[gene][level] - tables[gene][levels[gene]])
        levels[gene] = level
        ahead[gene] = _cheapest(costs[gene], tables[gene], level)
    return repair(problem.ladder, tuple(levels), budget, random.Random(0))


def _cheapest(costs: np.ndarray, removed: np.ndarray, level: int) -> tuple[float, int]:
    """The least price per weight of a level above this one, and the lowest level that begins at that price."""
    more = removed[level + 1 :] - removed[level]
    with np.errstate(divide="ignore", invalid="ignore"):
        prices = np.where(more > 0, (costs[level + 1 :] - costs[level]) / more, np.inf)
    if not prices.size:
        return float("inf"), level
    return float(prices.min()), level + 1 + int(prices.argmin())


# rule -> its level of every gene at a mean sparsity
RULES: Mapping[Allocator, Callable[[Problem, float], Levels]] = {
    "uniform": uniform,
    "owl": owl,
    "arithmetic": arithmetic,
    "sensitivity": sensitivity,
}


def evopress(
    problem: Problem,
    sparsity: float,
    budget: Budget,
    rng: random.Random,
) -> Levels:
    """A (1 + lambda) search by level switches from the uniform allocation, offspring halved on ever more windows.

    All offspring of a generation are compared on the same windows, the parent with the last of them.

    Source: Sieberling et al. 2025 (EvoPress), algorithm 1; 16 offspring and a quarter, half and all of the windows,
    since at the few million tokens of a small model their 64 offspring would see ten generations.
    """
    archive = problem.archive
    parent = archive.measure(uniform(problem, sparsity), archive.batches)
    removed = problem.budget(sparsity)
    barren = 0
    while (spent := archive.spent(budget)) < 1 and barren < BARREN:
        problem.progress("search, % of the budget", int(100 * spent), 100)
        before = archive.evaluations
        drawn = [repair(problem.ladder, switch(problem.ladder, parent.levels, rng, _JUMPS), removed, rng)
                 for _ in range(_OFFSPRING)]  # fmt: skip
        rest = list(dict.fromkeys(levels for levels in drawn if levels != parent.levels))
        for survivors, part in _STAGES:
            batches = max(1, archive.batches // part)
            measured = [archive.measure(levels, batches) for levels in rest]
            measured += [parent] if survivors == 1 else []
            measured.sort(key=lambda one: one.value(batches))
            rest = [one.levels for one in measured[:survivors]]
        parent = archive.measure(rest[0], archive.batches)
        barren = 0 if archive.evaluations > before else barren + 1
    return parent.levels


@torch.no_grad()
def outlier_shares(model: Model, norms: Mapping[str, Tensor]) -> list[float]:
    """By block, the share of scores abs(W)*X more than 5 times their mean, in per cent.

    Args:
        norms: X [in] by layer name.
    """
    shares = []
    for block in model.blocks:
        scores = [layer.weight.abs().float() * norms[layer.name] for layer in block.layers]
        entries = sum(score.numel() for score in scores)
        if not entries:
            shares.append(0.0)
            continue
        mean = sum(score.sum(dtype=torch.float64).item() for score in scores) / entries
        shares.append(100 * sum(int((score > _OUTLIER * mean).sum()) for score in scores) / entries)
    return shares
