"""Reads a formula such as `abs(W)*X**0.5` into an `Expression`, without eval, sympify or recursion.

Names come from two closed tables; size, depth and constants are capped before anything is computed. `a**b` is
right-associative and binds tighter than a minus on its left; a minus directly before a number that no `**` follows is
part of the constant.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from typing import Literal, NoReturn

from gpmetric.errors import ExpressionError
from gpmetric.expression.pasted import plain_spelling
from gpmetric.expression.primitives import PRIMITIVES, Primitive
from gpmetric.expression.tree import MAX_CONSTANT, Expression, Token, arity, subtree_end
from gpmetric.operands import OPERANDS

__all__ = ["MAX_BYTES", "MAX_DEPTH", "MAX_NODES", "parse"]

MAX_BYTES = 64 * 1024
MAX_NODES = 512
MAX_DEPTH = 64
_MAX_DIGITS = 40  # a float needs 17; refuses 5000-digit literals before any conversion
_SHOWN = 60  # characters of the formula that a message quotes

_SPELLED = {
    "^": "; a power is written **",
    "|": "; a size is written abs(W), a norm rownorm(W) or colnorm(W)",
    "\\": "; of LaTeX, \\left| \\right| \\cdot \\sqrt{} and \\frac{}{} are read",
    "\u221a": "; a root is written sqrt(W)",
}
_MEANT = {"norm": "rownorm", "sum": "rowsum", "square": "sqr", "minmax": "mms", "zscore": "zsn"}

_WORDS = (
    r"(?P<space>[ \t]+)|(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)"
    r"|(?P<name>[A-Za-z_][A-Za-z_0-9]*)"
)


def parse(text: str) -> Expression:
    """The expression a formula denotes, its structure kept as written.

    Args:
        text: infix over the operands and primitives, at most 64 kB, 512 nodes and depth 64; must use W. Other spellings
            are taken where `plain_spelling` knows them; columns are then those of ours.

    Raises:
        ExpressionError: with one line that names the offending thing and its column, counted from 1.
    """
    _check_text(text)
    text = plain_spelling(text)
    lexemes = _tokenize(text)
    tokens, columns = _Parser(text, lexemes).run()
    expression = Expression(tuple(tokens))
    if expression.depth > MAX_DEPTH:
        raise ExpressionError(
            f"the formula is {expression.depth} levels deep, at most {MAX_DEPTH} are accepted: {_quote(text)}"
        )
    _check_constants(text, tokens, columns)
    if "W" not in tokens:
        raise ExpressionError(f"a formula must use the weight W, but {_quote(text)} does not")
    return expression


def _binary_operators() -> dict[str, Primitive]:
    return {row.infix: row for row in PRIMITIVES.values() if row.infix and row.arity == 2}


@dataclass(frozen=True)
class _Lexeme:
    kind: str
    text: str
    column: int


def _check_text(text: str) -> None:
    """Refuses what is no text, too long, or empty."""
    if not isinstance(text, str):
        raise ExpressionError(f"a formula must be text, but got {type(text).__name__}")
    if len(text) > MAX_BYTES:
        raise ExpressionError(
            f"the formula has {len(text)} characters, at most {MAX_BYTES} are accepted: {_quote(text)}"
        )
    if not text.strip():
        raise ExpressionError(f"the formula is empty: {_quote(text)}")


def _tokenize(text: str) -> list[_Lexeme]:
    signs = sorted([*_binary_operators(), "(", ")", ","], key=len, reverse=True)  # ** before *
    pattern = re.compile(f"{_WORDS}|(?P<sign>{'|'.join(map(re.escape, signs))})")
    lexemes: list[_Lexeme] = []
    position = 0
    while position < len(text):
        match = pattern.match(text, position)
        if match is None or match.lastgroup is None:
            _refuse_character(text, position)
        if match.lastgroup == "number":
            _check_literal(text, match)
        if match.lastgroup != "space":
            lexemes.append(_Lexeme(match.lastgroup, match.group(), position + 1))
        position = match.end()
    return lexemes


def _refuse_character(text: str, position: int) -> NoReturn:
    hint = _SPELLED.get(text[position], "")
    if not text[position].isascii() and not hint:
        hint = "; formulas are plain ASCII"
    _fail(text, position + 1, f"unexpected character {text[position]!a}", hint)


def _check_literal(text: str, match: re.Match[str]) -> None:
    """Refuses literals that are long, not decimal, or out of range."""
    literal, column = match.group(), match.start() + 1
    following = text[match.end() : match.end() + 1]
    if following.isalnum() or following in ("_", "."):
        if following in ("_", ".") or following.isascii():
            _fail(
                text,
                column,
                f"malformed number {_quote(literal + following)}",
                "; numbers are decimal, like 0.5 or 1e-3",
            )
        _refuse_character(text, match.end())
    if len(literal) > _MAX_DIGITS:
        _fail(text, column, f"a number of {len(literal)} characters", f"; at most {_MAX_DIGITS} are accepted")
    if not float(literal) < MAX_CONSTANT:
        _fail(text, column, f"the constant {literal} is not below {MAX_CONSTANT:g}")


@dataclass
class _Frame:
    """What waits on the operator stack: an operator, a parenthesis, or a call with its finished arguments."""

    kind: Literal["operator", "parenthesis", "call"]
    name: str
    column: int
    precedence: int = 0
    arguments: int = 0


_Tree = list[tuple[Token, int]]  # prefix tokens with the column of each


@dataclass
class _Parser:
    """Operator-precedence parser (Dijkstra's shunting yard) with an explicit stack."""

    text: str
    lexemes: list[_Lexeme]
    values: list[_Tree] = field(default_factory=list)
    frames: list[_Frame] = field(default_factory=list)
    operators: dict[str, Primitive] = field(default_factory=_binary_operators)
    nodes: int = 0
    index: int = 0

    def run(self) -> tuple[list[Token], list[int]]:
        wants_value = True
        while self.index < len(self.lexemes):
            lexeme = self.lexemes[self.index]
            self.index += 1
            wants_value = self._value(lexeme) if wants_value else self._operator(lexeme)
        if wants_value:
            self.fail(len(self.text) + 1, "the formula ends where a value is expected,")
        self._reduce(0)
        if self.frames:
            self.fail(self.frames[-1].column, "'(' is never closed, opened")
        (tree,) = self.values
        return [token for token, _ in tree], [column for _, column in tree]

    def fail(self, column: int, problem: str, hint: str = "") -> NoReturn:
        _fail(self.text, column, problem, hint)

    def _peek(self, offset: int = 0) -> str:
        at = self.index + offset
        return self.lexemes[at].text if at < len(self.lexemes) else ""

    def _push(self, token: Token, column: int) -> None:
        self._count(column)
        self.values.append([(token, column)])

    def _count(self, column: int) -> None:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            self.fail(column, f"the formula has more than {MAX_NODES} nodes, passed")

    def _value(self, lexeme: _Lexeme) -> bool:
        """Takes a lexeme where a value is expected; returns whether a value is still expected."""
        if lexeme.kind == "number":
            self._push(float(lexeme.text), lexeme.column)
            return False
        if lexeme.kind == "name":
            return self._name(lexeme)
        if lexeme.text == "(":
            self.frames.append(_Frame("parenthesis", "(", lexeme.column))
            return True
        if lexeme.text == "-":
            return self._minus(lexeme)
        if lexeme.text == ")" and self.frames and self.frames[-1].kind == "call":
            return self._close(lexeme, given=False)
        self.fail(lexeme.column, f"expected a value, but got {lexeme.text!r}")

    def _name(self, lexeme: _Lexeme) -> bool:
        name, called = lexeme.text, self._peek() == "("
        if name in OPERANDS:
            if called:
                self.fail(lexeme.column, f"{name} is an operand and cannot be called, found")
            self._push(name, lexeme.column)
            return False
        if name not in PRIMITIVES:
            self.fail(lexeme.column, f"unknown name {_quote(name)}", _suggestion(name, called))
        if not called:
            self.fail(lexeme.column, f"{name} needs its arguments in parentheses, {name}{_signature(name)}, found")
        self.index += 1
        self._count(lexeme.column)
        self.frames.append(_Frame("call", name, lexeme.column))
        return True

    def _minus(self, lexeme: _Lexeme) -> bool:
        at, neg = self.index, PRIMITIVES["neg"]
        following = self.operators.get(self._peek(1), neg)
        if at < len(self.lexemes) and self.lexemes[at].kind == "number" and following.precedence <= neg.precedence:
            self.index += 1
            self._push(-float(self.lexemes[at].text), lexeme.column)
            return False
        self._count(lexeme.column)
        self.frames.append(_Frame("operator", neg.name, lexeme.column, neg.precedence))
        return True

    def _operator(self, lexeme: _Lexeme) -> bool:
        """Takes a lexeme where an operator is expected; returns whether a value is expected next."""
        if row := self.operators.get(lexeme.text):
            self._reduce(row.precedence + row.right_associative)
            self._count(lexeme.column)
            self.frames.append(_Frame("operator", row.name, lexeme.column, row.precedence))
            return True
        if lexeme.text == ",":
            self._reduce(0)
            if not self.frames or self.frames[-1].kind != "call":
                self.fail(lexeme.column, "a comma outside the arguments of a function")
            self.frames[-1].arguments += 1
            return True
        if lexeme.text == ")":
            return self._close(lexeme, given=True)
        self.fail(lexeme.column, f"expected an operator, but got {_quote(lexeme.text)}")

    def _close(self, lexeme: _Lexeme, given: bool) -> bool:
        """Closes a parenthesis or a call; `given` is False right after `(` or a comma."""
        self._reduce(0)
        if not self.frames:
            self.fail(lexeme.column, "')' without '('")
        frame = self.frames.pop()
        if frame.kind == "call":
            got = frame.arguments + given
            if not given and frame.arguments:
                self.fail(lexeme.column, "expected a value, but got ')'")
            self._apply(frame, got)
        return False

    def _reduce(self, precedence: int) -> None:
        """Applies the waiting operators that bind at least as tightly as `precedence`."""
        while self.frames and self.frames[-1].kind == "operator" and self.frames[-1].precedence >= precedence:
            frame = self.frames.pop()
            self._apply(frame, arity(frame.name))

    def _apply(self, frame: _Frame, got: int) -> None:
        expected = arity(frame.name)
        if got != expected:
            plural = "s" if expected > 1 else ""
            self.fail(frame.column, f"{frame.name} takes {expected} argument{plural}, but got {got},")
        arguments = self.values[-got:]
        del self.values[-got:]
        self.values.append([(frame.name, frame.column), *(item for tree in arguments for item in tree)])


def _check_constants(text: str, tokens: list[Token], columns: list[int]) -> None:
    """Refuses a formula in which a part made of constants alone is not finite and below 1e30, as 9**9**9."""
    stack: list[float | None] = []
    for index in reversed(range(len(tokens))):
        token = tokens[index]
        if isinstance(token, float):
            stack.append(token)
            continue
        arguments = [value for value in (stack.pop() for _ in range(arity(token))) if value is not None]
        known = token in PRIMITIVES and len(arguments) == arity(token)
        value = PRIMITIVES[token].value(arguments) if known else None
        if value is not None and not abs(value) < MAX_CONSTANT:
            end = subtree_end(tuple(tokens), index)
            part = _quote(str(Expression(tuple(tokens[index:end]))))
            _fail(text, min(columns[index:end]), f"the constant {part} is not finite and below {MAX_CONSTANT:g}")
        stack.append(value)


def _signature(name: str) -> str:
    return "(x)" if arity(name) == 1 else "(a, b)"


def _suggestion(name: str, called: bool) -> str:
    """Did-you-mean and the list of what is accepted."""
    known = {known.lower(): known for known in (PRIMITIVES if called else (*OPERANDS, *PRIMITIVES))}
    cutoff = 0.5 if len(name) > 1 else 1.0  # one letter is close to no word
    close = difflib.get_close_matches(name.lower()[:_SHOWN], known, n=1, cutoff=cutoff)
    meant = _MEANT.get(name.lower()) if called else None
    meant = meant or (known[close[0]] if close else None)
    hint = f"; did you mean {meant}?" if meant else ";"
    return f"{hint} operands: {' '.join(OPERANDS)}; functions: {' '.join(PRIMITIVES)}"


def _quote(text: str) -> str:
    """Printable ASCII of at most 60 characters, in quotes."""
    return ascii(text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "...")


def _fail(text: str, column: int, problem: str, hint: str = "") -> NoReturn:
    start = 0 if len(text) <= _SHOWN else max(0, min(column - 1 - _SHOWN // 2, len(text) - _SHOWN))
    shown = ("..." if start else "") + text[start : start + _SHOWN] + ("..." if start + _SHOWN < len(text) else "")
    raise ExpressionError(f"{problem} at column {column} of {shown!a}{hint}")
