"""Draws and children: sensible, within limits, readable back, and the same for a seed in every process."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from gpmetric.errors import InputError
from gpmetric.evolution.grammar import FORBIDDEN, foreign_to, is_sensible, nests
from gpmetric.evolution.request import DiscoverRequest, parse_nesting
from gpmetric.evolution.variation import Variation, _expression
from gpmetric.expression import PRIMITIVES, Expression, parse
from gpmetric.expression.rank import factorised
from gpmetric.metrics import BASELINES, resolve_metric
from gpmetric.operands import OPERANDS

SCRIPT = """
import random
from gpmetric.evolution.variation import Variation
from gpmetric.expression import PRIMITIVES, parse
from gpmetric.metrics import BASELINES, resolve_metric
from gpmetric.operands import OPERANDS
variation = Variation(tuple(OPERANDS), tuple(PRIMITIVES), 20, random.Random(7))
first, second = parse("abs(W)*X + 0.5*abs(W)*G"), parse("(abs(W)/rowsum(abs(W)) + abs(W)/colsum(abs(W)))*sqrt(X)")
for _ in range(60):
    print(variation.random_expression(), variation.vary(first, second))
"""


def variation(seed: int = 0, max_nodes: int = 20, operands: tuple[str, ...] = tuple(OPERANDS)) -> Variation:
    return Variation(operands, tuple(PRIMITIVES), max_nodes, random.Random(seed))


def test_draws_are_sensible_small_and_can_be_read_back() -> None:
    source = variation()
    for _ in range(300):
        expression = source.random_expression()
        assert is_sensible(expression)
        assert len(expression) <= 20
        assert parse(str(expression)) == expression


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_has_sensible_children(name: str) -> None:
    source, other = variation(max_nodes=30), parse("abs(W)*D")
    baseline = resolve_metric(name).expression
    children = {source.vary(baseline, other) for _ in range(60)}
    assert len(children) > 10
    assert all(is_sensible(child) and parse(str(child)) == child for child in children)


def test_operands_left_out_never_appear() -> None:
    source = variation(operands=("W", "X"))
    used = {name for _ in range(100) for name in source.random_expression().operands}
    assert used == {"W", "X"}


def test_the_global_generator_is_left_as_it_was() -> None:
    random.seed(3)
    before = random.getstate()
    variation().random_expression()
    assert random.getstate() == before


@pytest.mark.slow
def test_same_seed_same_draws_whatever_the_hash_seed() -> None:
    """DEAP draws from sets of types, whose order would depend on addresses and PYTHONHASHSEED."""
    runs = [
        subprocess.run([sys.executable, "-c", SCRIPT], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True)
        for seed in ("0", "1", "2")
    ]
    assert len({run.stdout for run in runs}) == 1
    assert runs[0].stdout.count(b"\n") == 60


@pytest.mark.parametrize(
    ("formula", "why"),
    [
        ("W*X", "odd in W"),
        ("exp(W)*X", "neither even nor odd"),
        ("abs(colsum(W))", "the same for every output"),
        ("rownorm(W)", "the same for every input"),
        ("abs(W)*(2*3)", "computes with constants alone"),
        ("max(W, 0)", "neither even nor odd"),
        ("tanh(W)*G", "odd in W"),
        ("W**3*X", "odd in W"),
    ],
)
def test_grammar_refuses(formula: str, why: str) -> None:
    assert not is_sensible(parse(formula)), why


@pytest.mark.parametrize(
    "formula",
    ["abs(W)*X", "W*W*mms(G)", "W**2*D", "W**0.5*X", "W/rowsum(W)", "tanh(W)*W", "colnorm(W)*abs(W)", "W*zsn(W)"],
)
def test_grammar_accepts(formula: str) -> None:
    assert is_sensible(parse(formula))


@pytest.mark.parametrize(
    ("formula", "outer", "inner", "found"),
    [
        ("exp(log(abs(W)))*X", "exp", "log", True),
        ("log(exp(abs(W)))*X", "exp", "log", False),
        ("exp(abs(W)*sqrt(log(X)))", "exp", "log", True),  # at any depth
        ("exp(abs(W)) + log(X)", "exp", "log", False),  # beside it
        ("mms(abs(W)*mms(X))", "mms", "mms", True),
        ("mms(abs(W))*mms(X)", "mms", "mms", False),
        ("abs(W)*X", "mul", "abs", True),
    ],
)
def test_nests(formula: str, outer: str, inner: str, found: bool) -> None:
    assert nests(parse(formula), outer, inner) == found


@pytest.mark.parametrize(("outer", "inner"), FORBIDDEN)
def test_what_is_forbidden_by_itself(outer: str, inner: str) -> None:
    formula = parse(f"abs(W)*{outer}(X + {inner}(X))")
    assert not is_sensible(formula)
    assert is_sensible(formula, ())
    assert is_sensible(parse(f"abs(W)*{outer}(X)*{inner}(X)"))


def test_draws_and_children_hold_nothing_forbidden() -> None:
    """Also what only this campaign forbids, which would be in many of them."""
    forbidden = (*FORBIDDEN, ("mul", "abs"), ("sqrt", "add"))
    source = Variation(tuple(OPERANDS), tuple(PRIMITIVES), 20, random.Random(0), forbidden)
    first, second = parse("sqr(W)*X"), parse("sqr(W)/rowsum(sqr(W)) + sqrt(G)*sqr(W)")
    drawn = [source.random_expression() for _ in range(100)] + [source.vary(first, second) for _ in range(100)]
    assert not any(nests(one, *pair) for one in drawn for pair in forbidden)
    free = Variation(tuple(OPERANDS), tuple(PRIMITIVES), 20, random.Random(0), ())
    drawn = [free.vary(parse("exp(log(abs(W)))*X"), second) for _ in range(100)]
    assert any(nests(one, "exp", "log") for one in drawn)


@pytest.mark.parametrize(
    ("text", "pair"), [("exp(log)", ("exp", "log")), (" mul ( abs )\t", ("mul", "abs")), ("mms(mms)", ("mms", "mms"))]
)
def test_a_nesting_is_read(text: str, pair: tuple[str, str]) -> None:
    assert parse_nesting(text) == pair


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exp", "--forbid must be like exp(log), outer(inner), but got 'exp'"),
        ("", "but got ''"),
        ("exp(log(abs))", "--forbid must be like"),
        ("exp(log) x", "--forbid must be like"),
        ("exp(log,abs)", "--forbid must be like"),
        ("exp()", "--forbid must be like"),
        ("exp(" + "a" * 5000, "--forbid must be like"),
        ("exp(lgo)", "--forbid: unknown name 'lgo'; did you mean 'log'?"),
        ("W(abs)", "--forbid: unknown name 'W'"),
    ],
)
def test_a_nesting_that_is_none(text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        parse_nesting(text)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("formula", "reason"),
    [
        ("abs(W)*X", ""),
        ("abs(W)*D", "uses 'D', which --operands or --primitives leaves out"),
        ("sqrt(W)*X", "uses 'sqrt', which --operands or --primitives leaves out"),
        ("abs(W)*X*2", "has 6 nodes, more than --max-nodes 5"),
    ],
)
def test_foreign_to(formula: str, reason: str) -> None:
    space = DiscoverRequest(operands=("W", "X"), primitives=("abs", "mul"), max_nodes=5)
    assert foreign_to(space, parse(formula)) == reason


def test_primitives_that_make_no_metric_are_refused() -> None:
    with pytest.raises(InputError, match="--primitives add: no sensible formula"):
        Variation(("W",), ("add",), 20, random.Random(0)).random_expression()


def test_a_formula_alone_in_its_space_is_its_own_child() -> None:
    alone = parse("abs(W)")
    assert Variation(("W",), ("abs",), 2, random.Random(0)).vary(alone, alone) == alone


def powers(expression: Expression) -> dict[str, float]:
    return {str(Expression(tokens)): power for tokens, power in factorised(expression).items()}


def drawn(source: Variation, draw: Callable[[], Any], count: int = 200) -> list[dict[str, float]]:
    """Powers of what an operator makes of its parents, with the generator it has in a campaign."""
    with source._own_generator():
        return [powers(_expression(draw())) for _ in range(count)]


def test_a_blend_of_two_is_on_the_line_through_the_powers_of_both() -> None:
    """Scaled so that W has the power 1: G**a * D**b with a + 2 b = 1, to the three digits powers have."""
    source = variation(4, max_nodes=30)
    parents = [source._tree(parse(text)) for text in ("sqr(W)*sqr(G)", "abs(W)*sqrt(D)")]
    found = drawn(source, lambda: source._blend(parents))
    for one in found:
        assert one.keys() <= {"W", "G", "D"}
        assert one["W"] == 1
        assert one.get("G", 0.0) + 2 * one.get("D", 0.0) == pytest.approx(1, abs=0.05)  # a small power is left out
    shares = [one.get("G", 0.0) for one in found]
    assert min(shares) < -0.3
    assert max(shares) > 1.3


def test_the_smallest_powers_go_where_there_are_too_many() -> None:
    """abs(W)*G**2*X**3 has 9 nodes, and colnorm(H)**0.5 takes another 5."""
    source = variation(4, max_nodes=12)
    wanted = {("W",): 1.0, ("colnorm", "H"): 0.5, ("G",): 2.0, ("X",): 3.0, ("D",): 0.01}
    [kept] = drawn(source, lambda: source._of_powers(wanted, source._tree(parse("W*W*D"))), 1)
    assert kept == {"W": 1.0, "G": 2.0, "X": 3.0}


def test_a_reweighed_formula_keeps_its_factors_and_may_get_a_few_more() -> None:
    source = variation(5, max_nodes=30)
    tree = source._tree(parse("abs(W)*mms(G)**3/colnorm(W)**3"))
    found = drawn(source, lambda: source._reweigh(tree))
    own = {"W", "mms(G)", "colnorm(W)"}
    assert sum(own <= one.keys() for one in found) > 180  # a power of 1 may come near 0
    assert all(one["mms(G)"] > 0 > one["colnorm(W)"] for one in found)
    added = [one.keys() - own for one in found]
    assert {len(one) for one in added} == {0, 1, 2, 3}
    assert frozenset().union(*added) >= {"X", "G", "H", "D", "F", "rownorm(G)", "rownorm(W)"}


@pytest.mark.parametrize("text", ["zsn(abs(W))+X", "abs(W)*X-G", "-(abs(W)*X)"])
def test_what_may_be_negative_is_no_product_of_sizes(text: str) -> None:
    source = variation(5, max_nodes=30)
    tree, other = source._tree(parse(text)), source._tree(parse("abs(W)*G"))
    assert source._reweigh(tree) == tree
    assert source._blend([tree, other]) == tree
    assert source._blend([tree, other, other]) != tree


def test_operations_left_out_stay_out_of_products() -> None:
    """Without powers there are no products of them to draw; without norms, products of operands alone."""
    source = Variation(("W", "X", "G"), ("abs", "mul", "div", "pow"), 30, random.Random(6))
    assert len({source.vary(parse("abs(W)*X"), parse("abs(W)*G")) for _ in range(50)}) > 30
    source = Variation(("W", "X", "G"), ("abs", "mul", "add"), 30, random.Random(6))
    first, second = parse("abs(W)*X"), parse("abs(W)*G")
    used = {token for _ in range(200) for token in source.vary(first, second).tokens}
    assert used & set(PRIMITIVES) <= {"abs", "mul", "add"}
