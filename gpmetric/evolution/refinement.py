"""Neighbours of a good formula: constants a little larger and smaller, powers, coefficients and factors besides."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from gpmetric.expression import Expression
from gpmetric.expression.rank import factorised, product
from gpmetric.expression.sign import nonnegative
from gpmetric.expression.tree import MAX_CONSTANT, Tokens, subtree_end
from gpmetric.operands import OPERANDS

__all__ = ["factors", "neighbours", "weighted"]


def neighbours(expression: Expression, factor: float) -> Iterator[Expression]:
    """Formulas one step away: a constant times or divided by `factor`, or a new power or coefficient of that size.

    A power is put on an operand that has none (on abs(W) rather than W), a coefficient on the second term of a sum or
    difference. The order is that of the tokens, `factor`, above 1, before its inverse.
    """
    tokens = expression.tokens
    parents = {child: place for place in range(len(tokens)) for child in expression.children(place)}
    for place, token in enumerate(tokens):
        for size in (factor, 1 / factor):
            if isinstance(token, float):
                value = float(f"{token * size:.3g}")
                if 0 < abs(value) < MAX_CONSTANT:
                    yield _replaced(tokens, place, place + 1, (value,))
                continue
            above = tokens[parents[place]] if place else None
            if ((token in OPERANDS and token != "W") or tokens[place : place + 2] == ("abs", "W")) and above != "pow":
                end = subtree_end(tokens, place)
                yield _replaced(tokens, place, end, ("pow", *tokens[place:end], float(f"{size:.3g}")))
            if token in ("add", "sub"):
                start = subtree_end(tokens, place + 1)
                end = subtree_end(tokens, start)
                has_coefficient = tokens[start] == "mul" and isinstance(tokens[start + 1], float)
                if not has_coefficient:
                    yield _replaced(tokens, start, end, ("mul", float(f"{size:.3g}"), *tokens[start:end]))


def factors(operands: Collection[str]) -> list[Tokens]:
    """The simplest things a saliency is multiplied by: operands, and the norms of a matrix's rows and columns."""
    found: list[Tokens] = []
    for name in operands:
        found.append((name,))
        if OPERANDS[name].axes == "out,in":
            found += [("rownorm", name), ("colnorm", name)]
    return found


def weighted(expression: Expression, power: float, operands: Collection[str]) -> Iterator[Expression]:
    """The formula times each of `factors` to that power, and to its negative, as one product of powers.

    In the logarithm of the score these are steps along every coordinate: most published metrics are such products.
    """
    powers = factorised(expression)
    for base in factors(operands):
        for size in (power, -power):
            if not nonnegative(expression.tokens):  # its factors would lose their signs
                yield Expression(("mul", *expression.tokens, "pow", *base, size))
                continue
            raised = powers | {base: float(f"{powers.get(base, 0.0) + size:.3g}")}
            yield product({one: exponent for one, exponent in raised.items() if exponent})


def _replaced(tokens: Tokens, start: int, end: int, middle: Tokens) -> Expression:
    return Expression((*tokens[:start], *middle, *tokens[end:]))
