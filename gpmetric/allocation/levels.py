"""What a candidate allocation is made of: one level per gene, and how many weights each level removes.

A gene is one matrix, the matrices of one sub-module (attention, MLP) or those of one block. Levels are steps of equal
weight counts, whatever the size of the matrix, so that one level more here and one less there keep the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

import numpy as np

from gpmetric.allocation.request import PATTERNS, Genes, parse_pattern
from gpmetric.errors import InputError
from gpmetric.models import Model
from gpmetric.pruning.allocation import Allocation, layer_target, removed_weights
from gpmetric.pruning.target import BLOCK, Granularity, Target

__all__ = ["Ladder", "Levels", "find_genes", "mix_ladder", "quantum_ladder"]

Levels = tuple[int, ...]  # a candidate: the level of each gene

_LEVELS = 250  # of the largest gene; a byte tells at which one a weight goes
_PATTERNS = 8  # of a mix; a byte tells in which ones a weight is kept


@dataclass(frozen=True)
class Ladder:
    """What each level means for each layer.

    Attributes:
        layers: names, in model order.
        shapes: [out, in] of each layer.
        genes: indices of the layers of each gene.
        targets: by layer and level; level 0 removes nothing.
        granularity: of all targets.
        nested: whether a level removes all that the levels below it remove.
    """

    layers: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    genes: tuple[tuple[int, ...], ...]
    targets: tuple[tuple[Target, ...], ...]
    granularity: Granularity
    nested: bool

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
    def removed(self) -> list[np.ndarray]:
        """By gene, the weights that each of its levels removes."""
        by_layer = [
            np.array([removed_weights(shape, target) for target in targets])
            for shape, targets in zip(self.shapes, self.targets, strict=True)
        ]
        return [np.sum([by_layer[layer] for layer in members], axis=0) for members in self.genes]

    @cached_property
    def entries(self) -> int:
        """Weights that may be pruned."""
        return sum(rows * columns for rows, columns in self.shapes)

    @cached_property
    def sizes(self) -> np.ndarray:
        """[genes]: weights of each gene."""
        return np.array([sum(int(np.prod(self.shapes[layer])) for layer in members) for members in self.genes])

    def removes(self, levels: Sequence[int]) -> int:
        """Weights that a candidate removes."""
        return int(sum(table[level] for table, level in zip(self.removed, levels, strict=True)))

    def sparsity(self, levels: Sequence[int]) -> float:
        """Fraction of the prunable weights that a candidate removes."""
        return self.removes(levels) / self.entries

    def nearest(self, sparsities: Sequence[float]) -> Levels:
        """The candidate whose genes come nearest to these sparsities."""
        wanted = np.asarray(sparsities) * self.sizes
        return tuple(int(np.abs(table - count).argmin()) for table, count in zip(self.removed, wanted, strict=True))

    def profile(self, levels: Sequence[int]) -> list[float]:
        """The sparsity of each gene."""
        return [float(table[level] / size) for table, level, size in zip(self.removed, levels, self.sizes, strict=True)]

    def targets_of(self, levels: Sequence[int]) -> list[Target]:
        """The target of each layer."""
        return [targets[levels[gene]] for targets, gene in zip(self.targets, self.gene_of, strict=True)]

    def allocation(self, levels: Sequence[int]) -> Allocation:
        """What `prune --allocation` takes."""
        return Allocation(self.granularity, dict(zip(self.layers, self.targets_of(levels), strict=True)))


def find_genes(model: Model, kind: Genes) -> tuple[tuple[int, ...], ...]:
    """Indices of the layers of each gene, in model order."""
    found: dict[tuple[int, str], list[int]] = {}
    index = 0
    for block_index, block in enumerate(model.blocks):
        for layer in block.layers:
            module = {"matrix": layer.name, "module": layer.name.rpartition(".")[0], "block": ""}[kind]
            found.setdefault((block_index, module), []).append(index)
            index += 1
    return tuple(map(tuple, found.values()))


def quantum_ladder(model: Model, granularity: Granularity, kind: Genes = "matrix") -> Ladder:
    """Levels of equal weight counts: a 250th of the largest gene each; the highest leaves something in every group."""
    genes = find_genes(model, kind)
    shapes = [(layer.weight.shape[0], layer.weight.shape[1]) for layer in model.layers]
    sizes = [sum(shapes[layer][0] * shapes[layer][1] for layer in members) for members in genes]
    quantum = -(-max(sizes) // _LEVELS)
    targets: dict[int, tuple[Target, ...]] = {}
    for members, size in zip(genes, sizes, strict=True):
        shares = [level * quantum / size for level in range(size // quantum + 1)]
        for layer in members:
            targets[layer] = tuple(_target(granularity, shapes[layer], share) for share in shares)
    return _ladder(model, shapes, genes, [targets[layer] for layer in range(len(shapes))], granularity, nested=True)


def mix_ladder(model: Model, patterns: Sequence[str] = PATTERNS, kind: Genes = "matrix") -> Ladder:
    """N:M patterns as levels, in the order of their sparsity, `dense` first.

    Raises:
        InputError: a pattern is none, or some layer's input is not divisible by its M.
    """
    shapes = [(layer.weight.shape[0], layer.weight.shape[1]) for layer in model.layers]
    levels = [parse_pattern(text) for text in patterns]
    levels.sort(key=lambda target: target.sparsity)
    if levels[0].sparsity != 0 or len({level.text for level in levels}) < max(2, len(levels)):
        raise InputError(f"--patterns {','.join(patterns)!r} must be `dense` and N:M patterns, each once")
    if len(levels) > _PATTERNS:
        raise InputError(f"--patterns {','.join(patterns)!r} are {len(levels)}; accepted: at most {_PATTERNS}")
    for layer in model.layers:
        for target in levels:
            if target.group and layer.weight.shape[1] % target.group:
                raise InputError(
                    f"--patterns {target.text}: in = {layer.weight.shape[1]} of layer {layer.name} is not divisible by "
                    f"{target.group} (--exclude)"
                )
    return _ladder(model, shapes, find_genes(model, kind), [tuple(levels)] * len(shapes), "n:m", nested=False)


def _ladder(
    model: Model,
    shapes: Sequence[tuple[int, int]],
    genes: tuple[tuple[int, ...], ...],
    targets: Sequence[tuple[Target, ...]],
    granularity: Granularity,
    *,
    nested: bool,
) -> Ladder:
    names = tuple(layer.name for layer in model.layers)
    return Ladder(names, tuple(shapes), genes, tuple(targets), granularity, nested)


def _target(granularity: Granularity, shape: tuple[int, int], share: float) -> Target:
    """The target nearest to a sparsity; at least one entry of every comparison group stays."""
    size = {"row": shape[1], "block": shape[0] * min(BLOCK, shape[1])}.get(granularity, shape[0] * shape[1])
    return layer_target(granularity, shape, min(round(share * size), size - 1))
