"""Published ways of choosing units, at the same number of parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpmetric.models import Model
from gpmetric.structured.budget import find_space, top_units
from gpmetric.structured.groups import Groups
from gpmetric.structured.plan import pools_of, uniform_counts, uniform_pools
from gpmetric.structured.request import RULES
from gpmetric.structured.scores import Features, unit_scores

__all__ = ["choose"]


def choose(
    model: Model,
    groups: Groups,
    name: str,
    sparsity: float,
    tokens: Tensor,
    features: Sequence[Features],
    seed: int = 0,
) -> Tensor:
    """The units [units], bool, that stay by a rule.

    A `uniform` rule keeps as many heads and channels in every block, a `global` one compares units of all parts. Block
    influence takes whole blocks, the last of them in part, by position.

    Args:
        name: a key of RULES.
        sparsity: share of the parameters inside the blocks that goes.
        tokens: [windows, length], the calibration text.
        features: of the dense model on it.
        seed: of `random`.
    """
    space = find_space(groups, ("head", "channel"), layers=False)
    scores = unit_scores(model, groups, name, tokens, features, torch.Generator().manual_seed(seed))
    if RULES[name].placing == "uniform":
        heads = range(groups.parts[0].units + 1)
        pools = uniform_pools(groups, space, uniform_counts(groups, sparsity, ("head", "channel"), heads))
        return top_units(scores, space, pools)
    return top_units(scores, space, pools_of(groups, space, sparsity, groups.cost))
