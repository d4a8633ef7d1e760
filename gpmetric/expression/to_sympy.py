"""Expressions to sympy. Only trees we built are handed over, never text.

Guards are left out: a protected function is its function of |.|, an operand is real, or non-negative where it can be
nothing else, a reduction is an undefined function.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache, lru_cache, reduce
from typing import Any

import sympy as sp

from gpmetric.errors import ExpressionError
from gpmetric.expression.from_sympy import finite_float, from_sympy
from gpmetric.expression.primitives import PRIMITIVES, Algebra
from gpmetric.expression.sign import nonnegative
from gpmetric.expression.tree import Expression, Token, Tokens, arity, fold, order, rooted, subtree_end
from gpmetric.operands import OPERANDS

__all__ = ["MAX_POWER", "algebra", "to_sympy"]

MAX_POWER = 1000.0  # of nested powers multiplied: (2*W)**(10**6) would be a number of a million bits
_NICE = 1000  # largest numerator and denominator of a float kept as an exact fraction
# Nodes that sympy looks into below a primitive; its assumption queries grow exponentially.
_MAX_OPEN: dict[Algebra, float] = {"linear": math.inf, "product": 24, "open": 12, "closed": 12}


def to_sympy(expression: Expression) -> Any:
    """The sympy form, automatically simplified as sympy does on construction.

    Raises:
        ExpressionError: nested powers multiply beyond 1000, where exact arithmetic could take for ever, or a constant
            part is not finite and below 1e30.
    """
    return _build(expression, None)


def algebra(expression: Expression) -> Expression:
    """The expression rewritten by way of sympy.

    Functions that no algebra passes through, and large parts below a non-linear function, become symbols that stand
    for their own rewritten tree: sympy's time then grows with the size of the tree, not exponentially with its depth.

    Raises:
        ExpressionError: as `to_sympy`, or a result that is no expression.
    """
    atoms: dict[Any, Tokens] = {}
    return from_sympy(_build(expression, atoms), atoms)


def _build(expression: Expression, atoms: dict[Any, Tokens] | None) -> Any:
    def node(token: Token, parts: list[tuple[Any, int]]) -> tuple[Any, int]:
        """A form, and the nodes that sympy can look into."""
        if isinstance(token, float):
            return _exact(token), 1
        return (_symbol(token, OPERANDS[token].signed), 1) if token in OPERANDS else _applied(token, parts, atoms)

    _check_powers(expression.tokens)
    return fold(expression.tokens, node)[0]


def _applied(token: str, parts: list[tuple[Any, int]], atoms: dict[Any, Tokens] | None) -> tuple[Any, int]:
    forms, size = [form for form, _ in parts], 1 + sum(size for _, size in parts)
    if token == "pow" and forms[1].is_number and not abs(finite_float(forms[1])) <= MAX_POWER:
        raise ExpressionError(f"an exponent beyond {MAX_POWER:g} has no sympy form")
    row = PRIMITIVES[token]
    if atoms is not None and size > _MAX_OPEN[row.algebra]:
        forms, size = [_closed_factors(form, atoms) for form in forms], 1 + len(forms)
    if atoms is not None and row.algebra == "closed":
        return _atom(token, forms, atoms), 1
    form = row.to_sympy(sp, *forms)
    if form.is_number:  # step by step: exp(exp(exp(500))) has more digits than memory
        finite_float(form)
    return form, size


def _atom(token: str, forms: list[Any], atoms: dict[Any, Tokens]) -> Any:
    """A symbol for a primitive that no algebra passes through."""
    sign = -1 if PRIMITIVES[token].is_odd and forms[0].could_extract_minus_sign() else 1
    arguments = [from_sympy(sign * form, atoms).tokens for form in forms]
    if PRIMITIVES[token].commutative:
        arguments.sort(key=order)
    tokens = rooted(token, arguments)
    return sign * _named(tokens, nonnegative(tokens), atoms)


def _closed_factors(form: Any, atoms: dict[Any, Tokens]) -> Any:
    """The product with the base of every factor made a symbol."""
    factors = []
    for factor in sp.Mul.make_args(form):
        base, exponent = factor.as_base_exp() if factor.is_Pow else (factor, sp.S.One)
        if not exponent.is_number:
            base, exponent = factor, sp.S.One
        sized = isinstance(base, sp.Abs)
        inner = _closed(base.args[0] if sized else base, atoms)
        factors.append((sp.Abs(inner, evaluate=False) if sized else inner) ** exponent)
    return sp.Mul(*factors)


def _closed(form: Any, atoms: dict[Any, Tokens]) -> Any:
    """A symbol, with its sign, that stands for the form."""
    if form.is_Symbol or form.is_number:
        return form
    sign = -1 if form.could_extract_minus_sign() else 1
    return sign * _named(from_sympy(sign * form, atoms).tokens, bool((sign * form).is_nonnegative), atoms)


def _named(tokens: Tokens, positive: bool, atoms: dict[Any, Tokens]) -> Any:
    """The symbol of a subtree, named by its text so that sympy's order does not depend on hashes."""
    assumption = {"nonnegative": True} if positive else {"real": True}
    symbol = sp.Symbol("{" + " ".join(map(str, tokens)) + "}", **assumption)
    atoms[symbol] = tokens
    return symbol


@cache
def _symbol(name: str, signed: bool) -> Any:
    return sp.Symbol(name, real=True) if signed else sp.Symbol(name, nonnegative=True)


@lru_cache(4096)
def _exact(value: float) -> Any:
    """A small fraction where it is the same float, else a sympy.Float."""
    fraction = Fraction(value).limit_denominator(_NICE)
    nice = abs(fraction.numerator) <= _NICE and fraction.numerator / fraction.denominator == value
    return sp.Rational(fraction.numerator, fraction.denominator) if nice else sp.Float(value)


def _check_powers(tokens: Tokens) -> None:
    """Bounds the product of powers on every path from the root; constants under exp or in exponents count as powers."""
    pending = [1.0]  # bound at the next token, in prefix order
    for index, token in enumerate(tokens):
        bound = pending.pop()
        if token in PRIMITIVES:
            bound *= max(1.0, PRIMITIVES[str(token)].power or 1.0)
        if token in ("pow", "exp"):
            # exp(1000*log(x)) is x**1000 to sympy.
            bound *= _size_of_constants(tokens, index)
        if bound > MAX_POWER:
            raise ExpressionError(f"nested powers beyond {MAX_POWER:g} have no sympy form")
        pending.extend([bound] * arity(token))


def _size_of_constants(tokens: Tokens, index: int) -> float:
    """Bound on the power that the node at `index` can apply to its first argument."""
    start = index + 1 if tokens[index] == "exp" else subtree_end(tokens, index + 1)  # the argument; the exponent
    exponent = tokens[start : subtree_end(tokens, start)]
    if len(exponent) == 1 and isinstance(exponent[0], float):
        return max(1.0, abs(exponent[0]))
    constants = (token for token in exponent if isinstance(token, float))
    return float(reduce(lambda bound, constant: min(bound * (1 + abs(constant)), 1e9), constants, 1.0))
