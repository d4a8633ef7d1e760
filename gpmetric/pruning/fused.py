"""Pruning by the Triton kernels: on CUDA devices where Triton is installed, and in Triton's interpreter.

The scores are the kernels' own. They differ from those of `evaluate` by the last bits of sums, roots, `exp`, `log`,
`tanh` and `pow` only; the choice among them is the same.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import cache, lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gpmetric.codegen.loading import load_functions
from gpmetric.errors import ExpressionError, GpmetricError, MaskError
from gpmetric.expression import Expression
from gpmetric.targets import Target

__all__ = ["compile_together", "mask_of_scores", "masks", "prune", "usable"]

_WIDEST = 2**16 - 1  # inputs of a row that is held in registers, MOST_COLUMNS; beyond 2**15 some of it spills
_GROUPS = (2, 4, 8, 16)  # M of N:M
_KEPT = 512  # formulas whose functions are at hand
_TRIED = 16  # rows of a weight that a kernel is tried on; 1 would be compiled for 1

_compiling = threading.Lock()  # groups are compiled one at a time
_groups: OrderedDict[Expression, tuple[Future[ModuleType], int]] = OrderedDict()  # a formula -> its group, its number


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
    functions, which = _find(expression, operands)
    return _launch(weight, functions.score, functions.LAYOUT, which, operands, targets, bits=False)


def masks(
    weight: Tensor, expression: Expression, operands: Mapping[str, Tensor], targets: Sequence[Target]
) -> list[Tensor]:
    """The same as boolean masks [out, in], True = kept."""
    functions, which = _find(expression, operands)
    return _launch(weight, functions.score, functions.LAYOUT, which, operands, targets, bits=True)


def mask_of_scores(score: Tensor, target: Target) -> Tensor:
    """The mask of scores [out, in] that are there already, `usable` at the target.

    Raises:
        MaskError: a score is NaN or infinite.
    """
    from gpmetric.kernels import launch  # needs Triton

    return _launch(score, launch.weight_itself, launch.Layout(), 0, {}, [target], bits=True)[0]


def compile_together(
    expressions: Sequence[Expression],
    layers: Sequence[tuple[Tensor, Mapping[str, Tensor]]],
    targets: Sequence[Target],
    bits: bool,
) -> None:
    """Makes one kernel of several formulas, in the background, for whoever prunes by one of them in this process.

    Args:
        expressions: about eight: each adds a tenth to the compilation of one, and registers spill from 16 on.
        layers: weights with their operands, at least one of each width, whose first rows the kernel is tried on.
        targets: as for `prune`.
        bits: whether masks will be asked for, or else pruned copies.
    """

    def build() -> ModuleType:
        functions = load_functions(expressions)
        for weight, operands in layers:
            few = {name: one[:_TRIED] if one.dim() == 2 else one for name, one in operands.items()}
            for which in range(len(expressions)):  # their reductions differ
                with suppress(Exception):  # a trial only: what fails here fails again where it is told
                    _launch(weight[:_TRIED], functions.score, functions.LAYOUT, which, few, targets, bits)
        return functions

    def run() -> None:
        with _compiling:
            functions.set_running_or_notify_cancel()
            try:
                functions.set_result(build())
            except Exception as error:
                functions.set_exception(error)

    functions: Future[ModuleType] = Future()
    for which, expression in enumerate(expressions):
        _groups[expression] = functions, which
    while len(_groups) > _KEPT:
        _groups.popitem(last=False)
    if os.environ.get("TRITON_INTERPRET") == "1":
        run()  # the interpreter runs one kernel at a time
    else:
        threading.Thread(target=run, name="gpmetric-kernels", daemon=True).start()


@cache
def _installed() -> bool:
    spec = find_spec("triton")
    return spec is not None and spec.origin is not None  # None: a folder of that name


def _fits(shape: torch.Size, target: Target) -> bool:
    if target.group:
        return target.group in _GROUPS and shape[1] % target.group == 0
    return target.across_rows or target.width(shape[1]) <= _WIDEST


_alone = lru_cache(_KEPT)(lambda expression: load_functions([expression]))


def _find(expression: Expression, named: Mapping[str, Tensor]) -> tuple[ModuleType, int]:
    """The functions that compute a formula, alone or among others, and its number there.

    A group is waited for while it is compiled, and left where it failed, others are before it, or an operand of
    another formula is missing. The scores are the same.
    """
    if expression in _groups:
        functions, which = _groups[expression]
        if (functions.running() or functions.done()) and not functions.exception():
            layout = functions.result().LAYOUT
            if all(name in named for name in (*layout.matrices, *layout.columns)):
                return functions.result(), which
    return _alone(expression), 0


def _launch(
    weight: Tensor,
    score: Any,
    layout: Any,
    which: int,
    named: Mapping[str, Tensor],
    targets: Sequence[Target],
    bits: bool,
) -> list[Tensor]:
    """The pruned weight or its mask by target."""
    from triton.errors import TritonError

    from gpmetric.kernels.launch import pieces
    from gpmetric.kernels.reduce import prepare

    weight = weight.detach().contiguous()
    bad = torch.zeros(1, dtype=torch.int64, device=weight.device)
    results = []
    try:
        operands = prepare(weight, named, layout, which)
        for target in targets:
            bad.zero_()  # all targets have the same scores
            whole = [(weight, operands)]
            width = target.width(weight.shape[1])
            parts = []
            for piece, its in whole if target.group or width == weight.shape[1] else pieces(weight, operands, width):
                found = _prune(piece, score, its, target, bits=bits, bad=bad)
                parts.append(_unpacked(found, piece.shape) if bits else found)
            results.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
    except ValueError as error:
        raise ExpressionError(str(error)) from error
    except TritonError as error:
        raise GpmetricError(f"a Triton kernel failed; GPMETRIC_KERNELS=0 does without: {error}") from error
    if bad:
        raise MaskError(f"{int(bad)} of {weight.numel()} scores are NaN or infinite")
    return results


def _prune(weight: Tensor, score: Any, operands: Any, target: Target, **to: Any) -> Tensor:
    """The weight pruned by the kernel of a target, or mask bits; `to` are the launchers' `out`, `bits` and `bad`."""
    from gpmetric.kernels.layer import prune_layer
    from gpmetric.kernels.pattern import prune_pattern
    from gpmetric.kernels.rows import prune_rows

    ((_, size), *_) = target.groups(weight.shape)
    found: Tensor
    if target.group:
        found = prune_pattern(weight, target.keep, target.group, score, operands, **to)
    else:
        prune = prune_layer if target.across_rows else prune_rows
        found = prune(weight, target.removed(size), score, operands, **to)
    return found


def _unpacked(bits: Tensor, shape: torch.Size) -> Tensor:
    """Boolean [out, in] of bytes [out, (in + 7) // 8], or of the bytes [(out * in + 7) // 8] of a whole layer."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    whole = ((bits[..., None] >> places) & 1).bool().flatten(-2)
    return whole[:, : shape[1]] if bits.dim() == 2 else whole[: shape.numel()].view(shape)
