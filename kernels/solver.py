"""SparseGPT's solver, 128 columns at a time: each program takes some rows through all of them.

A thread holds a part of its row in registers, which each column, one after the other, updates as it goes. Which entries
go is given, or is chosen among each M columns on the way, or by a threshold over all rows, which two more launches
find. What lies right of the block is then updated by one matrix product.

Several weights of one shape and several copies of each are taken together, one after the other in memory
[n, in, copies * out], so that rows follow each other.

    choice = Choice(weight[None], wanda, Operands(columns=(X[None],)), [lambda size: size // 2])
    pruned = solve(weight[None], factor[None], 1, choice)[0, 0]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpmetric.kernels.launch import Operands, on, sent
from gpmetric.kernels.layer import LEAST, MOST, PICKED, pick
from gpmetric.kernels.ops import LAST, key

__all__ = ["COLUMNS", "GROUPS", "Block", "Choice", "Given", "Pattern", "Rule", "Threshold", "reference", "solve"]

COLUMNS = 128  # of a block at most
GROUPS = (2, 4, 8)  # M of N:M; 16 takes 20 s to compile, and spills
_ROWS = 32  # of a program, each held by one thread
_PART = 32  # columns that a thread holds of its row at a time
_STEP = 4  # of them that are looked at together


class Block(NamedTuple):
    """Consecutive columns that are taken out of weights together.

    Attributes:
        weights: [n, in, copies * out], fp32, contiguous; kept entries are updated, the others become 0.
        removed: [n, size, copies * out], fp32, whose rows follow each other: what each entry of the block was worth
            when it went, 0 if kept.
        shares: [n, in, in], fp32: row i has what removing one unit of column i takes from those after it.
        copies: of each weight.
        first, size: the first column, and how many.
    """

    weights: Tensor
    removed: Tensor
    shares: Tensor
    copies: int
    first: int
    size: int

    def copied(self) -> Tensor:
        """The weights as they are now, [n, copies, out, in], in the same memory."""
        layers, inputs, _ = self.weights.shape
        return self.weights.view(layers, inputs, self.copies, -1).permute(0, 2, 3, 1)


class Given(NamedTuple):
    """`kept`: masks [n, copies, out, size] of a block's columns, boolean."""

    kept: Tensor


class Pattern(NamedTuple):
    """Of each `group` columns the lowest go, as many as `counts` [copies], int32, says, by scores computed on the way.

    `score`, `operands` and `bad` as for `Choice`.
    """

    counts: Tensor
    group: int
    score: triton.JITFunction
    operands: Operands
    bad: Tensor


class Threshold(NamedTuple):
    """Of a block's entries in all rows the lowest go, of equal ones the lower place in row-major order first.

    Attributes:
        keys: of the scores, int32 [n, copies, out * size].
        chosen: int64 [n, copies, 2], the highest key that goes, and the place of the last of that key that does.
    """

    keys: Tensor
    chosen: Tensor


Rule = Given | Pattern | Threshold


@triton.jit
def _shifted(pointers, offset):
    moved = ()
    for i in tl.static_range(len(pointers)):
        moved = moved + (pointers[i] + offset,)
    return moved


@triton.jit
def _score_here(w, matrices, columns, rows, numbers, layer, row, column, n_in, n_out, inside, SCORE: tl.constexpr):
    """(keys, how many scores are not finite) at some places of a layer, all of one shape; NaN has the highest key."""
    place = (row, column, column.to(tl.int64) * n_out + row, inside)
    score = SCORE(
        w, _shifted(matrices, layer * n_in * n_out), _shifted(columns, layer * n_in), _shifted(rows, layer * n_out),
        _shifted(numbers, layer), place, 0,
    )  # fmt: skip
    bad = (inside & ((tl.abs(score) < float("inf")) == 0)).to(tl.int32)
    return tl.where(score == score, key(score), LAST), bad


@triton.jit(do_not_specialize=["copies", "size"])
def _score_block(
    W, KEYS, EXTREMES, BAD, matrices, columns, rows, numbers, n_in, n_out, copies, first, size,
    SCORE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The keys of a block's scores, row by row, and the lowest and the highest of each copy."""
    copy, layer = tl.program_id(1), tl.program_id(2).to(tl.int64)
    across = tl.arange(0, BLOCK)[:, None]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :] + across * 0
    across += row * 0
    inside = (row < n_out) & (across < size)
    column = first + across
    w = tl.load(W + (layer * n_in + column) * copies * n_out + copy * n_out + row, mask=inside, other=0.0)
    keys, bad = _score_here(w, matrices, columns, rows, numbers, layer, row, column, n_in, n_out, inside, SCORE)
    one = layer * copies + copy
    tl.store(KEYS + one * n_out * size + row.to(tl.int64) * size + across, keys, mask=inside)
    tl.atomic_min(EXTREMES + 2 * one, tl.min(tl.min(tl.where(inside, keys, LAST), axis=1), axis=0), sem="relaxed")
    tl.atomic_max(EXTREMES + 2 * one + 1, tl.max(tl.max(tl.where(inside, keys, -LAST), axis=1), axis=0), sem="relaxed")
    wrong = tl.sum(tl.sum(bad, axis=1), axis=0)
    if wrong > 0:
        tl.atomic_add(BAD, wrong.to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["copies", "total"])
def _pick_block(KEYS, EXTREMES, QUOTA, CHOSEN, copies, total, PICKED: tl.constexpr):
    """The threshold of one copy's block, of `total` entries."""
    one = tl.program_id(0).to(tl.int64)
    low, high = tl.load(EXTREMES + 2 * one), tl.load(EXTREMES + 2 * one + 1)
    pick(KEYS + one * total, total, tl.load(QUOTA + one % copies), low, high, CHOSEN + 2 * one, PICKED)


@triton.jit(do_not_specialize=["copies", "size"])
def _remove(
    W, REMOVED, SHARES, KEPT, QUOTA, KEYS, CHOSEN, BAD, matrices, columns, rows, numbers, n_in, n_out, copies,
    next_kept, next_removed, first, size, SCORE: tl.constexpr, RULE: tl.constexpr, STEP: tl.constexpr,
    ROWS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """KEPT has `next_kept` bytes from row to row, REMOVED `next_removed` numbers from layer to layer."""
    copy, layer = tl.program_id(1), tl.program_id(2).to(tl.int64)
    one = layer * copies + copy
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < n_out
    index = tl.arange(0, PART)
    apart = tl.full((), 0, tl.int64) + copies * n_out  # from column to column
    W += (layer * n_in + first) * apart + copy * n_out + row
    REMOVED += layer * next_removed + copy * n_out + row
    SHARES += (layer * n_in + first) * n_in + first
    KEPT += (one * n_out + row) * next_kept
    KEYS += (one * n_out + row) * size
    if RULE == "Threshold":
        threshold, last = tl.load(CHOSEN + 2 * one), tl.load(CHOSEN + 2 * one + 1)
    if RULE == "Pattern":
        count = tl.load(QUOTA + copy)
    for part in range(0, size, PART):
        column = part + index
        inside = (column < size)[:, None] & there[None, :]
        # entries of the part; of columns that are finished, what they were worth when they went
        state = tl.load(W[None, :] + column[:, None] * apart, mask=inside, other=0.0)
        for before in range(0, part):
            share = tl.load(SHARES + before * n_in + column, mask=column < size, other=0.0)
            state -= share[:, None] * tl.load(REMOVED + before * apart, mask=there, other=0.0)[None, :]
        for start in range(part, tl.minimum(part + PART, size), STEP):
            values = ()
            for i in tl.static_range(STEP):
                values = values + (tl.sum(tl.where((column == start + i)[:, None], state, 0.0), axis=0),)
            kept = ()
            if RULE == "Pattern":
                keys = ()
                for i in tl.static_range(STEP):
                    score, bad = _score_here(
                        values[i], matrices, columns, rows, numbers, layer, row, first + start + i + row * 0, n_in,
                        n_out, there, SCORE,
                    )  # fmt: skip
                    keys = keys + (score,)
                    wrong = tl.sum(bad, axis=0)
                    if wrong > 0:
                        tl.atomic_add(BAD, wrong.to(tl.int64), sem="relaxed")
                for i in tl.static_range(STEP):
                    rank = tl.zeros((ROWS,), tl.int32)
                    for j in tl.static_range(STEP):
                        if j < i:
                            rank += (keys[j] <= keys[i]).to(tl.int32)
                        if j > i:
                            rank += (keys[j] < keys[i]).to(tl.int32)
                    kept = kept + (rank >= count,)
            else:
                for i in tl.static_range(STEP):
                    here = there & (start + i < size)
                    if RULE == "Given":
                        kept = kept + (tl.load(KEPT + start + i, mask=here, other=1) != 0,)
                    else:
                        found = tl.load(KEYS + start + i, mask=here, other=LAST).to(tl.int64)
                        place = row.to(tl.int64) * size + start + i
                        kept = kept + ((found > threshold) | ((found == threshold) & (place > last)),)
            gone = ()
            for i in tl.static_range(STEP):
                w = values[i]
                shares = SHARES + (start + i) * n_in
                for j in tl.static_range(i):
                    w -= gone[j] * tl.load(SHARES + (start + j) * n_in + start + i, mask=start + i < size, other=0.0)
                gone = gone + (tl.where(kept[i], 0.0, w),)
                tl.store(W + (start + i) * apart, tl.where(kept[i], w, 0.0), mask=there & (start + i < size))
                share = tl.load(shares + column, mask=(column > start + i) & (column < size), other=0.0)
                state = tl.where((column == start + i)[:, None], gone[i][None, :], state - share[:, None] * gone[i])
        tl.store(REMOVED[None, :] + column[:, None] * apart, state, mask=inside)
        tl.debug_barrier()  # the next part reads it


class Choice:
    """The rule of scores of the weights as updated so far.

    Args:
        weights: [n, out, in], of which the shape and the device count.
        score: as for `rows.prune_rows`.
        operands: of that score; matrices [n, in, out], columns [n, in], rows [n, out] and numbers [n], all fp32.
        removed: for each copy, how many of so many entries go.
        group: M of N:M, one of GROUPS, each M columns being chosen when they are reached; or 0, where all entries of a
            block are chosen by one threshold.

    Attributes:
        bad: [1], int64, the number of scores that were not finite.

    Raises:
        ValueError: `group` is none of GROUPS or leaves a remainder; called for another number of copies.
    """

    def __init__(
        self,
        weights: Tensor,
        score: triton.JITFunction,
        operands: Operands,
        removed: Sequence[Callable[[int], int]],
        group: int = 0,
    ) -> None:
        layers, self._rows, width = weights.shape
        if group and (group not in GROUPS or width % group):
            raise ValueError(f"group must be of {GROUPS} and divide {width} inputs, but is {group}")
        self._score, self._operands, self._removed, self._group = score, operands, removed, group
        self.bad = torch.zeros(1, dtype=torch.int64, device=weights.device)
        ends = torch.tensor([MOST, LEAST], dtype=torch.int32)
        # for each block, twice as many as it writes, so that all of them begin at 16 bytes
        blocks = 1 if group else triton.cdiv(width, COLUMNS)
        self._extremes = sent(ends.repeat(blocks, layers, len(removed), 2), weights.device)
        self._counts: dict[int, Tensor] = {}

    def __call__(self, block: Block) -> Rule:
        if block.copies != len(self._removed):
            raise ValueError(f"there are {block.copies} copies, but numbers for {len(self._removed)}")
        if self._group:
            return Pattern(self._count(self._group), self._group, self._score, self._operands, self.bad)
        counts = self._count(self._rows * block.size)
        return _by_threshold(
            block, counts, self._score, self._operands, self._extremes[block.first // COLUMNS], self.bad
        )

    def _count(self, size: int) -> Tensor:
        """How many of so many entries go, by copy."""
        if size not in self._counts:
            numbers = [removed(size) for removed in self._removed]
            self._counts[size] = sent(torch.tensor(numbers, dtype=torch.int32), self.bad.device)
        return self._counts[size]


def solve(
    weights: Tensor,
    factors: Tensor,
    copies: int,
    rule: Callable[[Block], Rule],
    columns: int = COLUMNS,
    width: int | None = None,
) -> Tensor:
    """The pruned weights [n, copies, out, in], fp32, whose kept entries make up best for those that go.

    A block of columns takes two launches, or four where a threshold is chosen; nothing waits for the device.

    Args:
        weights: [n, out, in], of n layers of one shape.
        factors: [n, in, in], fp32, upper Cholesky factors of the damped inverse Gram matrices.
        copies: of each weight.
        rule: what goes of the columns that are reached, `width` of them at a time.
        columns: of a block, COLUMNS at most; what lies right of it is updated when it is done.
        width: divides `columns`, which it is by default.

    Raises:
        ValueError: one of the numbers is wrong.

    Source: Frantar and Alistarh 2023 (SparseGPT), algorithm 1.
    """
    layers, rows, inputs = weights.shape
    width = width or columns
    if not 0 < columns <= COLUMNS:
        raise ValueError(f"columns must be from 1 to {COLUMNS}, but got {columns}")
    if width < 0 or columns % width:
        raise ValueError(f"width must divide {columns} columns, but is {width}")
    stacked = weights.detach().float().transpose(1, 2).repeat(1, 1, copies)
    shares = (factors / factors.diagonal(dim1=1, dim2=2)[:, :, None]).contiguous()
    removed = stacked.new_empty(layers, columns, copies * rows)

    def update(start: int, last: int, end: int) -> None:
        """Columns `last` to `end` after those from `start` to `last` are done, the last ones of `removed`."""
        given = shares[:, start:last, last:end].transpose(1, 2)
        stacked[:, last:end].baddbmm_(given, removed[:, start % columns : start % columns + last - start], alpha=-1)

    for start in range(0, inputs, columns):
        end = min(start + columns, inputs)
        for first in range(start, end, width):
            last = min(first + width, end)
            here = removed[:, first - start : last - start]
            block = Block(stacked, here, shares, copies, first, last - first)
            _take_out(block, rule(block))
            if last < end:
                update(first, last, end)
        if end < inputs:
            update(start, end, inputs)
    return block.copied().contiguous()


def _by_threshold(
    block: Block, counts: Tensor, score: triton.JITFunction, operands: Operands, extremes: Tensor, bad: Tensor
) -> Threshold:
    """In two launches; `extremes` holds a key above and one below all others for each copy, and is written to."""
    layers, width, _ = block.weights.shape
    rows = block.weights.shape[2] // block.copies
    total = rows * block.size
    keys = torch.empty(layers, block.copies, total, dtype=torch.int32, device=counts.device)
    chosen = torch.empty(layers, block.copies, 2, dtype=torch.int64, device=counts.device)
    with on(block.weights):
        _score_block[(triton.cdiv(rows, _ROWS), block.copies, layers)](
            block.weights, keys, extremes, bad, *operands[:4], width, rows, block.copies, block.first, block.size,
            SCORE=score, ROWS=_ROWS, BLOCK=COLUMNS, num_warps=8,
        )  # fmt: skip
        _pick_block[(layers * block.copies,)](
            keys, extremes, counts, chosen, block.copies, total, PICKED=PICKED, num_warps=16
        )
    return Threshold(keys, chosen)


def _take_out(block: Block, rule: Rule) -> None:
    """A block's columns, one after the other, in one launch; `block.weights` and `block.removed` change."""
    weights, removed, shares, copies, first, size = block
    layers, width, _ = weights.shape
    rows = weights.shape[2] // copies
    kept = keys = chosen = counts = bad = removed  # where the rule has none, none is read
    operands, score, step = Operands(), None, _STEP
    if isinstance(rule, Given):
        kept, apart = rule.kept, rule.kept.stride(2)
        if kept.stride() != (copies * rows * apart, rows * apart, apart, 1):
            kept = kept.contiguous()
        kept = kept.view(torch.uint8)
    elif isinstance(rule, Threshold):
        keys, chosen = rule
    else:
        counts, step, score, operands, bad = rule
    with on(weights):
        _remove[(triton.cdiv(rows, _ROWS), copies, layers)](
            weights, removed, shares, kept, counts, keys, chosen, bad, *operands[:4], width, rows, copies,
            kept.stride(-2), removed.stride(0), first, size,
            SCORE=score, RULE=type(rule).__name__, STEP=step, ROWS=_ROWS, PART=_PART, num_warps=1,
        )  # fmt: skip


def reference(weight: Tensor, factor: Tensor, kept: Tensor) -> Tensor:
    """The same in plain torch, of one weight [out, in] and a mask of its shape."""
    pruned = weight.float().clone()
    for column in range(pruned.shape[1]):
        gone = pruned[:, column].masked_fill(kept[:, column], 0) / factor[column, column]
        pruned[:, column:] -= gone[:, None] * factor[column, column:]
        pruned[:, column].masked_fill_(~kept[:, column], 0)
    return pruned
