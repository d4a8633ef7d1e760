"""Bernoulli probabilities of what stays, moved by a policy gradient from the losses of drawn models alone.

Source: Gao et al. 2025 (Bypass Back-propagation), section 3; `paper` is the estimator of their code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gpmetric.structured.budget import Pool, Space, project
from gpmetric.structured.request import Estimator

__all__ = ["Policy", "draw", "entropy", "initial"]

_WINDOW = 5  # steps of the published moving average
_EDGE = 1e-7  # of the published code: keeps a score finite where a probability is 0 or 1


@dataclass
class Policy:
    """Probabilities [entries], fp64, on their budgets.

    Attributes:
        baseline: the published moving average of the loss; None before the first step and for `rloo`.
    """

    space: Space
    pools: Sequence[Pool]
    probabilities: Tensor
    estimator: Estimator = "rloo"
    baseline: float | None = None

    def update(self, draws: Sequence[Tensor], losses: Sequence[float], rate: float) -> None:
        """One step against the losses of draws [entries], 0 or 1, all measured on the same windows.

        `rloo` compares the two of an antithetic pair, which cancels what the windows have in common. Its step is the
        natural gradient's: (draw - probability), times max(p, 1 - p) since the pair is not independent (Dong et al.
        2020, DisARM, equation 7). `paper` compares with a moving average, divides by the deviation of the draw, and by
        one draw too few, as published.
        """
        chances = self.probabilities
        step = torch.zeros_like(chances)
        for drawn, advantage in zip(draws, self._advantages(losses), strict=True):
            step += advantage * (drawn - chances)
        if self.estimator == "paper":
            step /= ((chances + _EDGE) * (1 - chances + _EDGE)).sqrt() * (len(draws) - 1)
        else:
            step *= torch.maximum(chances, 1 - chances) / len(draws)
        self.probabilities = project(chances - rate * step, self.space, self.pools)

    def _advantages(self, losses: Sequence[float]) -> list[float]:
        if self.estimator == "rloo":  # of two, less the other's
            return [loss - losses[place ^ 1] for place, loss in enumerate(losses)]
        mean, share = math.fsum(losses) / len(losses), 1 / _WINDOW
        self.baseline = mean if self.baseline is None else (1 - share) * self.baseline + share * mean
        return [loss - self.baseline for loss in losses]


def initial(space: Space, pools: Sequence[Pool], worth: Tensor, gates: float) -> Tensor:
    """Probabilities [entries] to begin with: the logistic function of standardised scores, brought to the budgets.

    Args:
        worth: of each atom, [atoms], standardised; 0 for all begins with equal probabilities.
        gates: probability that a gate is open.
    """
    values = torch.full((space.entries,), gates, dtype=torch.float64)
    values[: len(worth)] = torch.sigmoid(worth)
    return project(values, space, pools)


def draw(probabilities: Tensor, count: int, seed: int, step: int, *, antithetic: bool) -> list[Tensor]:
    """Draws [entries], fp64 0 or 1; those of a step depend on seed and step alone, so that a resumed search draws them.

    Args:
        antithetic: in pairs of u and 1 - u, which agree less than independent ones.
    """
    generator = np.random.default_rng([seed, step])
    found = []
    for _ in range(count // 2 if antithetic else count):
        uniform = torch.from_numpy(generator.random(len(probabilities)))
        found += [uniform < probabilities, 1 - uniform < probabilities] if antithetic else [uniform < probabilities]
    return [one.double() for one in found]


def entropy(probabilities: Tensor) -> float:
    """Mean entropy of the entries, in bits: 1 where all is open, 0 where all is decided."""
    return float(torch.special.entr(torch.stack([probabilities, 1 - probabilities])).sum() / math.log(2)) / max(
        1, len(probabilities)
    )
