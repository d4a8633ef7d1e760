"""The operands a metric may use: statistics of one linear layer with weight [out, in]. One row each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["OPERANDS", "Axes", "Cost", "Operand"]

Axes = Literal["out,in", "in"]
Cost = Literal["none", "activations", "gradients", "curvature"]


@dataclass(frozen=True)
class Operand:
    """One statistic of a linear layer.

    Attributes:
        name: one capital letter, as written in a formula.
        axes: "out,in" for a matrix of the weight's shape, "in" for one number per input.
        meaning: what is measured, in one sentence.
        cost: what has to be collected to have it: nothing, activations, gradients or the Gram matrix.
        latex: how it is written in mathematics.
    """

    name: str
    axes: Axes
    meaning: str
    cost: Cost
    latex: str


_ROWS = (
    Operand("W", "out,in", "the signed weight", "none", r"W"),
    Operand(
        "X", "in", "root mean square over calibration tokens of the input activation", "activations", r"\lVert X\rVert"
    ),
    Operand("G", "out,in", "mean over calibration sequences of the absolute gradient of the loss", "gradients", r"G"),
    Operand("H", "out,in", "Hessian diagonal, empirical Fisher: mean of the squared gradient", "gradients", r"H"),
    Operand("D", "in", "OBS curvature: 1 / diag((X^T X / n + damping)^-1)", "curvature", r"D"),
    Operand("F", "out,in", "H token by token: mean of the sum of every token's squared gradient", "gradients", r"F"),
)

OPERANDS: dict[str, Operand] = {row.name: row for row in _ROWS}
