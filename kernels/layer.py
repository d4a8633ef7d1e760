"""Exactly k entries of a whole matrix, scored twice and written once, without its scores ever being in memory.

A sample of the scores gives two bounds with the k-th lowest score between them, save for bad luck. The first pass
counts what is below and gathers the few scores in between, with their places; one program finds the k-th among them,
and of those equal to it the place of the last that goes. The second pass scores again and masks. Of equal scores the
lower place in row-major order goes first. Nothing of this waits for the host, which looks once in the end; where luck
was bad, it moves the bounds and the passes are made again. Where too many are alike to be gathered, one more pass
counts them tile by tile.

    pruned = prune_layer(weight, weight.numel() // 2, wanda, Operands(columns=(X,)))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpmetric.kernels.launch import Operands, on, outputs, scored
from gpmetric.kernels.ops import LAST, key

__all__ = ["LEAST", "MOST", "PICKED", "Search", "pick", "prune_layer", "reference"]

_TILE = 2048
_SAMPLE = 2**16  # scores that the bounds are taken from
_MARGIN = 0.005  # of all entries, on either side of the k-th
_ROOM = 32  # one entry in so many may lie between the bounds
_GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, are spread evenly and hit no column more than others
LEAST, MOST = -(2**31), 2**31 - 1  # of all keys
PICKED = 4096  # entries that the one program reads at once


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


@triton.jit(do_not_specialize=["which", "room"])
def _gather(
    W, KEYS, PLACES, COUNTS, BOUNDS, matrices, columns, rows, numbers, which, n_in, total, room,
    SCORE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """COUNTS: entries below two bounds, between them, and scores not finite. KEYS, PLACES: of what is between."""
    place, row, column, inside = _here(n_in, total, TILE)
    _, keys, bad = _keys(W, matrices, columns, rows, numbers, which, row, column, n_in, inside, SCORE)
    low, high = tl.load(BOUNDS), tl.load(BOUNDS + 1)
    below = inside & (keys < low)
    between = (inside & (keys >= low) & (keys <= high)).to(tl.int32)
    tl.atomic_add(COUNTS, tl.sum(below.to(tl.int32), axis=0).to(tl.int64), sem="relaxed")
    first = tl.atomic_add(COUNTS + 1, tl.sum(between, axis=0).to(tl.int64), sem="relaxed")
    at = first + tl.cumsum(between, axis=0) - 1
    found = (between == 1) & (at < room)
    tl.store(KEYS + at, keys, mask=found)
    tl.store(PLACES + at, place, mask=found)
    wrong = tl.sum(bad.to(tl.int32), axis=0)
    if wrong > 0:
        tl.atomic_add(COUNTS + 2, wrong.to(tl.int64))


@triton.jit
def _nth(KEYS, PLACES, count, wanted, low, high, among, only, BY_PLACE: tl.constexpr, PICKED: tl.constexpr):
    """(value, how many are lower, how many are not higher): the `wanted`-th lowest of the keys, or the places of one.

    Args:
        PLACES: of the keys; None where they are 0, 1, 2, ...
        count: of entries that are read.
        low, high: values below the lowest, and not below the highest.
        among: how many values there are.
        only: the key whose places are searched.

    At every step `below` < wanted <= `above`, the numbers of values at or below `low` and `high`; four values between
    them are counted at once, about where the wanted one is if values lie evenly, or evenly in every second step.
    """
    below, above = count * 0, among
    even = count < 0
    while (high - low > 1) & (above > wanted):
        width = (high - low).to(tl.float32)
        number = (above - below).to(tl.float32)
        share = (wanted - below).to(tl.float32) / number
        step = tl.maximum(tl.sqrt(tl.maximum(share * (1.0 - share), 0.0) / number), 0.35 / number)
        a = low + tl.minimum(tl.maximum(width * tl.where(even, 0.2, share - 1.5 * step), 0.0), width).to(tl.int64)
        b = low + tl.minimum(tl.maximum(width * tl.where(even, 0.4, share - 0.45 * step), 0.0), width).to(tl.int64)
        c = low + tl.minimum(tl.maximum(width * tl.where(even, 0.6, share + 0.45 * step), 0.0), width).to(tl.int64)
        d = low + tl.minimum(tl.maximum(width * tl.where(even, 0.8, share + 1.5 * step), 0.0), width).to(tl.int64)
        least, most = low + 1, high - 1
        values = (
            tl.minimum(tl.maximum(a, least), most), tl.minimum(tl.maximum(b, least), most),
            tl.minimum(tl.maximum(c, least), most), tl.minimum(tl.maximum(d, least), most),
        )  # fmt: skip
        first = tl.zeros((PICKED,), tl.int32)
        second, third, fourth = first, first, first
        for start in range(0, count, PICKED):
            index = start + tl.arange(0, PICKED)
            there = index < count
            value = tl.load(KEYS + index, mask=there, other=0).to(tl.int64)
            if BY_PLACE:
                there &= value == only
                value = index.to(tl.int64) if PLACES is None else tl.load(PLACES + index, mask=there, other=0)
            first += (there & (value <= values[0])).to(tl.int32)
            second += (there & (value <= values[1])).to(tl.int32)
            third += (there & (value <= values[2])).to(tl.int32)
            fourth += (there & (value <= values[3])).to(tl.int32)
        counts = (tl.sum(first, axis=0), tl.sum(second, axis=0), tl.sum(third, axis=0), tl.sum(fourth, axis=0))
        for one in tl.static_range(4):
            rises = (counts[one] < wanted) & (values[one] > low)
            falls = (counts[one] >= wanted) & (values[one] < high)
            below, low = tl.where(rises, counts[one], below), tl.where(rises, values[one], low)
            above, high = tl.where(falls, counts[one], above), tl.where(falls, values[one], high)
        even = even == 0
    return high, below, above


@triton.jit
def pick(KEYS, total, wanted, low, high, CHOSEN, PICKED: tl.constexpr):
    """CHOSEN: the `wanted`-th lowest of all keys, and the place of the last of that value that goes as lower ones do.

    `low` and `high` are the lowest and the highest key.
    """
    value, last = low.to(tl.int64) * 0 - (1 << 32), low.to(tl.int64) * 0  # a value below every key
    if wanted > 0:
        begin, end = low.to(tl.int64) - 1, high.to(tl.int64)
        value, fewer, number = _nth(KEYS, None, total, wanted, begin, end, total, begin, False, PICKED)
        last += total
        if number > wanted:
            wanted -= fewer
            last, _, _ = _nth(KEYS, None, total, wanted, begin * 0 - 1, last, number - fewer, value, True, PICKED)
    tl.store(CHOSEN, value)
    tl.store(CHOSEN + 1, last)


@triton.jit(do_not_specialize=["removed", "room"])
def _pick(KEYS, PLACES, COUNTS, BOUNDS, CHOSEN, total, removed, room, PICKED: tl.constexpr):
    """CHOSEN: a key, the last place of that key that goes, and whether both are known; lower keys go wherever they are.

    They are not where the bounds are wrong, or more is between them than there was room for.
    """
    below, between = tl.load(COUNTS), tl.load(COUNTS + 1)
    wanted = (removed - below).to(tl.int32)
    known = (removed == 0) | ((wanted > 0) & (removed <= below + between) & (between <= room))
    if removed == 0:
        tl.store(CHOSEN, wanted.to(tl.int64) * 0 - (1 << 32))  # below every key
    elif known:
        count = between.to(tl.int32)
        low, high = tl.load(BOUNDS).to(tl.int64) - 1, tl.load(BOUNDS + 1).to(tl.int64)
        value, fewer, number = _nth(KEYS, PLACES, count, wanted, low, high, count, low, False, PICKED)
        last = value * 0 + total
        if number > wanted:
            wanted -= fewer
            last, _, _ = _nth(KEYS, PLACES, count, wanted, value * 0 - 1, last, number - fewer, value, True, PICKED)
        tl.store(CHOSEN, value)
        tl.store(CHOSEN + 1, last)
    tl.store(CHOSEN + 2, known.to(tl.int64))


@triton.jit(do_not_specialize=["which"])
def _count_ties(
    W, TIES, CHOSEN, matrices, columns, rows, numbers, which, n_in, total, SCORE: tl.constexpr, TILE: tl.constexpr
):
    _, row, column, inside = _here(n_in, total, TILE)
    _, keys, _ = _keys(W, matrices, columns, rows, numbers, which, row, column, n_in, inside, SCORE)
    tl.store(TIES + tl.program_id(0), tl.sum((inside & (keys == tl.load(CHOSEN))).to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["which"])
def _apply(
    W, OUT, CHOSEN, BEFORE, matrices, columns, rows, numbers, which, n_in, total,
    SCORE: tl.constexpr, BITS: tl.constexpr, RANKED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """CHOSEN: as `_pick` has it; the number of ties that go instead of the last one's place where RANKED.

    BEFORE: ties in the tiles before each, read where RANKED.
    """
    known = tl.load(CHOSEN + 2) != 0
    place, row, column, inside = _here(n_in, total, TILE)
    w, keys, _ = _keys(W, matrices, columns, rows, numbers, which, row, column, n_in, inside, SCORE)
    threshold, last = tl.load(CHOSEN), tl.load(CHOSEN + 1)
    equal = (keys == threshold) & inside
    if RANKED:
        place_or_rank = tl.load(BEFORE + tl.program_id(0)).to(tl.int64) + tl.cumsum(equal.to(tl.int32), axis=0)
    else:
        place_or_rank = place
    gone = (keys < threshold) | (equal & (place_or_rank <= last))
    if BITS:
        kept = tl.where(gone | (inside == 0), 0, 1).reshape(TILE // 8, 8)
        packed = tl.sum(kept << tl.arange(0, 8)[None, :], axis=1)
        byte = tl.program_id(0).to(tl.int64) * (TILE // 8) + tl.arange(0, TILE // 8)
        tl.store(OUT + byte, packed.to(tl.uint8), mask=(byte < (total + 7) // 8) & known)
    else:
        tl.store(OUT + place, tl.where(gone, 0.0, w), mask=inside & known)


class Search:
    """A matrix on its way to being pruned: all is launched, and the host has not waited.

    Attributes:
        out: the pruned weight, or the mask, once `finish` was called.
        state: [2, 3], int64, what `finish` wants to know.
    """

    def __init__(
        self,
        weight: Tensor,
        removed: int,
        score: triton.JITFunction,
        operands: Operands,
        out: Tensor | None = None,
        bits: bool = False,
        bad: Tensor | None = None,
    ) -> None:
        """Arguments and errors as of `prune_layer`."""
        total, width = weight.numel(), weight.shape[1]
        self.out, bad = outputs(weight, operands, out, ((total + 7) // 8,) if bits else None, bad)
        if not 0 <= removed <= total:
            raise ValueError(f"removed must be from 0 to {total}, but got {removed}")
        self._weight, self._removed, self._bits = weight, removed, bits
        self._given = (*operands, width, total)
        self._grid = (triton.cdiv(total, _TILE),)
        self._options = {"SCORE": score, "TILE": _TILE, "num_warps": 4, "enable_fp_fusion": False}
        room = max(_SAMPLE, total // _ROOM)
        with on(weight):
            self._keys = torch.empty(room, dtype=torch.int32, device=weight.device)
            self._places = torch.empty(room, dtype=torch.int64, device=weight.device)
            self.state = self._passes(_first_bounds(weight, removed, (*operands, width), self._options))
            bad += self.state[0, 2]

    def _passes(self, bounds: Tensor) -> Tensor:
        """(below the bounds, between them, not finite), (key, last place, whether these are known)."""
        self._bounds, state = bounds, torch.zeros(2, 3, dtype=torch.int64, device=bounds.device)
        counts, chosen = state
        weight, keys, places, total, room = self._weight, self._keys, self._places, self._given[-1], len(self._keys)
        _gather[self._grid](weight, keys, places, counts, bounds, *self._given, room, **self._options)
        _pick[(1,)](keys, places, counts, bounds, chosen, total, self._removed, room, PICKED=PICKED, num_warps=16)
        self._apply(chosen, chosen, ranked=False)
        return state

    def _apply(self, chosen: Tensor, before: Tensor, ranked: bool) -> None:
        _apply[self._grid](
            self._weight, self.out, chosen, before, *self._given, BITS=self._bits, RANKED=ranked, **self._options
        )

    def finish(self, state: Sequence[Sequence[int]]) -> None:
        """Moves the bounds and makes the passes again where luck was bad; `state` as the host has read it."""
        least, most = LEAST, MOST  # the key lies between these for certain
        with on(self._weight):
            while not state[1][2]:
                (below, between, _), (low, high) = state[0], self._bounds.tolist()
                if self._removed <= below:
                    low, high, most = least, low - 1, low - 1
                elif self._removed > below + between:
                    low, high, least = high + 1, most, high + 1
                elif low < high:  # many are alike
                    least, most = low, high
                    nearer = _bounds(self._keys, (self._removed - below) / between).tolist()
                    low, high = nearer if nearer != [low, high] else (low, (low + high) // 2)
                else:  # all of those between are, and there is no room for their places
                    self._by_rank(low, self._removed - below)
                    return
                bounds = torch.tensor([low, high], dtype=torch.int32, device=self._weight.device)
                state = self._passes(bounds).tolist()

    def _by_rank(self, key: int, ties: int) -> None:
        """With so many of the entries of that key, the first ones."""
        chosen = torch.tensor([key, ties, 1], device=self._weight.device)
        counts = torch.empty(self._grid[0], dtype=torch.int32, device=self._weight.device)
        _count_ties[self._grid](self._weight, counts, chosen, *self._given, **self._options)
        self._apply(chosen, counts.cumsum(0, dtype=torch.int64) - counts, ranked=True)


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

    Besides `out` it takes 12 bytes for a 32nd of the weight's entries.

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
    search = Search(weight, removed, score, operands, out, bits, bad)
    search.finish(search.state.tolist())
    return search.out


def _first_bounds(weight: Tensor, removed: int, given: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """By a sample of the scores, or by all of few."""
    count = min(_SAMPLE, weight.numel())
    places = torch.arange(count, device=weight.device)
    if count < weight.numel():
        places = (places.double() * _GOLDEN % 1 * weight.numel()).long()
    keys = torch.empty(count, dtype=torch.int32, device=weight.device)
    _sample[(triton.cdiv(count, _TILE),)](weight, keys, places, *given, count, **options)
    return _bounds(keys, removed / weight.numel())


def _bounds(keys: Tensor, share: float) -> Tensor:
    """The keys a little below and above a quantile, [2], where the keys are."""
    order = keys.sort().values
    low, high = (min(max(int((share + margin) * len(order)), 0), len(order) - 1) for margin in (-_MARGIN, _MARGIN))
    return torch.stack([order[low], order[high]])


def reference(weight: Tensor, removed: int, scores: Tensor) -> Tensor:
    """The same in plain torch, of scores [out, in]."""
    order = scores.flatten().sort(stable=True).indices[:removed]
    return weight.flatten().scatter(0, order, 0).view_as(weight)
