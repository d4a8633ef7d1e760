"""The score an expression gives to every weight of a layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gpmetric.errors import ExpressionError
from gpmetric.expression.primitives import PRIMITIVES
from gpmetric.expression.tree import Expression, Token, Tokens, fold
from gpmetric.operands import OPERANDS

__all__ = ["compute", "evaluate", "prepare_operands"]


@torch.no_grad()
def evaluate(expression: Expression, operands: Mapping[str, Tensor]) -> Tensor:
    """Score of every weight; larger means keep.

    Args:
        expression: the formula.
        operands: W always, and those that the formula uses, each of the shape that its row of OPERANDS says, [out, in]
            or [in]. Any real dtype and device; converted to fp32 on the device of W at once.

    Returns:
        fp32 [out, in], contiguous, on the device of W, sharing memory with no operand. Not finite where the formula
        overflows fp32 or an operand is not finite.

    Raises:
        ExpressionError: a missing operand, or one of another shape.
    """
    values = prepare_operands(expression, operands)
    weight = operands["W"]
    score = compute(expression.tokens, values, weight).expand(weight.shape).contiguous()
    return score.clone() if len(expression) == 1 else score


def compute(tokens: Tokens, values: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """The value of a formula or of a part of one, in compact form: [out, in], or 1 along an axis it does not vary on.

    Args:
        tokens: a whole subtree.
        values: what `prepare_operands` gives.
        weight: [out, in], of which shape and device count.
    """

    def node(token: Token, arguments: list[Tensor]) -> Tensor:
        if isinstance(token, float):
            return torch.full((1, 1), token, dtype=torch.float32, device=weight.device)
        if token in values:
            return values[token]
        row = PRIMITIVES[token]
        if row.reduces in ("in", "out"):
            arguments = [argument.expand(weight.shape) for argument in arguments]  # [out, in]: sums count repeats
        return row.torch(*arguments)

    return fold(tokens, node)


def prepare_operands(expression: Expression, operands: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The operands used, fp32 on one device: matrices [out, in], vectors [1, in]."""
    missing = [name for name in ("W", *expression.operands) if name not in operands]
    if missing:
        available = " ".join(name for name in OPERANDS if name in operands) or "none"
        raise ExpressionError(f"the formula {_shown(expression)} needs operand {missing[0]}; available: {available}")
    weight = operands["W"]
    if weight.dim() != 2:
        raise ExpressionError(f"operand W must be [out, in], but got shape {list(weight.shape)}")
    values: dict[str, Tensor] = {}
    for name in expression.operands:
        vector = OPERANDS[name].axes == "in"
        wanted = weight.shape[1:] if vector else weight.shape
        if operands[name].shape != wanted:
            got = list(operands[name].shape)
            raise ExpressionError(f"operand {name} must have shape {list(wanted)} to go with W, but got {got}")
        value = operands[name].detach().to(device=weight.device, dtype=torch.float32)
        values[name] = value.unsqueeze(0) if vector else value  # [1, in] | [out, in]
    return values


def _shown(expression: Expression) -> str:
    text = str(expression)
    return text if len(text) <= 60 else text[:57] + "..."
