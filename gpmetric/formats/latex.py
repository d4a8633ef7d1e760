r"""A formula in LaTeX.

Values are matrices of the weight's shape [out, in]: `\odot` multiplies, `\frac` divides and `^{\odot}` raises element
by element, and a vector over the inputs is repeated for every row.
"""

from __future__ import annotations

from gpmetric.expression.primitives import ATOM, PRIMITIVES, Primitive
from gpmetric.expression.sign import nonnegative
from gpmetric.expression.tree import Expression, Token, Tokens, fold, rooted
from gpmetric.operands import OPERANDS

__all__ = ["to_latex"]

_Written = tuple[str, int, Tokens]  # the text of a part, how tightly it binds, and the part


def to_latex(expression: Expression) -> str:
    """The formula as LaTeX mathematics without delimiters; needs amsmath."""
    return fold(expression.tokens, _written)[0]


def _written(token: Token, arguments: list[_Written]) -> _Written:
    tokens = rooted(token, [part for _, _, part in arguments])
    if isinstance(token, float):
        return *_number(token), tokens
    if token in OPERANDS:
        return OPERANDS[token].latex, ATOM, tokens
    row = PRIMITIVES[token]
    return _filled(row, arguments), row.latex.precedence or row.precedence, tokens


def _filled(row: Primitive, arguments: list[_Written]) -> str:
    """The row's template with the texts of the arguments, in parentheses where they bind too loosely."""
    parts = [part for _, _, part in arguments]
    if row.latex.guarded and _shows_guard(row, parts):
        template, needs = row.latex.guarded, (0, 0)
    else:
        numeric = row.latex.scaled and any(isinstance(part[0], float) for part in parts)
        template, needs = row.latex.scaled if numeric else row.latex.template, row.latex.needs
    for place, (text, precedence, _) in enumerate(arguments):
        needed = needs[place]
        leads = needed and place == row.arity - 1 and text.startswith("-")  # a - (-b), -(-b)
        enclosed = precedence < needed or leads
        template = template.replace(f"#{place + 1}", rf"\left({text}\right)" if enclosed else text)
    return template


def _shows_guard(row: Primitive, parts: list[Tokens]) -> bool:
    """Whether an argument may be negative where its size is taken; a power by an odd number keeps the sign."""
    exponent = parts[-1][0]
    return not (
        all(nonnegative(part) for part in parts[:1])
        or (row.sign == "power" and isinstance(exponent, float) and exponent % 2 == 1)
    )


def _number(value: float) -> tuple[str, int]:
    mantissa, _, exponent = f"{value:.6g}".partition("e")
    text = rf"{mantissa} \cdot 10^{{{int(exponent)}}}" if exponent else mantissa
    return text, PRIMITIVES["neg"].precedence if value < 0 else PRIMITIVES["mul"].precedence if exponent else ATOM
