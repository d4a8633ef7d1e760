"""Pruning by the Triton kernels: on CUDA devices where Triton is installed, and in Triton's interpreter.

The scores are the kernels' own. They differ from those of `evaluate` by the last bits of sums, roots, `exp`, `log`,
`tanh` and `pow` only; the choice among them is the same.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gpmetric.errors import ExpressionError, MaskError
from gpmetric.export.triton import load_functions
from gpmetric.expression import Expression
from gpmetric.pruning.target import BLOCK, Target

__all__ = ["compile_together", "masks", "prune", "usable"]

_WIDEST = 2**16  # inputs of a row that is held in registers; beyond 2**15 some of it spills
_GROUPS = (2, 4, 8, 16)  # M of N:M
_KEPT = 512  # formulas whose functions are at hand
_TRIED = 16  # rows of a weight that a kernel is tried on; 1 would be compiled for 1

_compiler = ThreadPoolExecutor(1, "gpmetric-kernels")
_functions: OrderedDict[Expression, tuple[Callable[[], ModuleType], int]] = OrderedDict()


def usable(weight: Tensor, targets: Sequence[Target]) -> bool:
    """Whether the kernels can prune a weight [out, in] at all these targets; GPMETRIC_KERNELS=0 turns them off."""
    return (
        weight.numel() > 0
        and (weight.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
        and os.environ.get("GPMETRIC_KERNELS") != "0"
        and _installed()
        and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and all(_fits(weight.shape, target) for target in targets)
    )


def prune(
    weight: Tensor, expression: Expression, operands: Mapping[str, Tensor], targets: Sequence[Target]
) -> list[Tensor]:
    """The pruned copies of a weight, in its dtype, by target.

    Args:
        weight: [out, in], `usable` at the targets.
        expression: the formula.
        operands: by name, on any device, those that the formula uses at least.
        targets: where scores compete is what they say.

    Raises:
        MaskError: a score is NaN or infinite.
        ExpressionError: an operand is missing or has another shape.
    """
    return _launch(weight, *_find(expression), operands, targets, bits=False)


def masks(
    weight: Tensor, expression: Expression, operands: Mapping[str, Tensor], targets: Sequence[Target]
) -> list[Tensor]:
    """The same as boolean masks [out, in], True = kept."""
    return _launch(weight, *_find(expression), operands, targets, bits=True)


def compile_together(
    expressions: Sequence[Expression],
    layers: Sequence[tuple[Tensor, Mapping[str, Tensor]]],
    targets: Sequence[Target],
    bits: bool,
) -> None:
    """Makes one kernel of several formulas, in the background; whoever prunes by one of them waits for it.

    Args:
        expressions: about eight: each adds a tenth to the compilation of one, and registers spill from 16 on.
        layers: weights with their operands, at least one of each width, whose first rows the kernel is tried on.
        targets: as for `prune`.
        bits: whether masks will be asked for, or else pruned copies.
    """

    def build() -> ModuleType:
        module = load_functions(expressions)
        for weight, operands in layers:
            if usable(weight, targets):
                few = {name: one[:_TRIED] if one.dim() == 2 else one for name, one in operands.items()}
                with suppress(MaskError):
                    _launch(weight[:_TRIED], module, 0, few, targets, bits)
        return module

    module = _compiler.submit(build)
    for which, expression in enumerate(expressions):
        _hold(expression, module.result, which)


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def _fits(shape: torch.Size, target: Target) -> bool:
    if target.group:
        return target.group in _GROUPS and shape[1] % target.group == 0
    return target.granularity != "row" or shape[1] <= _WIDEST


def _find(expression: Expression) -> tuple[ModuleType, int]:
    """The functions that compute a formula, alone or among others, and its number there."""
    if expression not in _functions:
        module = load_functions([expression])
        _hold(expression, lambda: module, 0)
    module_of, which = _functions[expression]
    return module_of(), which


def _hold(expression: Expression, module_of: Callable[[], ModuleType], which: int) -> None:
    _functions[expression] = module_of, which
    while len(_functions) > _KEPT:
        _functions.popitem(last=False)


def _launch(
    weight: Tensor,
    functions: ModuleType,
    which: int,
    named: Mapping[str, Tensor],
    targets: Sequence[Target],
    bits: bool,
) -> list[Tensor]:
    """The pruned weight or its mask by target."""
    from gpmetric.kernels.launch import pieces  # needs Triton
    from gpmetric.kernels.reduce import prepare

    weight = weight.detach().contiguous()
    try:
        operands = prepare(weight, named, functions.LAYOUT, which)
    except ValueError as error:
        raise ExpressionError(str(error)) from error
    results = []
    bad = torch.zeros(1, dtype=torch.int64, device=weight.device)
    for target in targets:
        bad.zero_()  # all targets have the same scores
        parts = []
        whole = [(weight, operands)]
        for piece, its in pieces(weight, operands, BLOCK) if target.granularity == "block" else whole:
            found = _prune(piece, functions.score, its, target, bits, bad)
            parts.append(_unpacked(found, piece.shape) if bits else found)
        results.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
    if bad:
        raise MaskError(f"{int(bad)} of {weight.numel()} scores are NaN or infinite")
    return results


def _prune(piece: Tensor, score: Any, operands: Any, target: Target, bits: bool, bad: Tensor) -> Tensor:
    from gpmetric.kernels.layer import prune_layer
    from gpmetric.kernels.pattern import prune_pattern
    from gpmetric.kernels.rows import prune_rows

    if target.granularity == "n:m":
        return prune_pattern(piece, target.keep, target.group, score, operands, bits=bits, bad=bad)
    if target.granularity == "row":
        return prune_rows(piece, target.removed(piece.shape[1]), score, operands, bits=bits, bad=bad)
    return prune_layer(piece, target.removed(piece.numel()), score, operands, bits=bits, bad=bad)


def _unpacked(bits: Tensor, shape: torch.Size) -> Tensor:
    """Boolean [out, in] of bytes [out, (in + 7) // 8], or of the bytes [(out * in + 7) // 8] of a whole layer."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    whole = ((bits[..., None] >> places) & 1).bool().flatten(-2)
    return whole[:, : shape[1]] if bits.dim() == 2 else whole[: shape.numel()].view(shape)
