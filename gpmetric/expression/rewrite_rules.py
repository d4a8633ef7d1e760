"""First layer of simplification: opposing operations cancel, where the protected semantics really allow it.

A rule is a pair of prefix patterns; that an even function forgets `neg` and `abs` is in its row of PRIMITIVES. Every
rule makes the tree shorter, so rewriting ends; children are simplified before their parent, so one pass reaches the
form in which no rule applies. Values are equal up to rounding, for finite arguments and up to an additive TINY = 1e-30.

Source: Dong et al. 2024 (Pruner-Zero), opposing operation simplification; the conditions are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from gpmetric.expression.primitives import PRIMITIVES
from gpmetric.expression.sign import nonnegative
from gpmetric.expression.torch_forms import TINY
from gpmetric.expression.tree import MAX_CONSTANT, Expression, Token, Tokens, fold, rooted, subtree_end

__all__ = ["RULES", "Rule", "cancel_opposites"]


@dataclass(frozen=True)
class Rule:
    """`pattern` may be replaced by `result`; a variable stands for one subtree of the kind in `_KINDS`."""

    pattern: str
    result: str
    reason: str


_KINDS: dict[str, Callable[[Tokens], bool]] = {
    "x": lambda tokens: True,
    "y": lambda tokens: True,
    "p": nonnegative,
    "t": lambda tokens: tokens[0] in ("tanh", "mms"),  # within [-1, 1]
    "c": lambda tokens: isinstance(tokens[0], float),
    "k": lambda tokens: isinstance(tokens[0], float) and tokens[0] >= TINY,
    "n": lambda tokens: isinstance(tokens[0], float) and tokens[0] <= 0,
}

_AFFINE = "scaling to the value's own range forgets a positive factor and a shift"

RULES = (
    Rule("neg neg x", "x", "exact"),
    Rule("abs p", "p", "already non-negative"),
    Rule("sqrt sqr x", "abs x", "sqrt(x*x) = |x|"),
    Rule("sqr sqrt x", "abs x", "sqrt takes |x|"),
    Rule("exp log x", "abs x", "|x| + TINY; the clamp at e**80 is above every allowed constant"),
    Rule("log exp t", "t", "only within [-1, 1]: elsewhere the clamp and TINY show"),
    Rule("inv inv x", "x", "1 / max(1/|x|, TINY) differs from |x| by TINY at most"),
    Rule("inv div 1 x", "x", "as inv(inv(x))"),
    Rule("sub x x", "0", "exact for finite x"),
    Rule("max x x", "x", "exact"),
    Rule("min x x", "x", "exact"),
    Rule("max p n", "p", "p >= 0 >= n"),
    Rule("max n p", "p", "p >= 0 >= n"),
    Rule("min p n", "n", "p >= 0 >= n"),
    Rule("min n p", "n", "p >= 0 >= n"),
    Rule("add x 0", "x", "exact"),
    Rule("add 0 x", "x", "exact"),
    Rule("sub x 0", "x", "exact"),
    Rule("sub 0 x", "neg x", "exact"),
    Rule("add x neg y", "sub x y", "exact"),
    Rule("add neg x y", "sub y x", "exact"),
    Rule("sub x neg y", "add x y", "exact"),
    Rule("mul x 1", "x", "exact"),
    Rule("mul 1 x", "x", "exact"),
    Rule("mul x -1", "neg x", "exact"),
    Rule("mul -1 x", "neg x", "exact"),
    Rule("mul x 0", "0", "exact for finite x"),
    Rule("mul 0 x", "0", "exact for finite x"),
    Rule("mul neg x neg y", "mul x y", "exact"),
    Rule("mul x x", "sqr x", "the definition"),
    Rule("mul x inv y", "div x y", "one rounding less"),
    Rule("mul inv x y", "div y x", "one rounding less"),
    Rule("div x 1", "x", "exact"),
    Rule("div x -1", "neg x", "exact"),
    Rule("div 1 x", "inv x", "the definition"),
    Rule("div 0 x", "0", "the divisor is never 0"),
    Rule("div x inv y", "mul x y", "as inv(inv(x))"),
    Rule("pow x 0", "1", "0**0 = 1"),
    Rule("pow x 1", "x", "the sign is kept for odd integers"),
    Rule("pow x 2", "sqr x", "the definition"),
    Rule("pow x 0.5", "sqrt x", "both take |x|"),
    Rule("pow p -1", "inv p", "both guard at TINY; below 0 only inv turns -TINY to +TINY"),
    Rule("pow 1 x", "1", "1 to any finite power"),
    Rule("mms mms x", "mms x", "already spans [0, 1] or is 0"),
    Rule("mms zsn x", "mms x", _AFFINE),
    Rule("zsn mms x", "zsn x", _AFFINE),
    Rule("zsn zsn x", "zsn x", _AFFINE),
    *(
        Rule(f"{scaling} {affine}", f"{scaling} x", _AFFINE)
        for scaling in ("mms", "zsn")
        for affine in ("add x c", "add c x", "sub x c", "mul x k", "mul k x", "div x k")
    ),
)


def cancel_opposites(expression: Expression) -> Expression:
    """The expression with opposing operations cancelled and constants folded; never longer, and idempotent."""
    return Expression(fold(expression.tokens, lambda token, arguments: _rewritten(rooted(token, arguments))))


def _compiled(text: str) -> Tokens:
    """Pattern tokens: names and variables as text, numbers as floats."""
    return tuple(word if word.isalpha() else float(word) for word in text.split())


_TABLE: dict[Token, list[tuple[Tokens, Tokens]]] = {}
for _rule in RULES:
    _pattern, _result = _compiled(_rule.pattern), _compiled(_rule.result)
    _TABLE.setdefault(_pattern[0], []).append((_pattern, _result))


@lru_cache(65_536)
def _rewritten(tokens: Tokens) -> Tokens:
    """Normal form of a tree whose arguments are in normal form already."""
    while True:
        folded = _folded(tokens)
        if folded is not None:
            return folded
        if tokens[0] in PRIMITIVES and PRIMITIVES[str(tokens[0])].parity == "even" and tokens[1] in ("abs", "neg"):
            tokens = (tokens[0], *tokens[2:])
            continue
        for pattern, result in _TABLE.get(tokens[0], ()):
            binding = _match(pattern, tokens)
            if binding is not None:
                tokens = tuple(inner for word in result for inner in binding.get(word, (word,)))
                break
        else:
            return tokens


def _folded(tokens: Tokens) -> Tokens | None:
    """The constant a primitive gives on constants, while finite and below 1e30."""
    head, arguments = tokens[0], tokens[1:]
    values = [token for token in arguments if isinstance(token, float)]
    if not isinstance(head, str) or not arguments or len(values) != len(arguments):
        return None
    value = PRIMITIVES[head].value(values)
    return (value + 0.0,) if value is not None and abs(value) < MAX_CONSTANT else None


def _match(pattern: Tokens, tokens: Tokens) -> dict[Token, Tokens] | None:
    """Subtrees that the variables of the pattern stand for, or None."""
    binding: dict[Token, Tokens] = {}
    position = 0
    for word in pattern:
        if word not in _KINDS:
            if tokens[position] != word:
                return None
            position += 1
            continue
        end = subtree_end(tokens, position)
        part = tokens[position:end]
        if binding.setdefault(word, part) != part or not _KINDS[str(word)](part):
            return None
        position = end
    return binding
