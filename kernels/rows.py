"""Score, select and mask in one pass: each program prunes one row, and the row is read from memory once.

The scores of a row stay in registers. Any threshold with exactly `removed` scores at or below it serves, so that the
search may stop early: regula falsi (the Illinois variant) on the scores' keys, integers in whose scale heavy-tailed
scores are spread evenly. Where ties leave no such threshold, the lower column goes first, as a stable sort has it. NaN
comes last.

    pruned = prune_rows(weight, weight.shape[1] // 2, wanda, Operands(columns=(X,)))
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gpmetric.kernels.launch import Operands, on, outputs, scored
from gpmetric.kernels.ops import key, number

__all__ = ["prune_rows", "reference"]

_STEPS = tl.constexpr(24)  # of regula falsi, before bisection ends the search within 32 more
_ALL = tl.constexpr(1 << 30)  # ties: all of them
_WARPS = {1024: 4, 8192: 8}  # widest row -> warps; 16 beyond


@triton.jit
def _scores(
    W, matrices, columns, rows, numbers, which, row, n_in,
    SCORE: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The scores of one row, CHUNKS tensors [BLOCK]; NaN beyond its end."""
    scores = ()
    for chunk in tl.static_range(CHUNKS):
        column = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = column < n_in
        _, score = scored(W, matrices, columns, rows, numbers, which, row, column, n_in, inside, SCORE)
        scores = scores + (tl.where(inside, score, float("nan")),)
    return scores


@triton.jit
def _count(scores, threshold, CHUNKS: tl.constexpr):
    """How many scores are at or below a threshold; in fp32, exact below 2**24, which takes fewer instructions."""
    found = (scores[0] <= threshold).to(tl.float32)
    for chunk in tl.static_range(1, CHUNKS):
        found += (scores[chunk] <= threshold).to(tl.float32)
    return tl.sum(found, axis=0).to(tl.int32)


@triton.jit
def _extremes(scores, CHUNKS: tl.constexpr):
    """Keys of the lowest and the highest score, NaN apart."""
    low = tl.where(scores[0] == scores[0], scores[0], float("inf"))
    high = tl.where(scores[0] == scores[0], scores[0], float("-inf"))
    for chunk in tl.static_range(1, CHUNKS):
        one = scores[chunk]
        low = tl.minimum(low, tl.where(one == one, one, float("inf")))
        high = tl.maximum(high, tl.where(one == one, one, float("-inf")))
    return key(tl.min(low, axis=0)).to(tl.int64), key(tl.max(high, axis=0)).to(tl.int64)


@triton.jit
def _threshold(scores, wanted, valid, CHUNKS: tl.constexpr):
    """(threshold, ties): the `wanted` lowest of the `valid` scores are those below it and the first `ties` equal to it.

    At every step `below` < wanted <= `above`, the numbers of scores at or below the keys `low` and `high`.
    """
    low, high = _extremes(scores, CHUNKS)
    low -= 1
    below = 0
    above = valid
    middle = high
    found = above
    weight_low = 1.0
    weight_high = 1.0
    moved = 0
    step = 0
    while (high - low > 1) & (found != wanted):
        left = (wanted - below).to(tl.float32) * weight_low
        right = (above - wanted).to(tl.float32) * weight_high
        share = tl.where(step < _STEPS, left / (left + right), 0.5)
        width = high - low
        middle = low + tl.minimum(tl.maximum((width.to(tl.float32) * share).to(tl.int64), 1), width - 1)
        found = _count(scores, number(middle.to(tl.int32)), CHUNKS)
        under = found < wanted
        weight_high = tl.where(under & (moved == 1), weight_high * 0.5, 1.0)  # an end that stays again counts half
        weight_low = tl.where((found > wanted) & (moved == 2), weight_low * 0.5, 1.0)
        moved = tl.where(under, 1, 2)
        below = tl.where(under, found, below)
        low = tl.where(under, middle, low)
        above = tl.where(under, above, found)
        high = tl.where(under, high, middle)
        step += 1
    exact = found == wanted
    return number(tl.where(exact, middle, high).to(tl.int32)), tl.where(exact, _ALL, wanted - below)


@triton.jit
def _write(OUT, W, row, n_in, column, dropped, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """One chunk of the masked weight; with BITS of the mask, the lowest column in the lowest bit."""
    inside = column < n_in
    if BITS:
        kept = tl.where(dropped | (column >= n_in), 0, 1).reshape(BLOCK // 8, 8)
        packed = tl.sum(kept << tl.arange(0, 8)[None, :], axis=1)
        width = (n_in + 7) // 8
        place = tl.min(column, axis=0) // 8 + tl.arange(0, BLOCK // 8)
        tl.store(OUT + row * width + place, packed.to(tl.uint8), mask=place < width)
    else:
        w = tl.load(W + row * n_in + column, mask=inside, other=0.0)  # from the cache: to hold it would take registers
        tl.store(OUT + row * n_in + column, tl.where(dropped, 0.0, w.to(tl.float32)), mask=inside)


@triton.jit(do_not_specialize=["which", "removed"])
def _prune_rows(
    W, OUT, BAD, matrices, columns, rows, numbers, which, n_in, removed,
    SCORE: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scores = _scores(W, matrices, columns, rows, numbers, which, row, n_in, SCORE, BLOCK, CHUNKS)
    finite = (tl.abs(scores[0]) < float("inf")).to(tl.int32)
    valid = (scores[0] == scores[0]).to(tl.int32)
    for chunk in tl.static_range(1, CHUNKS):
        finite += (tl.abs(scores[chunk]) < float("inf")).to(tl.int32)
        valid += (scores[chunk] == scores[chunk]).to(tl.int32)
    bad = n_in - tl.sum(finite, axis=0)
    if bad > 0:
        tl.atomic_add(BAD, bad.to(tl.int64))
    valid = tl.sum(valid, axis=0)
    wanted = tl.minimum(removed, valid)
    nans = removed - wanted  # to go when all others are gone
    threshold, ties = _threshold(scores, wanted, valid, CHUNKS)
    if (ties == _ALL) & (nans == 0):
        for chunk in tl.static_range(CHUNKS):
            column = chunk * BLOCK + tl.arange(0, BLOCK)
            _write(OUT, W, row, n_in, column, scores[chunk] <= threshold, BITS, BLOCK)
    else:
        tied = 0
        lost = 0
        for chunk in tl.static_range(CHUNKS):
            column = chunk * BLOCK + tl.arange(0, BLOCK)
            one = scores[chunk]
            equal = (one == threshold).to(tl.int32)
            nan = ((one != one) & (column < n_in)).to(tl.int32)
            first = (equal == 1) & (tied + tl.cumsum(equal, axis=0) <= ties)
            gone = (nan == 1) & (lost + tl.cumsum(nan, axis=0) <= nans)
            _write(OUT, W, row, n_in, column, (one < threshold) | first | gone, BITS, BLOCK)
            tied += tl.sum(equal, axis=0)
            lost += tl.sum(nan, axis=0)


def _plan(width: int) -> tuple[int, int, int]:
    """(columns of a chunk, chunks, warps) for rows of that width; above 256 columns, chunks waste an eighth at most.

    A power of two would waste 49 % of a row of 11,008, and its registers spill at 32,768.
    """
    block = min(4096, triton.next_power_of_2(max(width, 16)))
    while block > 256 and triton.cdiv(width, block) * block > width * 9 // 8:
        block //= 2
    warps = next((warps for widest, warps in _WARPS.items() if width <= widest), 16)
    return block, triton.cdiv(width, block), warps


def prune_rows(
    weight: Tensor,
    removed: int,
    score: triton.JITFunction,
    operands: Operands,
    *,
    out: Tensor | None = None,
    bits: bool = False,
    bad: Tensor | None = None,
) -> Tensor:
    """The weight with the `removed` lowest scores of every row set to zero, of equal scores the lower column first.

    Args:
        weight: [out, in], contiguous, bf16, fp16 or fp32.
        removed: from 0 to `in`.
        score: a jit function with the signature of `wanda` in `launch`, called in fp32.
        operands: what it reads besides the weight.
        out: where to write, of the weight's shape and dtype; the weight itself for in place. A new tensor by default.
        bits: return the mask instead, uint8 [out, (in + 7) // 8]: bit j % 8 of byte j // 8 is set where column j stays.
        bad: int64 [1], to which the number of scores that are NaN or infinite is added.

    Returns:
        `out`, or the mask.

    Raises:
        ValueError: a tensor or number that the kernel cannot take.
    """
    height, width = weight.shape
    out, bad = outputs(weight, operands, out, (height, (width + 7) // 8) if bits else None, bad)
    if not 0 <= removed <= width:
        raise ValueError(f"removed must be from 0 to {width}, but got {removed}")
    block, chunks, warps = _plan(width)
    with on(weight):
        _prune_rows[(height,)](
            weight, out, bad, *operands, width, removed,
            SCORE=score, BITS=bits, BLOCK=block, CHUNKS=chunks, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def reference(weight: Tensor, removed: int, scores: Tensor) -> Tensor:
    """The same in plain torch, of scores [out, in]."""
    return weight.scatter(1, scores.sort(dim=1, stable=True).indices[:, :removed], 0)
