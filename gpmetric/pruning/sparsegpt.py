"""SparseGPT's column-by-column reconstruction, for any mask and for any metric choosing it on the way.

Pruning a weight is followed by the update of the weights to its right that best keeps the layer's output (optimal brain
surgeon); SparseGPT is the metric `W*W*D` chosen inside this solver. Weights of one shape and their several
masks are solved together: for small layers the time goes into calls, not arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from gpmetric.errors import MaskError
from gpmetric.expression import Expression
from gpmetric.expression.columns import ColumnScores
from gpmetric.pruning import fused, fused_solver
from gpmetric.pruning.mask import select_mask
from gpmetric.targets import BLOCK, Target

__all__ = ["block_columns", "compile_solver", "reconstruct", "reconstruct_blockwise"]

# Columns removed one by one before the rest of their block is updated by one product. Four targets of eight 512x192,
# one AMD EPYC thread: at 4, 8, 16 and 32 columns 0.77, 0.76, 0.77 and 0.82 of the seconds at 128
# (benchmarks/bench_solver.py).
_STEP = 16

_TRIED = 16  # rows that kernels are tried on; 1 would be compiled for 1

# (copies of the weights as updated so far [n, copies, out, in], first column, end column) -> the masks of those
# columns, [n, copies, out, end - first]
_Masks = Callable[[Tensor, int, int], Tensor]


def reconstruct(weights: Tensor, factors: Tensor, masks: Tensor) -> Tensor:
    """The pruned weights [n, copies, out, in], whose kept entries make up best for those that given masks remove.

    Args:
        weights: [n, out, in], the dense weights of n layers of one shape.
        factors: [n, in, in], upper Cholesky factors of the damped inverse Gram matrices (`calibration.inverse_factor`).
        masks: [n, copies, out, in], several of each weight, True = kept; used as they are.

    Source: Frantar and Alistarh 2023 (SparseGPT), algorithm 1 with M given.
    """
    return _solve(weights, factors, masks.shape[1], BLOCK, BLOCK, lambda _, start, end: masks[..., start:end])


def reconstruct_blockwise(weights: Tensor, factors: Tensor, targets: Sequence[Target], scores: ColumnScores) -> Tensor:
    """The pruned weights [n, targets, out, in], masks re-chosen on the updated weights, inside each 128-column block.

    One threshold per block holds over all rows of a layer and removes exactly int(block size * sparsity) weights (the
    published code removes one more); under N:M each M columns are chosen when the solver reaches them.

    Args:
        weights, factors: as for `reconstruct`.
        targets: those that choose at the same columns, all plain numbers for one, are solved together.
        scores: of a formula and these layers.

    Raises:
        MaskError: a score is not finite, or `in` is not divisible by M.

    Source: SparseGPT, algorithm 1, adaptive mask selection of section 3.4.
    """
    for target in targets:
        if not target.fits(weights.shape[2]):
            raise MaskError(f"in = {weights.shape[2]} is not divisible by {target.group} (target {target.text})")
    pruned: dict[Target, Tensor] = {}
    for group in dict.fromkeys(target.group for target in targets):
        alike = [target for target in targets if target.group == group]

        def choose(copies: Tensor, start: int, end: int, alike: Sequence[Target] = alike) -> Tensor:
            found = scores(copies, start, end).unbind(1)
            return torch.stack([_select(one, target) for one, target in zip(found, alike, strict=True)], dim=1)

        columns = block_columns(alike[0])
        solved = None
        if fused_solver.usable(weights, columns):
            solved = fused_solver.solve_by_scores(weights, factors, alike, columns, scores)
        if solved is None:
            solved = _solve(weights, factors, len(alike), columns, group or columns, choose)
        pruned |= zip(alike, solved.unbind(1), strict=True)
    return torch.stack([pruned[target] for target in targets], dim=1)


def compile_solver(expressions: Sequence[Expression], layer: Mapping[str, Tensor], targets: Sequence[Target]) -> None:
    """Begins to compile the kernels that solve by formulas at these targets, where kernels do, in the background.

    Args:
        layer: the operands of a layer, of which the first rows and columns are tried.
    """
    rows, columns = (min(size, most) for size, most in zip(layer["W"].shape, (_TRIED, BLOCK), strict=True))
    few = {name: one[:rows, :columns] if one.dim() == 2 else one[:columns] for name, one in layer.items()}
    weights, tried = few["W"].detach().float()[None], [target for target in targets if target.fits(columns)]
    if not fused_solver.usable(weights, columns):
        return

    def run() -> None:
        for expression in expressions:
            with suppress(Exception):  # a trial only: what fails here fails again where it is told
                scores = ColumnScores(expression, [few])
                reconstruct_blockwise(weights, torch.eye(columns, device=weights.device)[None], tried, scores)

    fused.in_background(run)


def _select(score: Tensor, target: Target) -> Tensor:
    """Masks [n, out, columns] of n layers: N:M knows rows only, all others share a threshold per layer."""
    if target.group:
        return select_mask(score.flatten(0, 1), target).view_as(score)
    return torch.stack([select_mask(layer, target.within("block")) for layer in score])


def block_columns(target: Target) -> int:
    """Columns per block: 128, or the largest multiple of M below it so that no group is cut."""
    return BLOCK if not target.group else max(target.group, BLOCK // target.group * target.group)


def _solve(weights: Tensor, factors: Tensor, count: int, columns: int, width: int, choose: _Masks) -> Tensor:
    """Algorithm 1 for `count` copies of each weight: `choose` gives the masks of each `width` columns when reached.

    What lies beyond a block of `columns` is updated when the block is done.
    """
    if fused_solver.usable(weights, columns):
        return fused_solver.solve_by_masks(weights, factors, count, columns, width, choose)
    layers, rows, inputs = weights.shape
    # [n, in, count * out]: a column of all copies is contiguous, which is 6 times faster at 1024x1024
    stacked = weights.detach().float().transpose(1, 2).repeat(1, 1, count)
    copies = stacked.view(layers, inputs, count, rows).permute(0, 2, 3, 1)  # [n, count, out, in], the same memory
    removed = torch.empty_like(stacked, dtype=torch.bool)
    values = torch.empty_like(stacked)  # what each removed entry was worth when it went, 0 where kept
    # [n, in, in], row i: what removing one unit of column i takes from those after it
    shares = factors / factors.diagonal(dim1=1, dim2=2)[:, :, None]
    plain = [_plain(tensor) for tensor in (stacked, removed, values, shares)]

    def update(first: int, last: int, end: int) -> None:
        """Columns `last` to `end` after those from `first` to `last` are done."""
        given = shares[:, first:last, last:end].transpose(1, 2)
        stacked[:, last:end].baddbmm_(given, values[:, first:last], alpha=-1)

    for start in range(0, inputs, columns):
        end = min(start + columns, inputs)
        for chosen in range(start, end, width):
            reach = min(chosen + width, end)
            removed[:, chosen:reach] = ~choose(copies, chosen, reach).flatten(1, 2).transpose(1, 2)
            for first in range(chosen, reach, _STEP):
                last = min(first + _STEP, reach)
                _remove(plain, first, last)
                update(first, last, end)
        update(start, end, inputs)
    return copies.contiguous()


def _remove(plain: Sequence[Any], first: int, last: int) -> None:
    """The inner loop, on arrays or tensors alike: one column after the other, each updating those from it to `last`."""
    stacked, removed, values, shares = plain
    for column in range(first, last):
        values[:, column] = stacked[:, column] * removed[:, column]
        stacked[:, column] -= values[:, column]
        stacked[:, column + 1 : last] -= shares[:, column, column + 1 : last, None] * values[:, column, None]


def _plain(tensor: Tensor) -> Any:
    """A numpy view on a CPU, where a call on a few hundred numbers costs a quarter of torch's; else the tensor."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor
