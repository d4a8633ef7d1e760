"""Scores for a solver that prunes some columns, updates the weights of the others, and goes on to the next columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from gpmetric.expression.evaluate import compute, prepare_operands
from gpmetric.expression.primitives import PRIMITIVES
from gpmetric.expression.tree import Expression, Token, Tokens, arity, subtree_end

__all__ = ["ColumnScores"]


class ColumnScores:
    """A formula, ready to score a few columns of several layers again and again while their weights change.

    Only W changes between calls. The parts of the formula without W are computed here, once. Each call computes the
    parts with W, and of these only the columns that are asked for; but a reduction (mms, rowsum, ...) needs its
    argument in all columns.

    Args:
        expression: the formula.
        layers: the operands of each layer, as for `evaluate`, all layers of one shape; of W only the shape counts.

    Raises:
        ExpressionError: a missing operand, or one of another shape.
    """

    def __init__(self, expression: Expression, layers: Sequence[Mapping[str, Tensor]]) -> None:
        tokens = self._tokens = expression.tokens
        self._shape = layers[0]["W"].shape
        prepared = [(prepare_operands(expression, layer), layer["W"]) for layer in layers]
        self._steps: list[int] = []  # tokens whose value is computed, or at hand, in the order of a stack machine
        self._fixed: dict[int, Tensor] = {}  # value [n, 1, out | 1, in | 1] of each largest subtree without W
        self._whole: set[int] = set()  # tokens inside a reduction, whose values have all columns
        index = 0
        while index < len(tokens):
            end = subtree_end(tokens, index)
            self._steps.insert(0, index)
            if "W" not in tokens[index:end]:
                self._fixed[index] = _stacked([compute(tokens[index:end], *layer) for layer in prepared])
                index = end
                continue
            if arity(tokens[index]) and PRIMITIVES[str(tokens[index])].reduces:
                self._whole.update(range(index + 1, end))
            index += 1

    def parts(self) -> tuple[Tokens, dict[str, Tensor]] | None:
        """The formula with each part without W as one token, `part0` and so on, and what these are worth.

        A value is [n, in or 1, out or 1], contiguous. None where a part with W is reduced.
        """
        tokens: list[Token] = []
        parts = dict[str, Tensor]()
        names = dict[Tokens, str]()
        index = 0
        while index < len(self._tokens):
            token, end = self._tokens[index], index + 1
            if index in self._fixed:
                end = subtree_end(self._tokens, index)
                subtree = self._tokens[index:end]
                token = names.setdefault(subtree, f"part{len(names)}")
                parts[token] = self._fixed[index][:, 0].transpose(1, 2)
            elif token != "W" and PRIMITIVES[str(token)].reduces:
                return None
            tokens.append(token)
            index = end
        return tuple(tokens), parts

    def __call__(self, weights: Tensor, start: int, end: int) -> Tensor:
        """Scores [n, copies, out, end - start] of those columns.

        Args:
            weights: [n, copies, out, in], fp32, several copies of each layer's weight as they are now.
            start, end: the first column, and one past the last.
        """
        stack: list[Tensor] = []
        for index in self._steps:
            token = self._tokens[index]
            if index in self._fixed:
                value = self._fixed[index]
            elif token == "W":
                value = weights
            else:
                row = PRIMITIVES[str(token)]
                arguments = [stack.pop() for _ in range(row.arity)]
                if row.reduces is None:
                    stack.append(row.torch(*arguments))
                    continue
                shape = (*weights.shape[:2], *self._shape) if row.reduces in ("in", "out") else arguments[0].shape
                value = _by_matrix(row.torch, arguments[0].expand(shape))
            keeps_all = index in self._whole or value.shape[3] == 1
            stack.append(value if keeps_all else value[..., start:end])
        return stack.pop().expand(*weights.shape[:3], end - start)


def _stacked(values: Sequence[Tensor]) -> Tensor:
    """[n, 1, rows, columns] of n matrices; columns are contiguous, as they are in the solver's weights."""
    return torch.stack([value.t() for value in values])[:, None].transpose(2, 3)


def _by_matrix(reduction: Callable[..., Tensor], values: Tensor) -> Tensor:
    """A reduction of each matrix of [n, copies, rows, columns], all alike in shape."""
    # each as it lies in memory: the order of a sum is not to depend on how many are scored together
    return torch.stack([torch.stack([reduction(matrix) for matrix in copies]) for copies in values])
