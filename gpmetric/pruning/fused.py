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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpmetric.codegen.loading import load_functions
from gpmetric.errors import ExpressionError, GpmetricError, MaskError
from gpmetric.expression import Expression
from gpmetric.targets import Target

__all__ = ["compile_together", "masks", "masks_of_scores", "prune", "usable"]

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
    weights: Sequence[Tensor],
    expression: Expression,
    operands: Sequence[Mapping[str, Tensor]],
    targets: Sequence[Target],
) -> list[list[Tensor]]:
    """The pruned copies of weights, in their dtypes, by weight and target; the host waits for the device once.

    Args:
        weights: [out, in] each, `usable` at the targets.
        expression: the formula.
        operands: of each weight by name, on any device, those that the formula uses at least.
        targets: where scores compete is what they say.

    Raises:
        MaskError: a score is NaN or infinite.
        ExpressionError: an operand is missing or has another shape.
    """
    jobs = [_job(weight, expression, one) for weight, one in zip(weights, operands, strict=True)]
    return _launch(jobs, [targets] * len(jobs))


def masks(
    weights: Sequence[Tensor],
    expression: Expression,
    operands: Sequence[Mapping[str, Tensor]],
    targets: Sequence[Target],
) -> list[list[Tensor]]:
    """The same as boolean masks [out, in], True = kept."""
    jobs = [_job(weight, expression, one) for weight, one in zip(weights, operands, strict=True)]
    return _launch(jobs, [targets] * len(jobs), bits=True)


def masks_of_scores(scores: Sequence[Tensor], targets: Sequence[Target]) -> list[Tensor]:
    """The masks of scores [out, in] that are there already, each `usable` at its target.

    Raises:
        MaskError: a score is NaN or infinite.
    """
    from gpmetric.kernels import launch  # needs Triton

    jobs = [_Job(score, launch.weight_itself, launch.Layout(), 0, {}) for score in scores]
    return [mask for (mask,) in _launch(jobs, [[target] for target in targets], bits=True)]


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
                job = _Job(weight[:_TRIED], functions.score, functions.LAYOUT, which, few)
                with suppress(Exception):  # a trial only: what fails here fails again where it is told
                    _launch([job], [targets], bits)
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


class _Job(NamedTuple):
    """A weight, or scores, to be pruned by the formula of that number among those of the functions."""

    weight: Tensor
    score: Any
    layout: Any
    which: int
    named: Mapping[str, Tensor]


def _job(weight: Tensor, expression: Expression, named: Mapping[str, Tensor]) -> _Job:
    functions, which = _find(expression, named)
    return _Job(weight, functions.score, functions.LAYOUT, which, named)


def _launch(jobs: Sequence[_Job], targets: Sequence[Sequence[Target]], bits: bool = False) -> list[list[Tensor]]:
    """The pruned weights or masks, by job and each of its targets: all is launched before the host waits, once."""
    from triton.errors import TritonError

    # 16 bytes each: Triton compiles anew for what is aligned otherwise
    bad = torch.zeros(len(jobs), 2, dtype=torch.int64, device=jobs[0].weight.device)
    try:
        started = [_started(job, its, bits, counted[:1]) for job, its, counted in zip(jobs, targets, bad, strict=True)]
        searches = [one for by_target in started for parts in by_target for one in parts if not _is_done(one)]
        states = [one.state for one in searches]
        told = torch.cat([bad.flatten(), *(state.flatten() for state in states)]).tolist()
        for place, search in enumerate(searches):
            first = 2 * len(jobs) + 6 * place
            search.finish((told[first : first + 3], told[first + 3 : first + 6]))
    except ValueError as error:
        raise ExpressionError(str(error)) from error
    except TritonError as error:
        raise GpmetricError(f"a Triton kernel failed; GPMETRIC_KERNELS=0 does without: {error}") from error
    for job, its, count in zip(jobs, targets, told[: 2 * len(jobs) : 2], strict=True):
        if count:  # all targets have the same scores
            raise MaskError(f"{count // len(its)} of {job.weight.numel()} scores are NaN or infinite")
    return [
        [_joined(parts, job.weight.shape, target, bits) for parts, target in zip(by_target, its, strict=True)]
        for job, its, by_target in zip(jobs, targets, started, strict=True)
    ]


def _started(job: _Job, targets: Sequence[Target], bits: bool, bad: Tensor) -> list[list[Any]]:
    """By target, for each piece of the weight, what is being written, or the search that writes it."""
    from gpmetric.kernels.launch import pieces
    from gpmetric.kernels.layer import Search
    from gpmetric.kernels.pattern import prune_pattern
    from gpmetric.kernels.reduce import prepare
    from gpmetric.kernels.rows import prune_rows

    weight = job.weight.detach().contiguous()
    operands = prepare(weight, job.named, job.layout, job.which)
    to = {"bits": bits, "bad": bad}
    found: list[list[Any]] = []
    for target in targets:
        if target.group:
            found.append([prune_pattern(weight, target.keep, target.group, job.score, operands, **to)])
            continue
        width, start = target.width(weight.shape[1]), Search if target.across_rows else prune_rows
        cut = [(weight, operands)] if width == weight.shape[1] else pieces(weight, operands, width)
        sizes = [part.numel() if target.across_rows else part.shape[1] for part, _ in cut]
        found.append(
            [
                start(part, target.removed(size), job.score, its, **to)
                for (part, its), size in zip(cut, sizes, strict=True)
            ]
        )
    return found


def _is_done(one: Any) -> bool:
    return isinstance(one, Tensor)


def _joined(parts: Sequence[Any], shape: torch.Size, target: Target, bits: bool) -> Tensor:
    """The weight, or the boolean mask, of the pieces that competed apart."""
    written = [one if _is_done(one) else one.out for one in parts]
    if bits:
        widths = [target.width(shape[1])] * (len(parts) - 1)
        widths.append(shape[1] - sum(widths))
        written = [_unpacked(one, shape[0], width) for one, width in zip(written, widths, strict=True)]
    return written[0] if len(written) == 1 else torch.cat(written, dim=1)


def _unpacked(bits: Tensor, rows: int, columns: int) -> Tensor:
    """Boolean [out, in] of bytes [out, (in + 7) // 8], or of the bytes [(out * in + 7) // 8] of a whole layer."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    whole = ((bits[..., None] >> places) & 1).bool().flatten(-2)
    return whole[:, :columns] if bits.dim() == 2 else whole[: rows * columns].view(rows, columns)
