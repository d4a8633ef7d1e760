"""A formula as a sympy expression and as a JSON record."""

from __future__ import annotations

from typing import Any

from gpmetric.errors import ExpressionError
from gpmetric.export.latex import to_latex
from gpmetric.expression.canonical import canonical, to_sympy
from gpmetric.expression.tree import Expression

__all__ = ["COMPARISON", "to_json", "to_sympy_text"]

# comparison group -> what a file says of it
COMPARISON = {
    "row": "Scores compete within each row.",
    "layer": "Scores compete within the whole matrix.",
    "block": "Scores compete within each 128 consecutive columns, over all rows.",
}


def to_sympy_text(expression: Expression) -> str:
    """One line that sympy prints for the formula without guards; reductions are undefined functions.

    Raises:
        ExpressionError: powers so large that sympy would not end.
    """
    return str(to_sympy(expression))


def to_json(expression: Expression, group: str = "row") -> dict[str, Any]:
    """Record of plain JSON values, `group` of COMPARISON; `sympy` is None where the formula has no sympy form."""
    try:
        symbolic: str | None = to_sympy_text(expression)
    except ExpressionError:
        symbolic = None
    return {
        "formula": str(expression),
        "group": group,
        "canonical": str(canonical(expression)),
        "latex": to_latex(expression),
        "sympy": symbolic,
        "operands": list(expression.operands),
        "nodes": len(expression),
        "depth": expression.depth,
        "tokens": list(expression.tokens),
    }
