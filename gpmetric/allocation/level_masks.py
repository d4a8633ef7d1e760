"""At which level each weight is removed, one byte per weight, and a model that takes on the masks of candidates.

Where the weights are resident, a candidate differs from the one before in a few matrices: only those are masked again,
one comparison per weight, and no pruned copy of any level is kept anywhere. Elsewhere a block is masked while it is at
hand.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from gpmetric.allocation.levels import Levels, LevelTable
from gpmetric.blockwise.shelf import Shelf
from gpmetric.models import Layer, Model
from gpmetric.pruning.mask import by_group, select_mask
from gpmetric.targets import Target

__all__ = ["PrunedModel", "kept_at", "level_codes"]

_STATES = 2**30  # bytes of hidden states of candidates that pass through the blocks together


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
    """A dense model whose layers can be at any level.

    Args:
        model: takes the candidates on.
        table: of their levels.
        codes: under the index of each layer, `codes` as `level_codes` gives them.
        room: bytes of hidden states that may be in memory; None is no limit but our own.
    """

    def __init__(self, model: Model, table: LevelTable, codes: Shelf, room: int | None = None) -> None:
        self.room = _STATES if room is None else min(room, _STATES)
        self.model, self.table, self._codes = model, table, codes
        self._levels: list[int | None] = [None] * len(table.layers)
        indices = iter(range(len(table.layers)))
        self._members = [[next(indices) for _ in block.layers] for block in model.blocks]
        self._dense: dict[int, Tensor] = {}  # weights by layer, of those that are at hand
        self._copies: list[Tensor] = []
        if model.resident:
            self._dense = {index: layer.weight for index, layer in enumerate(model.layers)}
            self._copies = [_empty_like(layer) for layer in model.layers]

    def files(self) -> dict[Hashable, Path]:
        """What another process has the same levels of."""
        return self._codes.files()

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
            if self._copies:
                self._show(index, self._weight(index, level, self._copies[index]))
            self._levels[index] = level

    def dense(self) -> None:
        """Makes the model dense again."""
        self._levels = [None] * len(self._levels)
        if self._copies:
            for index, weight in self._dense.items():
                self._show(index, weight)

    @contextmanager
    def block(self, index: int) -> Iterator[None]:
        """A block at hand, its layers at their levels."""
        layers, members = self.model.blocks[index].layers, self._members[index]
        with self.model.at_hand(index):
            if self._copies:
                yield
                return
            self._dense = {member: layer.weight for member, layer in zip(members, layers, strict=True)}
            try:
                pairs = zip(members, layers, strict=True)
                masked = [self._weight(member, self._levels[member], _empty_like(layer)) for member, layer in pairs]
                with self.model.holding(masked, layers):
                    yield
            finally:
                self._dense = {}

    def together(self, size: int) -> int:
        """Candidates that pass through the blocks together, each with so many bytes of hidden states.

        One where the weights are resident, and nothing is read for it.
        """
        return 1 if self.model.resident else max(1, self.room // (2 * size))

    def by_level(self, index: int, gradient: Tensor) -> Tensor:
        """[levels], float64: at each level of a layer, the sum over the weights it keeps of weight times gradient.

        The layer's block is at hand.
        """
        levels = len(self.table.targets[index])
        product = (self._dense[index].float() * gradient).reshape(-1).double()  # on accelerators without float64: none
        codes = self._codes_of(index).reshape(-1)
        if self.table.nested:
            # a weight that goes at level d is kept at the levels below d
            gone = torch.bincount(codes.int(), weights=product, minlength=levels + 1)
            return gone.flip(0).cumsum(0).flip(0)[1:].cpu()
        return torch.stack([product[kept_at(codes, level, nested=False)].sum() for level in range(levels)]).cpu()

    @torch.no_grad()
    def _weight(self, index: int, level: int | None, into: Tensor) -> Tensor:
        """A layer's weight at a level, written to a tensor of the same layout unless it is the dense one."""
        if level is None:
            return self._dense[index]
        return torch.mul(self._dense[index], kept_at(self._codes_of(index), level, nested=self.table.nested), out=into)

    def _codes_of(self, index: int) -> Tensor:
        return self._codes.get(index)["codes"].to(self.model.device)

    def _show(self, index: int, weight: Tensor) -> None:
        layer = self.model.layers[index]
        layer.parameter.data = layer.oriented(weight)


def _empty_like(layer: Layer) -> Tensor:
    """[out, in], stored as the layer's weight is: another layout would have other last bits."""
    return layer.oriented(torch.empty_like(layer.parameter.data))
