"""Running statistics of one linear layer, a row for each operand: tensors in, tensors out, no hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, Self

import torch
from torch import Tensor

from gpmetric.errors import SolverError
from gpmetric.lazy import lazy
from gpmetric.operands import GRAM, OPERANDS
from gpmetric.plugins import open_table

__all__ = [
    "ACCUMULATORS",
    "DAMPING",
    "AbsoluteGradients",
    "Accumulator",
    "FromGradients",
    "FromInputs",
    "FromRegion",
    "FromTokens",
    "InputMoments",
    "LayerStatistics",
    "RegionalGradients",
    "SquareOfMeanGradient",
    "SquaredGradients",
    "TokenMoments",
    "curvature",
    "damped",
    "damped_factor",
    "functions_of",
    "inverse_factor",
]

DAMPING = 0.01  # of the mean diagonal, as SparseGPT


class LayerStatistics:
    """What was measured of one layer, by name: operands as `gpmetric.operands` defines them, and the Gram matrix.

    Args:
        values: X, D [in], G, H, F [out, in] and so on, `gram` [in, in], X^T X / n over the n calibration tokens, and
            `cross` [in, in], X_dense^T X / n; fp32, None for what was not measured.

    Attributes:
        tokens: that the layer read, where it was counted.
        borrowed: names of what is an expert's siblings', since it read too little.
    """

    def __init__(self, **values: Tensor | None) -> None:
        self.values: Mapping[str, Tensor] = {name: value for name, value in values.items() if value is not None}
        self.tokens: int | None = None
        self.borrowed: tuple[str, ...] = ()

    def told(self, tokens: int | None, borrowed: Sequence[str]) -> Self:
        """The same, knowing how much was read."""
        self.tokens, self.borrowed = tokens, tuple(borrowed)
        return self

    def joined(self, others: Mapping[str, Tensor]) -> LayerStatistics:
        """With what was measured elsewhere, too."""
        return LayerStatistics(**self.values, **others).told(self.tokens, self.borrowed)

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    @property
    def operands(self) -> dict[str, Tensor]:
        """Those that a formula can use."""
        return {name: value for name, value in self.values.items() if name in OPERANDS}

    @property
    def gradients(self) -> dict[str, Tensor]:
        """Those measured on gradients of the dense model's loss."""
        return {name: value for name, value in self.operands.items() if OPERANDS[name].source == "gradients"}

    @property
    def gram(self) -> Tensor | None:
        """X^T X / n, [in, in], where it was kept."""
        return self.values.get(GRAM)

    @cached_property
    def factor(self) -> Tensor:
        """`inverse_factor` of the Gram matrix, [in, in], factorised once for all who use these statistics.

        Raises:
            SolverError: the Gram matrix cannot be factorised.
        """
        assert self.gram is not None, "an update needs the Gram matrix"
        return inverse_factor(self.gram)

    @staticmethod
    def factors(several: Sequence[LayerStatistics]) -> Tensor:
        """`factor` of each, [n, in, in], of layers with as many inputs; those that are missing are found together.

        Raises:
            SolverError: as `factor`.
        """
        missing = {id(one): one for one in several if "factor" not in vars(one)}
        if len(missing) > 1:
            found, fine = _inverse_factors(torch.stack([one[GRAM] for one in missing.values()]))
            for one, factor, known in zip(missing.values(), found, fine.tolist(), strict=True):
                if known:  # what needs more damping, or has none, is for `factor`
                    vars(one)["factor"] = factor
        return torch.stack([one.factor for one in several])


class InputMoments:
    """Second moments of a layer's input, and means of functions of it.

    Args:
        width: of the input.
        device: where sums are kept.
        gram: whether the Gram matrix is.
        functions: of activations [tokens, in], of the same shape.
    """

    def __init__(
        self, width: int, device: torch.device, *, gram: bool, functions: Iterable[Callable[[Tensor], Tensor]] = ()
    ) -> None:
        self.sums = {one: torch.zeros(width, device=device) for one in functions}
        self.tokens = 0
        self.squares = torch.zeros(width, device=device)
        self.products = torch.zeros(width, width, device=device) if gram else None

    def add(self, inputs: Tensor) -> None:
        """Adds activations [..., in]; sums are fp32: squares of fp16 activations overflow above 256."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()  # [tokens, in]
        self.tokens += len(rows)
        for function, total in self.sums.items():
            total += function(rows).sum(dim=0)
        if self.products is None:
            self.squares += rows.square().sum(dim=0)
        else:
            self.products.addmm_(rows.t(), rows)

    @classmethod
    def pooled(cls, parts: Sequence[InputMoments]) -> InputMoments:
        """Of all tokens that these have seen."""
        first = parts[0].squares
        found = cls(len(first), first.device, gram=parts[0].products is not None, functions=parts[0].sums)
        for part in parts:
            for function, total in part.sums.items():
                found.sums[function] += total
            found.tokens += part.tokens
            found.squares += part.squares
            if found.products is not None and part.products is not None:
                found.products += part.products
        return found

    def rms(self) -> Tensor:
        """Root mean square per input feature, [in]."""
        squares = self.squares if self.products is None else self.products.diagonal()
        return (squares / max(1, self.tokens)).sqrt()

    def mean(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Mean over tokens of one of the functions, [in]."""
        return self.sums[function] / max(1, self.tokens)

    def gram(self) -> Tensor:
        """X^T X / n, [in, in]; only where it was asked for."""
        assert self.products is not None
        return self.products / max(1, self.tokens)


class _Mean:
    """A sum [out, in] over sequences, fp32, of which the operand is the mean."""

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        self._sum = torch.zeros(shape, device=device)

    def result(self, sequences: int) -> Tensor:
        """The operand, over so many sequences."""
        return self._sum / max(1, sequences)


class AbsoluteGradients(_Mean):
    """G, mean absolute gradient: GBLM's l1 statistic as a mean."""

    def add(self, gradient: Tensor) -> None:
        """Adds the gradient [out, in] of one sequence's mean token loss, fp32."""
        self._sum += gradient.abs()


class SquaredGradients(_Mean):
    """H, mean squared gradient, the empirical Fisher diagonal: squares are taken before averaging."""

    def add(self, gradient: Tensor) -> None:
        """Adds the gradient [out, in] of one sequence's mean token loss, fp32."""
        self._sum += gradient.square()


class RegionalGradients(AbsoluteGradients):
    """R, mean absolute gradient of the norm of a block's own output: mean_n |d ||f(X_n)||_2 / dW|.

    A sample X_n is what the block f reads of one calibration sequence, [1, length, width]; the norm is over all entries
    of f(X_n).

    Source: Yang et al. 2025 (Wanda++), equations 2 and 3, where it is the root mean square over sequences.
    """


class SquareOfMeanGradient(_Mean):
    """Square of the mean gradient: the literal reading of the NSGA-II thesis, and measurably worse.

    `collect(..., accumulators=ACCUMULATORS | {"H": FromGradients(SquareOfMeanGradient)})` takes it for H.
    """

    def add(self, gradient: Tensor) -> None:
        """Adds the gradient [out, in] of one sequence's mean token loss, fp32."""
        self._sum += gradient

    def result(self, sequences: int) -> Tensor:
        return super().result(sequences).square()


class TokenMoments(_Mean):
    """F, the empirical Fisher diagonal with every token an observation of its own, at the price of one more product.

    A sequence's gradient is the sum of its tokens' gradients g_t x_t^T. Where these are independent, the square of the
    sum and the sum of the squares have the same expectation, but the second has far less noise: H of N sequences of L
    tokens rests on N observations, this on N * L.
    """

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Adds one sequence: a layer's inputs [..., in], and the loss's gradients of its outputs [..., out]."""
        inputs = inputs.reshape(-1, inputs.shape[-1]).float().square()
        gradients = gradients.reshape(-1, gradients.shape[-1]).float().square()
        self._sum.addmm_(gradients.t(), inputs)


class Accumulator(Protocol):
    """What takes a layer's observations sequence by sequence; `add` is given what the row of the operand says."""

    @property
    def add(self) -> Callable[..., None]: ...

    def result(self, sequences: int) -> Tensor:
        """The operand, over so many sequences."""


@dataclass(frozen=True)
class FromInputs:
    """Read off a layer's inputs at the end.

    Attributes:
        read: (their moments) -> the operand; where there is `of`, (its mean over tokens [in], fp32) -> the operand.
        pairs: whether it needs the Gram matrix.
        of: (activations [tokens, in], fp32, not to be written to) -> [tokens, in].
    """

    read: Callable[..., Tensor]
    pairs: bool = False
    of: Callable[[Tensor], Tensor] | None = None

    def result(self, moments: InputMoments) -> Tensor:
        """The operand."""
        return self.read(moments if self.of is None else moments.mean(self.of))


def functions_of(rows: Mapping[str, FromInputs]) -> list[Callable[[Tensor], Tensor]]:
    """What of activations these rows want the means of."""
    return [row.of for row in rows.values() if row.of is not None]


@dataclass(frozen=True)
class FromGradients:
    """Accumulated by `add(gradient [out, in])`, `start(shape [out, in], device)` being nothing yet."""

    start: Callable[[torch.Size, torch.device], Accumulator]


@dataclass(frozen=True)
class FromRegion:
    """Accumulated by `add(gradient [out, in])` of the norm of the block's output; `start` as of FromGradients."""

    start: Callable[[torch.Size, torch.device], Accumulator]


@dataclass(frozen=True)
class FromTokens:
    """Accumulated by `add(inputs [..., in], output gradients [..., out])`; `start` as of FromGradients."""

    start: Callable[[torch.Size, torch.device], Accumulator]


# operand, or the Gram matrix -> how it is accumulated
ACCUMULATORS: dict[str, FromInputs | FromGradients | FromTokens | FromRegion] = {
    "X": FromInputs(InputMoments.rms),
    "G": FromGradients(AbsoluteGradients),
    "H": FromGradients(SquaredGradients),
    "D": FromInputs(lambda moments: curvature(moments.gram()), pairs=True),
    "F": FromTokens(TokenMoments),
    "R": FromRegion(RegionalGradients),
    GRAM: FromInputs(InputMoments.gram, pairs=True),
}
open_table(
    "accumulator",
    ACCUMULATORS,
    (FromInputs, FromGradients, FromTokens, FromRegion),
    lazy("gpmetric.calibration.trial:check_accumulator"),
    makers=("start",),
)


def curvature(gram: Tensor) -> Tensor:
    """D [in]: 1 / diag((gram + damping)^-1), damping = 0.01 * mean(diag).

    Source: Frantar and Alistarh 2023 (SparseGPT), equation 3, with each weight's own row of H^-1.
    """
    inverse = torch.cholesky_inverse(damped_factor(gram))
    return 1 / inverse.diagonal()


def inverse_factor(gram: Tensor) -> Tensor:
    """Upper Cholesky factor U [in, in] of the damped inverse Gram matrix, U^T U = (gram + damping)^-1.

    Source: SparseGPT, section 3.3: row i of U holds what pruning column i must add to the columns after it.
    """
    inverse = torch.cholesky_inverse(damped_factor(gram))
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(inverse, upper=True)
    if info.item() or not torch.isfinite(factor).all():
        raise SolverError("the inverse of a Gram matrix could not be factorised")
    return factor


def _inverse_factors(grams: Tensor) -> tuple[Tensor, Tensor]:
    """`inverse_factor` of each of [n, in, in] with the least damping, and for which of them that served, [n]."""
    lower, first = torch.linalg.cholesky_ex(_with_damping(grams, 1))
    factors, second = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return factors, (first == 0) & (second == 0) & torch.isfinite(factors).flatten(1).all(dim=1)


def damped(gram: Tensor, times: int = 1) -> Tensor:
    """A Gram matrix [in, in] with 0.01 of its mean diagonal, or that many times as much, added to the diagonal.

    Raises:
        SolverError: it is not finite.
    """
    if not torch.isfinite(gram).all():
        raise SolverError("a Gram matrix holds NaN or infinity: the model's activations overflow")
    return _with_damping(gram, times)


def _with_damping(grams: Tensor, times: int) -> Tensor:
    """`damped` of [..., in, in]."""
    mean = grams.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
    mean = mean.where(mean > 1e-30, 1)  # all inputs zero: any damping will do, but its inverse must be finite in fp32
    return grams + DAMPING * times * mean * torch.eye(grams.shape[-1], device=grams.device)


def damped_factor(gram: Tensor, times: int = 1) -> Tensor:
    """Lower factor of `damped`; the damping grows tenfold, at most four times, until it is positive definite."""
    factor: Tensor
    for attempt in range(5):
        factor, info = torch.linalg.cholesky_ex(damped(gram, times * 10**attempt))
        if not info.item():
            return factor
    raise SolverError(f"a Gram matrix [{len(gram)}, {len(gram)}] is not positive definite even at 100 times its mean")
