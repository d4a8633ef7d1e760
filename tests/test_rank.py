"""Rank forms: hand-worked equal and unequal formulas, and the order of scores in float64 on random formulas."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from typing import get_args

import pytest
import torch
from torch import Tensor

from gpmetric.evolution.variation import Variation
from gpmetric.expression import PRIMITIVES, Expression, parse
from gpmetric.expression.canonical import canonical
from gpmetric.expression.rank import RankGroup, factorised, product, rank_form
from gpmetric.expression.tree import arity
from gpmetric.metrics import BASELINES, resolve_metric
from gpmetric.operands import OPERANDS, Operand
from gpmetric.pruning.mask import select_mask
from gpmetric.targets import parse_target

GROUPS: tuple[RankGroup, ...] = get_args(RankGroup)
TARGETS: dict[RankGroup, tuple[str, ...]] = {"row": ("0.5", "0.7", "2:4"), "layer": ("layer:0.5",)}
GAP = 1e-9  # difference, relative to the largest score, from which two float64 scores have an order

WORKED: list[tuple[str, str, str]] = [  # formula, rank form in rows, rank form in the layer
    # outer functions
    ("mms(abs(W)*X)", "abs(W)*X", "abs(W)*X"),
    ("zsn(log(W*X))", "abs(W)*X", "abs(W)*X"),
    ("exp(tanh(3*abs(W)*X+2))", "abs(W)*X", "abs(W)*X"),
    ("sqrt(W-X)", "abs(W-X)", "abs(W-X)"),
    ("sqrt(tanh(W))", "abs(W)", "abs(W)"),
    ("W**3", "W", "W"),
    ("log(W)+2*log(X)", "sqrt(W)*X", "sqrt(W)*X"),
    # decreasing functions turn the order about, two of them cancel
    ("-inv(abs(W)*X)", "abs(W)*X", "abs(W)*X"),
    ("1-inv(1+abs(W))", "abs(W)", "abs(W)"),
    ("inv(abs(W))", "-abs(W)", "-abs(W)"),
    ("-exp(abs(W))", "-abs(W)", "-abs(W)"),
    ("-(X/abs(W))", "abs(W)/X", "abs(W)/X"),
    ("inv(W-X)", "inv(W-X)", "inv(W-X)"),
    # constant terms and factors
    ("abs(W)*X/rowsum(abs(W))", "abs(W)*X", "abs(W)*X/rowsum(abs(W))"),
    ("abs(W)*X+rowsum(W)", "abs(W)*X", "rowsum(W)+abs(W)*X"),
    ("abs(W)*X-colsum(rowsum(W))", "abs(W)*X", "abs(W)*X"),
    ("abs(W)*X/colsum(rowsum(abs(W)))", "abs(W)*X", "abs(W)*X"),
    ("abs(W)*rowsum(W)", "abs(W)*rowsum(W)", "abs(W)*rowsum(W)"),
    ("abs(W)/colsum(abs(W))", "abs(W)/colsum(abs(W))", "abs(W)/colsum(abs(W))"),
    ("-3*(abs(W)-G)", "G-abs(W)", "G-abs(W)"),
    ("rownorm(W)*X", "rownorm(W)*X", "rownorm(W)*X"),
    # constants within the row that reach 0 there: equal scores stay equal
    ("abs(W)*mms(rownorm(W))", "abs(W)*mms(rownorm(W))", "abs(W)*mms(rownorm(W))"),
    ("abs(W)*max(rowsum(W),0)", "abs(W)*max(rowsum(W),0)", "abs(W)*max(rowsum(W),0)"),
    # a power of the whole product
    ("sqr(W)*X**2", "abs(W)*X", "abs(W)*X"),
    ("W**6*X**3", "sqr(W)*X", "sqr(W)*X"),
    ("abs(W)*H**0.25", "sqr(W)*sqrt(H)", "sqr(W)*sqrt(H)"),
    ("W**4*H", "sqr(W)*sqrt(H)", "sqr(W)*sqrt(H)"),
    ("abs(W)**0.3*X**0.1", "abs(W)*X**0.3333333333333333", "abs(W)*X**0.3333333333333333"),
    ("W**3*X**3", "W*X", "W*X"),
    # sums
    ("4*abs(W)*X+2*G", "abs(W)*X+G/2", "abs(W)*X+G/2"),
    ("abs(W)*X+abs(W)*G", "abs(W)*(G+X)", "abs(W)*(G+X)"),
    ("rowsum(abs(W))*(abs(W)*X)+rowsum(abs(W))*G", "abs(W)*X+G", "rowsum(abs(W))*(abs(W)*X+G)"),
    ("abs(W)*X+G/rownorm(W)", "abs(W)*rownorm(W)*X+G", "G/rownorm(W)+abs(W)*X"),
    # left as they are: mms is affine, but its shift is not 0, and the sign of the term is not known
    ("sqr(W)*mms(G)", "sqr(W)*mms(G)", "sqr(W)*mms(G)"),
    ("max(abs(W),X)", "max(abs(W),X)", "max(abs(W),X)"),
    ("W-W", "0", "0"),
    ("W/0", "W/0", "W/0"),
]

DIFFERENT: list[tuple[str, str, tuple[RankGroup, ...]]] = [  # formulas that do not rank alike, and where
    ("W*W*mms(G)", "W*W*G", GROUPS),
    ("abs(W)*X", "abs(W)*sqrt(X)", GROUPS),
    ("abs(W)*X", "-abs(W)*X", GROUPS),
    ("abs(W)*X", "W*X", GROUPS),
    ("abs(W)-X", "X-abs(W)", GROUPS),
    ("abs(W)*X+G", "abs(W)*X+2*G", GROUPS),
    ("abs(W)*X/colsum(abs(W))", "abs(W)*X", GROUPS),
    ("abs(W)*X*rowsum(abs(W))", "abs(W)*X", ("layer",)),
    ("abs(W)*X+rownorm(W)", "abs(W)*X", ("layer",)),
    ("tanh(abs(W))*X", "abs(W)*X", GROUPS),
    ("(abs(W)+2)*X", "abs(W)*X", GROUPS),
]


@pytest.mark.parametrize(("text", "row", "layer"), WORKED)
def test_worked_forms(text: str, row: str, layer: str) -> None:
    assert {group: str(rank_form(parse(text), group)) for group in GROUPS} == {"row": row, "layer": layer}


@pytest.mark.parametrize(("first", "second", "groups"), DIFFERENT)
def test_formulas_that_rank_differently_stay_apart(first: str, second: str, groups: tuple[RankGroup, ...]) -> None:
    for group in groups:
        assert rank_form(parse(first), group) != rank_form(parse(second), group)


def formulas(count: int, seed: int) -> list[Expression]:
    """Half draws of a search, half children of two earlier formulas, which are larger."""
    generator = random.Random(seed)
    variation = Variation(tuple(OPERANDS), tuple(PRIMITIVES), 25, generator)
    found = [variation.random_expression() for _ in range(count // 2)]
    while len(found) < count:
        found.append(variation.vary(*generator.sample(found, 2)))
    return found


def operands(seed: int) -> dict[str, Tensor]:
    """float64 operands of a 6x8 layer: W normal, the others log-normal."""
    generator = torch.Generator().manual_seed(seed)

    def normal(row: Operand) -> Tensor:
        return torch.randn(1 if row.axes == "in" else 6, 8, dtype=torch.float64, generator=generator)

    return {name: normal(row) if row.signed else normal(row).exp() for name, row in OPERANDS.items()}


def score(expression: Expression, values: dict[str, Tensor]) -> Tensor | None:
    """Float64 score [out, in] by the table's own functions; None where a guard or saturation acts."""
    shape = values["W"].shape
    stack: list[Tensor] = []
    for token in reversed(expression.tokens):
        if isinstance(token, float):
            stack.append(torch.full(shape, token, dtype=torch.float64))
        elif token in values:
            stack.append(values[token].expand(shape))
        else:
            arguments = [stack.pop() for _ in range(arity(token))]
            stack.append(PRIMITIVES[token].torch(*arguments).expand(shape))
            if _guarded(token, arguments, stack[-1]):
                return None
    return stack[0]


def _guarded(token: str, arguments: list[Tensor], value: Tensor) -> bool:
    """Whether a guard or saturation acts, or rounding hides differences that the argument has."""
    last = arguments[-1]
    if not value.abs().max() < 1e6 or last.abs().max() > {"exp": 12.0, "tanh": 5.0}.get(token, 1e6):
        return True
    if token in ("mms", "zsn"):
        distinct = last.unique()
        return len(distinct) > 1 and bool(distinct.diff().min() < 1e-7 * (distinct[-1] - distinct[0]))
    divisor = {"inv": last, "div": last, "log": last, "pow": arguments[0]}.get(token)
    return divisor is not None and bool(divisor.abs().min() < 1e-6)


def differences(value: Tensor) -> tuple[Tensor, Tensor]:
    """Sign of first - second for all pairs within a group of [groups, size], and whether that is beyond rounding."""
    difference = value.unsqueeze(2) - value.unsqueeze(1)  # [groups, size, size]
    return difference.sign(), difference.abs() > GAP * value.abs().amax()


@pytest.mark.every(2)
@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_the_order_in_every_group_is_kept(group: RankGroup) -> None:
    """Of every pair of scores of a group, in float64; a tie on one side is one on the other. And the masks."""
    checked = 0
    for index, expression in enumerate(formulas(1000, seed=11)):
        values, form = operands(index), rank_form(expression, group)
        before, after = score(expression, values), score(form, values)
        if before is None or after is None or form == canonical(expression):
            continue
        checked += 1
        shape = before.shape if group == "row" else (1, -1)
        (expected, clear), (found, apart) = (differences(value.reshape(shape)) for value in (before, after))
        assert ((expected == found) | ~(clear | apart)).all(), f"{expression} and {form}"
        ties = ~(clear & apart).sum(2).eq(clear.shape[2] - 1).all()
        for target in map(parse_target, () if ties else TARGETS[group]):
            assert select_mask(before, target).equal(select_mask(after, target)), f"{expression} and {form}"
    assert checked > 200


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_idempotent_never_longer_and_with_W(group: RankGroup) -> None:
    for expression in formulas(300, seed=12):
        form, whole = rank_form(expression, group), canonical(expression)
        assert rank_form(form, group) == form == rank_form(whole, group)
        assert len(form) <= len(whole)
        assert "W" in form.operands or form == whole


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("name", BASELINES)
def test_disguises_share_one_form(name: str, group: RankGroup) -> None:
    """Increasing functions, positive factors, shifts and double turns around a formula do not change its form."""
    disguises = ("exp({})", "tanh({})", "mms({})", "zsn({})", "2*({})", "({})/3", "({})-1.5", "-(-({}))", "({})**3")
    formula = resolve_metric(name).expression
    for outer, inner in itertools.product(disguises, repeat=2):
        text = outer.format(inner.format(formula))
        assert rank_form(parse(text), group) == rank_form(formula, group), text


@pytest.mark.parametrize(
    "tokens",
    [
        ("tanh",) * 600 + ("W",),
        ("exp",) * 60 + ("W",),
        ("sqr",) * 60 + ("mul", 3.0, "W"),
        ("add",) * 255 + ("W",) * 256,
        ("mul", 1e-200, "sqr", "mul", 1e-200, "W"),
        ("mul", "rowsum", "abs", "W", "X"),
        ("div", "abs", "W", "mul", 0.0, "X"),
        ("inv", "mul", 0.0, "W"),
    ],
)
def test_odd_formulas_have_a_form(tokens: tuple[str | float, ...]) -> None:
    for group in GROUPS:
        form = rank_form(Expression(tokens), group)
        assert rank_form(form, group) == form
        assert len(form) <= len(canonical(Expression(tokens)))


SCRIPT = """
import random
from gpmetric.evolution.variation import Variation
from gpmetric.expression import PRIMITIVES
from gpmetric.expression.rank import rank_form
from gpmetric.operands import OPERANDS
variation = Variation(tuple(OPERANDS), tuple(PRIMITIVES), 25, random.Random(14))
for _ in range(80):
    expression = variation.random_expression()
    print(rank_form(expression, "row"), rank_form(expression, "layer"))
"""


@pytest.mark.slow
def test_the_same_in_every_process() -> None:
    """Independent of PYTHONHASHSEED."""
    runs = [
        subprocess.run([sys.executable, "-c", SCRIPT], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True)
        for seed in ("1", "2")
    ]
    assert runs[0].stdout.count(b"\n") == 80
    assert runs[0].stdout == runs[1].stdout


def test_reading_formulas_stays_light() -> None:
    code = "import sys, gpmetric.expression.rank; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# A formula as powers of factors


@pytest.mark.parametrize(
    ("text", "powers"),
    [
        ("sqr(W)*mms(G+0.001*X)/colnorm(W)**0.4", {"W": 2.0, "mms(G+0.001*X)": 1.0, "colnorm(W)": -0.4}),
        ("-3*abs(W)**1.2*G*sqrt(H)/inv(G)", {"W": 1.2, "G": 2.0, "H": 0.5}),
        ("abs(W)*X+100*abs(W)*G", {"W": 1.0, "G+0.01*X": 1.0}),
        ("(W*sqrt(X))**3", {"W": 3.0, "X": 1.5}),
        ("W-W", {}),
    ],
)
def test_a_formula_is_powers_of_factors(text: str, powers: dict[str, float]) -> None:
    found = factorised(parse(text))
    assert {str(Expression(tokens)): power for tokens, power in found.items()} == pytest.approx(powers)
    assert not powers or factorised(product(found)) == pytest.approx(found)


def test_what_cannot_be_factorised_is_one_factor() -> None:
    expression = parse("abs(W)/(X-X)")
    assert factorised(expression) == {expression.tokens: 1.0}
