"""Rules of allocation: from a mean sparsity to the level of every gene, all at the budget of a uniform mask."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gpmetric.allocation.evaluation_log import EvaluationLog, Measured
from gpmetric.allocation.evidence import Evidence, shares_below
from gpmetric.allocation.exact_budget import uniform_budget
from gpmetric.allocation.levels import Levels, LevelTable, Numbers
from gpmetric.allocation.request import ALLOCATORS, AllocateRequest, Allocator, rules
from gpmetric.allocation.variation import repair
from gpmetric.errors import PluginError
from gpmetric.plugins import names_of
from gpmetric.pruning.allocation import Allocation
from gpmetric.session.listeners import Progress

__all__ = [
    "Ground", "OnGeneration", "Problem", "arithmetic", "diagonal", "dlp", "one_threshold", "owl", "search",
    "sensitivity", "uniform",
]  # fmt: skip

_LOG = logging.getLogger(__name__)

# told of a generation: its number, its population, the batches that it is measured on, the share of the budget spent
OnGeneration = Callable[[int, Sequence[Measured], int, float], None]

_DIAGONAL = 5  # sparsities at which the rules stand in the first population, and as baselines beside the front
_OWL_SPREAD, _DLP_SPREAD = 0.08, 0.15  # their lambda and alpha
# Of the way from uniform to one threshold. Excess on 60 windows of ptb-valid of alps with fit dense, 64 windows of 256,
# at 0, 0.25, 0.5, 0.75 and 1: llama-05m 0.347, 0.285, 0.260, 0.285, 0.373 at 0.6 and 0.657, 0.559, 0.570, 0.553, 0.639
# at 0.7; llama-4m 0.066, 0.053, 0.049, 0.047, 0.062 and 0.152, 0.120, 0.125, 0.122, 0.146. Half of the way on another
# score, llama-05m: W*W*H 0.262 and 0.535, W*W*D 0.327 and 0.645, W*W*X*X 0.312 and 0.678 (llama-4m 0.070 and 0.163).
_WAY = 0.5
_STEPS = 9  # of an arithmetic progression that are tried, 0 among them
_PROBES = (0.4, 0.6, 0.8, 0.95)  # sparsities that a gene is probed at, the others dense
_TRIED = 0.5  # sparsity at which a plug-in's rule is tried
_HIGHEST = 0.99  # sparsity of a gene that a rule may ask for


@dataclass(frozen=True)
class Ground:
    """What a rule works with that measures no candidate."""

    table: LevelTable
    blocks: Sequence[int]  # by gene, the block it is in
    evidence: Evidence

    @cached_property
    def rules(self) -> dict[str, Allocator]:
        """Those rules whose statistics are there, the simplest first; of plug-ins, what measures nothing and works."""
        measured = self.evidence.saliency is not None
        known = {name: row for name, row in rules().items() if measured or not row.needs}
        foreign = {name: known[name] for name in names_of("allocator") if name in known}
        return {name: row for name, row in known.items() if name not in foreign or self._works(name, row)}

    def levels_of(self, name: str, row: Allocator, sparsity: float) -> Levels:
        """What a rule gives.

        Raises:
            PluginError: that is no level of every gene.
        """
        assert row.rule is not None
        levels, counts = row.rule(self, sparsity), [len(removed) for removed in self.table.removed]
        if not isinstance(levels, tuple) or len(levels) != len(counts) or not all(map(_is_level, levels, counts)):
            raise PluginError(f"allocator {name} gave no level of each of {len(counts)} genes, but {levels!r:.60}")
        return levels

    def _works(self, name: str, row: Allocator) -> bool:
        """Whether a plug-in's rule can stand beside the others; told where it fails."""
        if row.measures != "nothing":
            return False
        try:
            self.levels_of(name, row, _TRIED)
        except PluginError as error:
            _LOG.warning("%s; it is no baseline here", error)
            return False
        return True

    def budget(self, sparsity: float) -> int:
        """Weights that the uniform mask of that sparsity removes."""
        return uniform_budget(self.table, sparsity)

    def at_budget(self, sparsities: Sequence[float] | Numbers, sparsity: float) -> Levels:
        """The candidate nearest to the sparsities of its genes, all shifted alike, at the budget of a mean sparsity."""
        shifted = np.asarray(sparsities) + sparsity - np.average(sparsities, weights=self.table.sizes)
        levels = self.table.nearest(np.clip(shifted, 0.0, _HIGHEST).tolist())
        return repair(self.table, levels, self.budget(sparsity), random.Random(0))


@dataclass(frozen=True)
class Problem(Ground):
    """What an allocator works with; the levels of a rule that measures no candidate may be others than the log's."""

    log: EvaluationLog
    progress: Progress
    solves: bool = False  # whether kept weights of candidates are updated

    def searched(self, spent: float) -> None:
        """Tells of the share of the search's budget that is spent."""
        self.progress("search, % of the budget", int(100 * min(1.0, spent)), 100)

    def cost_of_probes(self) -> tuple[int, int]:
        """Evaluations and tokens that `costs` takes."""
        evaluations = len(_PROBES) * len(self.table.genes)
        return evaluations, evaluations * self.log.tokens_of(self.probe_batches)

    def tokens_of(self, row: Allocator, sparsities: int) -> int:
        """Tokens that a rule takes at so many sparsities, were nothing measured before."""
        tried = _STEPS * sparsities * self.log.tokens_of(max(1, self.log.batches // 2))
        return {"nothing": 0, "candidates": tried, "genes": self.cost_of_probes()[1]}[row.measures]

    @property
    def probe_batches(self) -> int:
        """Batches that a gene alone is measured on."""
        return max(1, self.log.batches // 4)

    @cached_property
    def costs(self) -> list[Numbers]:
        """By gene, what each of its levels costs with the others dense, in nats per prediction, interpolated."""
        dense = tuple(0 for _ in self.table.genes)
        batches = self.probe_batches
        by_gene = [
            sorted({int(np.abs(removed - share * size).argmin()) for share in _PROBES})
            for removed, size in zip(self.table.removed, self.table.sizes, strict=True)
        ]
        pairs = [(gene, level) for gene, probed in enumerate(by_gene) for level in probed]
        self.progress("genes alone", 0, len(self.table.genes))
        measured = self.log.measure_all([(*dense[:gene], level, *dense[gene + 1 :]) for gene, level in pairs], batches)
        found = []
        for gene, (removed, probed) in enumerate(zip(self.table.removed, by_gene, strict=True)):
            values = [next(measured).value(batches) for _ in probed]
            costs = np.interp(removed, [0, *removed[probed]], [0.0, *np.maximum.accumulate(values)])
            costs[removed > removed[probed[-1]]] = np.inf  # never measured
            found.append(costs)
            self.progress("genes alone", gene + 1, len(self.table.genes))
        return found


def _is_level(level: object, count: int) -> bool:
    return isinstance(level, int | np.integer) and 0 <= int(level) < count


def search(
    request: AllocateRequest,
    problem: Problem,
    profiles: Sequence[Allocation] = (),
    on_generation: OnGeneration = lambda *told: None,
) -> list[Levels]:
    """What an allocator finds within its budget: the candidates of a front, or one; it begins with profiles, too."""
    row = ALLOCATORS[request.allocator]
    if row.search is not None:
        return row.search(problem, request, profiles, on_generation)
    return [problem.levels_of(request.allocator, row, one) for one in diagonal(request, problem.log.focus)]


def diagonal(request: AllocateRequest, focus: float | None) -> list[float]:
    """Sparsities over the range of the front, one that is asked for among them."""
    spaced: list[float] = np.linspace(request.lowest, request.highest, _DIAGONAL).round(4).tolist()
    return sorted({*spaced, *([] if focus is None else [focus])})


def uniform(problem: Ground, sparsity: float) -> Levels:
    """Every gene at the mean sparsity."""
    return problem.at_budget([sparsity] * len(problem.table.genes), sparsity)


def owl(problem: Ground, sparsity: float) -> Levels:
    """Blocks with more outliers keep more, within 2 lambda.

    Source: Yin et al. 2024 (OWL), section 3; the shares of all linear layers of a block together, as in their code.
    """
    return _by_block(problem, problem.evidence.outliers, _OWL_SPREAD, sparsity)


def dlp(problem: Ground, sparsity: float) -> Levels:
    """Blocks keep more the lower the median of their scores abs(W)*X is, within 2 alpha.

    Source: Chen et al. 2025 (DLP), section 3: a block's unimportance is the median over all of its linear layers, its
    importance 1 less its share of the sum of all, which are brought to a range of 2 alpha around the mean.
    """
    return _by_block(problem, [-median for median in problem.evidence.medians], _DLP_SPREAD, sparsity)


def _by_block(problem: Ground, importance: Sequence[float], spread: float, sparsity: float) -> Levels:
    """Blocks keep more the more important they are, linearly, the most and the least 2 spreads apart."""
    present = sorted(set(problem.blocks))  # others have no layer that is pruned
    shares = np.asarray([importance[block] for block in present])
    width = float(np.ptp(shares))
    keep = 2 * spread * (shares - shares.min()) / width if width else np.zeros(len(shares))
    by_block = dict(zip(present, sparsity - (keep - keep.mean()), strict=True))
    return problem.at_budget([by_block[block] for block in problem.blocks], sparsity)


def one_threshold(problem: Ground, sparsity: float) -> Levels:
    """Genes lose what one threshold over all weights on W*W*F would remove of them, shrunk towards uniform.

    The loss rises by half of W*W*F, to second order, when a weight is removed alone (LeCun et al. 1990, with the
    empirical Fisher). Where many go and the others are fitted, genes differ less than that.
    """
    saliency = problem.evidence.saliency
    assert saliency is not None, "F was not measured"
    by_gene = np.stack([saliency[list(members)].sum(axis=0) for members in problem.table.genes])
    return problem.at_budget(sparsity + _WAY * (shares_below(by_gene, sparsity) - sparsity), sparsity)


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
    batches = max(1, problem.log.batches // 2)
    measured = problem.log.measure_all(list(dict.fromkeys(tried)), batches)
    return min(measured, key=lambda one: one.value(batches)).levels


def sensitivity(problem: Problem, sparsity: float) -> Levels:
    """From the dense model on, always the level that costs least per weight, by what each gene costs alone."""
    costs, tables = problem.costs, problem.table.removed
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
    return repair(problem.table, tuple(levels), budget, random.Random(0))


def _cheapest(costs: Numbers, removed: Numbers, level: int) -> tuple[float, int]:
    """The least price per weight of a level above this one, and the lowest level that begins at that price."""
    more = removed[level + 1 :] - removed[level]
    with np.errstate(divide="ignore", invalid="ignore"):
        prices = np.where(more > 0, (costs[level + 1 :] - costs[level]) / more, np.inf)
    if not prices.size:
        return float("inf"), level
    return float(prices.min()), level + 1 + int(prices.argmin())
