r"""A formula in LaTeX.

Values are matrices of the weight's shape [out, in]: `\odot` multiplies, `\frac` divides and `^{\odot}` raises element
by element, and a vector over the inputs is repeated for every row.
"""

from __future__ import annotations

from gpmetric.expression.primitives import ATOM, PRIMITIVES
from gpmetric.expression.sign import nonnegative
from gpmetric.expression.tree import Expression, Token, Tokens, arity
from gpmetric.operands import OPERANDS

__all__ = ["to_latex"]

# Lowest precedence an argument may have without parentheses; 0 where the template encloses it itself.
_NEEDS = {"add": (1, 2), "sub": (1, 2), "mul": (2, 3), "neg": (3,), "sqr": (ATOM,), "pow": (ATOM, 0)}


def to_latex(expression: Expression) -> str:
    """The formula as LaTeX mathematics without delimiters; needs amsmath."""
    stack: list[tuple[str, int, Tokens]] = []  # text, precedence, tokens
    for token in reversed(expression.tokens):
        arguments = [stack.pop() for _ in range(arity(token))]
        text, precedence = _node(token, arguments)
        stack.append((text, precedence, (token, *(inner for argument in arguments for inner in argument[2]))))
    return stack[0][0]


def _node(token: Token, arguments: list[tuple[str, int, Tokens]]) -> tuple[str, int]:
    if isinstance(token, float):
        return _number(token)
    if token in OPERANDS:
        return OPERANDS[token].latex, ATOM
    row = PRIMITIVES[token]
    if token == "pow":
        return _power(arguments), 4
    plain = all(nonnegative(tokens) for _, _, tokens in arguments)
    template = row.latex_nonnegative if plain and row.latex_nonnegative else row.latex
    if token == "mul" and any(isinstance(tokens[0], float) for _, _, tokens in arguments):
        template = r"#1 \cdot #2"
    needs = _NEEDS.get(token, (0,) * row.arity)
    texts = [_enclosed(text, precedence, need) for (text, precedence, _), need in zip(arguments, needs, strict=True)]
    if row.infix and token != "div" and texts[-1].startswith("-"):  # a - (-b), -(-b)
        texts[-1] = _enclosed(texts[-1], 0, ATOM)
    return _filled(template, texts), 4 if token == "sqr" else row.precedence


def _power(arguments: list[tuple[str, int, Tokens]]) -> str:
    """`pow` keeps the sign of its base for odd integers and takes the size otherwise."""
    (base, precedence, tokens), (exponent, _, exponent_tokens) = arguments
    odd = isinstance(exponent_tokens[0], float) and exponent_tokens[0] % 2 == 1
    signed = odd or nonnegative(tokens)
    base = _enclosed(base, precedence, ATOM) if signed else rf"\lvert {base}\rvert"
    return rf"{{{base}}}^{{\odot {exponent}}}"


def _filled(template: str, texts: list[str]) -> str:
    for place, text in enumerate(texts, start=1):
        template = template.replace(f"#{place}", text)
    return template


def _enclosed(text: str, precedence: int, needed: int) -> str:
    return text if precedence >= needed else rf"\left({text}\right)"


def _number(value: float) -> tuple[str, int]:
    mantissa, _, exponent = f"{value:.6g}".partition("e")
    text = rf"{mantissa} \cdot 10^{{{int(exponent)}}}" if exponent else mantissa
    return text, PRIMITIVES["neg"].precedence if value < 0 else PRIMITIVES["mul"].precedence if exponent else ATOM
