"""Many formulas as one program: each sub-expression that they share is computed once, and forgotten after its last use.

The program is in static single assignment form: step n is a primitive applied to earlier steps. A value that varies
along one axis only stays a vector; big matrices are computed some rows at a time, which keeps temporaries in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from gpmetric.expression.evaluate import prepare_operands
from gpmetric.expression.primitives import PRIMITIVES
from gpmetric.expression.tree import Expression, Token, Tokens, arity
from gpmetric.operands import OPERANDS

__all__ = ["Tape"]

# Entries of one block, 512 KiB of fp32. CPU time of 48 formulas at 1024x4096 on one AMD EPYC thread, random and
# converged, in times of whole matrices: blocks of 2**15 1.01 and 1.01, of 2**17 0.93 and 0.91, of 2**19 0.93 and 0.86
# (benchmarks/bench_tape.py).
_BLOCK = 2**17
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


class Tape:
    """The scores of many formulas, each shared sub-expression computed once.

    Args:
        expressions: the formulas; equal ones may occur.
    """

    def __init__(self, expressions: Sequence[Expression]) -> None:
        self._expressions = tuple(expressions)
        self._steps: list[_Step] = []
        self._axes: list[frozenset[str]] = []  # of each step: those its value varies along
        self._numbers: dict[_Step, int] = {}
        self._last: dict[int, int] = {}  # step -> the step that uses it last; a formula's end counts as a step
        self._formulas = [self._append(expression) for expression in self._expressions]
        self._released: dict[int, list[int]] = {}  # step -> matrices not needed after it
        for number, last in self._last.items():
            if self._steps[number].arguments and len(self._axes[number]) == 2:
                self._released.setdefault(last, []).append(number)

    def __len__(self) -> int:
        """Number of distinct sub-expressions."""
        return len(self._numbers)

    def scores(self, operands: Mapping[str, Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Index and score of every formula, in order, each computed when it is asked for.

        Args:
            operands: as for `evaluate`; not to be changed before the last score.

        Returns:
            Pairs of an index and what `evaluate` gives for that formula: the same bits on one CPU thread. A score
            is not to be written to, since later formulas may contain it.

        Raises:
            ExpressionError: at once, for the first formula that lacks an operand or finds one of another shape.
        """
        return self._scores(self._leaves(operands), operands["W"].shape)

    def _append(self, expression: Expression) -> tuple[list[_Run], int]:
        """Adds the steps a formula is the first to need; its runs, and its end: a step that uses the root."""
        tokens = expression.tokens
        runs: list[_Run] = []
        root = 0
        # What a reduction needs comes first, so that between reductions a whole run goes through the blocks at once.
        for index in (*(i for i in reversed(range(len(tokens))) if _reduces(tokens[i])), 0):
            first = len(self._steps)
            root = self._number(tokens[expression.subtree(index)])
            new = sorted(range(first, len(self._steps)), key=self._phase)
            runs += [_Run(list(steps), phase == 1) for phase, steps in groupby(new, self._phase) if phase >= 0]
        end = len(self._steps)
        self._steps.append(_Step("", (root,)))
        self._axes.append(frozenset())
        self._last[root] = end
        return runs, end

    def _number(self, tokens: Tokens) -> int:
        """Number of the step that computes a subtree, after adding what is new in it."""
        stack: list[int] = []
        for token in reversed(tokens):
            arguments = tuple(stack.pop() for _ in range(arity(token)))
            step = _Step(token, arguments)
            if step not in self._numbers:
                self._numbers[step] = len(self._steps)
                self._last |= dict.fromkeys(arguments, len(self._steps))
                self._axes.append(self._axes_of(step))
                self._steps.append(step)
            stack.append(self._numbers[step])
        return stack[0]

    def _axes_of(self, step: _Step) -> frozenset[str]:
        if isinstance(step.token, float):
            return frozenset()
        if step.token in OPERANDS:
            return frozenset(OPERANDS[step.token].axes.split(","))
        return frozenset().union(*(self._axes[a] for a in step.arguments)) - {PRIMITIVES[step.token].reduces}

    def _phase(self, number: int) -> int:
        """Order within the new steps of a subtree: -1 operands and constants, 0 vectors, 1 matrices, 2 a reduction."""
        if not self._steps[number].arguments:
            return -1
        if _reduces(self._steps[number].token):
            return 2
        return int(len(self._axes[number]) == 2)

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
        for index, (runs, end) in enumerate(self._formulas):
            for run in runs:
                if run.in_blocks and rows < shape[0]:
                    self._compute_in_blocks(run.steps, values, shape, rows)
                else:
                    self._compute(run.steps, values, shape)
            (root,) = self._steps[end].arguments
            score = values[root].expand(shape).contiguous()
            if not self._steps[root].arguments:
                score = score.clone()
            self._release(end, values)
            yield index, score

    def _compute(self, steps: Sequence[int], values: dict[int, Tensor], shape: torch.Size) -> None:
        for number in steps:
            token = self._steps[number].token
            assert isinstance(token, str)  # constants are values already
            row = PRIMITIVES[token]
            arguments = [values[argument] for argument in self._steps[number].arguments]
            if row.reduces in ("in", "out"):
                arguments = [argument.expand(shape) for argument in arguments]  # [out, in]: sums count repeats
            values[number] = row.torch(*arguments)
            self._release(number, values)

    def _compute_in_blocks(self, steps: Sequence[int], values: dict[int, Tensor], shape: torch.Size, rows: int) -> None:
        """The same for element-wise steps on matrices; only what outlives the run is ever a whole matrix."""
        used = {argument for number in steps for argument in self._steps[number].arguments} & values.keys()
        found: dict[int, Tensor] = {}
        block: dict[int, Tensor] = {}
        for start in range(0, shape[0], rows):
            part = slice(start, start + rows)
            block = {number: values[number][part] if len(values[number]) > 1 else values[number] for number in used}
            self._compute(steps, block, shape)
            if not found:
                found = {number: block[number].new_empty(shape) for number in block.keys() - used}
            for number, matrix in found.items():
                matrix[part] = block[number]
        for number in used - block.keys():
            del values[number]
        values |= found

    def _release(self, number: int, values: dict[int, Tensor]) -> None:
        for unused in self._released.get(number, ()):
            del values[unused]


def _reduces(token: Token) -> bool:
    return isinstance(token, str) and token in PRIMITIVES and PRIMITIVES[token].reduces is not None


def _rows(leaves: Mapping[int, Tensor], shape: torch.Size) -> int:
    """Rows of one block; all of them on a GPU, for small matrices, and where sums would depend on the layout."""
    rows, columns = shape
    apart = all(leaf.device.type == "cpu" and leaf.is_contiguous() for leaf in leaves.values())
    if not apart or rows * columns <= _BLOCK:
        return rows
    aligned = _LANES // math.gcd(_LANES, columns)
    return max(aligned, _BLOCK // columns // aligned * aligned)
