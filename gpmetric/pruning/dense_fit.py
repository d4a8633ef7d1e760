"""What a layer of a pruned model must be to give there what the dense model gives: `--fit dense`."""

from __future__ import annotations

import torch
from torch import Tensor

from gpmetric.calibration.accumulators import LayerStatistics, damped_factor
from gpmetric.operands import CROSS

__all__ = ["dense_goal"]

# Damping, in that of the solvers: few tokens tell little of what the other inputs would be. Excess on ptb-valid of alps
# at 60 % with 1, 10 and 100 times: SmolLM2-135M, 48 windows of 256, 0.751, 0.675 and 0.738 (fitted to its own outputs
# 0.794). Mean of 0.6 and 2:4 on four small models, in SparseGPT's, with 1, 3, 10, 30 and 100 times: 16 windows 0.583,
# 0.578, 0.561, 0.563, 0.584; 32 0.534, 0.532, 0.527, 0.543, 0.558; 64 0.526, 0.529, 0.532, 0.540, 0.558 (fitted to
# their own outputs 0.655, 0.622, 0.626): no size asks for another (benchmarks/results.csv, `calibration`).
_DAMPING = 10


@torch.no_grad()
def dense_goal(weight: Tensor, statistics: LayerStatistics) -> Tensor:
    """The weight [out, in], fp32, that gives best on a layer's inputs in the pruned model what it gives in the dense.

    The least squares of W' X^T against W X_dense^T: W' = W C A^-1 with A = X^T X / n and C = X_dense^T X / n, both with
    a tenth of A's mean diagonal added. Errors of the layers before are made up for, as far as inputs tell of them.

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
    return weight.float() + torch.cholesky_solve(change.t(), damped_factor(gram, _DAMPING)).t()
