"""Formulas that score weights: `parse` reads one, `evaluate.evaluate` scores with it, `canonical.canonical` names it.

Reading a formula imports neither torch nor sympy.
"""

from gpmetric.expression.parse import parse
from gpmetric.expression.primitives import PRIMITIVES
from gpmetric.expression.tree import Expression

__all__ = ["PRIMITIVES", "Expression", "parse"]
