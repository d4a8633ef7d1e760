"""Drawing and varying formulas with DEAP's typed trees.

Expressions go in and come out; DEAP's trees and its use of the global random generator stay inside this module. A value
is typed by the axes it varies along, so that no draw is spent on sums over an axis a value does not have.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

from deap import gp

from gpmetric.errors import InputError
from gpmetric.evolution.grammar import FORBIDDEN, Nesting, is_sensible
from gpmetric.evolution.refinement import factors
from gpmetric.expression import PRIMITIVES, Expression
from gpmetric.expression.rank import factorised, product
from gpmetric.expression.sign import nonnegative
from gpmetric.expression.tree import Token, Tokens, fold
from gpmetric.operands import OPERANDS

__all__ = ["Constant", "InVector", "Matrix", "OutVector", "Variation"]

_Nodes = Any  # a PrimitiveTree, or a list of primitives in prefix order: DEAP has no types

_ADDED = 3  # factors that a child may have beyond its parent's
_LEAST_POWER = 0.02  # a factor below it is left out
_PATIENCE = 3000  # draws before giving up; with all primitives, one draw in six is sensible


class _Axes(type):
    """A type with a fixed hash: DEAP draws from a set of types, whose order would differ between processes."""

    def __hash__(cls) -> int:
        return sum(map(ord, cls.__name__))


class Matrix(metaclass=_Axes):
    """[out, in]; anything narrower may stand in its place."""


class InVector(Matrix):
    """[in], one value per input."""


class OutVector(Matrix):
    """[out], one value per output."""


class Constant(InVector, OutVector):
    """A number."""


_TYPES: dict[str, type] = {"out,in": Matrix, "in": InVector}


def _signatures(name: str) -> list[tuple[type, tuple[type, ...]]]:
    """(result, arguments) of each DEAP primitive a row of PRIMITIVES stands for; the narrowest that fits is taken."""
    row = PRIMITIVES[name]
    if row.reduces == "in":
        return [(OutVector, (Matrix,))]
    if row.reduces == "out":
        return [(InVector, (Matrix,))]
    if name == "pow":  # exponents are constants: a matrix as exponent is no metric anyone would read
        return [(vector, (vector, Constant)) for vector in (InVector, Matrix)]
    return [(vector, (vector,) * row.arity) for vector in (InVector, Matrix)]


def _draw_constant() -> float:
    """Mostly simple fractions, which exponents and mixtures of published metrics are made of."""
    if random.random() < 0.5:
        return random.choice((0.25, 0.5, 0.75, 1.5, 2.0, 3.0))
    return _round(random.choice((-1, 1)) * 10 ** random.uniform(-2, 1))


def _round(value: float) -> float:
    return float(f"{value:.3g}")


class Variation:
    """Random formulas, crossover and mutation within a set of operands, primitives and a size limit.

    Args:
        operands: names from OPERANDS; W must be among them.
        max_nodes: larger offspring are discarded.
        rng: the campaign's generator; DEAP draws from it too.
    """

    def __init__(
        self,
        operands: Sequence[str],
        primitives: Sequence[str],
        max_nodes: int,
        rng: random.Random,
        forbidden: Sequence[Nesting] = FORBIDDEN,
    ) -> None:
        self._forbidden = forbidden
        self._rng = rng
        self._max_nodes = max_nodes
        self._set = gp.PrimitiveSetTyped("metric", [], Matrix)
        self._variants: dict[str, list[gp.Primitive]] = {}
        for name in operands:
            self._set.addTerminal(name, _TYPES[OPERANDS[name].axes], name=name)
        self._set.addEphemeralConstant("constant", _draw_constant, Constant)
        for name in primitives:
            for number, (result, arguments) in enumerate(_signatures(name)):
                self._set.addPrimitive(_no_code, list(arguments), result, name=f"{name}/{number}")
                self._variants.setdefault(name, []).append(self._set.mapping[f"{name}/{number}"])
        self._simplest = [base for base in factors(OPERANDS) if self._knows(Expression(base))]

    def random_expression(self) -> Expression:
        """A sensible formula grown to a depth of 2 to 4.

        Raises:
            InputError: the primitives make none, as `add` alone does not.
        """
        found = self._until_usable(lambda: self._grow(2, 4, Matrix), unlike=None)
        if found is None:
            names = ", ".join(self._variants)
            raise InputError(f"--primitives {names}: no sensible formula in {_PATIENCE} draws (even in W, at most "
                             f"{self._max_nodes} nodes)")  # fmt: skip
        return found

    def vary(self, first: Expression, second: Expression, *others: Expression) -> Expression:
        """A child of several formulas: other powers of their factors, crossover, a changed subtree or constant.

        A formula that has no other sensible child within reach is its own.
        """
        parents = (first, second, *others)
        return self._until_usable(lambda: self._child(*map(self._tree, parents)), unlike=first) or first

    def _child(self, *parents: gp.PrimitiveTree) -> _Nodes:
        """One operator drawn by its share; a joined pair, a product of two metrics say, is a crossover at the roots.

        On llama-05m, after 480 s at one seed, the best mean divergence was 0.519 where half of the children vary
        powers, of four parents, and 0.530 where three in ten do, of two parents.
        """
        first, second = parents[:2]
        draw = random.random()
        if draw < 0.20:
            return gp.cxOnePoint(first, second)[0]
        if draw < 0.25:
            return self._join(first, second)
        if draw < 0.50:
            return self._blend(parents)
        if draw < 0.75:
            return self._reweigh(first)
        if draw < 0.80:
            return gp.mutUniform(first, lambda pset, type_: self._grow(0, 2, type_), self._set)[0]
        if draw < 0.85:
            return gp.mutNodeReplacement(first, self._set)[0]
        if draw < 0.90:
            return gp.mutInsert(first, self._set)[0]
        if draw < 0.93:
            return gp.mutShrink(first)[0]
        return self._perturb(first)

    def _join(self, first: gp.PrimitiveTree, second: gp.PrimitiveTree) -> _Nodes:
        binary = [nodes[-1] for nodes in self._variants.values() if nodes[-1].args == [Matrix, Matrix]]
        return [random.choice(binary), *first, *second] if binary else first

    def _blend(self, parents: Sequence[gp.PrimitiveTree]) -> _Nodes:
        """The parents' mean in the powers of their factors, moved by normal multiples of how each differs from it.

        Source: the rank-mu sampling of evolution strategies, Hansen and Ostermeier 2001, without a covariance matrix.
        """
        points = [_powers(parent) for parent in parents if nonnegative(_expression(parent).tokens)]
        if len(points) < 2:  # signs would be lost
            return parents[0]
        bases = dict.fromkeys(base for point in points for base in point)
        mean = {base: sum(point.get(base, 0.0) for point in points) / len(points) for base in bases}
        moved = dict(mean)
        for point in points:
            share = random.gauss(0, 1) / math.sqrt(len(points) - 1)
            for base in bases:
                moved[base] += share * (point.get(base, 0.0) - mean[base])
        return self._of_powers(moved, parents[0])

    def _reweigh(self, tree: gp.PrimitiveTree) -> _Nodes:
        """The powers of all factors, and of a few of the simplest there are, moved by a normal step."""
        if not nonnegative(_expression(tree).tokens):
            return tree
        step = 10 ** random.uniform(-1.5, -0.3)
        powers = _powers(tree)
        for base in random.sample(self._simplest, min(len(self._simplest), random.randint(0, _ADDED))):
            powers.setdefault(base, 0.0)
        return self._of_powers({base: power + random.gauss(0, step) for base, power in powers.items()}, tree)

    def _of_powers(self, powers: dict[Tokens, float], otherwise: gp.PrimitiveTree) -> _Nodes:
        """The product, without its smallest powers where it would be too large."""
        ranked = sorted(powers.items(), key=lambda item: -abs(item[1]))
        kept = {base: _round(power) for base, power in ranked if abs(power) >= _LEAST_POWER}
        while kept:
            found = product(kept)
            if len(found) <= self._max_nodes:
                return self._tree(found) if self._knows(found) else otherwise
            kept.popitem()
        return otherwise

    def _grow(self, least: int, most: int, type_: type) -> _Nodes:
        """A tree of that type in prefix order, full or ragged by a coin's throw, of a depth in [least, most].

        DEAP's own generators raise IndexError where a type has no primitive, as constants have none.
        """
        depth, full = random.randint(least, most), random.random() < 0.5
        nodes: list[gp.Primitive] = []
        pending = [(0, type_)]
        while pending:
            level, wanted = pending.pop()
            primitives = self._set.primitives[wanted]
            stop = level >= depth or (level >= least and not full and random.random() < 0.3)
            if stop or not primitives:
                terminal = random.choice(self._set.terminals[wanted])
                nodes.append(terminal() if isinstance(terminal, gp.MetaEphemeral) else terminal)
            else:
                node = random.choice(primitives)
                nodes.append(node)
                pending.extend((level + 1, argument) for argument in reversed(node.args))
        return nodes

    def _perturb(self, tree: gp.PrimitiveTree) -> _Nodes:
        """Scales one constant by a log-normal factor; a tree without one has a node replaced instead."""
        places = [index for index, node in enumerate(tree) if node.arity == 0 and isinstance(node.value, float)]
        if not places:
            return gp.mutNodeReplacement(tree, self._set)[0]
        place = random.choice(places)
        tree[place] = gp.Terminal(_round(tree[place].value * random.lognormvariate(0, 0.5)), False, Constant)
        return tree

    def _until_usable(self, draw: Callable[[], _Nodes], unlike: Expression | None) -> Expression | None:
        with self._own_generator():
            for _ in range(_PATIENCE):
                expression = _expression(draw())
                fits = expression != unlike and len(expression) <= self._max_nodes
                if fits and is_sensible(expression, self._forbidden):
                    return expression
        return None

    @contextmanager
    def _own_generator(self) -> Iterator[None]:
        """DEAP draws from the module `random`; lend it the campaign's generator and give the module its state back."""
        outer = random.getstate()
        random.setstate(self._rng.getstate())
        try:
            yield
        finally:
            self._rng.setstate(random.getstate())
            random.setstate(outer)

    def _knows(self, expression: Expression) -> bool:
        """Whether every operation and operand is in the set."""
        names = (token for token in expression.tokens if isinstance(token, str))
        return all(name in self._variants or name in self._set.mapping for name in names)

    def _tree(self, expression: Expression) -> _Nodes:
        """The same formula as a DEAP tree, every node with the narrowest signature that fits its arguments."""

        def grow(token: Token, arguments: Sequence[list[Any]]) -> list[Any]:
            if isinstance(token, float):
                return [gp.Terminal(token, False, Constant)]
            if token in OPERANDS:
                return [self._set.mapping[token]]
            return [self._fitting(token, [nodes[0].ret for nodes in arguments]), *chain(*arguments)]

        return gp.PrimitiveTree(fold(expression.tokens, grow))

    def _fitting(self, name: str, arguments: Sequence[type]) -> gp.Primitive:
        for node in self._variants.get(name, ()):
            if all(issubclass(have, want) for have, want in zip(arguments, node.args, strict=True)):
                return node
        raise KeyError(name)


def _powers(tree: gp.PrimitiveTree) -> dict[Tokens, float]:
    """Powers of the factors of a formula, scaled so that W has 1 or, where it is no factor, all have 1 together."""
    powers = factorised(_expression(tree))
    unit = powers.get(("W",), 0.0)
    unit = unit if unit > 0 else sum(map(abs, powers.values())) or 1.0
    return {base: power / unit for base, power in powers.items()}


def _no_code(*arguments: object) -> None:
    """DEAP wants a function for each primitive; the trees are never compiled, only converted."""
    raise AssertionError("formulas are evaluated by gpmetric.expression")


def _expression(tree: Sequence[gp.Primitive]) -> Expression:
    return Expression(tuple(node.name.partition("/")[0] if node.arity else node.value for node in tree))
