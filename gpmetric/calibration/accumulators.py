"""Running statistics of one linear layer: tensors in, tensors out, no hooks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gpmetric.errors import SolverError

__all__ = [
    "DAMPING",
    "GradientMoments",
    "InputMoments",
    "LayerStatistics",
    "TokenMoments",
    "curvature",
    "inverse_factor",
]

DAMPING = 0.01  # of the mean diagonal, as SparseGPT


@dataclass(frozen=True)
class LayerStatistics:
    """The operands of one layer that calibration measures; None where they were not asked for.

    X [in], D [in], and G, H, F [out, in], all fp32, as defined in `gpmetric.operands`; gram [in, in] is X^T X / n over
    the n calibration tokens, which the OBS solver factorises.
    """

    X: Tensor
    D: Tensor | None = None
    G: Tensor | None = None
    H: Tensor | None = None
    F: Tensor | None = None
    gram: Tensor | None = None

    @cached_property
    def factor(self) -> Tensor:
        """`inverse_factor` of the Gram matrix, [in, in], factorised once for all who use these statistics.

        Raises:
            SolverError: the Gram matrix cannot be factorised.
        """
        assert self.gram is not None, "an update needs the Gram matrix"
        return inverse_factor(self.gram)


class InputMoments:
    """Second moments of a layer's input; `gram` is kept only when asked for."""

    def __init__(self, width: int, device: torch.device, *, gram: bool) -> None:
        self.tokens = 0
        self.squares = torch.zeros(width, device=device)
        self.products = torch.zeros(width, width, device=device) if gram else None

    def add(self, inputs: Tensor) -> None:
        """Adds activations [..., in]; sums are fp32: squares of fp16 activations overflow above 256."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()  # [tokens, in]
        self.tokens += len(rows)
        if self.products is None:
            self.squares += rows.square().sum(dim=0)
        else:
            self.products.addmm_(rows.t(), rows)

    def rms(self) -> Tensor:
        """Root mean square per input feature, [in]."""
        squares = self.squares if self.products is None else self.products.diagonal()
        return (squares / max(1, self.tokens)).sqrt()

    def gram(self) -> Tensor | None:
        """X^T X / n, [in, in], or None when it was not collected."""
        return None if self.products is None else self.products / max(1, self.tokens)


class GradientMoments:
    """Mean absolute and mean squared gradient over sequences (GBLM's l1 statistic and the empirical Fisher diagonal).

    Squares are taken before averaging; with `accumulated`, H is the square of the mean gradient instead, which is the
    literal reading of the NSGA-II thesis and measurably worse.
    """

    def __init__(self, shape: torch.Size, device: torch.device, *, accumulated: bool = False) -> None:
        self.sequences = 0
        self.absolute = torch.zeros(shape, device=device)
        self.second = torch.zeros(shape, device=device)
        self.accumulated = accumulated

    def add(self, gradient: Tensor) -> None:
        """Adds the gradient [out, in] of one sequence's mean token loss."""
        gradient = gradient.float()
        self.sequences += 1
        self.absolute += gradient.abs()
        self.second += gradient if self.accumulated else gradient.square()

    def result(self) -> tuple[Tensor, Tensor]:
        """(G, H), each [out, in]."""
        count = max(1, self.sequences)
        second = self.second / count
        return self.absolute / count, second.square() if self.accumulated else second


class TokenMoments:
    """The empirical Fisher diagonal with every token an observation of its own, at the price of one more product.

    A sequence's gradient is the sum of its tokens' gradients g_t x_t^T. Where these are independent, the square of the
    sum and the sum of the squares have the same expectation, but the second has far less noise: H of N sequences of L
    tokens rests on N observations, this on N * L.
    """

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        self.squares = torch.zeros(shape, device=device)

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Adds one sequence: a layer's inputs [..., in], and the loss's gradients of its outputs [..., out]."""
        inputs = inputs.reshape(-1, inputs.shape[-1]).float().square()
        gradients = gradients.reshape(-1, gradients.shape[-1]).float().square()
        self.squares.addmm_(gradients.t(), inputs)

    def result(self, sequences: int) -> Tensor:
        """F [out, in]."""
        return self.squares / max(1, sequences)


def curvature(gram: Tensor) -> Tensor:
    """D [in]: 1 / diag((gram + damping)^-1), damping = 0.01 * mean(diag).

    Source: Frantar and Alistarh 2023 (SparseGPT), equation 3, with each weight's own row of H^-1.
    """
    inverse = torch.cholesky_inverse(_cholesky(gram))
    return 1 / inverse.diagonal()


def inverse_factor(gram: Tensor) -> Tensor:
    """Upper Cholesky factor U [in, in] of the damped inverse Gram matrix, U^T U = (gram + damping)^-1.

    Source: SparseGPT, section 3.3: row i of U holds what pruning column i must add to the columns after it.
    """
    inverse = torch.cholesky_inverse(_cholesky(gram))
    factor, info = torch.linalg.cholesky_ex(inverse, upper=True)
    if info.item() or not torch.isfinite(factor).all():
        raise SolverError("the inverse of a Gram matrix could not be factorised")
    return factor


def _cholesky(gram: Tensor) -> Tensor:
    """Lower factor of the damped matrix; damping grows tenfold, at most four times, until it is positive definite."""
    if not torch.isfinite(gram).all():
        raise SolverError("a Gram matrix holds NaN or infinity: the model's activations overflow")
    mean = gram.diagonal().mean()
    mean = mean.where(mean > 1e-30, 1)  # all inputs zero: any damping will do, but its inverse must be finite in fp32
    for attempt in range(5):
        damping = DAMPING * 10**attempt * mean
        factor, info = torch.linalg.cholesky_ex(gram + damping * torch.eye(len(gram), device=gram.device))
        if not info.item():
            return factor
    raise SolverError(f"a Gram matrix [{len(gram)}, {len(gram)}] is not positive definite even at 100 times its mean")
