"""What a layer of a pruned model must be to give there what the dense model gives: `--fit dense`."""

from __future__ import annotations

import torch
from torch import Tensor

from gpmetric.calibration.accumulators import LayerStatistics, damped_factor
from gpmetric.operands import CROSS

__all__ = ["dense_goal"]


@torch.no_grad()
def dense_goal(weight: Tensor, statistics: LayerStatistics) -> Tensor:
    """The weight [out, in], fp32, that gives best on a layer's inputs in the pruned model what it gives in the dense.

    The least squares of W' X^T against W X_dense^T: W' = W C A^-1 with A = X^T X / n and C = X_dense^T X / n, both with
    the damping of the solvers. Errors of the layers before are made up for by it, as far as inputs tell of them.

    Args:
        weight: [out, in], of the dense model.
        statistics: of the layer's inputs in the pruned model; without `cross`, the weight is its own goal.

    Raises:
        SolverError: the Gram matrix cannot be factorised.
    """
    cross, gram = statistics.values.get(CROSS), statistics.gram
    if cross is None:
        return weight
    assert gram is not None, "a fit needs the Gram matrix"
    change = weight.float() @ (cross - gram)
    return weight.float() + torch.cholesky_solve(change.t(), damped_factor(gram)).t()
