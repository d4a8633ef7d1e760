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

from gpmetric.kernels.ops import LAST, Operands, check, key, loaded

__all__ = ["prune_layer", "reference"]

_TILE = 2048
_SAMPLE = 2**16  # scores that the bounds are taken from
_MARGIN = 0.005  # of all entries, on either side of the k-th
_ROOM = 32  # one entry in so many may lie between the bounds
_GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, are spread evenly and hit no column more than others
_LEAST, _MOST = -(2**31), 2**31 - 1  # of all keys


@triton.jit
def _keys(W, matrices, columns, rows, numbers, place, n_in, total, SCORE: tl.constexpr):
    """Keys of the scores at some places in row-major order; NaN has the highest."""
    inside = place < total
    row = place // n_in
    column = place - row * n_in
    w = tl.load(W + place, mask=inside, other=0.0).to(tl.float32)
    score = SCORE(
        w, loaded(matrices, place, inside), loaded(columns, column, inside), loaded(rows, row, inside),
        loaded(numbers, column * 0, inside),
    )  # fmt: skip
    return tl.where(score == score, key(score), LAST), inside & ((tl.abs(score) < float("inf")) == 0)


@triton.jit
def _sample(
    W, KEYS, PLACES, matrices, columns, rows, numbers, n_in, total, count, SCORE: tl.constexpr, TILE: tl.constexpr
):
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    place = tl.load(PLACES + index, mask=index < count, other=0)
    keys, _ = _keys(W, matrices, columns, rows, numbers, place, n_in, total, SCORE)
    tl.store(KEYS + index, keys, mask=index < count)


@triton.jit(do_not_specialize=["low", "high", "room"])
def _gather(
    W, FOUND, COUNTS, matrices, columns, rows, numbers, n_in, total, low, high, room,
    SCORE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """COUNTS: entries below `low`, entries from `low` to `high`, scores not finite. FOUND: keys of the second."""
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    keys, bad = _keys(W, matrices, columns, rows, numbers, place, n_in, total, SCORE)
    below = (place < total) & (keys < low)
    between = ((place < total) & (keys >= low) & (keys <= high)).to(tl.int32)
    tl.atomic_add(COUNTS, tl.sum(below.to(tl.int32), axis=0).to(tl.int64))
    first = tl.atomic_add(COUNTS + 1, tl.sum(between, axis=0).to(tl.int64))
    at = first + tl.cumsum(between, axis=0) - 1
    tl.store(FOUND + at, keys, mask=(between == 1) & (at < room))
    wrong = tl.sum(bad.to(tl.int32), axis=0)
    if wrong > 0:
        tl.atomic_add(COUNTS + 2, wrong.to(tl.int64))


@triton.jit(do_not_specialize=["threshold"])
def _count_ties(
    W, TIES, matrices, columns, rows, numbers, n_in, total, threshold, SCORE: tl.constexpr, TILE: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    keys, _ = _keys(W, matrices, columns, rows, numbers, place, n_in, total, SCORE)
    tl.store(TIES + tl.program_id(0), tl.sum(((place < total) & (keys == threshold)).to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["threshold", "ties"])
def _apply(
    W, OUT, BEFORE, matrices, columns, rows, numbers, n_in, total, threshold, ties,
    SCORE: tl.constexpr, RANKED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """BEFORE: ties in the tiles before each, read where RANKED: otherwise all ties go."""
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    keys, _ = _keys(W, matrices, columns, rows, numbers, place, n_in, total, SCORE)
    gone = keys <= threshold
    if RANKED:
        equal = ((keys == threshold) & (place < total)).to(tl.int32)
        rank = tl.load(BEFORE + tl.program_id(0)).to(tl.int64) + tl.cumsum(equal, axis=0)
        gone = (keys < threshold) | ((equal == 1) & (rank <= ties))
    w = tl.load(W + place, mask=place < total, other=0.0)
    tl.store(OUT + place, tl.where(gone, 0.0, w.to(tl.float32)), mask=place < total)


def prune_layer(
    weight: Tensor,
    removed: int,
    score: triton.JITFunction,
    operands: Operands,
    *,
    out: Tensor | None = None,
    bad: Tensor | None = None,
) -> Tensor:
    """The weight with its `removed` lowest scores set to zero, of equal ones the lower place in row-major order first.

    Besides `out` it takes a 32nd of the weight's entries in int32.

    Args:
        weight: [out, in], contiguous, bf16, fp16 or fp32.
        removed: at least 1 and below the number of entries.
        score, operands, out, bad: as for `rows.prune_rows`.

    Raises:
        ValueError: a tensor or number that the kernels cannot take.
    """
    check(weight, operands, out)
    total, width = weight.numel(), weight.shape[1]
    if not 0 < removed < total:
        raise ValueError(f"removed must be at least 1 and below {total}, but got {removed}")
    out = torch.empty_like(weight) if out is None else out
    given = (*operands, width, total)
    grid = (triton.cdiv(total, _TILE),)
    options = {"SCORE": score, "TILE": _TILE, "num_warps": 4, "enable_fp_fusion": False}

    low, high = _first_bounds(weight, removed, given, options)
    least, most = _LEAST, _MOST  # the k-th key lies between these for certain
    found = torch.empty(max(_SAMPLE, total // _ROOM), dtype=torch.int32, device=weight.device)
    while True:
        counts = torch.zeros(3, dtype=torch.int64, device=weight.device)
        _gather[grid](weight, found, counts, *given, low, high, len(found), **options)
        below, between, wrong = counts.tolist()
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
    if bad is not None:
        bad += wrong

    if low == high:
        threshold, ties, equal = low, removed - below, between
    else:
        order = found[:between].sort().values
        threshold = int(order[removed - below - 1])
        ties = removed - below - int((order < threshold).sum())
        equal = int((order == threshold).sum())
    before = found  # not read
    if ties < equal:
        counted = torch.empty(grid[0], dtype=torch.int32, device=weight.device)
        _count_ties[grid](weight, counted, *given, threshold, **options)
        before = counted.cumsum(0, dtype=torch.int64) - counted
    _apply[grid](weight, out, before, *given, threshold, ties, RANKED=ties < equal, **options)
    return out


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
