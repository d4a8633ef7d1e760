"""Shared programs against `evaluate`, formula by formula, bit by bit; their steps and releases worked by hand."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gpmetric.errors import ExpressionError
from gpmetric.evolution.variation import Variation
from gpmetric.expression import PRIMITIVES, Expression, parse
from gpmetric.expression import shared_program as module
from gpmetric.expression.evaluate import evaluate
from gpmetric.expression.shared_program import SharedProgram
from gpmetric.expression.tree import arity
from gpmetric.metrics import BASELINES, resolve_metric
from gpmetric.operands import OPERANDS

SHAPES = [(6, 42), (42, 123), (1, 8), (8, 1), (70, 33), (64, 192)]


def make_operands(out: int, columns: int, seed: int = 0) -> dict[str, Tensor]:
    """Random operands of either sign, with zeros of either sign and, in G, values that overflow when squared."""
    generator = torch.Generator().manual_seed(seed)
    operands = {
        name: torch.randn((out, columns) if row.axes == "out,in" else (columns,), generator=generator)
        for name, row in OPERANDS.items()
    }
    operands["W"].view(-1)[::5] = 0.0
    operands["W"].view(-1)[::7] = -0.0
    operands["H"].view(-1)[::3] = -0.0
    operands["G"] *= 10 ** torch.linspace(-30, 25, columns)
    return operands


def evolved(seed: int, count: int = 40) -> list[Expression]:
    """Random formulas and as many of their children."""
    rng = random.Random(seed)
    variation = Variation(tuple(OPERANDS), tuple(PRIMITIVES), 20, rng)
    formulas = [variation.random_expression() for _ in range(count)]
    return formulas + [variation.vary(rng.choice(formulas), rng.choice(formulas)) for _ in range(count)]


def arbitrary(seed: int, count: int = 60) -> list[Expression]:
    """Any valid trees: vectors, constants, sums of constants, matrices as exponents."""
    rng = random.Random(seed)
    formulas = []
    for _ in range(count):
        tokens: list[str | float] = []
        missing = 1
        while missing:
            leaf = rng.random() < 0.3 or len(tokens) + missing > 20
            tokens.append(rng.choice([*OPERANDS, 0.5, -1.5, 0.0, 3.0] if leaf else [*PRIMITIVES]))
            missing += arity(tokens[-1]) - 1
        formulas.append(Expression(tuple(tokens)))
    return formulas


def assert_same_bits(formulas: Sequence[Expression], operands: dict[str, Tensor]) -> None:
    """NaN equals NaN, 0 does not equal -0."""
    indices = []
    for index, score in SharedProgram(formulas).scores(operands):
        indices.append(index)
        expected = evaluate(formulas[index], operands)
        assert score.shape == expected.shape
        assert score.is_contiguous()
        assert score.dtype == torch.float32
        same = (score.view(torch.int32) == expected.view(torch.int32)) | (score.isnan() & expected.isnan())
        assert same.all(), f"{formulas[index]}: {score[~same][:3]} for {expected[~same][:3]}"
    assert indices == list(range(len(formulas)))


@pytest.mark.every(5)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block", [1, 500, 2**18])
def test_scores_are_those_of_evaluate(shape: tuple[int, int], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, and in the smallest blocks that are allowed; the last block is a ragged one at 70x33 and 42x123."""
    monkeypatch.setattr(module, "_BLOCK", block)
    for seed in range(3):
        assert_same_bits(evolved(seed) + arbitrary(seed), make_operands(*shape, seed))


def test_scores_of_the_baselines_in_blocks_of_the_real_size() -> None:
    formulas = [resolve_metric(name).expression for name in BASELINES]
    assert_same_bits(formulas, make_operands(1100, 250))


def test_every_layout_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conv1D weights are transposed views; sums over one are added up in another order than over a copy."""
    monkeypatch.setattr(module, "_BLOCK", 500)
    for seed in range(3):
        operands = make_operands(70, 33, seed)
        turned = {name: value.t().contiguous().t() if value.dim() == 2 else value for name, value in operands.items()}
        assert_same_bits(evolved(seed), turned)
        assert_same_bits(evolved(seed), operands | {"W": turned["W"]})
        assert_same_bits(evolved(seed), operands | {"X": torch.arange(66.0)[::2]})
        assert_same_bits(evolved(seed), operands | {"W": torch.nn.Parameter(operands["W"].bfloat16())})


@pytest.mark.parametrize("block", [1, 2**18])
@pytest.mark.parametrize("exponent", [0, 0.5, 1, 2, 3, -1, -2, -3, 2.3, -0.0115])
def test_every_kind_of_power(exponent: float, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of zeros of either sign, of sizes around TINY and of values that are not finite."""
    monkeypatch.setattr(module, "_BLOCK", block)
    operands = make_operands(32, 10)
    operands["W"][0] = torch.tensor([0, 0.0, -0.0, 1e-30, -1e-30, 9e-31, -9e-31, torch.inf, -torch.inf, torch.nan])
    assert_same_bits([Expression(("pow", name, float(exponent))) for name in "WGX"], operands)


@pytest.mark.parametrize("block", [1, 2**18])
@pytest.mark.parametrize("value", [0.0, -0.1, 3e38, 1e-30, torch.inf, torch.nan])
def test_parts_of_reductions(value: float, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Constant matrices, those constant up to the sign of 0, and ordinary ones with one such value."""
    monkeypatch.setattr(module, "_BLOCK", block)
    texts = [
        "mms(W)",
        "zsn(W)",
        "zsn(mms(W))*zsn(W)",
        "mms(zsn(W)*G)+zsn(W)",
        "rownorm(colnorm(W)*W)",
        "zsn(X)-mms(W*X)",
    ]
    for fill in (torch.full((33, 10), value), torch.full((33, 10), value).copysign(torch.randn(33, 10))):
        assert_same_bits([parse(text) for text in texts], make_operands(33, 10) | {"W": fill})
    operands = make_operands(33, 10)
    operands["W"][20, 3] = value
    assert_same_bits([parse(text) for text in texts], operands)


def test_shared_steps_are_one() -> None:
    """W, X, abs(W), abs(W)*X and sqrt(...); the order of arguments is kept."""
    assert len(SharedProgram([parse("abs(W)*X"), parse("sqrt(abs(W)*X)")])) == 5
    assert len(SharedProgram([parse("W*X"), parse("X*W")])) == 4
    assert len(SharedProgram([parse("rownorm(W)"), parse("rowsum(sqr(W))")])) == 4
    assert len(SharedProgram([parse("zsn(W)")])) == 19
    assert len(SharedProgram([])) == 0


@pytest.mark.parametrize("block", [1, 2**18])
def test_values_go_after_their_last_use(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """abs(W)*X is needed by the first and the third formula, the matrices of the others by nobody else."""
    monkeypatch.setattr(module, "_BLOCK", block)
    program = SharedProgram([parse("exp(abs(W)*X)"), parse("rowsum(W)*H"), parse("abs(W)*X"), parse("tanh(W)*H")])
    values = program._leaves(make_operands(32, 10))
    held = [
        sum(value.shape == (32, 10) for value in values.values()) for _ in program._scores(values, torch.Size((32, 10)))
    ]
    assert held == [3, 3, 2, 2]  # W, H and, until it is scored, abs(W)*X


def test_what_nothing_waits_for_does_not_leave_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """log(W) is computed after the sum it is multiplied by: one matrix holds what is summed, and then the score."""
    monkeypatch.setattr(module, "_BLOCK", 1)
    made: list[torch.Size] = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda shape, **options: made.append(shape) or empty(shape, **options))
    list(SharedProgram([parse("log(W)*rowsum(G)*colsum(exp(G)*0.5)")]).scores(make_operands(32, 10)))
    assert made == [(32, 10)]


def test_memory_of_a_score_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first, which the last contains, is kept; the others take turns."""
    monkeypatch.setattr(module, "_BLOCK", 1)
    formulas = [parse(text) for text in ("exp(W)", "tanh(W)", "log(W)", "sqrt(W)", "exp(W)*H")]
    pointers = [score.data_ptr() for _, score in SharedProgram(formulas).scores(make_operands(32, 10))]
    assert pointers[1] == pointers[2] == pointers[3] == pointers[4] != pointers[0]


def test_two_iterators_of_a_program_do_not_share_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 1)
    program = SharedProgram([parse(text) for text in ("exp(W)", "tanh(W)*G", "exp(W)*H")])
    list(program.scores(make_operands(32, 10)))
    layers = [make_operands(32, 10, seed) for seed in range(2)]
    for scores in zip(*map(program.scores, layers), strict=True):
        for layer, (index, score) in zip(layers, scores, strict=True):
            assert torch.equal(score.nan_to_num(), evaluate(program._expressions[index], layer).nan_to_num())


def test_one_axis_values_stay_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []

    def tanh(value: Tensor) -> Tensor:
        shapes.append(tuple(value.shape))
        return value.tanh()

    monkeypatch.setitem(PRIMITIVES, "tanh", replace(PRIMITIVES["tanh"], torch=tanh))
    list(SharedProgram([parse("W*tanh(X)"), parse("abs(W)*tanh(X)*tanh(rowsum(G))")]).scores(make_operands(6, 42)))
    assert shapes == [(1, 42), (6, 1)]


def test_a_score_shares_no_memory_with_an_operand() -> None:
    operands = make_operands(1, 8)
    formulas = [parse("W"), Expression(("X",)), Expression(("neg", "neg", "W")), Expression((2.0,))]
    pointers = {value.data_ptr() for value in operands.values()}
    for _, score in SharedProgram(formulas).scores(operands):
        assert score.data_ptr() not in pointers
        assert score.shape == (1, 8)


@pytest.mark.parametrize(
    "operands",
    [
        {},
        {"X": torch.ones(4)},
        {"W": torch.ones(4)},
        {"W": torch.ones(2, 4)},
        {"W": torch.ones(2, 4), "X": torch.ones(3)},
    ],
)
def test_the_error_is_that_of_evaluate_and_comes_at_once(operands: dict[str, Tensor]) -> None:
    formulas = [Expression((2.0,)), parse("abs(W)"), parse("abs(W)*X"), parse("W*X*G")]
    with pytest.raises(ExpressionError) as expected:
        [evaluate(formula, operands) for formula in formulas]
    with pytest.raises(ExpressionError) as caught:
        SharedProgram(formulas).scores(operands)
    assert str(caught.value) == str(expected.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_scores_on_a_gpu() -> None:
    operands = {name: value.cuda() for name, value in make_operands(70, 33).items()}
    assert_same_bits(evolved(0), operands)
