"""Which draws are worth evaluating: one walk over a formula tells the axes it varies along and its parity in W.

A network does the same when an input feature and its column of W change sign together, so a saliency that changes with
the sign of W ranks by accident of training; every published metric is even in W.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gpmetric.expression import Expression
from gpmetric.expression.sign import parity
from gpmetric.expression.tree import Token, axes_of, fold, subtree_end

if TYPE_CHECKING:
    from gpmetric.evolution.request import DiscoverRequest
    from gpmetric.evolution.search_config import SearchConfig

__all__ = ["FORBIDDEN", "Nesting", "foreign_to", "is_sensible", "nests"]

Nesting = tuple[str, str]  # outer and inner primitive

# Saturating, exploding or rescaling functions of themselves: nobody would read them, and their scores tie or overflow.
FORBIDDEN: tuple[Nesting, ...] = (
    ("exp", "exp"), ("log", "log"), ("tanh", "tanh"), ("exp", "tanh"),
    ("mms", "mms"), ("zsn", "zsn"), ("mms", "zsn"), ("zsn", "mms"),
)  # fmt: skip


def is_sensible(expression: Expression, forbidden: Sequence[Nesting] = FORBIDDEN) -> bool:
    """Whether the score uses W, differs along both axes, is even in W, and computes nothing from constants alone.

    Nor may it have one of the `forbidden` nestings at any depth.
    """
    if "W" not in expression.operands or any(nests(expression, *pair) for pair in forbidden):
        return False
    axes, from_constants = fold(expression.tokens, _axes)
    return axes == {"out", "in"} and not from_constants and parity(expression.tokens) == "even"


def _axes(token: Token, arguments: list[tuple[frozenset[str], bool]]) -> tuple[frozenset[str], bool]:
    """Axes that a value varies along, and whether anything in it is computed from constants alone."""
    along = [axes for axes, _ in arguments]
    return axes_of(token, along), any(found for _, found in arguments) or (bool(along) and not any(along))


def nests(expression: Expression, outer: str, inner: str) -> bool:
    """Whether `inner` occurs anywhere below an `outer`."""
    tokens = expression.tokens
    places = (place for place, token in enumerate(tokens) if token == outer)
    return any(inner in tokens[place + 1 : subtree_end(tokens, place)] for place in places)


def foreign_to(space: DiscoverRequest | SearchConfig, expression: Expression) -> str:
    """Why a formula is outside the space that is searched, "" when it is inside."""
    known = {*space.operands, *space.primitives}
    foreign = [token for token in expression.tokens if isinstance(token, str) and token not in known]
    if foreign:
        return f"uses {foreign[0]!r}, which --operands or --primitives leaves out"
    if len(expression) > space.max_nodes:
        return f"has {len(expression)} nodes, more than --max-nodes {space.max_nodes}"
    nested = ((outer, inner) for outer, inner in space.forbidden if nests(expression, outer, inner))
    return next((f"nests {inner} in {outer}, which no formula may" for outer, inner in nested), "")
