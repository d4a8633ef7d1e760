"""The primitives of the formula language in Triton, fp32 in and out, guarded as `gpmetric.expression.primitives` says.

Square roots and quotients are rounded as IEEE 754 wants and no product is fused with a sum, so that formulas of these
are bit-equal to torch's. `exp`, `log`, `tanh` and `pow` rest on the hardware's approximations.

A score is a jit function like `wanda`: of a tensor of weights, and for each field of `Operands` the values that go with
them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "EXP_LIMIT",
    "LAST",
    "TINY",
    "Operands",
    "check",
    "key",
    "loaded",
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
    "outputs",
    "wanda",
]

TINY = tl.constexpr(1e-30)  # smallest size of a divisor
EXP_LIMIT = tl.constexpr(80.0)  # beyond it exp stays what it is there
LAST = tl.constexpr(0x7FFFFFFF)  # a key above all others, for NaN


class Operands(NamedTuple):
    """What a score reads besides the weight [out, in]; contiguous, of any float dtype, on the weight's device.

    Attributes:
        matrices: [out, in] each.
        columns: [in] each.
        rows: [out] each.
        numbers: [1] each.
    """

    matrices: tuple[Tensor, ...] = ()
    columns: tuple[Tensor, ...] = ()
    rows: tuple[Tensor, ...] = ()
    numbers: tuple[Tensor, ...] = ()


def outputs(
    weight: Tensor, operands: Operands, out: Tensor | None, bits: bool, bad: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What a launcher writes to, (`out` or the mask, `bad`), made where it is not given; its arguments are checked."""
    check(weight, operands, out)
    if bits:
        out = torch.empty(len(weight), (weight.shape[1] + 7) // 8, dtype=torch.uint8, device=weight.device)
    elif out is None:
        out = torch.empty_like(weight)
    return out, torch.zeros(1, dtype=torch.int64, device=weight.device) if bad is None else bad


def check(weight: Tensor, operands: Operands, out: Tensor | None = None) -> None:
    """Refuses what the kernels, which go by bare pointers, would read or write wrongly.

    Raises:
        ValueError: naming the tensor and what it must be.
    """
    height, width = weight.shape
    wanted = {"matrices": (height, width), "columns": (width,), "rows": (height,), "numbers": (1,)}
    tensors = [("weight", weight, (height, width))]
    tensors += [(field, one, wanted[field]) for field, found in operands._asdict().items() for one in found]
    tensors += [] if out is None else [("out", out, (height, width))]
    for name, tensor, shape in tensors:
        if tuple(tensor.shape) != shape or not tensor.is_contiguous() or tensor.device != weight.device:
            raise ValueError(
                f"{name} must be contiguous, {list(shape)}, on {weight.device}, but got {list(tensor.shape)} with "
                f"strides {tensor.stride()} on {tensor.device}"
            )
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} must be float32, bfloat16 or float16, but got {tensor.dtype}")
    if out is not None and out.dtype != weight.dtype:
        raise ValueError(f"out must be {weight.dtype} as the weight, but got {out.dtype}")


@triton.jit
def wanda(w, matrices, columns, rows, numbers):
    """abs(W)*X, where X is the first of `columns`."""
    return tl.abs(w) * columns[0]


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
def loaded(pointers, place, inside):
    """What each pointer has at a place, in fp32."""
    values = ()
    for i in tl.static_range(len(pointers)):
        values = values + (tl.load(pointers[i] + place, mask=inside, other=0.0).to(tl.float32),)
    return values


@triton.jit
def op_sqrt(x):
    """Square root of |x|."""
    return tl.sqrt_rn(tl.abs(x))


@triton.jit
def op_log(x):
    """Natural logarithm of |x| + TINY."""
    return tl.log(tl.abs(x) + TINY)


@triton.jit
def op_exp(x):
    """Exponential of min(x, EXP_LIMIT); NaN stays NaN."""
    return tl.exp(tl.where(x > EXP_LIMIT, EXP_LIMIT, x))


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
    """a / b, with b replaced by TINY where |b| < TINY."""
    return tl.div_rn(a, tl.where(tl.abs(b) < TINY, TINY, b))


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
    """|a|**b, keeping the sign of a where b is an odd integer; |a| is at least TINY where b < 0."""
    size = tl.abs(a)
    size = tl.where((b < 0) & (size < TINY), TINY, size)
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
