"""Bernoulli probabilities of what stays, moved by a policy gradient from the losses of drawn models alone.

Source: Gao et al. 2025 (Bypass Back-propagation), section 3; `paper` is the estimator of their code. What a search does
by default is in `exchange`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gpmetric.structured.request import ESTIMATORS
from gpmetric.structured.unit_space import Pool, UnitSpace, project

__all__ = ["Policy", "draw", "entropy", "initial"]

_WINDOW = 5  # steps of the published moving average
_EDGE = 1e-7  # of the published code: keeps a score finite where a probability is 0 or 1
_SPREAD_WINDOW = 50  # steps of rloo's moving average
_LIMIT = 3.0  # standard deviations of an advantage: one dead model among those drawn is no reason to leap
_CEILING = 50.0  # of a loss that is not finite, or as good as
_MIN_GATE = 0.05  # probability that a gate counts with in costs: what is behind a closed one has a cost all the same


@dataclass
class Policy:
    """Probabilities [entries], fp64, on their budgets.

    `average` is the moving one, of the loss for `paper`, of the squared difference within a pair for `rloo`.
    """

    space: UnitSpace
    pools: Sequence[Pool]
    probabilities: Tensor
    estimator: str = "rloo"
    average: float | None = None  # before the first step

    def update(self, draws: Sequence[Tensor], losses: Sequence[float], rate: float) -> None:
        """One step against the losses of draws [entries], 0 or 1, all measured on the same windows; infinite for a dead
        model.

        `rloo` compares the two of an antithetic pair, which cancels what the windows have in common, in deviations of
        such differences, so that one rate serves all models. Its step is the natural gradient's: (draw - probability),
        times max(p, 1 - p) since the pair is not independent (Dong et al. 2020, DisARM, equation 7), divided by the
        root of the cost: without it expensive units follow noise; divided by the cost itself, they hardly move. `paper`
        compares with a moving average, divides by the deviation of the draw, and by one draw too few, as published.
        """
        chances = self.probabilities
        slopes = self.space.slopes(chances.clamp_min(_MIN_GATE), self.space.cost)
        dear = (slopes / self.space.cost.min()).clamp_min(1).sqrt()
        step = torch.zeros_like(chances)
        for drawn, advantage in zip(draws, self._advantages(losses), strict=True):
            step += advantage * (drawn - chances)
        if self.estimator == "paper":
            step /= ((chances + _EDGE) * (1 - chances + _EDGE)).sqrt() * (len(draws) - 1)
        else:
            step *= 2 * torch.maximum(chances, 1 - chances) / len(draws) / dear
        weights = None if self.estimator == "paper" else dear
        self.probabilities = project(chances - rate * step, self.space, self.pools, weights)

    def _advantages(self, losses: Sequence[float]) -> list[float]:
        capped = [min(loss, _CEILING) for loss in losses]
        if self.estimator == "paper":
            average = self._averaged(math.fsum(capped) / len(capped), _WINDOW)
            return [loss - average for loss in capped]
        gaps = [loss - capped[place ^ 1] for place, loss in enumerate(capped)]  # of two, less the other's
        alive = [gap * gap for gap, loss in zip(gaps, losses, strict=True) if max(abs(gap), loss) < _CEILING / 2]
        if alive:
            self._averaged(math.fsum(alive) / len(alive), _SPREAD_WINDOW)
        spread = math.sqrt(self.average or 0.0)
        return [max(-_LIMIT, min(_LIMIT, gap / spread)) if spread else 0.0 for gap in gaps]

    def _averaged(self, value: float, window: int) -> float:
        """The moving average, the value already in it."""
        self.average = value if self.average is None else self.average + (value - self.average) / window
        return self.average


def initial(space: UnitSpace, pools: Sequence[Pool], worth: Tensor, gates: float, estimator: str = "rloo") -> Tensor:
    """Probabilities [entries] to begin with: the logistic function of scaled scores, brought to the budgets.

    Args:
        worth: of each atom, [atoms], standardised; 0 for all begins with equal probabilities.
        gates: probability that a gate is open.
        estimator: the published one begins less decided.
    """
    values = torch.full((space.entries,), gates, dtype=torch.float64)
    values[: len(worth)] = torch.sigmoid(ESTIMATORS[estimator].sharpness * worth)
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
    bits = torch.special.entr(torch.stack([probabilities, 1 - probabilities])).sum() / math.log(2)
    return float(bits) / max(1, len(probabilities))
