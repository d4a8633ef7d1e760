"""Which draws are worth evaluating: one walk over a formula tells the axes it varies along and its parity in W.

A network does the same when an input feature and its column of W change sign together, so a saliency that changes with
the sign of W ranks by accident of training; every published metric is even in W.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from gpmetric.expression import PRIMITIVES, Expression
from gpmetric.expression.tree import subtree_end
from gpmetric.operands import OPERANDS

__all__ = ["FORBIDDEN", "Nesting", "Space", "foreign_to", "is_sensible", "nests"]

_EVEN, _ODD, _NEITHER = "even", "odd", "neither"


Nesting = tuple[str, str]

# Saturating, exploding or rescaling functions of themselves: nobody would read them, and their scores tie or overflow.
FORBIDDEN: tuple[Nesting, ...] = (
    ("exp", "exp"),
    ("log", "log"),
    ("tanh", "tanh"),
    ("exp", "tanh"),
    ("mms", "mms"),
    ("zsn", "zsn"),
    ("mms", "zsn"),
    ("zsn", "mms"),
)


@dataclass(frozen=True)
class _Value:
    """What is known of a subexpression; a constant one has its number unless it was computed."""

    axes: frozenset[str]
    parity: str
    constant: float | None = None


def is_sensible(expression: Expression, forbidden: Sequence[Nesting] = FORBIDDEN) -> bool:
    """Whether the score uses W, differs along both axes, is even in W, and computes nothing from constants alone.

    Args:
        expression: any formula.
        forbidden: (outer, inner) primitives that must not be nested, at any depth.
    """
    if "W" not in expression.operands or any(nests(expression, *pair) for pair in forbidden):
        return False
    values: list[_Value] = []  # not yet consumed, walking the prefix form backwards
    for token in reversed(expression.tokens):
        if isinstance(token, float):
            values.append(_Value(frozenset(), _EVEN, token))
        elif token in OPERANDS:
            values.append(_Value(frozenset(OPERANDS[token].axes.split(",")), _ODD if token == "W" else _EVEN))
        else:
            arguments = [values.pop() for _ in range(PRIMITIVES[token].arity)]
            axes = _axes(token, arguments)
            if not any(argument.axes for argument in arguments):
                return False
            values.append(_Value(axes, _parity(token, arguments)))
    (score,) = values
    return score.axes == {"out", "in"} and score.parity == _EVEN


def nests(expression: Expression, outer: str, inner: str) -> bool:
    """Whether `inner` occurs anywhere below an `outer`."""
    tokens = expression.tokens
    places = (place for place, token in enumerate(tokens) if token == outer)
    return any(inner in tokens[place + 1 : subtree_end(tokens, place)] for place in places)


def _axes(name: str, arguments: Sequence[_Value]) -> frozenset[str]:
    together = frozenset().union(*(argument.axes for argument in arguments))
    return together - {PRIMITIVES[name].reduces}


def _parity(name: str, arguments: Sequence[_Value]) -> str:
    parities = [argument.parity for argument in arguments]
    if name == "pow":
        exponent = arguments[1].constant
        odd_power = exponent is not None and exponent % 2 == 1
        return parities[0] if odd_power or parities[0] != _ODD else _EVEN
    if all(parity == _EVEN for parity in parities):
        return _EVEN
    return _NEITHER if _NEITHER in parities else _OF_ODD.get(name, lambda given: _NEITHER)(parities)


# primitive -> parity of the result when at least one argument is odd and none is neither; absent: neither
_OF_ODD: dict[str, Callable[[Sequence[str]], str]] = {
    **dict.fromkeys(("abs", "sqr", "sqrt", "log", "rownorm", "colnorm"), lambda given: _EVEN),
    **dict.fromkeys(("neg", "tanh", "inv", "zsn", "rowsum", "colsum"), lambda given: _ODD),
    **dict.fromkeys(("add", "sub"), lambda given: _ODD if set(given) == {_ODD} else _NEITHER),
    **dict.fromkeys(("mul", "div"), lambda given: _EVEN if given.count(_ODD) == 2 else _ODD),
}


class Space(Protocol):
    """What formulas may be made of."""

    @property
    def operands(self) -> tuple[str, ...]: ...
    @property
    def primitives(self) -> tuple[str, ...]: ...
    @property
    def max_nodes(self) -> int: ...


def foreign_to(space: Space, expression: Expression) -> str:
    """Why a formula is outside the space that is searched, "" when it is inside."""
    known = {*space.operands, *space.primitives}
    foreign = [token for token in expression.tokens if isinstance(token, str) and token not in known]
    if foreign:
        return f"uses {foreign[0]!r}, which --operands or --primitives leaves out"
    if len(expression) > space.max_nodes:
        return f"has {len(expression)} nodes, more than --max-nodes {space.max_nodes}"
    return ""
