"""What formulas consist of: operands, primitives, recurring sub-expressions, the powers of operands, and the groups
their scores compete in."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gpmetric.expression import PRIMITIVES, Expression
from gpmetric.expression.canonical import canonical
from gpmetric.expression.tree import Token, Tokens, arguments_of, chain, fold, order, rooted, subtree_end
from gpmetric.operands import OPERANDS
from gpmetric.targets import plain_granularities

__all__ = ["Feature", "find_features", "find_groups", "merged", "powers", "sub_expressions"]

_MIN_FORMULAS = 5  # that hold a sub-expression for it to count as recurring, and
_MIN_SHARE = 0.02  # the least share of all formulas that do
_ANY = 7  # stands for every constant until the text is there; a name with a 7 in it is another word
_FIXED_POWERS = {"abs": 1.0, "neg": 1.0, "sqr": 2.0, "sqrt": 0.5, "inv": -1.0}


@dataclass(frozen=True, eq=False)
class Feature:
    """A part of formulas; `members` is boolean [formulas], True where the formula has it."""

    kind: Literal["group", "operand", "primitive", "sub-expression"]
    name: str
    members: NDArray[np.bool_]


def find_features(expressions: Sequence[Expression]) -> list[Feature]:
    """Every operand and primitive that occurs, and every sub-expression of at least 2 nodes that recurs.

    A sub-expression is known by its canonical text without positive constant factors, which change no order:
    `1100*abs(W)*G` is `abs(W)*G`. Of other constants only the sign is told: `X**0.3` and `X**0.41` are `X**c`. It
    recurs when at least max(5, 2 %) of the formulas hold it.
    """
    tokens = [set(expression.tokens) for expression in expressions]
    found = [Feature("operand", name, np.array([name in one for one in tokens])) for name in OPERANDS]
    found += [Feature("primitive", name, np.array([name in one for one in tokens])) for name in PRIMITIVES]
    found = [feature for feature in found if feature.members.any()]
    holders: dict[str, list[int]] = {}
    for index, expression in enumerate(expressions):
        for name in sub_expressions(expression):
            holders.setdefault(name, []).append(index)
    needed = max(_MIN_FORMULAS, _MIN_SHARE * len(expressions))
    recurring = [(name, indices) for name, indices in sorted(holders.items()) if len(indices) >= needed]
    every = np.arange(len(expressions))
    return found + [Feature("sub-expression", name, np.isin(every, indices)) for name, indices in recurring]


def find_groups(groups: Sequence[str]) -> list[Feature]:
    """The comparison groups that formulas have, `groups` [formulas]; none where all have the same.

    Of two, the first in the order of the table is left out: it is what formulas without the other have.
    """
    found = [name for name in plain_granularities() if name in groups]
    told = found if len(found) > 2 else found[1:]
    return [Feature("group", f"group {name}", np.array([name == one for one in groups])) for name in told]


@lru_cache(maxsize=100_000)
def sub_expressions(expression: Expression) -> frozenset[str]:
    """Canonical texts of the sub-expressions, constants merged, those that are a lone name or number left out."""
    trees = {expression.tokens[expression.subtree(index)] for index in range(len(expression))}
    return frozenset(name for tree in trees if len(tree) > 1 and (name := _named(tree)))


@lru_cache(maxsize=100_000)
def _named(tokens: Tokens) -> str:
    """Empty where nothing but a name or number is left."""
    form = canonical(Expression(_without_factors(tokens)))
    return merged(form) if len(form) > 1 else ""


def merged(expression: Expression) -> str:
    """The text of a formula with `c` for every positive constant and `-c` for every negative one.

    Terms and factors stand in an order that does not depend on the constants.
    """

    def node(token: Token, arguments: list[Tokens]) -> Tokens:
        if isinstance(token, float):
            return (math.copysign(_ANY, token),)
        if token in ("add", "mul"):
            pieces = [piece for one in arguments for piece in (_chained(token, one) if one[0] == token else [one])]
            return chain(token, sorted(pieces, key=order))
        commutes = token in PRIMITIVES and PRIMITIVES[token].commutative
        return rooted(token, sorted(arguments, key=order) if commutes else arguments)

    return re.sub(rf"\b{_ANY}\b", "c", str(Expression(fold(expression.tokens, node))))


def _chained(name: str, tokens: Tokens) -> list[Tokens]:
    """What `chain` put together."""
    pieces: list[Tokens] = []
    while tokens[0] == name:
        tokens, last = arguments_of(tokens)
        pieces.append(last)
    return [tokens, *pieces]


def _without_factors(tokens: Tokens) -> Tokens:
    """The tree without the positive constants that multiply or divide the whole of it."""
    if tokens[0] not in ("mul", "div"):
        return tokens
    middle = subtree_end(tokens, 1)
    left, right = tokens[1:middle], tokens[middle:]
    if _is_positive(right):
        return _without_factors(left)
    if _is_positive(left) and tokens[0] == "mul":
        return _without_factors(right)
    return (tokens[0], *_without_factors(left), *_without_factors(right))


def _is_positive(tokens: Tokens) -> bool:
    return isinstance(tokens[0], float) and tokens[0] > 0


def powers(expression: Expression, operand: str) -> set[float]:
    """Powers in which an operand enters: {0.5, 2.0} for X in `sqrt(X) + abs(W)*X**2`, {1.0} where it stands bare.

    Powers of powers multiply; signs and absolute values do not matter. What is inside any other operation, `mms(X)**2`,
    counts as it stands there: 1.0.
    """
    tokens = expression.tokens
    parent = {child: index for index in range(len(tokens)) for child in expression.children(index)}
    found = set()
    for index, token in enumerate(tokens):
        if token == operand:
            power, place = 1.0, index
            while place in parent and (factor := _power(expression, parent[place], place)) is not None:
                power, place = power * factor, parent[place]
            found.add(power)
    return found


def _power(expression: Expression, index: int, child: int) -> float | None:
    """The power to which the node at `index` raises its argument at `child`; None where it does something else."""
    token = expression.tokens[index]
    if token == "pow":
        base, exponent = expression.children(index)
        value = expression.tokens[exponent]
        return value if child == base and isinstance(value, float) else None
    return _FIXED_POWERS.get(str(token))
