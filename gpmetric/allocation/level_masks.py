"""At which level each weight is removed, one byte per weight, and a model that takes on the masks of candidates.

A candidate differs from the one before in a few matrices: only those are masked again, one comparison per weight, and
no pruned copy of any level is kept anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpmetric.allocation.levels import Levels, LevelTable
from gpmetric.models import Model
from gpmetric.pruning.mask import by_group, select_mask
from gpmetric.targets import Target

__all__ = ["PrunedModel", "kept_at", "level_codes"]


def level_codes(score: Tensor, targets: Sequence[Target], *, nested: bool) -> Tensor:
    """For every weight, one byte that tells at which of its layer's levels it is kept.

    Args:
        score: [out, in]; larger means keep.
        targets: by level, of one granularity; at most 255.
        nested: each level removes all that the one below it removes.

    Returns:
        uint8 [out, in]: the lowest level that removes the weight, the number of levels where none does; bit by bit, at
        which of at most 8 levels the weight is kept, where levels are not nested.

    Raises:
        MaskError: a score is not finite, or `in` is not divisible by M.
    """
    if not nested:
        bits = torch.zeros_like(score, dtype=torch.uint8)
        for level, target in enumerate(targets):
            bits |= select_mask(score, target).to(torch.uint8) << level
        return bits
    select_mask(score, targets[0])  # refuses what no mask can be made of

    def lowest(groups: Tensor) -> Tensor:
        """By rank within the comparison group, lower columns first among equals."""
        size = groups.shape[1]
        order = groups.sort(dim=1, stable=True).indices
        removed = torch.tensor([target.removed(size) for target in targets], device=score.device)
        by_rank = torch.searchsorted(removed, torch.arange(size, device=score.device), right=True).to(torch.uint8)
        return torch.empty_like(groups, dtype=torch.uint8).scatter_(1, order, by_rank.expand_as(groups))

    return by_group(lowest, score, targets[0])


def kept_at(codes: Tensor, level: int, *, nested: bool) -> Tensor:
    """The mask of one level, boolean [out, in]."""
    return codes > level if nested else (codes >> level) & 1 == 1


class PrunedModel:
    """A dense model whose layers can be at any level; codes of each layer as `level_codes` gives them."""

    def __init__(self, model: Model, table: LevelTable, codes: Sequence[Tensor]) -> None:
        self.model, self.table, self._codes = model, table, codes
        self._dense = [layer.weight for layer in model.layers]
        self._copies = [layer.oriented(torch.empty_like(layer.parameter.data)) for layer in model.layers]
        self._levels: list[int | None] = [None] * len(codes)

    @property
    def levels(self) -> tuple[int | None, ...]:
        """The level that each layer is at; None is the dense one."""
        return tuple(self._levels)

    @torch.no_grad()
    def set(self, levels: Levels) -> None:
        """Prunes to a candidate."""
        for index, gene in enumerate(self.table.gene_of):
            level = levels[gene]
            if level == self._levels[index]:
                continue
            mask = kept_at(self._codes[index], level, nested=self.table.nested)
            torch.mul(self._dense[index], mask, out=self._copies[index])
            self._show(index, self._copies[index])
            self._levels[index] = level

    def dense(self) -> None:
        """Makes the model dense again."""
        for index, weight in enumerate(self._dense):
            self._show(index, weight)
            self._levels[index] = None

    def by_level(self, index: int, gradient: Tensor) -> Tensor:
        """[levels], float64: at each level of a layer, the sum over the weights it keeps of weight times gradient."""
        levels = len(self.table.targets[index])
        product = (self._dense[index].float() * gradient).reshape(-1).double()  # on accelerators without float64: none
        codes = self._codes[index].reshape(-1)
        if self.table.nested:
            # a weight that goes at level d is kept at the levels below d
            gone = torch.bincount(codes.int(), weights=product, minlength=levels + 1)
            return gone.flip(0).cumsum(0).flip(0)[1:].cpu()
        return torch.stack([product[kept_at(codes, level, nested=False)].sum() for level in range(levels)]).cpu()

    def _show(self, index: int, weight: Tensor) -> None:
        layer = self.model.layers[index]
        layer.parameter.data = layer.oriented(weight)
