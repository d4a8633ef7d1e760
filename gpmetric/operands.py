"""The operands a metric may use: statistics of one linear layer with weight [out, in]. One row each.

How a row is accumulated from calibration text is the row of the same name in `gpmetric.calibration.accumulators`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from gpmetric.errors import InputError
from gpmetric.plugins import open_table

__all__ = ["CROSS", "GRAM", "OPERANDS", "Axes", "Operand", "Source", "is_regional", "needs_gradients", "shape_of"]

Axes = Literal["out,in", "in"]
Source = Literal["weight", "inputs", "gram", "region", "gradients"]

CROSS = "cross"  # X_dense^T X / n [in, in], of a layer's inputs in the dense model and in a pruned one
GRAM = "gram"  # X^T X / n [in, in]: what solvers ask for by name like an operand, though no formula can use it


@dataclass(frozen=True)
class Operand:
    """One statistic of a linear layer.

    Attributes:
        name: one capital letter, as written in a formula.
        axes: "out,in" for a matrix of the weight's shape, "in" for one number per input.
        meaning: what is measured, in one sentence.
        source: what it is measured on: the weight itself, the layer's inputs, their Gram matrix, gradients of the norm
            of what the layer's block gives ("region"), or gradients of the dense model's loss.
        latex: how it is written in mathematics.
        signed: whether it can be negative.
    """

    name: str
    axes: Axes
    meaning: str
    source: Source
    latex: str
    signed: bool = False

    @property
    def cost(self) -> float:
        """What collecting it takes, in rough multiples of a forward pass over the calibration text."""
        return _COSTS[self.source]


# One forward and one backward pass for a region, too; but block by block, and wherever X is measured.
_COSTS: dict[Source, float] = {"weight": 0.0, "inputs": 1.0, "gram": 2.0, "region": 3.0, "gradients": 3.0}

_ROWS = (
    Operand("W", "out,in", "the signed weight", "weight", r"W", signed=True),
    Operand("X", "in", "root mean square over calibration tokens of the input activation", "inputs", r"\lVert X\rVert"),
    Operand("G", "out,in", "mean over calibration sequences of the absolute gradient of the loss", "gradients", r"G"),
    Operand("H", "out,in", "Hessian diagonal, empirical Fisher: mean of the squared gradient", "gradients", r"H"),
    Operand("D", "in", "OBS curvature: 1 / diag((X^T X / n + damping)^-1)", "gram", r"D"),
    Operand("F", "out,in", "H token by token: mean of the sum of every token's squared gradient", "gradients", r"F"),
    Operand("R", "out,in", "mean absolute gradient of the norm of the block's own output", "region", r"R"),
)

OPERANDS: dict[str, Operand] = {row.name: row for row in _ROWS}


def _check(name: str, row: Operand, fellows: Mapping[str, Any]) -> None:
    """Refuses the row of a plug-in, whose accumulator is tried by itself."""
    if name != row.name or re.fullmatch("[A-Z]", name) is None:
        raise InputError(f"an operand is called by one capital letter, but by {name!r} and {row.name!r:.60}")
    for field, kinds in (("axes", Axes), ("source", Source)):
        if (value := getattr(row, field)) not in get_args(kinds) or value == "weight":
            accepted = ", ".join(kind for kind in get_args(kinds) if kind != "weight")
            raise InputError(f"{field} must be one of {accepted}, but is {value!r:.60}")
    if "accumulator" not in fellows:
        raise InputError(f"how it is measured is missing: {name!r}: (Operand(...), FromInputs(...)), for instance")


open_table("operand", OPERANDS, Operand, _check)


def shape_of(name: str, weight: Sequence[int]) -> tuple[int, ...]:
    """Shape of an operand, or of the Gram matrix, that goes with a weight [out, in]."""
    rows, columns = weight
    if name in (CROSS, GRAM):
        return columns, columns
    return (columns,) if OPERANDS[name].axes == "in" else (rows, columns)


def needs_gradients(names: Iterable[str]) -> bool:
    """Whether one of these statistics is measured on gradients of the dense model's loss."""
    return any(name in OPERANDS and OPERANDS[name].source == "gradients" for name in names)


def is_regional(names: Iterable[str]) -> bool:
    """Whether one of these statistics is measured on gradients of a block's own output."""
    return any(name in OPERANDS and OPERANDS[name].source == "region" for name in names)
