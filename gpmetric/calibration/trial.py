"""A plug-in's accumulator tried on a few tokens of a tiny layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gpmetric.calibration.accumulators import (
    FromGradients,
    FromInputs,
    FromRegion,
    FromTokens,
    InputMoments,
    functions_of,
)
from gpmetric.errors import InputError
from gpmetric.expression.trial import check_tensor
from gpmetric.operands import Operand

__all__ = ["check_accumulator"]

_KINDS: dict[str, tuple[type, ...]] = {  # by source
    "inputs": (FromInputs,),
    "gram": (FromInputs,),
    "region": (FromRegion,),
    "gradients": (FromGradients, FromTokens),
}
_OUT, _IN, _TOKENS = 3, 5, 7


def check_accumulator(
    name: str, row: FromInputs | FromGradients | FromTokens | FromRegion, fellows: Mapping[str, Any]
) -> None:
    """Refuses a row that gives no statistic of the shape and sign that the operand of its name says.

    Raises:
        InputError: what is wrong.
    """
    operand = fellows.get("operand")
    if not isinstance(operand, Operand):
        raise InputError(f"it belongs to an operand, {name!r}: (Operand(...), {type(row).__name__}(...))")
    if not isinstance(row, _KINDS[operand.source]):
        accepted = " or ".join(kind.__name__ for kind in _KINDS[operand.source])
        raise InputError(f"an operand of source {operand.source} is measured by {accepted}")
    if isinstance(row, FromInputs) and row.pairs != (operand.source == "gram"):
        raise InputError(f"pairs must be {not row.pairs} where the operand's source is {operand.source}")
    shape = (_IN,) if operand.axes == "in" else (_OUT, _IN)
    value = check_tensor("the statistic", _measured(row), shape)
    if not operand.signed and (value < 0).any():
        raise InputError("it can be negative, so the operand must be signed=True")


def _measured(row: FromInputs | FromGradients | FromTokens | FromRegion) -> object:
    """The statistic of two sequences."""
    generator, cpu = torch.Generator().manual_seed(0), torch.device("cpu")

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if isinstance(row, FromInputs):
        moments = InputMoments(_IN, cpu, gram=row.pairs, functions=functions_of({"": row}))
        for inputs in (draw(1, _TOKENS, _IN), draw(1, _TOKENS, _IN)):
            if row.of is not None:
                before = inputs[0].clone()
                check_tensor("of", row.of(inputs[0]), (_TOKENS, _IN))
                if not torch.equal(inputs[0], before):
                    raise InputError("of writes to the activations")
            moments.add(inputs)
        return row.result(moments)
    one = row.start(torch.Size((_OUT, _IN)), cpu)
    for _ in range(2):
        if isinstance(row, FromTokens):
            one.add(draw(1, _TOKENS, _IN), draw(1, _TOKENS, _OUT))
        else:
            one.add(draw(_OUT, _IN))
    return one.result(2)
