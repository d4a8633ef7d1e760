"""An expression: a tree over operands, primitives and constants, stored as prefix tokens like DEAP's trees.

`Expression(("mul", "abs", "W", "X"))` prints as `abs(W)*X`. Every walk is a loop over tokens: a tree of any depth is
handled without recursion.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import TypeVar

from gpmetric.errors import ExpressionError
from gpmetric.expression.primitives import ATOM, PRIMITIVES
from gpmetric.operands import OPERANDS

__all__ = [
    "MAX_CONSTANT",
    "Expression",
    "Token",
    "Tokens",
    "arguments_of",
    "arity",
    "axes_of",
    "chain",
    "fold",
    "order",
    "rooted",
    "subtree_end",
]

MAX_CONSTANT = 1e30  # every constant, and every constant part of a formula, is smaller in size

_NUMBER = re.compile(r"-?[0-9.]+(e[-+]?[0-9]+)?")

Token = str | float
Tokens = tuple[Token, ...]
T = TypeVar("T")


def arity(token: Token) -> int:
    """Number of arguments a token takes: 0 for an operand or a constant."""
    row = PRIMITIVES.get(token)  # type: ignore[arg-type]
    return row.arity if row else 0


def subtree_end(tokens: Tokens, start: int) -> int:
    """Index one past the last token of the subtree that begins at `start`."""
    missing, end = 1, start
    while missing:
        missing += arity(tokens[end]) - 1
        end += 1
    return end


def arguments_of(tokens: Tokens) -> list[Tokens]:
    """The subtrees that the root of a tree is applied to."""
    found: list[Tokens] = []
    start = 1
    while start < len(tokens):
        end = subtree_end(tokens, start)
        found.append(tokens[start:end])
        start = end
    return found


def fold(tokens: Tokens, node: Callable[[Token, list[T]], T]) -> T:
    """The value of a tree from the leaves up: `node` gives that of a token from those of its arguments."""
    stack: list[T] = []
    for token in reversed(tokens):
        stack.append(node(token, [stack.pop() for _ in range(arity(token))]))
    return stack[0]


def rooted(token: Token, arguments: Iterable[Tokens]) -> Tokens:
    """The tree of a token over those of its arguments."""
    return (token, *(inner for argument in arguments for inner in argument))


def chain(name: str, parts: Iterable[Tokens]) -> Tokens:
    """a op b op c of a binary primitive, bracketed from the left."""
    return reduce(lambda left, right: (name, *left, *right), parts)


def axes_of(token: Token, arguments: Sequence[frozenset[str]]) -> frozenset[str]:
    """Axes that a value varies along, a node of `fold`: "out" and "in" for a matrix, none for a number."""
    if token in OPERANDS:
        return frozenset(OPERANDS[str(token)].axes.split(","))
    along = frozenset[str]().union(*arguments)
    return along - {PRIMITIVES[str(token)].reduces} if token in PRIMITIVES else along


def order(tokens: Tokens) -> tuple[bool, int, tuple[tuple[int, float, str], ...]]:
    """Sort key of terms and factors: those with W first, then the shorter, then by text."""
    keys = tuple((1, token, "") if isinstance(token, float) else (0, 0.0, token) for token in tokens)
    return "W" not in tokens, len(tokens), keys


@dataclass(frozen=True)
class Expression:
    """An immutable, hashable formula tree.

    Args:
        tokens: prefix order; a name of `OPERANDS` or `PRIMITIVES`, or a finite constant with |x| < 1e30.

    Raises:
        ExpressionError: an unknown token, a constant out of range, missing or surplus tokens.
    """

    tokens: Tokens

    def __post_init__(self) -> None:
        tokens = tuple(_checked(token) for token in self.tokens)
        missing = 1
        for index, token in enumerate(tokens):
            if not missing:
                raise ExpressionError(
                    f"expression tokens go on after the tree is complete, at token {index}: {token!r}"
                )
            missing += arity(token) - 1
        if missing:
            raise ExpressionError(f"expression tokens end while {missing} more are needed (got {len(tokens)} tokens)")
        object.__setattr__(self, "tokens", tokens)

    def __len__(self) -> int:
        """Number of nodes."""
        return len(self.tokens)

    def __str__(self) -> str:
        """Infix text with minimal parentheses; `parse` reads it back to the same tree."""
        return fold(self.tokens, _infix)[0]

    def __repr__(self) -> str:
        return f"Expression<{self}>"

    @cached_property
    def depth(self) -> int:
        """Nodes on the longest path from the root; a lone operand has depth 1."""
        return fold(self.tokens, lambda token, depths: 1 + max(depths, default=0))

    @property
    def operands(self) -> tuple[str, ...]:
        """Operands used, in the order of the operand table."""
        return tuple(name for name in OPERANDS if name in self.tokens)

    @property
    def constants(self) -> tuple[float, ...]:
        """Constants in the order of the text."""
        return tuple(token for token in self.tokens if isinstance(token, float))

    def subtree(self, index: int) -> slice:
        """Slice of `tokens` that holds the subtree whose root is token `index`."""
        index = range(len(self.tokens))[index]
        return slice(index, subtree_end(self.tokens, index))

    def children(self, index: int) -> tuple[int, ...]:
        """Token indices of the arguments of token `index`."""
        child = range(len(self.tokens))[index] + 1
        found: list[int] = []
        for _ in range(arity(self.tokens[index])):
            found.append(child)
            child = subtree_end(self.tokens, child)
        return tuple(found)


def _checked(token: object) -> Token:
    """The token in its stored type; -0 becomes 0 so that equal trees print alike."""
    if isinstance(token, str):
        if token in OPERANDS or token in PRIMITIVES:
            return token
        raise ExpressionError(f"unknown token {ascii(token)[:60]} in an expression")
    if not isinstance(token, (int, float)) or isinstance(token, bool):
        raise ExpressionError(f"a token must be a name or a number, but got {ascii(token)[:60]}")
    if not abs(token) < MAX_CONSTANT:  # also NaN; integers of any size compare without conversion
        raise ExpressionError(f"a constant must be finite and below {MAX_CONSTANT:g} in size, but got {_short(token)}")
    return float(token) + 0.0


def _short(number: float) -> str:
    return f"{number!r:.30}" if isinstance(number, float) else "a long integer"


def _number(value: float) -> str:
    """Shortest text that reads back as the same float, without a trailing `.0`."""
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


def _infix(token: Token, arguments: list[tuple[str, int]]) -> tuple[str, int]:
    """Text and precedence of one node from those of its arguments."""
    if isinstance(token, float):
        # A negative constant binds like a unary minus.
        return _number(token), PRIMITIVES["neg"].precedence if math.copysign(1.0, token) < 0 else ATOM
    if token in OPERANDS:
        return token, ATOM
    row = PRIMITIVES[token]
    texts = [text for text, _ in arguments]
    minus = PRIMITIVES["neg"].precedence
    if not row.infix or (row.arity == 1 and _NUMBER.fullmatch(texts[0])):  # `-0.5` is the constant, `neg(0.5)` the node
        return f"{token}({','.join(texts)})", ATOM
    if row.arity == 1:
        return row.infix + _enclosed(*arguments[0], row.precedence, plain=False), row.precedence
    left, right = arguments
    if row.right_associative:  # a minus may follow `**` but not lead its left side
        return f"{_enclosed(*left, row.precedence + 1)}{row.infix}{_enclosed(*right, minus)}", row.precedence
    plain = row.precedence > PRIMITIVES["add"].precedence  # `W*-X` reads well, `W--X` does not
    text = _enclosed(*left, row.precedence) + row.infix + _enclosed(*right, row.precedence + 1, plain=plain)
    return text, row.precedence


def _enclosed(text: str, precedence: int, needed: int, plain: bool = True) -> str:
    """The text, in parentheses if it binds less than `needed`, or leads with a minus where that is not `plain`."""
    return text if precedence >= needed and (plain or not text.startswith("-")) else f"({text})"
