"""Exactly k entries of a whole matrix, scored twice and written once, without its scores ever being in memory.

A sample of the scores gives two bounds with the k-th lowest score between them, save for bad luck. The first pass
counts what is below and gathers the few scores in between; sorted, they give the k-th. The second pass scores again and
masks. Of equal scores the lower place in row-major order goes first: where not all of them go, one more pass counts
them tile by tile.

    pruned = prune_layer(weight, weight.numel() // 2, wanda, Operands(columns=(X,)))
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpmetric.kernels.launch import Operands, on, outputs, scored
from gpmetric.kernels.ops import LAST, key

__all__ = ["prune_layer", "reference"]

_TILE = 2048
_SAMPLE = 2**16  # scores that the bounds are taken from
_MARGIN = 0.005  # of all entries, on either side of the k-th
_ROOM = 32  # one entry in so many may lie between the bounds
_GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, are spread evenly and hit no column more than others
_LEAST, _MOST = -(2**31), 2**31 - 1  # of all keys


@triton.jit
def _keys(W, matrices, columns, rows, numbers, which, row, column, n_in, inside, SCORE: tl.constexpr):
    """(weights, keys of their scores, which of these are not finite) at some places; NaN has the highest key."""
    w, score = scored(W, matrices, columns, rows, numbers, which, row, column, n_in, inside, SCORE)
    return w, tl.where(score == score, key(score), LAST), inside & ((tl.abs(score) < float("inf")) == 0)


@triton.jit
def _here(n_in, total, TILE: tl.constexpr):
    """(places in row-major order, their rows, their columns, which exist) of this program's tile."""
    first = tl.program_id(0).to(tl.int64) * TILE
    index = tl.arange(0, TILE)
    top = first // n_in
    offset = (first - top * n_in).to(tl.int32) + index  # so that the division of many is one of 32 bits
    down = offset // n_in
    return first + index, top + down, offset - down * n_in, first + index < total


@triton.jit(do_not_specialize=["which"])
def _sample(
    W, KEYS, PLACES, matrices, columns, rows, numbers, which, n_in, count, SCORE: tl.constexpr, TILE: tl.constexpr
):
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = index < count
    place = tl.load(PLACES + index, mask=inside, other=0)
    row = place // n_in
    _, keys, _ = _keys(W, matrices, columns, rows, numbers, which, row, place - row * n_in, n_in, inside, SCORE)
    tl.store(KEYS + index, keys, mask=inside)


@triton.jit(do_not_specialize=["which", "low", "high", "room"])
def _gather(
    W, FOUND, COUNTS, matrices, columns, rows, numbers, which, n_in, total, low, high, room,
    SCORE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """COUNTS: entries below `low`, entries from `low` to `high`, scores not finite. FOUND: keys of the second."""
    _, row, column, inside = _here(n_in, total, TILE)
    _, keys, bad = _keys(W, matrices, columns, rows, numbers, which, row, column, n_in, inside, SCORE)
    below = inside & (keys < low)
    between = (inside & (keys >= low) & (keys <= high)).to(tl.int32)
    tl.atomic_add(COUNTS, tl.sum(below.to(tl.int32), axis=0).to(tl.int64), sem="relaxed")
    first = tl.atomic_add(COUNTS + 1, tl.sum(between, axis=0).to(tl.int64), sem="relaxed")
    at = first + tl.cumsum(between, axis=0) - 1
    tl.store(FOUND + at, keys, mask=(between == 1) & (at < room))
    wrong = tl.sum(bad.to(tl.int32), axis=0)
    if wrong > 0:
        tl.atomic_add(COUNTS + 2, wrong.to(tl.int64))


@triton.jit(do_not_specialize=["which", "threshold"])
def _count_ties(
    W, TIES, matrices, columns, rows, numbers, which, n_in, total, threshold, SCORE: tl.constexpr, TILE: tl.constexpr
):
    _, row, column, inside = _here(n_in, total, TILE)
    _, keys, _ = _keys(W, matrices, columns, rows, numbers, which, row, column, n_in, inside, SCORE)
    tl.store(TIES + tl.program_id(0), tl.sum((inside & (keys == threshold)).to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["which", "threshold", "ties"])
def _apply(
    W, OUT, BEFORE, matrices, columns, rows, numbers, which, n_in, total, threshold, ties,
    SCORE: tl.constexpr, BITS: tl.constexpr, RANKED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """BEFORE: ties in the tiles before each, read where RANKED: otherwise all ties go."""
    place, row, column, inside = _here(n_in, total, TILE)
    w, keys, _ = _keys(W, matrices, columns, rows, numbers, which, row, column, n_in, inside, SCORE)
    gone = keys <= threshold
    if RANKED:
        equal = ((keys == threshold) & inside).to(tl.int32)
        rank = tl.load(BEFORE + tl.program_id(0)).to(tl.int64) + tl.cumsum(equal, axis=0)
        gone = (keys < threshold) | ((equal == 1) & (rank <= ties))
    if BITS:
        kept = tl.where(gone | (inside == 0), 0, 1).reshape(TILE // 8, 8)
        packed = tl.sum(kept << tl.arange(0, 8)[None, :], axis=1)
        byte = tl.program_id(0).to(tl.int64) * (TILE // 8) + tl.arange(0, TILE // 8)
        tl.store(OUT + byte, packed.to(tl.uint8), mask=byte < (total + 7) // 8)
    else:
        tl.store(OUT + place, tl.where(gone, 0.0, w), mask=inside)


def prune_layer(
    weight: Tensor,
    removed: int,
    score: triton.JITFunction,
    operands: Operands,
    *,
    out: Tensor | None = None,
    bits: bool = False,
    bad: Tensor | None = None,
) -> Tensor:
    """The weight with its `removed` lowest scores set to zero, of equal ones the lower place in row-major order first.

    Besides `out` it takes a 32nd of the weight's entries in int32.

    Args:
        weight: [out, in], contiguous, bf16, fp16 or fp32.
        removed: from 0 to the number of entries.
        score, operands, out, bad: as for `rows.prune_rows`.
        bits: return the mask instead, uint8 [(out * in + 7) // 8], of the entries in row-major order.

    Returns:
        `out`, or the mask.

    Raises:
        ValueError: a tensor or number that the kernels cannot take.
    """
    total, width = weight.numel(), weight.shape[1]
    out, bad = outputs(weight, operands, out, ((total + 7) // 8,) if bits else None, bad)
    if not 0 <= removed <= total:
        raise ValueError(f"removed must be from 0 to {total}, but got {removed}")
    given = (*operands, width, total)
    grid = (triton.cdiv(total, _TILE),)
    options = {"SCORE": score, "TILE": _TILE, "num_warps": 4, "enable_fp_fusion": False}
    with on(weight):
        threshold, ties, equal, wrong = _search(weight, removed, (*operands, width), options)
        bad += wrong
        before = bad  # not read
        if ties < equal:
            counted = torch.empty(grid[0], dtype=torch.int32, device=weight.device)
            _count_ties[grid](weight, counted, *given, threshold, **options)
            before = counted.cumsum(0, dtype=torch.int64) - counted
        _apply[grid](weight, out, before, *given, threshold, ties, BITS=bits, RANKED=ties < equal, **options)
    return out


def _search(weight: Tensor, removed: int, given: tuple[Any, ...], options: dict[str, Any]) -> tuple[int, int, int, int]:
    """(key, ties, equal, wrong): to go are scores below the key and the first `ties` of the `equal` ones at it; `wrong`
    scores are not finite.
    """
    total = weight.numel()
    low, high = _first_bounds(weight, removed, given, options) if removed else (_LEAST, _LEAST)
    least, most = _LEAST, _MOST  # the key lies between these for certain
    found = torch.empty(max(_SAMPLE, total // _ROOM), dtype=torch.int32, device=weight.device)
    while True:
        counts = torch.zeros(3, dtype=torch.int64, device=weight.device)
        grid = (triton.cdiv(total, _TILE),)
        _gather[grid](weight, found, counts, *given, total, low, high, len(found), **options)
        below, between, wrong = counts.tolist()
        if not removed:
            return _LEAST, 0, 0, wrong
        if removed <= below:
            low, high, most = least, low - 1, low - 1
        elif removed > below + between:
            low, high, least = high + 1, most, high + 1
        elif between > len(found) and low < high:  # many are alike
            least, most = low, high
            nearer = _bounds(found, (removed - below) / between)
            low, high = nearer if nearer != (low, high) else (low, (low + high) // 2)
        else:
            break
    if low == high:
        return low, removed - below, between, wrong
    order = found[:between].sort().values
    threshold = int(order[removed - below - 1])
    lower = int((order < threshold).sum())
    return threshold, removed - below - lower, int((order == threshold).sum()), wrong


def _first_bounds(weight: Tensor, removed: int, given: tuple[Any, ...], options: dict[str, Any]) -> tuple[int, int]:
    count = min(_SAMPLE, weight.numel())
    spread = torch.arange(count, dtype=torch.float64, device=weight.device) * _GOLDEN % 1
    keys = torch.empty(count, dtype=torch.int32, device=weight.device)
    places = (spread * weight.numel()).long()
    _sample[(triton.cdiv(count, _TILE),)](weight, keys, places, *given, count, **options)
    return _bounds(keys, removed / weight.numel())


def _bounds(keys: Tensor, share: float) -> tuple[int, int]:
    """The keys a little below and above a quantile."""
    order = keys.sort().values
    low, high = (min(max(int((share + margin) * len(order)), 0), len(order) - 1) for margin in (-_MARGIN, _MARGIN))
    return int(order[low]), int(order[high])


def reference(weight: Tensor, removed: int, scores: Tensor) -> Tensor:
    """The same in plain torch, of scores [out, in]."""
    order = scores.flatten().sort(stable=True).indices[:removed]
    return weight.flatten().scatter(0, order, 0).view_as(weight)
