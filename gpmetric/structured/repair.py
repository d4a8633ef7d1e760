"""What is done for the outputs of sublayers that lost units: a constant for what is gone, or a fit of what is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy

import torch
from torch import Tensor

from gpmetric.errors import SolverError
from gpmetric.structured.groups import Groups
from gpmetric.structured.scores import Features
from gpmetric.structured.shrink import Repair

__all__ = ["DAMPINGS", "Repairer"]

# Of the mean square, in the least-squares fit; `slim` takes what is best on its search text. Excess on validation by
# 0.001, 0.01, 0.1, 0.3, 1: SmolLM2-135M at 0.2, 2,048 tokens 0.666, 0.531, 0.404, 0.377, 0.369, 6,144 tokens 0.411,
# 0.394, 0.361, 0.355, 0.358; gpt2-3m at 0.3, 8,192 tokens 0.002, 0.003, 0.007, 0.010, 0.017. Without repair, SmolLM2
# has 0.451.
DAMPINGS = (1e-3, 1e-2, 1e-1, 5e-1)


class Repairer:
    """Repairs of every sublayer that lost units.

    Args:
        groups: of the model, which is dense now.
        features: moments of the dense model, with products for `least-squares`.
        kind: a key of REPAIRS.
        add_bias: give a bias to outputs that have none.
        damping: of the fit, as a share of the mean square of the features.
    """

    def __init__(
        self, groups: Groups, features: Sequence[Features], kind: str, *, add_bias: bool = False, damping: float = 1e-3
    ) -> None:
        self._groups, self._features, self._kind, self.damping = groups, features, kind, damping
        self._weights = [one.weight for one in groups.sublayers]  # of the dense model, whatever becomes of it
        self._biases = [None if one.output.bias is None else one.output.bias.data for one in groups.sublayers]
        self._may = [kind != "none" and (add_bias or bias is not None) for bias in self._biases]
        self._crossed = [self._cross(index) for index in range(len(features) * (kind == "least-squares"))]

    def damped(self, damping: float) -> Repairer:
        """The same with another damping of the fit."""
        found = copy(self)
        found.damping = damping
        return found

    def repairs(self, kept: Tensor) -> dict[int, Repair]:
        """By index of a sublayer that lost units of these [units], bool, what stands for its output layer.

        `bias`: bias + W_gone E[x_gone] (FLAP, equation 4). `least-squares`: the kept columns and, where there may be
        one, the bias that minimise the squared distance to the dense output over the calibration tokens.

        Raises:
            SolverError: the features' moments are not finite.
        """
        found = {index: self._repair(index, mine) for index, mine in enumerate(self._groups.split(kept))}
        return {index: repair for index, repair in found.items() if repair is not None}

    def moved(self, repairs: Mapping[int, Repair], before: Tensor, kept: Tensor) -> dict[int, Repair]:
        """Repairs of units [units] that stay, where `repairs` are those of others: only what differs is computed."""
        found = dict(repairs)
        pairs = zip(self._groups.split(before), self._groups.split(kept), strict=True)
        for index, (old, mine) in enumerate(pairs):
            if not torch.equal(old, mine):
                found.pop(index, None)
                if (repair := self._repair(index, mine)) is not None:
                    found[index] = repair
        return found

    def _repair(self, index: int, mine: Tensor) -> Repair | None:
        """Of one sublayer and its units that stay, None where there is nothing to mend or no way to."""
        if mine.all() or self._kind == "none":
            return None
        columns = self._groups.sublayers[index].columns
        stays, gone = columns[mine].flatten(), columns[~mine].flatten()
        weight, mean = self._weights[index], self._features[index].mean
        if self._kind == "least-squares" and len(stays):
            return self._fitted(index, stays)
        if self._may[index]:
            return Repair(bias=self._biased(index, weight[:, gone].double() @ mean[gone]))
        return None

    def _biased(self, index: int, constant: Tensor) -> Tensor:
        bias = self._biases[index]
        return (constant if bias is None else constant + bias.double()).to(self._weights[index].dtype)

    def _cross(self, index: int) -> tuple[Tensor, Tensor]:
        """Mean of the features where a bias can hold it, and the dense outputs' covariance with them; both fp64."""
        moments = self._features[index]
        assert moments.products is not None
        centre = moments.mean if self._may[index] else torch.zeros_like(moments.mean)
        covariance = moments.products - torch.outer(centre, centre)  # [features, features], of one sublayer at a time
        return centre, self._weights[index].double() @ covariance  # [out, features]

    def _fitted(self, index: int, stays: Tensor) -> Repair:
        weight, moments = self._weights[index], self._features[index]
        assert moments.products is not None
        mean, (centre, crossed) = moments.mean, self._crossed[index]
        covariance = moments.products[stays][:, stays] - torch.outer(centre[stays], centre[stays])
        dense, inner = weight.double(), covariance
        damping = self.damping * inner.diagonal().mean().clamp_min(1e-30)
        # what is left of W C = W' C_kept, shrunk towards the columns as they are
        inner.diagonal().add_(damping)
        target = crossed[:, stays] + damping * dense[:, stays]
        factor, failed = torch.linalg.cholesky_ex(inner)
        if failed:
            one = self._groups.sublayers[index]
            raise SolverError(f"--repair least-squares: block {one.block}, {one.name}: its features cannot be fitted")
        fitted = torch.cholesky_solve(target.t(), factor).t()
        if not self._may[index]:
            return Repair(fitted.to(weight.dtype))
        return Repair(fitted.to(weight.dtype), self._biased(index, dense @ mean - fitted @ mean[stays]))
