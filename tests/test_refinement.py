"""Neighbours: the whole list for a few formulas, and what holds for every one."""

from __future__ import annotations

import pytest

from gpmetric.evolution.refinement import neighbours, weighted
from gpmetric.expression import Expression, parse
from gpmetric.metrics import BASELINES, resolve_metric


def listed(text: str, factor: float) -> list[str]:
    return [str(one) for one in neighbours(parse(text), factor)]


def test_a_power_for_every_operand_but_the_sign() -> None:
    assert listed("abs(W)*X", 1.5) == ["abs(W)**1.5*X", "abs(W)**0.667*X", "abs(W)*X**1.5", "abs(W)*X**0.667"]


def test_a_power_that_is_there_is_changed_instead() -> None:
    """W alone has no power: it has a sign."""
    assert listed("W*W*D**2", 1.2) == ["W*W*D**2.4", "W*W*D**1.67"]


def test_a_coefficient_on_the_second_term() -> None:
    assert listed("sqr(W) - G", 2.0) == ["sqr(W)-2*G", "sqr(W)-0.5*G", "sqr(W)-G**2", "sqr(W)-G**0.5"]


def test_a_coefficient_that_is_there_is_changed_instead() -> None:
    assert listed("sqr(W) + 0.5*G", 1.1) == [
        "sqr(W)+0.55*G",
        "sqr(W)+0.455*G",
        "sqr(W)+0.5*G**1.1",
        "sqr(W)+0.5*G**0.909",
    ]


def test_nothing_near() -> None:
    assert listed("W*W", 1.5) == []
    assert listed("W*W*0", 1.5) == []


@pytest.mark.parametrize("constant", ["9e29", "-9e29", "1e-30"])
def test_a_constant_stays_one_that_can_be_read(constant: str) -> None:
    expression = parse(f"abs(W)*({constant}) + X")
    near = list(neighbours(expression, 1.5))
    assert all(parse(str(one)) == one for one in near)
    assert near


@pytest.mark.parametrize("factor", [1.5, 1.1])
@pytest.mark.parametrize("name", BASELINES)
def test_every_neighbour_is_one_step_away_and_can_be_read(name: str, factor: float) -> None:
    expression = resolve_metric(name, 128, 256).expression
    near = list(neighbours(expression, factor))
    assert len(near) >= 2
    assert expression not in near
    for one in near:
        assert parse(str(one)) == one
        assert without_constants(one) == without_constants(expression) or len(one) == len(expression) + 2
        assert one.operands == expression.operands


def without_constants(expression: Expression) -> list[object]:
    return [token if isinstance(token, str) else "constant" for token in expression.tokens]


def test_a_power_of_every_simple_factor() -> None:
    """A factor that is there has its power changed, and goes where that leaves nothing of it."""
    found = [str(one) for one in weighted(parse("abs(W)*sqrt(X)"), 0.5, ("W", "X"))]
    assert found == [
        "abs(W)**1.5*X**0.5",
        "abs(W)**0.5*X**0.5",
        "abs(W)*rownorm(W)**0.5*X**0.5",
        "abs(W)*X**0.5/rownorm(W)**0.5",
        "abs(W)*colnorm(W)**0.5*X**0.5",
        "abs(W)*X**0.5/colnorm(W)**0.5",
        "abs(W)*X",
        "abs(W)",
    ]


def test_a_signed_formula_keeps_its_sign() -> None:
    found = [str(one) for one in weighted(parse("abs(W)*X-G"), 0.5, ("X",))]
    assert found == ["(abs(W)*X-G)*X**0.5", "(abs(W)*X-G)*X**-0.5"]
