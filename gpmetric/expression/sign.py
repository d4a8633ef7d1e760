"""Which expressions are known never to be negative, from signs alone (NaN aside)."""

from __future__ import annotations

from gpmetric.expression.tree import Tokens, arity, subtree_end

__all__ = ["nonnegative"]

_ALWAYS = frozenset({"X", "G", "H", "D", "F", "abs", "sqr", "sqrt", "exp", "mms", "rownorm", "colnorm"})
_IF_ALL = frozenset({"tanh", "inv", "rowsum", "colsum", "add", "mul", "div", "min"})


def nonnegative(tokens: Tokens) -> bool:
    """Whether every value of the tree is >= 0 for any real W and non-negative X, G, H, D, F; False when unknown."""
    stack: list[tuple[bool, int]] = []  # sign known, index of the root
    for index in reversed(range(len(tokens))):
        token = tokens[index]
        arguments = [stack.pop() for _ in range(arity(token))]
        signs = [sign for sign, _ in arguments]
        if isinstance(token, float):
            known = token >= 0
        elif token == "pow":
            known = signs[0] or _even(tokens[arguments[1][1] :])
        elif token == "mul" and not all(signs):
            left, right = (tokens[start : subtree_end(tokens, start)] for _, start in arguments)
            known = left == right
        else:
            known = token in _ALWAYS or (token in _IF_ALL and all(signs)) or (token == "max" and any(signs))
        stack.append((known, index))
    return stack[0][0]


def _even(exponent: Tokens) -> bool:
    """Whether an exponent is a constant under which `pow` drops the sign: anything but an odd integer."""
    return isinstance(exponent[0], float) and exponent[0] % 2 != 1
