"""The levels at which weights go, one byte per weight, and a model that takes on candidates from them.

A candidate differs from the one before in a few matrices: only those are masked again, one comparison per weight, and
no pruned copy of any level is kept anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpmetric.allocation.levels import Ladder, Levels
from gpmetric.models import Model
from gpmetric.pruning.mask import select_mask
from gpmetric.pruning.target import BLOCK, Target

__all__ = ["PrunedModel", "death_levels", "kept"]


def death_levels(score: Tensor, targets: Sequence[Target], *, nested: bool) -> Tensor:
    """For every weight, at which of its layer's levels it goes.

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
    if targets[0].granularity == "block":
        whole = [target.with_granularity("layer") for target in targets]
        return torch.cat([_deaths(part, whole) for part in score.split(BLOCK, dim=1)], dim=1)
    return _deaths(score, targets)


def _deaths(score: Tensor, targets: Sequence[Target]) -> Tensor:
    """Rank within the comparison group, lower columns first among equals, told in levels."""
    size = targets[0].group_size(score.shape)
    groups = score.reshape(-1, size)
    order = groups.sort(dim=1, stable=True).indices
    removed = torch.tensor([target.removed(size) for target in targets], device=score.device)
    by_rank = torch.searchsorted(removed, torch.arange(size, device=score.device), right=True).to(torch.uint8)
    return torch.empty_like(groups, dtype=torch.uint8).scatter_(1, order, by_rank.expand_as(groups)).view_as(score)


def kept(deaths: Tensor, level: int, *, nested: bool) -> Tensor:
    """The mask of one level, boolean [out, in]."""
    return deaths > level if nested else (deaths >> level) & 1 == 1


class PrunedModel:
    """A model whose layers can be at any level.

    Args:
        model: the dense model.
        ladder: of its layers.
        deaths: of each layer, as `death_levels` gives them.
    """

    def __init__(self, model: Model, ladder: Ladder, deaths: Sequence[Tensor]) -> None:
        self.model = model
        self.ladder = ladder
        self._deaths = deaths
        self._dense = [layer.weight for layer in model.layers]
        self._copies = [layer.oriented(torch.empty_like(layer.parameter.data)) for layer in model.layers]
        self._levels: list[int | None] = [None] * len(deaths)

    @property
    def levels(self) -> tuple[int | None, ...]:
        """The level that each layer is at; None is the dense one."""
        return tuple(self._levels)

    @torch.no_grad()
    def set(self, levels: Levels) -> None:
        """Prunes to a candidate."""
        for index, gene in enumerate(self.ladder.gene_of):
            level = levels[gene]
            if level == self._levels[index]:
                continue
            mask = kept(self._deaths[index], level, nested=self.ladder.nested)
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
        ladder = self.ladder
        levels = len(ladder.targets[index])
        product = (self._dense[index].float() * gradient).reshape(-1).double()  # on accelerators without float64: none
        deaths = self._deaths[index].reshape(-1)
        if ladder.nested:
            # a weight that dies at level d is kept at the levels below d
            died = torch.bincount(deaths.int(), weights=product, minlength=levels + 1)
            return died.flip(0).cumsum(0).flip(0)[1:].cpu()
        kept_at = [product[kept(deaths, level, nested=False)].sum() for level in range(levels)]
        return torch.stack(kept_at).cpu()

    def _show(self, index: int, weight: Tensor) -> None:
        layer = self.model.layers[index]
        layer.parameter.data = layer.oriented(weight)
