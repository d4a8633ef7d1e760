"""From sympy's form back to an expression, in an order of terms and factors that is ours.

The tree is walked with an explicit stack; numbers that are no finite float, and functions that are no primitive, raise
ExpressionError.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy as sp

from gpmetric.errors import ExpressionError
from gpmetric.expression.primitives import PRIMITIVES
from gpmetric.expression.tree import MAX_CONSTANT, Expression, Token, Tokens, chain, order, rooted

__all__ = ["finite_float", "from_sympy"]


def from_sympy(form: Any, atoms: Mapping[Any, Tokens] | None = None) -> Expression:
    """The expression of a form built by `to_sympy`, terms and factors in the order of `order`.

    Args:
        form: a sympy expression.
        atoms: the tokens of symbols that stand for whole subtrees.

    Raises:
        ExpressionError: the form contains something that is no primitive, or no finite real number.
    """
    done: dict[Any, Tokens] = dict(atoms or {})
    stack = [(form, False)]
    while stack:
        node, ready = stack.pop()
        if node in done:
            continue
        if ready:
            done[node] = _plan(node).combine(done)
        else:
            stack.append((node, True))
            stack.extend((part, False) for part in _plan(node).parts)
    return Expression(done[form])


@dataclass(frozen=True)
class _Plan:
    """The parts a node needs translated first, and how their tokens are put together."""

    combine: Callable[[dict[Any, Tokens]], Tokens]
    parts: list[Any] = field(default_factory=list)


def _plan(node: Any) -> _Plan:
    if node.is_number:
        return _Plan(lambda done: (finite_float(node),))
    if node.is_Symbol:
        return _Plan(lambda done: (node.name,))
    if node.is_Add:
        return _plan_sum(node)
    if node.is_Mul or node.is_Pow or isinstance(node, sp.Abs):
        return _plan_product(node)
    row = PRIMITIVES.get(node.func.__name__.lower())  # sympy's Max is our max
    if row is None:
        raise ExpressionError(f"sympy's {node.func.__name__[:40]} is no primitive")
    arguments = [_unsized(argument) if row.grows_with_size else argument for argument in node.args]
    if row.commutative:
        return _Plan(lambda done: chain(row.name, sorted((done[part] for part in arguments), key=order)), arguments)
    return _Plan(lambda done: rooted(row.name, [done[part] for part in arguments]), arguments)


def finite_float(number: Any) -> float:
    """The number.

    Raises:
        ExpressionError: it is not finite, real and below 1e30.
    """
    try:
        value = complex(number)
    except (TypeError, ValueError, OverflowError):
        value = complex("nan")
    if value.imag or not abs(value.real) < MAX_CONSTANT:
        raise ExpressionError("a number that is not finite, real and below 1e30")
    return value.real + 0.0


def _unsized(factor: Any) -> Any:
    """The factors with |.| taken off, for a function that takes the size itself."""
    return sp.Mul(*(part.args[0] if isinstance(part, sp.Abs) else part for part in sp.Mul.make_args(factor)))


def _plan_sum(node: Any) -> _Plan:
    """g * (a + b - c): the common coefficient g that leaves the fewest others is taken out."""
    terms = [term.as_coeff_Mul() for term in node.args]
    sizes = sorted({abs(coefficient) for coefficient, rest in terms if rest != 1}, key=float)
    common = min([sp.S.One, *sizes], key=lambda g: (g != 1) + sum(abs(c) != g for c, rest in terms if rest != 1))
    positive: list[Any] = []
    negative: list[Any] = []
    for coefficient, rest in terms:
        size = abs(coefficient) / common
        part = size * rest if size != 1 and rest != 1 else (size if rest == 1 else rest)
        (positive if coefficient > 0 else negative).append(part)

    def combine(done: dict[Any, Tokens]) -> Tokens:
        plus, minus = (sorted((done[part] for part in parts), key=order) for parts in (positive, negative))
        total = chain("sub", [chain("add", plus), *minus]) if plus else ("neg", *chain("add", minus))
        return total if common == 1 else ("mul", finite_float(common), *total)

    return _Plan(combine, positive + negative)


_Group = tuple[list[Any], list[Any], list[Any], list[Any]]  # sized over, over, sized under, under the fraction bar


def _plan_product(node: Any) -> _Plan:
    """c * (a*b/d)**e * ...: bases with the same exponent share it, and factors |a|, |b| share one abs."""
    number, groups = sp.S.One, defaultdict[Any, _Group](lambda: ([], [], [], []))
    for factor in sp.Mul.make_args(node):
        if factor.is_number:
            number *= factor
            continue
        base, exponent = factor.as_base_exp() if factor.is_Pow else (factor, sp.S.One)
        if not exponent.is_number or (base.is_number and factor.is_Pow):
            base, exponent = factor, sp.S.One
        under = exponent.is_negative
        sized = isinstance(base, sp.Abs)
        groups[abs(exponent)][2 * under + (not sized)].append(base.args[0] if sized else base)
    parts = [part for group in groups.values() for kind in group for base in kind for part in _needed(base)]

    def combine(done: dict[Any, Tokens]) -> Tokens:
        over: list[Tokens] = []
        under: list[Tokens] = []
        for exponent in sorted(groups, key=float):
            top, bottom = _power(finite_float(exponent), groups[exponent], done)
            over.extend(top)
            under.extend(bottom)
        return _fraction(finite_float(number), sorted(over, key=order), sorted(under, key=order))

    return _Plan(combine, parts)


def _needed(base: Any) -> list[Any]:
    return list(base.args) if base.is_Pow else [base]


def _base(base: Any, done: dict[Any, Tokens]) -> Tokens:
    """Tokens of a base; one with a symbolic exponent is a power itself."""
    return ("pow", *done[base.args[0]], *done[base.args[1]]) if base.is_Pow else done[base]


def _power(exponent: float, group: _Group, done: dict[Any, Tokens]) -> tuple[list[Tokens], list[Tokens]]:
    """Factors above and below the bar that a group of equal exponents gives."""
    sized_over, over, sized_under, under = ([_base(base, done) for base in kind] for kind in group)
    if exponent % 2 != 1:  # the power takes the size itself
        over, under, sized_over, sized_under = over + sized_over, under + sized_under, [], []
    tops, bottoms = _quotient(sized_over, sized_under)
    over, under = over + [("abs", *part) for part in tops], under + [("abs", *part) for part in bottoms]
    if exponent == 1:
        return over, under
    tops, bottoms = _quotient(over, under)
    return [_raised(part, exponent) for part in tops], [_raised(part, exponent) for part in bottoms]


def _quotient(over: list[Tokens], under: list[Tokens]) -> tuple[list[Tokens], list[Tokens]]:
    """One part above the bar, or, when nothing stands there, one below."""
    over, under = sorted(over, key=order), sorted(under, key=order)
    if over:
        return [_fraction(1.0, over, under)], []
    return [], ([chain("mul", under)] if under else [])


def _raised(base: Tokens, exponent: float) -> Tokens:
    row = next((row for row in PRIMITIVES.values() if row.power == exponent and exponent % 2 != 1), None)
    return (row.name, *base) if row else ("pow", *base, exponent)  # an odd power keeps the sign


def _fraction(number: float, over: list[Tokens], under: list[Tokens]) -> Tokens:
    """number * over / under, with -1 as a leading neg and 1/3 as a division by 3."""
    size: Token = 1.0 if number == -1 else number
    divisor = (
        1 / number if over and 0 < number < 1 and (1 / number).is_integer() and 1 / (1 / number) == number else None
    )
    if not over and under and size == 1:
        total: Tokens = ("inv", *chain("mul", under))
    else:
        leading = [] if over and (size == 1 or divisor) else [(size,)]
        total = chain("div", [chain("mul", [*leading, *over]), *under])
    if divisor:
        total = ("div", *total, divisor)
    return ("neg", *total) if number == -1 else total
