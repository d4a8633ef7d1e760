"""Allocator depth: the sparsity rises linearly from the first block to the last, by 0.2 in all.

gpmetric allocate --plugin examples/plugins/by_depth.py --allocator depth --sparsity 0.6
"""

from gpmetric.allocation.allocators import Problem
from gpmetric.allocation.request import Allocator

RISE = 0.2


def by_depth(problem: Problem, sparsity: float) -> tuple[int, ...]:
    """The level of every gene; `at_budget` shifts what is asked for to the mean sparsity, exactly."""
    last = max(1, *problem.blocks)
    return problem.at_budget([sparsity + RISE * (block / last - 0.5) for block in problem.blocks], sparsity)


PLUGIN = {"depth": Allocator("sparsity rises linearly with depth", by_depth)}
