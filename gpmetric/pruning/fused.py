"""Pruning by the Triton kernels: on CUDA devices where Triton is installed, and in Triton's interpreter.

The scores are the kernels' own. They differ from those of `evaluate` by the last bits of sums, roots, `exp`, `log`,
`tanh` and `pow` only; the choice among them is the same.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import cache, lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpmetric.codegen.functions import has_kernels
from gpmetric.codegen.loading import load_functions
from gpmetric.errors import ExpressionError, GpmetricError, MaskError
from gpmetric.expression import Expression
from gpmetric.targets import Target

__all__ = ["compile_together", "in_background", "masks", "masks_of_scores", "prune", "usable"]

_WIDEST = 2**16 - 1  # inputs of a row that is held in registers, MOST_COLUMNS; beyond 2**15 some of it spills
_GROUPS = (2, 4, 8, 16)  # M of N:M
_KEPT = 512  # formulas whose functions are at hand
# Entries of a weight whose keys are all kept where scores compete over it: one program goes over them about six times.
_LARGEST = 2**21
_TRIED = 16  # rows of a weight that a kernel is tried on; 1 would be compiled for 1

_compiling = threading.Lock()  # groups are compiled one at a time
_groups: OrderedDict[Expression, tuple[Future[ModuleType], int]] = OrderedDict()  # a formula -> its group, its number


def usable(weight: Tensor, targets: Sequence[Target], expression: Expression | None = None) -> bool:
    """Whether the kernels can prune a weight [out, in] at all these targets, by scores that are there or by a formula.

    GPMETRIC_KERNELS=0 turns them off.
    """
    return (
        weight.numel() > 0
        and (weight.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
        and os.environ.get("GPMETRIC_KERNELS") != "0"
        and _installed()
        and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and all(_fits(weight.shape, target) for target in targets)
        and (expression is None or has_kernels(expression.tokens))
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

    jobs = [_Job(one, launch.weight_itself, launch.Layout(), 0, {}, one.numel() > _LARGEST) for one in scores]
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
                large = weight.numel() > _LARGEST
                job = _Job(weight[:_TRIED], functions.score, functions.LAYOUT, which, few, large)
                for jobs in ([job], [job] * 2):  # several are launched together
                    with suppress(Exception):  # a trial only: what fails here fails again where it is told
                        _launch(jobs, [targets] * len(jobs), bits)
        return functions

    def run() -> None:
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
    in_background(run)


def in_background(compile_some: Callable[[], None]) -> None:
    """Compiles kernels in a thread, one after the other; at once in the interpreter, which runs one at a time."""

    def run() -> None:
        with _compiling:
            compile_some()

    if os.environ.get("TRITON_INTERPRET") == "1":
        run()
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
    large: bool  # whether scores that compete over the whole weight are not all kept


def _job(weight: Tensor, expression: Expression, named: Mapping[str, Tensor]) -> _Job:
    functions, which = _find(expression, named)
    return _Job(weight, functions.score, functions.LAYOUT, which, named, weight.numel() > _LARGEST)


class _Piece(NamedTuple):
    """What competes apart in a weight at a target."""

    score: Any
    target: Target
    job: Any  # a `launch.Job`
    large: bool


def _launch(jobs: Sequence[_Job], targets: Sequence[Sequence[Target]], bits: bool = False) -> list[list[Tensor]]:
    """The pruned weights or masks, by job and each of its targets: all is launched before the host waits, once."""
    if not jobs or not any(targets):
        return [[] for _ in jobs]
    from triton.errors import TritonError

    # 16 bytes each: Triton compiles anew for what is aligned otherwise
    bad = torch.zeros(len(jobs), max(map(len, targets)), 2, dtype=torch.int64, device=jobs[0].weight.device)
    try:
        pieces = [_pieces(job, its, bits, slots) for job, its, slots in zip(jobs, targets, bad, strict=True)]
        searches = _started([piece for by_target in pieces for parts in by_target for piece in parts], bits)
        told = torch.cat([bad.flatten(), *(one.state.flatten() for one in searches)]).tolist()
        for place, search in enumerate(searches):
            first = bad.numel() + 6 * place
            search.finish((told[first : first + 3], told[first + 3 : first + 6]))
    except ValueError as error:
        raise ExpressionError(str(error)) from error
    except TritonError as error:
        raise GpmetricError(f"a Triton kernel failed; GPMETRIC_KERNELS=0 does without: {error}") from error
    size = bad[0].numel()
    for place, job in enumerate(jobs):
        if count := max(told[place * size : (place + 1) * size]):  # all targets have the same scores
            raise MaskError(f"{count} of {job.weight.numel()} scores are NaN or infinite")
    return [[_joined(parts, bits) for parts in by_target] for by_target in pieces]


def _pieces(job: _Job, targets: Sequence[Target], bits: bool, bad: Tensor) -> list[list[_Piece]]:
    """By target, what competes apart, with what is to be written; `bad` has two numbers for each target."""
    from gpmetric.kernels import launch
    from gpmetric.kernels.reduce import prepare

    weight = job.weight.detach().contiguous()
    operands = prepare(weight, job.named, job.layout, job.which)
    found = []
    cut = {weight.shape[1]: [(weight, operands)]}  # by columns that compete apart
    for target, slot in zip(targets, bad, strict=False):
        width = weight.shape[1] if target.group else target.width(weight.shape[1])
        if width not in cut:
            cut[width] = launch.pieces(weight, operands, width)
        pieces = []
        for part, its in cut[width]:
            rows, columns = part.shape
            size = part.numel() if target.across_rows else columns
            shape = ((part.numel() + 7) // 8,) if target.across_rows else (rows, (columns + 7) // 8)
            out = torch.empty(shape, dtype=torch.uint8, device=part.device) if bits else torch.empty_like(part)
            one = launch.Job(part, out, slot[:1], target.removed(size), its)
            pieces.append(_Piece(job.score, target, one, job.large and len(cut[width]) == 1))
        found.append(pieces)
    return found


def _started(pieces: Sequence[_Piece], bits: bool) -> list[Any]:
    """Begins to write them all, alike ones in one launch; the searches that are to be finished."""
    from gpmetric.kernels.launch import together
    from gpmetric.kernels.layers import prune_layers_together
    from gpmetric.kernels.pattern import prune_pattern_together
    from gpmetric.kernels.rows import prune_rows_together

    alike: dict[Any, list[_Piece]] = {}
    for piece in pieces:
        target = piece.target
        kind = id(piece.score), target.group, target.across_rows, target.across_rows and piece.large
        alike.setdefault(kind, []).append(piece)
    alone: list[_Piece] = []
    for (_, group, across_rows, large), same in alike.items():
        score = same[0].score
        for places in [[place] for place in range(len(same))] if large else together([one.job for one in same]):
            jobs = [same[place].job for place in places]
            if len(jobs) == 1:
                alone.append(same[places[0]])
            elif group:
                prune_pattern_together(jobs, group, score, bits=bits)
            elif across_rows:
                prune_layers_together(jobs, score, bits=bits)
            else:
                prune_rows_together(jobs, score, bits=bits)
    return [search for piece in alone if (search := _started_alone(piece, bits))]


def _started_alone(piece: _Piece, bits: bool) -> Any:
    """In a launch of its own; the search, if there is one to be finished."""
    from gpmetric.kernels.layer import Search
    from gpmetric.kernels.pattern import prune_pattern
    from gpmetric.kernels.rows import prune_rows

    (score, target, job, _), search = piece, None
    to = {"out": job.out, "bits": bits, "bad": job.bad}
    if target.group:
        prune_pattern(job.weight, target.keep, target.group, score, job.operands, **to)
    elif target.across_rows:
        search = Search(job.weight, job.removed, score, job.operands, **to)
    else:
        prune_rows(job.weight, job.removed, score, job.operands, **to)
    return search


def _joined(pieces: Sequence[_Piece], bits: bool) -> Tensor:
    """The weight, or the boolean mask, of the pieces that competed apart."""
    written = [_unpacked(job.out, *job.weight.shape) if bits else job.out for _, _, job, _ in pieces]
    return written[0] if len(written) == 1 else torch.cat(written, dim=1)


def _unpacked(bits: Tensor, rows: int, columns: int) -> Tensor:
    """Boolean [out, in] of bytes [out, (in + 7) // 8], or of the bytes [(out * in + 7) // 8] of a whole layer."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    whole = ((bits[..., None] >> places) & 1).bool().flatten(-2)
    return whole[:, :columns] if bits.dim() == 2 else whole[: rows * columns].view(rows, columns)
