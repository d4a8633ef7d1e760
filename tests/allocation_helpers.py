"""Pruned models and candidates for tests/test_allocation.py and tests/test_allocation_search.py."""

from __future__ import annotations

import random

from gpmetric.allocation.deaths import PrunedModel, death_levels
from gpmetric.allocation.levels import Ladder, Levels
from gpmetric.models import Model


def pruned_model(model: Model, ladder: Ladder) -> PrunedModel:
    """By magnitude."""
    pairs = zip(model.layers, ladder.targets, strict=True)
    deaths = [death_levels(layer.weight.abs(), targets, nested=ladder.nested) for layer, targets in pairs]
    return PrunedModel(model, ladder, deaths)


def drawn(ladder: Ladder, rng: random.Random) -> Levels:
    """A candidate."""
    return ladder.nearest([rng.uniform(0.3, 0.8) for _ in ladder.genes])
