"""Third layer of simplification, rank equivalence: what leaves the order of scores alone in every comparison group.

Only order decides a mask: `exp(abs(W)*X)`, `3*abs(W)*X + rowsum(W)` and `sqr(W)*X**2` prune alike under a row target.
Down from the root, strictly increasing functions, terms and positive factors constant within the group, and a power
common to all factors are removed. As in the canonical form, guards are taken not to act.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from gpmetric.errors import ExpressionError
from gpmetric.expression.canonical import canonical
from gpmetric.expression.parse import MAX_DEPTH, MAX_NODES
from gpmetric.expression.primitives import PRIMITIVES
from gpmetric.expression.sign import nonnegative
from gpmetric.expression.tree import Expression, Tokens, arguments_of, axes_of, chain, fold, order, subtree_end

__all__ = ["RankGroup", "factorised", "product", "rank_form"]

RankGroup = Literal["row", "layer"]

# group -> axes along which its members differ: what varies along none of them is constant within the group
_AXES: dict[RankGroup, frozenset[str]] = {"row": frozenset({"in"}), "layer": frozenset({"out", "in"})}


def rank_form(expression: Expression, group: RankGroup) -> Expression:
    """The canonical form of a formula modulo what leaves the order of scores within each comparison group unchanged.

    Args:
        expression: the formula.
        group: "row" where scores compete within one output (row and N:M targets), so that what does not vary along
            `in` is constant; "layer" where scores of several outputs compete, so that only scalars are.

    Returns:
        An expression that orders every group as the argument does wherever no guard or saturation acts, for W without
        zeros and positive statistics. Idempotent, never longer than the canonical form, the same in every process. It
        is the canonical form itself where the order does not depend on W, and may then lack W as that does.
    """
    seen: dict[Expression, None] = {}
    form = canonical(expression)
    # As in `canonical`: a step never lengthens, so the steps end in a fixed point or a cycle; of that its least member.
    while form not in seen:
        seen[form] = None
        form = _step(form, group)
    forms = list(seen)
    return min(forms[forms.index(form) :], key=lambda member: (len(member), order(member.tokens)))


def factorised(expression: Expression) -> dict[Tokens, float]:
    """The size of a formula as powers of factors, but for a number: `sqr(W)*G/colnorm(W)` is W 2, G 1, colnorm(W) -1.

    What a sum's terms have in common is taken out of it; each factor stands for its absolute value.
    """
    try:
        found = _Reducer("layer")._product(expression.tokens).size(1.0)
    except (ExpressionError, ArithmeticError):  # a constant part is 0 under a bar, or not below 1e30
        return {expression.tokens: 1.0}
    return {tokens: power for (tokens, _), power in found.factors.items()}


def product(powers: Mapping[Tokens, float]) -> Expression:
    """The formula that `factorised` takes to these powers, none of them 0."""
    return Expression(_product_tokens({(tokens, True): power for tokens, power in powers.items()}))


def _step(form: Expression, group: RankGroup) -> Expression:
    """Everything removable at the root removed, in canonical form; the argument where that is longer or lacks W."""
    if len(form) > MAX_NODES or form.depth > MAX_DEPTH:  # the walks below recurse
        return form
    try:
        sign, tokens = _Reducer(group).oriented(form.tokens)
        reduced = canonical(Expression(tokens if sign > 0 else ("neg", *tokens)))
    except (ExpressionError, ArithmeticError):  # a constant part is 0 under a bar, or not below 1e30
        return form
    return reduced if "W" in reduced.tokens and len(reduced) <= len(form) else form


_Base = tuple[Tokens, bool]  # a subtree, and whether its absolute value is meant; always so where it is never negative
_Factors = dict[_Base, float]


@dataclass(frozen=True)
class _Product:
    """coefficient * product of base**exponent; the exponent of a base that may be negative is an odd integer."""

    coefficient: float
    factors: _Factors

    def times(self, other: _Product, exponent: float = 1.0) -> _Product:
        """The product with other**exponent, the exponent an odd integer."""
        factors = dict(self.factors)
        for base, power in other.factors.items():
            factors[base] = factors.get(base, 0.0) + exponent * power
        return _Product(self.coefficient * other.coefficient**exponent, _tidy(factors))

    def size(self, exponent: float) -> _Product:
        """|product|**exponent."""
        factors: _Factors = {}
        for (tokens, _), power in self.factors.items():
            factors[tokens, True] = factors.get((tokens, True), 0.0) + exponent * power
        return _Product(abs(self.coefficient) ** exponent, _tidy(factors))


@dataclass(frozen=True)
class _Reducer:
    """The walk from the root of a formula, for one kind of comparison group."""

    group: RankGroup

    def oriented(self, tokens: Tokens) -> tuple[float, Tokens]:
        """(sign, tree): sign * tree ranks as the argument does."""
        product = self._product(tokens)
        if not product.coefficient:
            return 1.0, (0.0,)
        sign = math.copysign(1.0, product.coefficient)
        factors = {base: power for base, power in product.factors.items() if not self._is_positive_constant(base)}
        sign, factors = _scaled(sign, factors) if all(sized for _, sized in factors) else (sign, _unraised(factors))
        if len(factors) != 1:
            return sign, _product_tokens(factors)
        (((base, sized), power),) = factors.items()
        row = PRIMITIVES.get(str(base[0]))
        if sized and row and row.is_odd and row.grows:  # |tanh(x)| = tanh(|x|)
            base = (row.name, "abs", *base[1:])
        if power < 0 or (sized and not nonnegative(base)):
            return sign, _product_tokens(factors)
        inner = self._inner(base)
        if inner is None:
            return sign, base
        inner_sign, inner = self.oriented(inner)
        return sign * inner_sign, inner

    def _inner(self, tokens: Tokens) -> Tokens | None:
        """A smaller tree that ranks as this one does, which is no product; None where none is known."""
        row = PRIMITIVES.get(str(tokens[0]))
        if row and row.grows:
            return tokens[1:]
        if row and row.grows_with_size:
            return ("abs", *tokens[1:])
        if tokens[0] not in ("add", "sub"):
            return None
        terms = list(_terms(tokens))
        kept = [(scale, term) for scale, term in terms if not self._is_constant(term)]
        if kept and all(term[0] == "log" for _, term in kept):  # a*log|x| + log|y| = log(|x|**a * |y|)
            return chain("mul", [("pow", "abs", *term[1:], scale) for scale, term in kept])
        return _sum_tokens(kept) if 0 < len(kept) < len(terms) else None

    def _product(self, tokens: Tokens) -> _Product:
        """The tree as a product, numbers and what sums have in common taken out."""
        head, arguments = tokens[0], arguments_of(tokens)
        if isinstance(head, float):
            return _Product(head, {})
        power = PRIMITIVES[head].power if head in PRIMITIVES else None
        if head in ("add", "sub"):
            return self._sum(tokens)
        if head in ("neg", "mul"):
            left = self._product(arguments[0]) if head == "mul" else _Product(-1.0, {})
            return left.times(self._product(arguments[-1]))
        if head in ("inv", "div"):
            left = self._product(arguments[0]) if head == "div" else _Product(1.0, {})
            return left.times(self._product(arguments[-1]), -1.0)
        if power is not None:
            return self._product(arguments[0]).size(power)
        exponent = arguments[1][0] if head == "pow" else None
        if isinstance(exponent, float):
            inner = self._product(arguments[0])
            return _Product(1.0, {}).times(inner, exponent) if exponent % 2 == 1 else inner.size(exponent)
        return _Product(1.0, {(tokens, nonnegative(tokens)): 1.0})

    def _sum(self, tokens: Tokens) -> _Product:
        """A sum as common factors times the sum of the rest, whose coefficients are 1 as far as they can be."""
        merged: dict[tuple[tuple[_Base, float], ...], float] = {}
        for scale, term in _terms(tokens):
            product = self._product(term)
            key = tuple(sorted(product.factors.items(), key=_factor_order))
            merged[key] = merged.get(key, 0.0) + scale * product.coefficient
        terms = [dict(key) for key, coefficient in merged.items() if coefficient]
        coefficients = [coefficient for coefficient in merged.values() if coefficient]
        if len(terms) < 2:
            return _Product(coefficients[0], terms[0]) if terms else _Product(0.0, {})
        common = self._common_factors(terms)
        rests = [_product_tokens(_Product(1.0, term).times(_Product(1.0, common), -1.0).factors) for term in terms]
        ordered = sorted(zip(rests, coefficients, strict=True), key=lambda pair: order(pair[0]))
        sizes = [abs(coefficient) for _, coefficient in ordered]
        unit = max(sizes, key=sizes.count)  # of equals the first
        unit = -unit if all(coefficient < 0 for coefficient in coefficients) else unit
        rest = _sum_tokens([(_rounded(coefficient / unit), term) for term, coefficient in ordered])
        return _Product(unit, {(rest, nonnegative(rest)): 1.0}).times(_Product(1.0, common))

    def _common_factors(self, terms: list[_Factors]) -> _Factors:
        """What to take out of a sum: factors that all terms have; of one constant in the group, its commonest power."""
        common: _Factors = {}
        for base in dict.fromkeys(base for term in terms for base in term):
            powers = [term.get(base, 0.0) for term in terms]
            if self._is_positive_constant(base):
                common[base] = min(powers, key=lambda power: (-powers.count(power), power))
            elif min(powers) > 0 or max(powers) < 0:
                common[base] = min(powers, key=abs)
        return _tidy(common)

    def _is_constant(self, tokens: Tokens) -> bool:
        """Whether the tree has one value within each comparison group."""
        return not fold(tokens, axes_of) & _AXES[self.group]

    def _is_positive_constant(self, base: _Base) -> bool:
        """Whether a factor has one value within each group, and that is above 0.

        A value >= 0 is taken to be above 0 unless it is made to touch it: by max(x, 0), or by scaling to [0, 1] what
        is constant itself, of which one row, or everything, becomes 0.
        """
        tokens, sized = base
        named = [(index, PRIMITIVES[str(token)]) for index, token in enumerate(tokens) if token in PRIMITIVES]
        parts = [tokens[index : subtree_end(tokens, index)] for index, row in named if row.reduces == "all"]
        touches = 0.0 in tokens or any(self._is_constant(part) for part in parts)
        return sized and not touches and self._is_constant(tokens)


def _scaled(sign: float, factors: _Factors) -> tuple[float, _Factors]:
    """One representative of all sign * product**c, c > 0, where every base is a size: the shortest.

    A negative power turns the order about: -(a/b) ranks as b/a, and 1/a as -a.
    """
    if sign < 0:
        sign, factors = 1.0, {base: -power for base, power in factors.items()}
    if factors and all(power < 0 for power in factors.values()):
        sign, factors = -1.0, {base: -power for base, power in factors.items()}
    scales = {target / abs(power) for power in factors.values() for target in (0.5, 1.0, 2.0)}
    candidates = [{base: _rounded(power * scale) for base, power in factors.items()} for scale in scales]
    return sign, min(candidates, key=_power_cost, default=factors)


def _unraised(factors: _Factors) -> _Factors:
    """A product of either sign without the odd power that it is of another."""
    unit = min(abs(power) for (_, sized), power in factors.items() if not sized)
    odd = all(power / unit % 2 == 1 for (_, sized), power in factors.items() if not sized)
    return {base: _rounded(power / unit) for base, power in factors.items()} if odd else factors


def _power_cost(factors: _Factors) -> tuple[int, bool, float, list[float]]:
    """Sort key: nodes that the powers take, factors of one power sharing it; then |W| plain; then powers nearest 1."""
    nodes, powers = 0, {abs(power) for power in factors.values()}
    for power in powers:
        nodes += 0 if power == 1 else 1 if power in (0.5, 2) else 2
        bases = [tokens for (tokens, _), other in factors.items() if abs(other) == power]
        nodes += power % 2 == 1 and not all(map(nonnegative, bases))  # abs is written out
    ordered = [power for _, power in sorted(factors.items(), key=_factor_order)]
    return nodes, abs(factors.get((("W",), True), 1.0)) != 1, max(max(power, 1 / power) for power in powers), ordered


def _tidy(factors: _Factors) -> _Factors:
    """Factors without powers of 0, and with even powers of a base as powers of its size."""
    tidied: _Factors = {}
    for (tokens, sized), power in factors.items():
        base = (tokens, sized or power % 2 == 0)
        tidied[base] = _rounded(tidied.get(base, 0.0) + power)
    return {base: power for base, power in tidied.items() if power}


@lru_cache(4096)
def _rounded(number: float) -> float:
    """The simple fraction at hand, else 12 digits: 0.3/0.1 is to be 3."""
    fraction = float(Fraction(number).limit_denominator(1000))
    return fraction if math.isclose(fraction, number, rel_tol=1e-12) else float(f"{number:.12g}")


def _factor_order(item: tuple[_Base, float]) -> tuple[object, ...]:
    (tokens, sized), power = item
    return order(tokens), sized, power


def _terms(tokens: Tokens, scale: float = 1.0) -> Iterator[tuple[float, Tokens]]:
    """(coefficient, term) of a sum, numbers multiplied out."""
    head, arguments = tokens[0], arguments_of(tokens)
    numbers = [part[0] if isinstance(part[0], float) else None for part in arguments]
    if head in ("add", "sub"):
        yield from _terms(arguments[0], scale)
        yield from _terms(arguments[1], scale if head == "add" else -scale)
    elif head == "neg":
        yield from _terms(arguments[0], -scale)
    elif head == "mul" and numbers[0] is not None:
        yield from _terms(arguments[1], scale * numbers[0])
    elif head in ("mul", "div") and numbers[1] is not None:
        yield from _terms(arguments[0], scale * numbers[1] if head == "mul" else scale / numbers[1])
    else:
        yield scale, tokens


def _sum_tokens(terms: list[tuple[float, Tokens]]) -> Tokens:
    return chain("add", [term if scale == 1 else ("mul", scale, *term) for scale, term in terms])


def _product_tokens(factors: _Factors) -> Tokens:
    over: list[Tokens] = [(1.0,)]
    under: list[Tokens] = []
    for (tokens, sized), power in sorted(factors.items(), key=_factor_order):
        part: Tokens = ("abs", *tokens) if sized and not nonnegative(tokens) else tokens
        (over if power > 0 else under).append(part if abs(power) == 1 else ("pow", *part, abs(power)))
    total = chain("mul", over[1:] or over)
    return ("div", *total, *chain("mul", under)) if under else total
