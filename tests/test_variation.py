"""Draws and children: sensible, within limits, readable back, and the same for a seed in every process."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from gpmetric.errors import InputError
from gpmetric.evolution.grammar import is_sensible
from gpmetric.evolution.variation import Variation
from gpmetric.expression import PRIMITIVES, parse
from gpmetric.operands import OPERANDS
from gpmetric.pruning.metrics import BASELINES, resolve_metric

SCRIPT = """
import random
from gpmetric.evolution.variation import Variation
from gpmetric.expression import PRIMITIVES, parse
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


def test_primitives_that_make_no_metric_are_refused() -> None:
    with pytest.raises(InputError, match="--primitives add: no sensible formula"):
        Variation(("W",), ("add",), 20, random.Random(0)).random_expression()


def test_a_formula_alone_in_its_space_is_its_own_child() -> None:
    alone = parse("abs(W)")
    assert Variation(("W",), ("abs",), 2, random.Random(0)).vary(alone, alone) == alone
