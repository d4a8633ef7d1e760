"""N of each M consecutive inputs, scored, ranked and masked in one pass, each group by the thread that read it.

A tile is reshaped so that its last axes are the bits of a column's place in its group, and split along them into M
tensors, one per place. A score's rank among its group's M is then a sum of M - 1 comparisons; of equal scores the lower
column goes first. NaN ranks last.

    pruned = prune_pattern(weight, 2, 4, wanda, Operands(columns=(X,)))
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from gpmetric.kernels.launch import Job, Operands, on, outputs, processors, scored, table, told
from gpmetric.kernels.ops import LAST, key

__all__ = ["prune_pattern", "prune_pattern_together", "reference"]

_BLOCK = 2048  # columns of a tile at most


@triton.jit
def _places(tile, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """A tile [BLOCK] as GROUP tensors [BLOCK / GROUP], by place in the group. Splitting off the lowest bit first, each
    step's second halves come after its first halves, so that places are in order."""
    if GROUP == 2:
        parts = (tile.reshape(BLOCK // 2, 2),)
    elif GROUP == 4:
        parts = (tile.reshape(BLOCK // 4, 2, 2),)
    elif GROUP == 8:
        parts = (tile.reshape(BLOCK // 8, 2, 2, 2),)
    else:
        parts = (tile.reshape(BLOCK // 16, 2, 2, 2, 2),)
    for level in tl.static_range(4):
        if (1 << level) < GROUP:
            first = ()
            second = ()
            for i in tl.static_range(1 << level):
                low, high = tl.split(parts[i])
                first = first + (low,)
                second = second + (high,)
            parts = first + second
    return parts


@triton.jit
def _tile(parts, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The tile [BLOCK] that `_places` takes apart."""
    for level in tl.static_range(4):
        if (1 << level) < GROUP:
            joined = ()
            for i in tl.static_range(GROUP >> (level + 1)):
                joined = joined + (tl.join(parts[i], parts[i + (GROUP >> (level + 1))]),)
            parts = joined
    return parts[0].reshape(BLOCK)


@triton.jit
def _prune_block(
    W, OUT, BAD, matrices, columns, rows, numbers, which, n_in, row, start, removed,
    SCORE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some columns of a row; `start` is divisible by BLOCK."""
    column = start + tl.arange(0, BLOCK)
    inside = column < n_in
    w, score = scored(W, matrices, columns, rows, numbers, which, row, column, n_in, inside, SCORE)
    bad = tl.sum((inside & ((tl.abs(score) < float("inf")) == 0)).to(tl.int32), axis=0)
    if bad > 0:
        tl.atomic_add(BAD, bad.to(tl.int64))
    keys = _places(tl.where(score == score, key(score), LAST), GROUP, BLOCK)
    kept = ()
    for i in tl.static_range(GROUP):
        rank = tl.zeros_like(keys[0])
        for j in tl.static_range(GROUP):
            if j < i:
                rank += (keys[j] <= keys[i]).to(tl.int32)
            if j > i:
                rank += (keys[j] < keys[i]).to(tl.int32)
        kept = kept + ((rank >= removed).to(tl.int32),)
    keep = _tile(kept, GROUP, BLOCK)
    if BITS:
        packed = tl.sum(tl.where(inside, keep, 0).reshape(BLOCK // 8, 8) << tl.arange(0, 8)[None, :], axis=1)
        byte = start // 8 + tl.arange(0, BLOCK // 8)
        width = (n_in + 7) // 8
        tl.store(OUT + row * width + byte, packed.to(tl.uint8), mask=byte < width)
    else:
        tl.store(OUT + row * n_in + column, tl.where(keep != 0, w, 0.0), mask=inside)


@triton.jit(do_not_specialize=["which"])
def _prune_pattern(
    W, OUT, BAD, matrices, columns, rows, numbers, which, n_in,
    SCORE: tl.constexpr, BITS: tl.constexpr, REMOVED: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _prune_block(
        W, OUT, BAD, matrices, columns, rows, numbers, which, n_in, tl.program_id(0).to(tl.int64),
        tl.program_id(1) * BLOCK, REMOVED, SCORE, BITS, GROUP, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["which"])
def _prune_pattern_together(
    TABLE, W, OUT, BAD, matrices, columns, rows, numbers, which, n_in,
    SCORE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """TABLE: as `launch.table` has it; the pointers tell the types of those in it."""
    first, step, n_out, removed, _, pointers = told(TABLE, (W, OUT, BAD), matrices, columns, rows, numbers)
    for row in range(first, n_out, step):
        row += tl.full((), 0, tl.int64)  # a place may be beyond 32 bits
        for start in range(0, n_in, BLOCK):
            _prune_block(
                pointers[0][0], pointers[0][1], pointers[0][2], pointers[1], pointers[2], pointers[3], pointers[4],
                which, n_in, row, start, removed, SCORE, BITS, GROUP, BLOCK,
            )  # fmt: skip


def prune_pattern(
    weight: Tensor,
    keep: int,
    group: int,
    score: triton.JITFunction,
    operands: Operands,
    *,
    out: Tensor | None = None,
    bits: bool = False,
    bad: Tensor | None = None,
) -> Tensor:
    """The weight with all but the `keep` highest scores of each `group` consecutive inputs set to zero.

    Args:
        weight: [out, in], contiguous, bf16, fp16 or fp32; `in` is divisible by `group`.
        keep: at least 1 and below `group`.
        group: 2, 4, 8 or 16.
        score, operands, out, bits, bad: as for `rows.prune_rows`.

    Returns:
        `out`, or the mask.

    Raises:
        ValueError: a tensor or number that the kernel cannot take.
    """
    height, width = weight.shape
    out, bad = outputs(weight, operands, out, (height, (width + 7) // 8) if bits else None, bad)
    whole = isinstance(keep, int) and isinstance(group, int)
    if not whole or group not in (2, 4, 8, 16) or not 0 < keep < group or width % group:
        raise ValueError(
            f"{keep}:{group} of {width} inputs: group must be 2, 4, 8 or 16 and divide them, 0 < keep < group"
        )
    block = _block(width)
    with on(weight):
        _prune_pattern[(height, triton.cdiv(width, block))](
            weight, out, bad, *operands, width,
            SCORE=score, BITS=bits, REMOVED=group - keep, GROUP=group, BLOCK=block, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def prune_pattern_together(jobs: Sequence[Job], group: int, score: triton.JITFunction, *, bits: bool = False) -> None:
    """`prune_pattern` of several weights of one width in one launch.

    Args:
        jobs: that `launch.check` accepts and `launch.together` has in one list; of each `group` columns `removed` go.
        group, score, bits: as for `prune_pattern`.
    """
    first, width = jobs[0], jobs[0].weight.shape[1]
    found, programs = table(jobs, _resident(first.weight))
    with on(first.weight):
        _prune_pattern_together[(programs,)](
            found, first.weight, first.out, first.bad, *first.operands, width,
            SCORE=score, BITS=bits, GROUP=group, BLOCK=_block(width), num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def _block(width: int) -> int:
    """Columns of a tile."""
    return min(_BLOCK, triton.next_power_of_2(max(width, 128)))


def _resident(weight: Tensor) -> int:
    """As many as a device holds at once; two where there is none."""
    return 2 if weight.device.type != "cuda" else 16 * processors(weight)


def reference(weight: Tensor, keep: int, group: int, scores: Tensor) -> Tensor:
    """The same in plain torch, of scores [out, in]."""
    order = scores.reshape(-1, group).sort(dim=1, stable=True).indices[:, : group - keep]
    return weight.reshape(-1, group).scatter(1, order, 0).view_as(weight)
