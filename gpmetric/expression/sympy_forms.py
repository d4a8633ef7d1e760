"""Sympy forms of the protected primitives: functions of |.|, powers and undefined functions, all on real arguments.

Each function is called with the sympy module, so that the table of primitives does not import it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

__all__ = ["opaque", "symbolic_abs", "symbolic_pow"]


@lru_cache(maxsize=64)
def opaque(sp: Any, name: str, nonnegative: bool) -> Any:
    """The undefined real function of a primitive that sympy knows nothing about."""
    return sp.Function(name, nonnegative=True) if nonnegative else sp.Function(name, real=True)


def symbolic_abs(sp: Any, x: Any) -> Any:
    """|x| as a product of sizes; sympy's own Abs takes milliseconds on sums."""
    sizes = []
    for factor in sp.Mul.make_args(x):
        base, exponent = factor.as_base_exp() if factor.is_Pow else (factor, sp.S.One)
        if factor.is_nonnegative:
            sizes.append(factor)
        elif factor.is_nonpositive:
            sizes.append(-factor)
        elif exponent.is_Integer:
            sign = -1 if base.could_extract_minus_sign() else 1  # |a - b| and |b - a| are one form
            sizes.append(sp.Abs(sign * base, evaluate=False) ** exponent)
        else:
            sizes.append(sp.Abs(factor, evaluate=False))
    return sp.Mul(*sizes)


def symbolic_pow(sp: Any, a: Any, b: Any) -> Any:
    """The protected power: a**b where the sign is kept or positive, |a|**b for other numbers, else opaque."""
    if b.is_Integer or a.is_nonnegative:
        return a**b
    return symbolic_abs(sp, a) ** b if b.is_number else opaque(sp, "pow", False)(a, b)
