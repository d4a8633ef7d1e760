"""Many formulas as one program: each sub-expression that they share is computed once, and forgotten after its last use.

The program is in static single assignment form: step n is a primitive applied to earlier steps. A value that varies
along one axis only stays a vector. Big matrices are computed some rows at a time, which keeps temporaries in the cache;
those needed for longer lie in buffers that are used again, since fresh memory costs more than what is written to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from gpmetric.expression.evaluate import prepare_operands
from gpmetric.expression.primitives import PRIMITIVES, Primitive, Reduction
from gpmetric.expression.torch_forms import TINY
from gpmetric.expression.tree import Expression, Token, axes_of, fold
from gpmetric.operands import OPERANDS

__all__ = ["SharedProgram"]

# Entries of one block, 1 MiB of fp32. CPU time of 48 formulas at 1024x4096 on one AMD EPYC thread, random and
# converged, in times of whole matrices: blocks of 2**15 0.67 and 0.78, of 2**17 0.57 and 0.65, of 2**18 0.51 and 0.71,
# of 2**19 0.50 and 0.66 (benchmarks/bench_tape.py).
_BLOCK = 2**18
# Torch's vector loops take up to 32 entries at once and may round a remainder differently (pow does): blocks hold a
# multiple of 32, so only the last one has a remainder, and it is the whole matrix's.
_LANES = 32


class _Step(NamedTuple):
    """A token applied to earlier steps; equal steps are one.

    a*b and b*a are two: of 20 populations of 48 formulas, one would save 2 steps in 1000, and the order of arguments
    decides the layout of a result, thus the last bits of its sums, and which of 0 and -0 is the maximum.
    """

    token: Token
    arguments: tuple[int, ...]


class _Run(NamedTuple):
    """Steps computed one after the other, over the whole layer or, element-wise ones on matrices, in blocks of rows."""

    steps: list[int]
    in_blocks: bool


class _Part(NamedTuple):
    """A step within a primitive, with the columns of the table that the program reads."""

    torch: Callable[..., Tensor]
    reduces: Reduction = None


# Parts of the primitives on matrices, operation by operation those of torch_forms. A primitive that does not come apart
# is one step. mms and zsn do, because all but their reductions can be done in blocks; where low and high are equal, low
# is subtracted, inf is the divisor, and 0 is added, which makes -0 positive; elsewhere -0 is added, which changes
# nothing. pow by a constant needs fewer guards.
_PARTS = {
    "low": _Part(lambda x: x.amin().view(1, 1), "all"),
    "high": _Part(lambda x: x.amax().view(1, 1), "all"),
    "mean": _Part(lambda x: x.mean().view(1, 1), "all"),
    "over": _Part(lambda x, divisor: x / divisor),
    "shift": _Part(lambda mean, low, span: mean.where(span != 0, low)),
    "divisor": _Part(lambda x, span: x.where(span != 0, math.inf)),
    "zero": _Part(lambda span: span.new_full((1, 1), -0.0).where(span != 0, 0.0)),
    "positive power": _Part(lambda x, exponent: x.abs().pow_(exponent)),
    "negative power": _Part(lambda x, exponent: x.abs().clamp_(min=TINY).pow_(exponent)),
}


class SharedProgram:
    """The scores of many formulas, each shared sub-expression computed once.

    Args:
        expressions: the formulas; equal ones may occur.
    """

    def __init__(self, expressions: Sequence[Expression]) -> None:
        self._expressions = tuple(expressions)
        self._steps: list[_Step] = []
        self._axes: list[frozenset[str]] = []  # of each step: those its value varies along
        self._numbers: dict[_Step, int] = {}
        self._buffers: list[Tensor] = []  # [out, in]; whole matrices that blocks are written to
        self._last: dict[int, int] = {}  # step -> the step that uses it last; a formula's end counts as a step
        self._formulas = [self._append(expression) for expression in self._expressions]
        self._released: dict[int, list[int]] = {}  # step -> matrices not needed after it
        for number, last in self._last.items():
            if self._steps[number].arguments and len(self._axes[number]) == 2:
                self._released.setdefault(last, []).append(number)

    def __len__(self) -> int:
        """Number of distinct steps: sub-expressions, and parts of those that come apart."""
        return len(self._numbers)

    def scores(self, operands: Mapping[str, Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Index and score of every formula, in order, each computed when it is asked for.

        Args:
            operands: as for `evaluate`; not to be changed before the last score.

        Returns:
            Pairs of an index and what `evaluate` gives for that formula: the same bits on one CPU thread. A score is
            to be read before another is asked for, of these or other operands, which may take its memory, and not to be
            written to, since later formulas may contain it.

        Raises:
            ExpressionError: at once, for the first formula that lacks an operand or finds one of another shape.
        """
        return self._scores(self._leaves(operands), operands["W"].shape)

    def _append(self, expression: Expression) -> tuple[list[_Run], int]:
        """Adds the steps a formula is the first to need; its runs, and its end: a step that uses the root."""
        first = len(self._steps)
        root = fold(expression.tokens, self._apply)
        levels = self._levels(range(first, len(self._steps)))
        order = sorted(levels, key=lambda number: (levels[number], self._phase(number)))
        runs = [
            _Run(list(steps), phase == 1)
            for (_, phase), steps in groupby(order, lambda number: (levels[number], self._phase(number)))
        ]
        end = self._new_step(_Step("", (root,)), frozenset())
        for number in (*order, end):
            self._last |= dict.fromkeys(self._steps[number].arguments, number)
        return runs, end

    def _levels(self, new: range) -> dict[int, int]:
        """For each new step, how many new reductions come before it, one after the other.

        An element-wise step is put off to the level that first needs it, where it may never have to leave its block.
        """
        levels: dict[int, int] = {}
        for number in new:
            arguments = self._steps[number].arguments
            if arguments:
                levels[number] = max(levels[a] + self._reduces(a) if a in levels else 0 for a in arguments)
        needed: dict[int, int] = {}
        for number in reversed(levels):
            if not self._reduces(number):
                levels[number] = needed.get(number, levels[number])
            for a in self._steps[number].arguments:
                needed[a] = min(levels[number], needed.get(a, levels[number]))
        return levels

    def _apply(self, token: Token, arguments: Sequence[int]) -> int:
        """Number of the step that applies a primitive, or of the last of its parts; of an operand or a constant."""
        step = self._step
        if not arguments or len(self._axes[arguments[0]]) < 2:
            return step(token, *arguments)
        if token in ("rownorm", "colnorm"):
            return step("sqrt", step("rowsum" if token == "rownorm" else "colsum", step("sqr", *arguments)))
        if token in ("mms", "zsn"):
            return self._scaled(str(token), *arguments)
        exponent = self._steps[arguments[-1]].token
        if token == "pow" and isinstance(exponent, float) and exponent and exponent % 2 != 1:
            return step("positive power" if exponent > 0 else "negative power", *arguments)
        return step(token, *arguments)

    def _scaled(self, token: str, x: int) -> int:
        """Number of the last step of mms or zsn."""
        step = self._step
        low, high = step("low", x), step("high", x)
        span = step("sub", high, low)
        if token == "mms":
            scaled = step("over", step("sub", x, low), step("divisor", span, span))
        else:
            mean = step("shift", step("mean", x), low, span)
            size = step("max", step("sub", high, mean), step("sub", mean, low))
            unit = step("over", step("sub", x, mean), step("divisor", size, span))
            deviation = step("sqrt", step("mean", step("sqr", unit)))
            scaled = step("over", unit, step("divisor", deviation, span))
        return step("add", scaled, step("zero", span))

    def _step(self, token: Token, *arguments: int) -> int:
        step = _Step(token, arguments)
        if step not in self._numbers:
            self._numbers[step] = self._new_step(step, self._axes_of(step))
        return self._numbers[step]

    def _new_step(self, step: _Step, axes: frozenset[str]) -> int:
        self._steps.append(step)
        self._axes.append(axes)
        return len(self._steps) - 1

    def _axes_of(self, step: _Step) -> frozenset[str]:
        if step.token in _PARTS and _PARTS[str(step.token)].reduces == "all":
            return frozenset()  # low, high, mean
        return axes_of(step.token, [self._axes[argument] for argument in step.arguments])

    def _reduces(self, number: int) -> bool:
        token = self._steps[number].token
        return isinstance(token, str) and token not in OPERANDS and _row(token).reduces is not None

    def _phase(self, number: int) -> int:
        """Order within a level: 0 vectors, 1 matrices, 2 reductions."""
        return 2 if self._reduces(number) else int(len(self._axes[number]) == 2)

    def _leaves(self, operands: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Values of the steps without arguments: operands in fp32, constants [1, 1]."""
        prepared: dict[str, Tensor] = {}
        for index, expression in enumerate(self._expressions):
            if not index or not prepared.keys() >= set(expression.operands):
                prepared |= prepare_operands(expression, operands)
        leaves = {number: step.token for number, step in enumerate(self._steps) if not step.arguments}
        return {
            number: prepared[token]
            if isinstance(token, str)
            else torch.full((1, 1), token, dtype=torch.float32, device=operands["W"].device)
            for number, token in leaves.items()
        }

    def _scores(self, values: dict[int, Tensor], shape: torch.Size) -> Iterator[tuple[int, Tensor]]:
        """`values` holds what later steps need, by step."""
        rows = _rows(values, shape)
        # taken from the program: a second iterator at the same time makes its own
        buffers, self._buffers = [buffer for buffer in self._buffers if buffer.shape == shape], []
        for index, (runs, end) in enumerate(self._formulas):
            for run in runs:
                if run.in_blocks and rows < shape[0]:
                    self._compute_in_blocks(run.steps, values, buffers, shape, rows)
                else:
                    self._compute(run.steps, values, shape)
            (root,) = self._steps[end].arguments
            score = values[root].expand(shape).contiguous()
            if not self._steps[root].arguments:
                score = score.clone()
            self._release(end, values)
            yield index, score
        self._buffers = buffers

    def _compute(self, steps: Sequence[int], values: dict[int, Tensor], shape: torch.Size) -> None:
        for number in steps:
            token = self._steps[number].token
            assert isinstance(token, str)  # constants are values already
            row = _row(token)
            arguments = [values[argument] for argument in self._steps[number].arguments]
            if row.reduces in ("in", "out"):
                arguments = [argument.expand(shape) for argument in arguments]  # [out, in]: sums count repeats
            values[number] = row.torch(*arguments)
            self._release(number, values)

    def _compute_in_blocks(
        self, steps: Sequence[int], values: dict[int, Tensor], buffers: list[Tensor], shape: torch.Size, rows: int
    ) -> None:
        """The same for element-wise steps on matrices; only what outlives the run is ever a whole matrix."""
        used = {argument for number in steps for argument in self._steps[number].arguments} & values.keys()
        found: dict[int, Tensor] = {}
        block: dict[int, Tensor] = {}
        for start in range(0, shape[0], rows):
            part = slice(start, start + rows)
            block = {number: values[number][part] if len(values[number]) > 1 else values[number] for number in used}
            self._compute(steps, block, shape)
            if not found:
                found = dict(zip(block.keys() - used, _free(buffers, values, shape), strict=False))
            for number, matrix in found.items():
                matrix[part] = block[number]
        for number in used - block.keys():
            del values[number]
        values |= found

    def _release(self, number: int, values: dict[int, Tensor]) -> None:
        for unused in self._released.get(number, ()):
            del values[unused]


def _row(token: str) -> _Part | Primitive:
    return _PARTS.get(token) or PRIMITIVES[token]


def _free(buffers: list[Tensor], values: Mapping[int, Tensor], shape: torch.Size) -> Iterator[Tensor]:
    """Those of the buffers that hold no value, then new ones."""
    taken = {id(value) for value in values.values()}
    yield from [buffer for buffer in buffers if id(buffer) not in taken]
    while True:
        buffers.append(torch.empty(shape, dtype=torch.float32))
        yield buffers[-1]


def _rows(leaves: Mapping[int, Tensor], shape: torch.Size) -> int:
    """Rows of one block; all of them on a GPU, for small matrices, and where sums would depend on the layout."""
    rows, columns = shape
    apart = all(leaf.device.type == "cpu" and leaf.is_contiguous() for leaf in leaves.values())
    if not apart or rows * columns <= _BLOCK:
        return rows
    aligned = _LANES // math.gcd(_LANES, columns)
    return max(aligned, _BLOCK // columns // aligned * aligned)
