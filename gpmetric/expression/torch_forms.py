"""Torch semantics of the primitives, protected so that every finite input has a value.

The Python export copies these sources, so each uses only tensor methods, TINY, EXP_LIMIT and other functions of this
file. Torch is not imported. NaN always propagates. Guards are arithmetic where they can be: on one AVX-512 thread a
comparison, a `where` or a `masked_fill` of an entry takes 0.4, 0.6 and 1.1 ns, `clamp` and the like 0.1 to 0.3 ns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

TINY = 1e-30  # smallest size of a divisor; normal in fp32
EXP_LIMIT = 80.0  # exp(80) = 5.5e34 stays below the fp32 maximum of 3.4e38


def torch_neg(x: Tensor) -> Tensor:
    return -x


def torch_abs(x: Tensor) -> Tensor:
    return x.abs()


def torch_sqr(x: Tensor) -> Tensor:
    return x * x


def torch_sqrt(x: Tensor) -> Tensor:
    """Square root of |x|."""
    return x.abs().sqrt_()


def torch_log(x: Tensor) -> Tensor:
    """Natural logarithm of |x| + TINY."""
    return x.abs().add_(TINY).log_()


def torch_exp(x: Tensor) -> Tensor:
    """Exponential of min(x, EXP_LIMIT)."""
    return x.clamp(max=EXP_LIMIT).exp_()


def torch_tanh(x: Tensor) -> Tensor:
    return x.tanh()


def torch_inv(x: Tensor) -> Tensor:
    """1 / x, with x replaced by TINY where |x| < TINY."""
    # 9.9999993e-31 is the fp32 number before TINY: the sum is negative from -TINY down
    return x.abs().clamp_(min=TINY).copysign_(x + 9.9999993e-31).reciprocal_()


def torch_mms(x: Tensor) -> Tensor:
    """Min-max scaling over the whole value to [0, 1]; 0 where the value is constant."""
    low = x.amin()
    span = x.amax() - low
    return ((x - low) / span).where(span != 0, 0.0)


def torch_zsn(x: Tensor) -> Tensor:
    """Z-score over the whole value (population deviation); 0 where the value is constant."""
    mean, low, high = x.mean(), x.amin(), x.amax()
    unit = (x - mean) / (high - mean).maximum(mean - low)  # in [-1, 1]: squares near 1e-50 would vanish in fp32
    return (unit / (unit * unit).mean().sqrt()).where(high - low != 0, 0.0)


def torch_rowsum(x: Tensor) -> Tensor:
    """Sum over the inputs of each row: [out, in] -> [out, 1]."""
    return x.sum(dim=1, keepdim=True)


def torch_colsum(x: Tensor) -> Tensor:
    """Sum over the outputs of each column: [out, in] -> [1, in]."""
    return x.sum(dim=0, keepdim=True)


def torch_rownorm(x: Tensor) -> Tensor:
    """Euclidean norm of each row: [out, in] -> [out, 1]."""
    return (x * x).sum(dim=1, keepdim=True).sqrt()


def torch_colnorm(x: Tensor) -> Tensor:
    """Euclidean norm of each column: [out, in] -> [1, in]."""
    return (x * x).sum(dim=0, keepdim=True).sqrt()


def torch_add(a: Tensor, b: Tensor) -> Tensor:
    return a + b


def torch_sub(a: Tensor, b: Tensor) -> Tensor:
    return a - b


def torch_mul(a: Tensor, b: Tensor) -> Tensor:
    return a * b


def torch_div(a: Tensor, b: Tensor) -> Tensor:
    """a / b, with b replaced by TINY where |b| < TINY."""
    return a / b.abs().clamp_(min=TINY).copysign_(b + 9.9999993e-31)  # as in torch_inv


def torch_max(a: Tensor, b: Tensor) -> Tensor:
    return a.maximum(b)


def torch_min(a: Tensor, b: Tensor) -> Tensor:
    return a.minimum(b)


def torch_pow(a: Tensor, b: Tensor) -> Tensor:
    """|a|**b, keeping the sign of a where b is an odd integer; |a| is at least TINY where b < 0."""
    # clamped to [1, 1], a number is 1 and NaN is NaN, which C's pow hides in 1**nan and nan**0
    least = (b < 0) * b.clamp(1, 1) * TINY
    size = a.abs().maximum(least).pow(b) * a.clamp(1, 1)
    signed = a.maximum(b.new_zeros(()).where(b % 2 != 1, float("-inf"))) + 0.0  # b odd: a, with 0 for -0; else >= 0
    return size.copysign(signed)
