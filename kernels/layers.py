"""Exactly k entries of each of many small matrices, in three launches for all of them and all of their k.

The scores' keys of a matrix are written once, 4 bytes each; one program for every k finds the threshold among them; the
last launch masks. `layer` is for large ones: it keeps no scores.

    prune_layers_together([Job(weight, out, bad, removed, operands)], wanda)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from gpmetric.kernels.launch import Job, Operands, on, processors, scored, sent, table, told
from gpmetric.kernels.layer import LEAST, MOST, PICKED, pick
from gpmetric.kernels.ops import LAST, key

__all__ = ["prune_layers_together"]

_AT_ONCE = 2048  # entries of a program


@triton.jit(do_not_specialize=["which"])
def _write_keys(
    TABLE, ENDS, W, KEYS, BAD, matrices, columns, rows, numbers, which, n_in, SCORE: tl.constexpr, TILE: tl.constexpr
):
    """ENDS: by matrix, the lowest and the highest of its keys."""
    first, step, tiles, n_out, place, pointers = told(TABLE, (W, KEYS, BAD), matrices, columns, rows, numbers)
    for tile in range(first, tiles, step):
        index = tile * TILE + tl.arange(0, TILE)
        row = index // n_in
        inside = index < n_out * n_in
        _, score = scored(
            pointers[0][0], pointers[1], pointers[2], pointers[3], pointers[4], which, row, index - row * n_in, n_in,
            inside, SCORE,
        )  # fmt: skip
        keys = tl.where(score == score, key(score), LAST)
        tl.store(pointers[0][1] + index, keys, mask=inside)
        tl.atomic_min(ENDS + 2 * place, tl.min(tl.where(inside, keys, LAST), axis=0), sem="relaxed")
        tl.atomic_max(ENDS + 2 * place + 1, tl.max(tl.where(inside, keys, -LAST), axis=0), sem="relaxed")
        wrong = tl.sum((inside & ((tl.abs(score) < float("inf")) == 0)).to(tl.int32), axis=0)
        if wrong > 0:
            tl.atomic_add(pointers[0][2], wrong.to(tl.int64), sem="relaxed")


@triton.jit
def _pick_many(PICKS, KEYS, ENDS, CHOSEN, PICKED: tl.constexpr):
    """PICKS: of each k, where its keys begin, how many there are, k, and the place of their ENDS."""
    one = tl.program_id(0)
    begin, total = tl.load(PICKS + 4 * one), tl.load(PICKS + 4 * one + 1).to(tl.int32)
    wanted, place = tl.load(PICKS + 4 * one + 2).to(tl.int32), tl.load(PICKS + 4 * one + 3)
    pick(
        KEYS + begin, total, wanted, tl.load(ENDS + 2 * place), tl.load(ENDS + 2 * place + 1), CHOSEN + 2 * one, PICKED
    )


@triton.jit
def _mask_many(TABLE, CHOSEN, W, OUT, BAD, numbers, n_in, BITS: tl.constexpr, TILE: tl.constexpr):
    """Of `numbers`, the only one is the matrix's keys."""
    first, step, tiles, n_out, place, pointers = told(TABLE, (W, OUT, BAD), (), (), (), numbers)
    threshold, last = tl.load(CHOSEN + 2 * place), tl.load(CHOSEN + 2 * place + 1)
    total = n_out * n_in
    for tile in range(first, tiles, step):
        index = tile * TILE + tl.arange(0, TILE)
        inside = index < total
        keys = tl.load(pointers[4][0] + index, mask=inside, other=0).to(tl.int64)
        gone = (keys < threshold) | ((keys == threshold) & (index <= last))
        if BITS:
            kept = tl.where(gone | (inside == 0), 0, 1).reshape(TILE // 8, 8)
            packed = tl.sum(kept << tl.arange(0, 8)[None, :], axis=1)
            byte = tile * (TILE // 8) + tl.arange(0, TILE // 8)
            tl.store(pointers[0][1] + byte, packed.to(tl.uint8), mask=byte < (total + 7) // 8)
        else:
            w = tl.load(pointers[0][0] + index, mask=inside, other=0.0)
            tl.store(pointers[0][1] + index, tl.where(gone, 0.0, w), mask=inside)


def prune_layers_together(jobs: Sequence[Job], score: triton.JITFunction, *, bits: bool = False) -> None:
    """`layer.prune_layer` of several matrices of one width in three launches; one program goes over all keys of each.

    Args:
        jobs: that `launch.check` accepts and `launch.together` has in one list; a weight with the same operands is
            scored once for all of them, and what is not finite counted once.
        score, bits: as for `layer.prune_layer`.
    """
    first, device = jobs[0], jobs[0].weight.device
    places: dict[object, int] = {}  # what is scored -> its place
    matrices: list[Job] = []
    of = []
    for job in jobs:
        read = (job.weight, *job.tensors[3:])
        of.append(places.setdefault(tuple((one.data_ptr(), one.shape) for one in read), len(matrices)))
        matrices += [job] * (of[-1] == len(matrices))
    begins = [0]
    for job in matrices:
        begins.append(begins[-1] + triton.cdiv(job.weight.numel(), 4) * 4)  # aligned
    keys = torch.empty(begins[-1], dtype=torch.int32, device=device)
    parts = [keys[begin : begin + one.weight.numel()] for begin, one in zip(begins, matrices, strict=False)]
    picks = [(begins[at], job.weight.numel(), job.removed, at) for job, at in zip(jobs, of, strict=True)]
    scoring = [job._replace(out=part) for job, part in zip(matrices, parts, strict=True)]
    masking = [job._replace(operands=Operands(numbers=(parts[at],))) for job, at in zip(jobs, of, strict=True)]
    ends = torch.tensor([MOST, LEAST], dtype=torch.int32).repeat(len(matrices), 1)
    ends, chosen = sent(ends, device), torch.empty(len(jobs), 2, dtype=torch.int64, device=device)
    resident = 16 * processors(first.weight) if device.type == "cuda" else 2
    with on(first.weight):
        found, programs = table(scoring, resident, _AT_ONCE)
        _write_keys[(programs,)](
            found, ends, first.weight, keys, first.bad, *first.operands, first.weight.shape[1],
            SCORE=score, TILE=_AT_ONCE, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        _pick_many[(len(jobs),)](sent(torch.tensor(picks), device), keys, ends, chosen, PICKED=PICKED, num_warps=16)
        found, programs = table(masking, resident, _AT_ONCE)
        _mask_many[(programs,)](
            found, chosen, first.weight, first.out, first.bad, (keys,), first.weight.shape[1],
            BITS=bits, TILE=_AT_ONCE, num_warps=4,
        )  # fmt: skip
