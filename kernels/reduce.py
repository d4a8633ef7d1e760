"""Sums and extremes of a formula's values over rows, columns or the matrix, without the values ever being in memory.

They are what `rowsum`, `colsum`, `rownorm`, `colnorm`, `mms` and `zsn` need before a score can be computed. Every sum
is taken in an order that depends on the shape only, so that a second run gives the same bits.

    sums = row_sums(weight, wanda, Operands(columns=(X,)))
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpmetric.kernels.launch import Layout, Operands, check, gathered, on, scored

__all__ = ["column_sums", "extremes", "moments", "prepare", "row_sums"]

_COLUMNS = 1024  # of a row at once
_SPLITS = 64  # parts that the rows of a column sum are cut into


@triton.jit(do_not_specialize=["which"])
def _reduce_rows(
    W, SUM, LOW, HIGH, matrices, columns, rows, numbers, which, mean, reach, n_in,
    SCORE: tl.constexpr, SQUARES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum, lowest and highest value of a row; with SQUARES the sum of ((value - mean) / reach)**2."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    low = tl.full([BLOCK], float("inf"), tl.float32)
    high = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, n_in, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < n_in
        _, value = scored(W, matrices, columns, rows, numbers, which, row, column, n_in, inside, SCORE)
        low = tl.minimum(low, tl.where(inside, value, float("inf")), propagate_nan=tl.PropagateNan.ALL)
        high = tl.maximum(high, tl.where(inside, value, float("-inf")), propagate_nan=tl.PropagateNan.ALL)
        if SQUARES:
            value = tl.div_rn(value - tl.load(mean), tl.load(reach))
            value = value * value
        total += tl.where(inside, value, 0.0)
    # in fp64: the order, which is Triton's and not the same in every kernel, does not show
    tl.store(SUM + row, tl.sum(total.to(tl.float64), axis=0).to(tl.float32))
    lost = tl.sum((low != low).to(tl.int32), axis=0) > 0  # tl.min passes over a NaN
    tl.store(LOW + row, tl.where(lost, float("nan"), tl.min(low, axis=0)))
    tl.store(HIGH + row, tl.where(lost, float("nan"), tl.max(high, axis=0)))


@triton.jit(do_not_specialize=["which", "n_out", "share"])
def _sum_columns(
    W, PART, matrices, columns, rows, numbers, which, n_out, n_in, share, SCORE: tl.constexpr, BLOCK: tl.constexpr
):
    """The sums of `share` rows of each column."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n_in
    first = tl.program_id(1) * share
    total = tl.zeros([BLOCK], tl.float32)
    row = first.to(tl.int64)
    for _line in range(first, tl.minimum(first + share, n_out)):
        _, value = scored(W, matrices, columns, rows, numbers, which, row, column, n_in, inside, SCORE)
        total += value
        row += 1
    tl.store(PART + tl.program_id(1).to(tl.int64) * n_in + column, total, mask=inside)


def _by_row(
    weight: Tensor,
    part: triton.JITFunction,
    operands: Operands,
    mean: Tensor | None = None,
    reach: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums, lowest and highest values [out] of a part; of its squares where mean and reach are given."""
    check(weight, operands)
    height, width = weight.shape
    sums, low, high = torch.empty(3, height, dtype=torch.float32, device=weight.device).unbind()
    with on(weight):
        _reduce_rows[(height,)](
            weight, sums, low, high, *operands, sums if mean is None else mean, sums if reach is None else reach, width,
            SCORE=part, SQUARES=mean is not None, BLOCK=min(_COLUMNS, triton.next_power_of_2(width)),
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return sums, low, high


def row_sums(weight: Tensor, part: triton.JITFunction, operands: Operands) -> Tensor:
    """[out], fp32: the sum of a part over the inputs of each row."""
    return _by_row(weight, part, operands)[0]


def column_sums(weight: Tensor, part: triton.JITFunction, operands: Operands) -> Tensor:
    """[in], fp32: the sum of a part over the outputs of each column."""
    check(weight, operands)
    height, width = weight.shape
    share = triton.cdiv(height, _SPLITS)
    splits = triton.cdiv(height, share)
    block = min(256, triton.next_power_of_2(width))
    partial = torch.empty(splits, width, dtype=torch.float32, device=weight.device)
    with on(weight):
        _sum_columns[(triton.cdiv(width, block), splits)](
            weight, partial, *operands, height, width, share,
            SCORE=part, BLOCK=block, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return partial.sum(dim=0)


def extremes(weight: Tensor, part: triton.JITFunction, operands: Operands) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of a part, [1] each; NaN where one value is."""
    _, low, high = _by_row(weight, part, operands)
    return low.amin().view(1), high.amax().view(1)


def moments(
    weight: Tensor, part: triton.JITFunction, operands: Operands
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What a z-score needs, [1] each: the lowest, highest and mean value, the largest distance from the mean, and the
    deviation in units of that: squares of values near 1e-25 would vanish in fp32.
    """
    sums, low, high = _by_row(weight, part, operands)
    low, high = low.amin().view(1), high.amax().view(1)
    mean = (sums.double().sum() / weight.numel()).float().view(1)
    reach = (high - mean).maximum(mean - low)
    squares, _, _ = _by_row(weight, part, operands, mean, reach)
    return low, high, mean, reach, (squares.double().sum() / weight.numel()).sqrt().float().view(1)


def prepare(weight: Tensor, named: Mapping[str, Tensor | None], layout: Layout, which: int = 0) -> Operands:
    """`gathered` operands, with the results of the formula's reductions among them.

    Raises:
        ValueError: an operand is missing or has another shape.
    """
    operands = gathered(weight, named, layout)
    part = layout.part
    for number, reduction, place in layout.steps[which] if layout.steps else ():
        one = operands._replace(which=number)
        if reduction in ("rowsum", "rownorm"):
            sums = row_sums(weight, part, one)
            operands.rows[place].copy_(sums.sqrt() if reduction == "rownorm" else sums)
        elif reduction in ("colsum", "colnorm"):
            sums = column_sums(weight, part, one)
            operands.columns[place].copy_(sums.sqrt() if reduction == "colnorm" else sums)
        else:
            results = extremes(weight, part, one) if reduction == "mms" else moments(weight, part, one)
            for result, slot in zip(results, operands.numbers[place:], strict=False):
                slot.copy_(result)
    return operands._replace(which=which)
