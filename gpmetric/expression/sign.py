"""What the sign of a formula's value is known to be, from the signs of its parts (NaN aside)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal

from gpmetric.expression.primitives import PRIMITIVES
from gpmetric.expression.tree import Token, Tokens, arity, fold, subtree_end
from gpmetric.operands import OPERANDS

__all__ = ["Parity", "nonnegative", "parity"]

Parity = Literal["even", "odd", "neither"]


@lru_cache(16_384)
def nonnegative(tokens: Tokens) -> bool:
    """Whether every value of the tree is >= 0 whatever the operands are, of the sign they have; False when unknown."""
    stack: list[tuple[bool, int]] = []  # sign known, index of the root
    for index in reversed(range(len(tokens))):
        token = tokens[index]
        arguments = [stack.pop() for _ in range(arity(token))]
        signs = [sign for sign, _ in arguments]
        if isinstance(token, float):
            known = token >= 0
        elif token in OPERANDS:
            known = not OPERANDS[token].signed
        elif PRIMITIVES[token].sign == "power":
            known = signs[0] or _even(tokens[arguments[1][1]])
        elif PRIMITIVES[token].sign == "product" and not all(signs):
            left, right = (tokens[start : subtree_end(tokens, start)] for _, start in arguments)
            known = left == right
        else:
            known = _KNOWN[PRIMITIVES[token].sign](signs)
        stack.append((known, index))
    return stack[0][0]


_KNOWN: dict[str, Callable[[Sequence[bool]], bool]] = {
    "unknown": lambda signs: False,
    "always": lambda signs: True,
    "all": all,
    "any": any,
    "product": all,
}


def _even(exponent: Token) -> bool:
    """Whether an exponent is a constant under which `pow` drops the sign: anything but an odd integer."""
    return isinstance(exponent, float) and exponent % 2 != 1


def parity(tokens: Tokens) -> Parity:
    """Whether the value stays as it is where W changes its sign, changes its own, or neither; as far as is known."""
    return fold(tokens, _parity_of)[0]


def _parity_of(token: Token, arguments: list[tuple[Parity, Token]]) -> tuple[Parity, Token]:
    if token in PRIMITIVES:
        rule = _PARITIES[PRIMITIVES[str(token)].parity]
        return rule([parity for parity, _ in arguments], arguments[-1][1]), token
    return "odd" if token in OPERANDS and OPERANDS[str(token)].source == "weight" else "even", token


def _of_function(given: Sequence[Parity], last: Token) -> Parity:
    return "even" if set(given) == {"even"} else "neither"


def _of_even(given: Sequence[Parity], last: Token) -> Parity:
    return "neither" if "neither" in given else "even"


def _of_sum(given: Sequence[Parity], last: Token) -> Parity:
    return given[0] if len(set(given)) == 1 else "neither"


def _of_product(given: Sequence[Parity], last: Token) -> Parity:
    if "neither" in given:
        return "neither"
    return "odd" if given.count("odd") == 1 else "even"


def _of_power(given: Sequence[Parity], exponent: Token) -> Parity:
    odd = isinstance(exponent, float) and exponent % 2 == 1
    return "even" if given[0] == "odd" and not odd else given[0]


# rule of a primitive -> parity of its value from those of its arguments and the root of the last
_PARITIES: dict[str, Callable[[Sequence[Parity], Token], Parity]] = {
    "none": _of_function,
    "even": _of_even,
    "odd": _of_sum,
    "sum": _of_sum,
    "product": _of_product,
    "power": _of_power,
}
