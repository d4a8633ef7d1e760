"""The primitives of the formula language in Triton, fp32 in and out, guarded as `gpmetric.expression.primitives` says.

Square roots and quotients are rounded as IEEE 754 wants, which torch's square root on a CPU is not always, and no
product is fused with a sum. `exp`, `log` and `tanh` rest on the hardware's
approximations to the last bits; `pow` is 2**(b log2 a), off by as many bits as b log2 a has.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "LAST",
    "key",
    "number",
    "op_div",
    "op_exp",
    "op_inv",
    "op_log",
    "op_max",
    "op_min",
    "op_mms",
    "op_pow",
    "op_sqrt",
    "op_tanh",
    "op_zsn",
]

_TINY = tl.constexpr(1e-30)  # smallest size of a divisor
_EXP_LIMIT = tl.constexpr(80.0)  # beyond it exp stays what it is there
LAST = tl.constexpr(0x7FFFFFFF)  # a key above all others, for NaN


@triton.jit
def key(x):
    """An int32 in the order of fp32 numbers, -0 and 0 being one; not for NaN."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def number(key):
    """The fp32 number of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def op_sqrt(x):
    """Square root of |x|."""
    return tl.sqrt_rn(tl.abs(x))


@triton.jit
def op_log(x):
    """Natural logarithm of |x| + _TINY."""
    return tl.log(tl.abs(x) + _TINY)


@triton.jit
def op_exp(x):
    """Exponential of min(x, _EXP_LIMIT); NaN stays NaN."""
    return tl.exp(tl.where(x > _EXP_LIMIT, _EXP_LIMIT, x))


@triton.jit
def op_tanh(x):
    """Hyperbolic tangent; by its series near 0, where 1 - exp(-2x) cancels."""
    size = tl.abs(x)
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
    small = tl.exp(-2.0 * size)
    far = tl.div_rn(1.0 - small, 1.0 + small)
    return tl.where(size < 0.2, series, tl.where(x < 0, -far, far))


@triton.jit
def op_div(a, b):
    """a / b, with b replaced by _TINY where |b| < _TINY."""
    return tl.div_rn(a, tl.where(tl.abs(b) < _TINY, _TINY, b))


@triton.jit
def op_inv(x):
    """1 / x, guarded in the same way."""
    return op_div(tl.full(x.shape, 1.0, tl.float32), x)


@triton.jit
def op_max(a, b):
    """The larger; NaN where either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def op_min(a, b):
    """The smaller; NaN where either is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def op_pow(a, b):
    """|a|**b, keeping the sign of a where b is an odd integer; |a| is at least _TINY where b < 0."""
    size = tl.abs(a)
    size = tl.where((b < 0) & (size < _TINY), _TINY, size)
    power = tl.exp2(b * tl.log2(size))
    power = tl.where((b == 0) | (size == 1), 1.0, power)
    odd = b - 2.0 * tl.floor(b * 0.5) == 1.0
    power = tl.where((a < 0) & odd, -power, power)
    return tl.where((a == a) & (b == b), power, float("nan"))


@triton.jit
def op_mms(x, low, high):
    """x scaled to [0, 1] by the lowest and highest value there are; 0 where all are alike."""
    return tl.where(high - low != 0, tl.div_rn(x - low, high - low), 0.0)


@triton.jit
def op_zsn(x, low, high, mean, reach, spread):
    """z-score: `reach` is the largest distance from the mean, `spread` the deviation in units of it."""
    return tl.where(high - low != 0, tl.div_rn(tl.div_rn(x - mean, reach), spread), 0.0)
