"""Drawn models and what they cost: measured where the search is, or by workers that have opened the model again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gpmetric.structured.draw_objective import DrawObjective
from gpmetric.structured.repair import Repairer
from gpmetric.structured.shrink import Repair, Shrinker

__all__ = ["Draw", "Measurer"]

_HELD = 3  # models whose repairs are at hand: what stays, what was proposed last, and what is


@dataclass(frozen=True, eq=False)
class Draw:
    """A model, by its units [units], bool, that stay, on the windows of a step."""

    step: int
    kept: Tensor


class Measurer:
    """The objective of drawn models in this process.

    Args:
        shrinker: of the dense model.
        repairer: mends their outputs as those of the written one will be.
        objective: on the windows of a step.
    """

    def __init__(self, shrinker: Shrinker, repairer: Repairer, objective: DrawObjective) -> None:
        self._shrinker, self._repairer, self._objective = shrinker, repairer, objective
        self._mended: list[tuple[Tensor, dict[int, Repair]]] = []  # units and repairs, the last used at the end

    @torch.no_grad()
    def __call__(self, draw: Draw) -> float:
        """In nats per prediction, infinite where it is not finite; a SolverError where a fit fails."""
        self._objective.turn(draw.step)
        with self._shrinker.passing(draw.kept, self._repairs(draw.kept)):
            return self._objective()

    def _repairs(self, kept: Tensor) -> dict[int, Repair]:
        place = next((place for place, one in enumerate(self._mended) if torch.equal(one[0], kept)), None)
        if place is not None:
            self._mended.append(self._mended.pop(place))
        else:
            near = min(self._mended, key=lambda one: int((one[0] != kept).sum()), default=None)
            found = self._repairer.moved(near[1], near[0], kept) if near else self._repairer.repairs(kept)
            self._mended = [*self._mended, (kept, found)][-_HELD:]
        return self._mended[-1][1]
