"""The canonical form: opposing operations cancelled, then sympy's normal form in a fixed order of terms.

Two formulas with one canonical form give the same values wherever no guard acts. The converse is not promised: common
factors are not searched for, and rank equivalence is a later layer.
"""

from __future__ import annotations

from functools import lru_cache

from gpmetric.errors import ExpressionError
from gpmetric.expression.parse import MAX_DEPTH, MAX_NODES
from gpmetric.expression.primitives import PRIMITIVES
from gpmetric.expression.rewrite_rules import cancel_opposites
from gpmetric.expression.to_sympy import algebra, to_sympy
from gpmetric.expression.tree import Expression, Token, Tokens, fold, order, rooted

_KNOWN = 16_384  # steps that are remembered: a form is looked at again by whoever builds on it

__all__ = ["cancel_opposites", "canonical", "to_sympy"]


def canonical(expression: Expression) -> Expression:
    """The canonical form; idempotent, never longer than the argument, the same in every process.

    Returns:
        An expression with the value of the argument wherever no guard acts, up to rounding. It may lack W (`W-W` is 0).
    """
    seen: dict[Expression, None] = {}
    form = expression
    # A step never lengthens, so the steps end in a fixed point or, rarely, a cycle: then its least member.
    while form not in seen:
        seen[form] = None
        form = _step(form)
    forms = list(seen)
    return min(forms[forms.index(form) :], key=lambda member: (len(member), order(member.tokens)))


@lru_cache(_KNOWN)
def _step(expression: Expression) -> Expression:
    """Both layers once; where sympy's form is longer or cannot be told, the first layer with its arguments sorted."""
    first = _sorted(cancel_opposites(expression))
    if len(first) > MAX_NODES or first.depth > MAX_DEPTH:  # sympy recurses
        return first
    try:
        second = cancel_opposites(algebra(first))
    except ExpressionError:
        return first
    return second if len(second) <= len(first) else first


def _sorted(expression: Expression) -> Expression:
    """The arguments of every commutative primitive in the order of `order`; exact."""

    def node(token: Token, arguments: list[Tokens]) -> Tokens:
        commutes = token in PRIMITIVES and PRIMITIVES[str(token)].commutative
        return rooted(token, sorted(arguments, key=order) if commutes else arguments)

    return Expression(fold(expression.tokens, node))
