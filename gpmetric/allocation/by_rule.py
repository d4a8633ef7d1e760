"""Allocations of a session's model by rules that measure no candidate, and mixtures of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gpmetric.allocation.allocators import Ground
from gpmetric.allocation.evidence import Evidence, block_scores, saliency_counts
from gpmetric.allocation.exact_budget import exact_allocation
from gpmetric.allocation.levels import Numbers, level_table
from gpmetric.pruning.allocation import Allocation
from gpmetric.session.listeners import Progress
from gpmetric.session.session import Session

__all__ = ["Directions", "directions_of"]

_SLOPE = 0.1  # sparsity that the last block has more than the mean, in the direction `depth`
_KIND = 0.1  # and that layers of a kind have more, in their own


class Directions:
    """Ways that an allocation can go from uniform, by name: the mean sparsity stays.

    Those of rules are what the rule gives at this sparsity. Besides, there is `depth`, more sparsity from block to
    block, and one for every kind of layer, by the last parts of its name.

    Args:
        ground: a gene for every layer.
        sparsity: the mean.
    """

    def __init__(self, ground: Ground, sparsity: float) -> None:
        self._ground, self._sparsity, table = ground, sparsity, ground.table
        self.moves: dict[str, Numbers] = {}  # [layers]
        for name, row in ground.rules.items():
            if row.measures == "nothing" and row.rule is not None:
                self._add(name, np.asarray(table.profile(row.rule(ground, sparsity))))
        blocks = np.unique(ground.blocks, return_inverse=True)[1]
        self._add("depth", _SLOPE * (2 * blocks / max(1, int(blocks.max())) - 1))
        kinds = [".".join([part for part in name.split(".") if not part.isdigit()][-2:]) for name in table.layers]
        for kind in dict.fromkeys(kinds):
            self._add(kind, _KIND * np.array([one == kind for one in kinds], dtype=float))

    def _add(self, name: str, sparsities: Numbers) -> None:
        moved = sparsities - np.average(sparsities, weights=self._ground.table.sizes)
        if np.abs(moved).max() > 1e-3:  # of a model whose layers are all of one kind, for instance
            self.moves[name] = moved

    def allocation(self, shares: Mapping[str, float]) -> Allocation:
        """The allocation that goes so far in each direction, at the budget of the uniform one, to the weight."""
        table = self._ground.table
        moved = sum((share * self.moves[name] for name, share in shares.items()), np.zeros(len(table.genes)))
        levels = self._ground.at_budget(self._sparsity + moved, self._sparsity)
        return exact_allocation(table, levels, self._ground.budget(self._sparsity))


def directions_of(session: Session, granularity: str, sparsity: float, progress: Progress) -> Directions:
    """The directions for a session's model, by its dense statistics, F among them.

    Raises:
        InputError, ModelError: as `level_table` and `Session.statistics`.
    """
    model = session.model
    statistics = session.statistics({"F"}, progress).layers
    table = level_table(model, granularity)
    norms, counts = {}, {}
    blocks = []
    for index, block in enumerate(model.blocks):
        with model.at_hand(index):
            for layer in block.layers:
                found = statistics[layer.name]
                norms[layer.name], counts[layer.name] = found["X"], saliency_counts(layer.weight, found["F"])
                blocks.append(index)
    saliency = np.stack([counts[name] for name in table.layers])
    return Directions(Ground(table, blocks, Evidence(*block_scores(model, norms), saliency)), sparsity)
