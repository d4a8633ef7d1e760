"""Pruned models and candidates for tests/test_allocation.py and tests/test_allocation_search.py."""

from __future__ import annotations

import random

from gpmetric.allocation.level_masks import PrunedModel, level_codes
from gpmetric.allocation.levels import Levels, LevelTable
from gpmetric.blockwise.shelf import Shelf
from gpmetric.models import Model


def pruned_model(model: Model, table: LevelTable) -> PrunedModel:
    """By magnitude."""
    codes, targets = Shelf(), iter(enumerate(table.targets))
    for place, block in enumerate(model.blocks):
        with model.at_hand(place):
            for layer, (index, mine) in zip(block.layers, targets, strict=False):
                codes.put(index, {"codes": level_codes(layer.weight.abs(), mine, nested=table.nested)})
    return PrunedModel(model, table, codes)


def drawn(table: LevelTable, rng: random.Random) -> Levels:
    """A candidate."""
    return table.nearest([rng.uniform(0.3, 0.8) for _ in table.genes])
