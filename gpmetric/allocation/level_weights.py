"""The weights of every layer at every level, solved once, and a model put together of those that a candidate asks for.

Each layer is solved for itself, on the dense model's statistics. That stands for what it would be in use, where block
after block is pruned, which is measured for the last few candidates only (`in_use`).

Source: Sieberling et al. 2025 (EvoPress), section 4, their database of levels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gpmetric.allocation.level_masks import PrunedModel
from gpmetric.allocation.levels import LevelTable
from gpmetric.calibration.accumulators import LayerStatistics
from gpmetric.metrics import Metric
from gpmetric.pruning.updaters import prune_weights
from gpmetric.targets import Target

__all__ = ["SolvedModel", "database_bytes", "solved_levels", "solved_together"]

_TOGETHER = 2**25  # entries of the copies of a weight that are solved at once


def database_bytes(table: LevelTable, itemsize: int) -> int:
    """What the weights of all layers at all levels take; a level that removes nothing takes none."""
    pairs = zip(table.shapes, table.targets, strict=True)
    return sum(itemsize * shape[0] * shape[1] * len(_solving(shape, targets)) for shape, targets in pairs)


def solved_together(table: LevelTable) -> int:
    """Levels of the largest layer that are solved at once."""
    largest = max(rows * columns for rows, columns in table.shapes)
    return max(1, min(max(map(len, table.targets)), _TOGETHER // largest))


def solved_levels(
    weight: Tensor, metric: Metric, targets: Sequence[Target], statistics: LayerStatistics, update: str
) -> Iterator[tuple[int, Tensor]]:
    """The levels of a layer that remove anything, and its weight [out, in] there, of the dtype given.

    Raises:
        MaskError, SolverError: as `prune_weights`.
    """
    solving = _solving(weight.shape, targets)
    size = max(1, _TOGETHER // weight.numel())
    for start in range(0, len(solving), size):
        group = solving[start : start + size]
        pruned = prune_weights([weight], metric, [targets[level] for level in group], [statistics], update)
        for level, (solved,) in zip(group, pruned, strict=True):
            yield level, solved.to(weight.dtype)


def _solving(shape: Sequence[int], targets: Sequence[Target]) -> list[int]:
    return [level for level, target in enumerate(targets) if target.removes(shape)]


class SolvedModel(PrunedModel):
    """A dense model whose layers can be at any level, their weights taken from a shelf.

    There, under (index of the layer, level), `weight` is what `solved_levels` gives; nothing is there for a level that
    removes nothing.
    """

    def by_level(self, index: int, gradient: Tensor) -> Tensor:
        """[levels], float64: at each level of a layer, the sum over its weights there of weight times gradient."""
        levels = range(len(self.table.targets[index]))
        return torch.stack([(self._solved(index, level).float() * gradient).double().sum() for level in levels]).cpu()

    @torch.no_grad()
    def _weight(self, index: int, level: int | None, into: Tensor) -> Tensor:
        return self._dense[index] if level is None else into.copy_(self._solved(index, level))

    def _solved(self, index: int, level: int) -> Tensor:
        if (index, level) not in self._codes:
            return self._dense[index]
        return self._codes.get((index, level))["weight"].to(self.model.device)
