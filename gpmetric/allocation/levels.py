"""What a candidate allocation is made of: one level per gene, and how many weights each level removes.

A gene is one matrix, the matrices of one sub-module (attention, MLP) or those of one block. Levels are steps of equal
weight counts, whatever the size of the matrix, so that one level more here and one less there keep the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpmetric.allocation.request import GENES, MOST_LEVELS, PATTERNS, parse_pattern
from gpmetric.errors import InputError
from gpmetric.models import Model
from gpmetric.pruning.allocation import Allocation, layer_target
from gpmetric.targets import GRANULARITIES, Target

__all__ = ["LevelTable", "Levels", "Numbers", "find_genes", "level_table", "within_reach"]

Levels = tuple[int, ...]  # a candidate: the level of each gene
Numbers = NDArray[Any]

_REACH = (0.3, 0.2)  # below and above the range of a front, in which the levels are that weights are solved at
_PATTERNS = 8  # of a mix; a byte tells in which ones a weight is kept


@dataclass(frozen=True)
class LevelTable:
    """What each level means for each layer."""

    layers: tuple[str, ...]  # names, in model order
    shapes: tuple[tuple[int, int], ...]  # [out, in] of each layer
    genes: tuple[tuple[int, ...], ...]  # indices of the layers of each gene
    targets: tuple[tuple[Target, ...], ...]  # by layer and level; level 0 removes nothing
    granularity: str  # of all targets; a key of GRANULARITIES
    steps: int = MOST_LEVELS  # of the largest gene

    @property
    def nested(self) -> bool:
        """Whether a level removes all that the levels below it remove, as N:M patterns do not."""
        return not GRANULARITIES[self.granularity].counted

    @cached_property
    def names(self) -> list[str]:
        """By gene, what its layers' names have in common: a layer, a sub-module or a block."""
        found = []
        for members in self.genes:
            parts = [self.layers[layer].split(".") for layer in members]
            shared = [one[0] for one in takewhile(lambda one: len(set(one)) == 1, zip(*parts, strict=False))]
            found.append(".".join(shared))
        return found

    @cached_property
    def gene_of(self) -> list[int]:
        """The gene of each layer."""
        found = {layer: gene for gene, members in enumerate(self.genes) for layer in members}
        return [found[layer] for layer in range(len(self.layers))]

    @cached_property
    def removed(self) -> list[Numbers]:
        """By gene, the weights that each of its levels removes."""
        by_layer = [
            np.array([target.removes(shape) for target in targets])
            for shape, targets in zip(self.shapes, self.targets, strict=True)
        ]
        return [np.sum([by_layer[layer] for layer in members], axis=0) for members in self.genes]

    @cached_property
    def entries(self) -> int:
        """Weights that may be pruned."""
        return sum(rows * columns for rows, columns in self.shapes)

    @cached_property
    def sizes(self) -> Numbers:
        """[genes]: weights of each gene."""
        return np.array([sum(int(np.prod(self.shapes[layer])) for layer in members) for members in self.genes])

    def scaled(self, step: int) -> int:
        """As much as so many of the finest levels, in levels of this table; at least one."""
        return max(1, round(step * self.steps / MOST_LEVELS))

    def removes(self, levels: Sequence[int]) -> int:
        """Weights that a candidate removes."""
        return int(sum(counts[level] for counts, level in zip(self.removed, levels, strict=True)))

    def sparsity(self, levels: Sequence[int]) -> float:
        """Fraction of the prunable weights that a candidate removes."""
        return self.removes(levels) / self.entries

    def nearest(self, sparsities: Sequence[float]) -> Levels:
        """The candidate whose genes come nearest to these sparsities."""
        wanted = np.asarray(sparsities) * self.sizes
        return tuple(int(np.abs(counts - one).argmin()) for counts, one in zip(self.removed, wanted, strict=True))

    def profile(self, levels: Sequence[int]) -> list[float]:
        """The sparsity of each gene."""
        return [float(one[level] / size) for one, level, size in zip(self.removed, levels, self.sizes, strict=True)]

    def targets_of(self, levels: Sequence[int]) -> list[Target]:
        """The target of each layer."""
        return [targets[levels[gene]] for targets, gene in zip(self.targets, self.gene_of, strict=True)]

    def allocation(self, levels: Sequence[int]) -> Allocation:
        """What `prune --allocation` takes."""
        return Allocation(self.granularity, dict(zip(self.layers, self.targets_of(levels), strict=True)))


def find_genes(model: Model, kind: str) -> tuple[tuple[int, ...], ...]:
    """Indices of the layers of each gene, in model order; the kind is a key of GENES."""
    found: dict[tuple[int, str], list[int]] = {}
    layers = ((place, layer) for place, block in enumerate(model.blocks) for layer in block.layers)
    for index, (place, layer) in enumerate(layers):
        found.setdefault((place, GENES[kind].key(layer.name)), []).append(index)
    return tuple(map(tuple, found.values()))


def within_reach(lowest: float, highest: float) -> tuple[float, float]:
    """Sparsities that genes of a front between two sparsities hardly go beyond."""
    return max(0.0, lowest - _REACH[0]), min(1.0, highest + _REACH[1])


def level_table(
    model: Model,
    granularity: str,
    kind: str = "matrix",
    patterns: Sequence[str] = PATTERNS,
    steps: int = MOST_LEVELS,
    within: tuple[float, float] = (0.0, 1.0),
) -> LevelTable:
    """The levels of a model's layers: steps of equal weight counts, or N:M patterns.

    Args:
        granularity: a key of GRANULARITIES.
        kind: of genes, a key of GENES.
        patterns: levels of an N:M mix, in any order, `dense` among them.
        steps: of the largest gene from nothing to all, at most MOST_LEVELS.
        within: sparsities of the steps that are levels, besides the one that removes nothing.

    Raises:
        InputError: a pattern is none, or some layer's input is not divisible by its M.
    """
    genes = find_genes(model, kind)
    shapes = tuple((layer.weight.shape[0], layer.weight.shape[1]) for layer in model.layers)
    if GRANULARITIES[granularity].counted:
        targets = [_pattern_levels(model, patterns)] * len(shapes)
    else:
        targets = _equal_steps(shapes, genes, granularity, steps, within)
    names = tuple(layer.name for layer in model.layers)
    return LevelTable(names, shapes, genes, tuple(targets), granularity, steps)


def _equal_steps(
    shapes: Sequence[tuple[int, int]],
    genes: Sequence[Sequence[int]],
    granularity: str,
    steps: int,
    within: tuple[float, float],
) -> list[tuple[Target, ...]]:
    """By layer, targets that far apart; the highest leaves something in every comparison group."""
    sizes = [sum(shapes[layer][0] * shapes[layer][1] for layer in members) for members in genes]
    step = -(-max(sizes) // steps)
    found: dict[int, tuple[Target, ...]] = {}
    for members, size in zip(genes, sizes, strict=True):
        shares = [level * step / size for level in range(size // step + 1)]
        shares = [share for share in shares if share == 0 or within[0] <= share <= within[1]]
        for layer in members:
            found[layer] = tuple(_nearest_target(granularity, shapes[layer], share) for share in shares)
    return [found[layer] for layer in range(len(shapes))]


def _nearest_target(granularity: str, shape: tuple[int, int], share: float) -> Target:
    """The target nearest to a sparsity; at least one entry of every comparison group stays."""
    size = Target("", granularity, 0.0).groups(shape)[0][1]
    return layer_target(granularity, shape, min(round(share * size), size - 1))


def _pattern_levels(model: Model, patterns: Sequence[str]) -> tuple[Target, ...]:
    """N:M patterns in the order of their sparsity, `dense` first."""
    levels = sorted(map(parse_pattern, patterns), key=lambda target: target.sparsity)
    if levels[0].sparsity != 0 or len({level.text for level in levels}) < max(2, len(levels)):
        raise InputError(f"--patterns {','.join(patterns)!r} must be `dense` and N:M patterns, each once")
    if len(levels) > _PATTERNS:
        raise InputError(f"--patterns {','.join(patterns)!r} are {len(levels)}; accepted: at most {_PATTERNS}")
    for layer in model.layers:
        width = layer.weight.shape[1]
        for target in levels:
            if not target.fits(width):
                raise InputError(
                    f"--patterns {target.text}: in = {width} of layer {layer.name} is not divisible by {target.group} "
                    "(--exclude)"
                )
    return tuple(levels)
