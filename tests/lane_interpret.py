"""Kernels in Triton's interpreter against plain torch; `test_kernels.py` runs this file in a process of its own.

The interpreter must be chosen before Triton is imported, and cannot share a process with compilation. Rows are short:
it takes milliseconds for what a GPU does in microseconds.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gpmetric.export.triton import load_functions
from gpmetric.expression import PRIMITIVES, parse
from gpmetric.expression.evaluate import evaluate
from gpmetric.kernels import layer, pattern, rows
from gpmetric.kernels.launch import Operands
from gpmetric.kernels.reduce import prepare
from gpmetric.pruning.metrics import BASELINES, resolve_metric

pytestmark = [pytest.mark.interpret, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

SHAPES = [(3, 5), (2, 300), (2, 528)]
KINDS = ["normal", "ties", "zeros", "nan", "infinite", "signed"]


def sample(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """W, X and G such that scores abs(W)*X + G are of a kind."""
    generator = torch.Generator().manual_seed(KINDS.index(kind))
    W = torch.randn(shape, generator=generator)
    X = torch.rand(shape[1], generator=generator)
    G = torch.zeros(shape)
    odd = torch.rand(shape, generator=generator)
    if kind == "ties":
        W, X = W.round(), torch.ones(shape[1])
    elif kind == "zeros":
        W = W.where(odd > 0.6, 0)
    elif kind == "nan":
        G[odd > 0.6] = torch.nan
    elif kind == "infinite":
        G[odd > 0.7], G[odd < 0.2] = torch.inf, -torch.inf
    elif kind == "signed":
        G = torch.randn(shape, generator=generator) - 1
    return W.to(dtype), X, G


@pytest.fixture(scope="module")
def score(tmp_path_factory: pytest.TempPathFactory) -> object:
    return load_functions([parse("abs(W)*X + G")], tmp_path_factory.mktemp("kernels")).score


def mask_of(bits: Tensor, width: int) -> Tensor:
    return ((bits[:, :, None].int() >> torch.arange(8)) & 1).flatten(1)[:, :width].bool()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_kernel_chooses_as_a_stable_sort(
    shape: tuple[int, int], kind: str, dtype: torch.dtype, score: object
) -> None:
    W, X, G = sample(shape, kind, dtype)
    operands, scores = Operands((G,), (X,)), W.float().abs() * X + G
    wrong = int((~scores.isfinite()).sum())
    for removed in {1, shape[1] // 2, shape[1] - 1}:
        bad = torch.zeros(1, dtype=torch.int64)
        expected = rows.reference(W, removed, scores)
        assert torch.equal(rows.prune_rows(W, removed, score, operands, bad=bad), expected)
        assert bad.item() == wrong
    bits = rows.prune_rows(W, shape[1] // 2, score, operands, bits=True)
    kept = rows.reference(torch.ones(shape), shape[1] // 2, scores) != 0
    assert torch.equal(mask_of(bits, shape[1]), kept)
    for removed in {1, W.numel() // 3, W.numel() - 1}:
        bad = torch.zeros(1, dtype=torch.int64)
        assert torch.equal(layer.prune_layer(W, removed, score, operands, bad=bad), layer.reference(W, removed, scores))
        assert bad.item() == wrong
    bits = layer.prune_layer(W, W.numel() // 3, score, operands, bits=True)
    kept = layer.reference(torch.ones(shape), W.numel() // 3, scores) != 0
    assert torch.equal(mask_of(bits[None], W.numel()).view(shape), kept)
    for keep, group in ((1, 2), (2, 4), (3, 4), (4, 8), (5, 16)):
        if shape[1] % group == 0:
            expected = pattern.reference(W, keep, group, scores)
            assert torch.equal(pattern.prune_pattern(W, keep, group, score, operands), expected)
            bits = pattern.prune_pattern(W, keep, group, score, operands, bits=True)
            kept = pattern.reference(torch.ones(shape), keep, group, scores) != 0
            assert torch.equal(mask_of(bits, shape[1]), kept)


def test_a_layer_of_few_samples_and_little_room(monkeypatch: pytest.MonkeyPatch, score: object) -> None:
    """Bounds that miss, and more between them than there is room for, are tried again."""
    monkeypatch.setattr(layer, "_SAMPLE", 4)
    monkeypatch.setattr(layer, "_ROOM", 1000)
    for kind in KINDS:
        W, X, G = sample((7, 300), kind, torch.float32)
        scores = W.abs() * X + G
        for removed in (1, 700, 1050, 2099):
            pruned = layer.prune_layer(W, removed, score, Operands((G,), (X,)))
            assert torch.equal(pruned, layer.reference(W, removed, scores)), (kind, removed)


def test_in_place(score: object) -> None:
    W, X, G = sample((3, 304), "normal", torch.float32)
    operands = Operands((G,), (X,))
    for prune in (
        lambda weight, **options: rows.prune_rows(weight, 150, score, operands, **options),
        lambda weight, **options: pattern.prune_pattern(weight, 2, 8, score, operands, **options),
        lambda weight, **options: layer.prune_layer(weight, 500, score, operands, **options),
    ):
        again = W.clone()
        assert prune(again, out=again) is again
        assert torch.equal(again, prune(W))
        assert not torch.equal(again, W)


def test_what_the_kernels_cannot_read_is_refused(score: object) -> None:
    W, X, G = sample((4, 32), "normal", torch.float32)
    good = Operands((G,), (X,))
    for weight, operands, message in [
        (W.t(), Operands(), "weight must be contiguous"),
        (W.double(), good, "weight must be float32"),
        (W, Operands((G[:3],), (X,)), "matrices must be contiguous"),
        (W, Operands((G,), (X.double(),)), "columns must be float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            rows.prune_rows(weight, 2, score, operands)
    with pytest.raises(ValueError, match="removed must be at least 1 and below 32, but got 0"):
        rows.prune_rows(W, 0, score, good)
    with pytest.raises(ValueError, match="removed must be at least 1 and below 128, but got 128"):
        layer.prune_layer(W, 128, score, good)
    with pytest.raises(ValueError, match="2:3 of 32 inputs"):
        pattern.prune_pattern(W, 2, 3, score, good)
    with pytest.raises(ValueError, match="out must be torch"):
        rows.prune_rows(W, 2, score, good, out=W.half())


FORMULAS = [
    *(f"{name}(abs(W)*X+G)*abs(W)" for name, row in PRIMITIVES.items() if row.arity == 1),
    *(f"{name}(W, G+X)" for name in ("max", "min")),
    "W/(G-0.5)",
    "(W-G)**3*D",
    "(abs(W)+G)**X",
    "W*W*F/rowsum(G)**0.47",
    "zsn(W*G)+mms(X)",
    "colnorm(rownorm(W)*X)*abs(W)",
    "rowsum(W)+mms(rowsum(G)*W)*W",
    "0*W+X",
    "W",
    *(str(resolve_metric(name, 128, 2048).expression) for name in BASELINES),
]


def drawn() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (5, 70)
    operands = {name: torch.rand(shape, generator=generator) for name in "GHF"}
    operands |= {name: torch.rand(shape[1], generator=generator) for name in "XD"}
    return operands | {"W": torch.randn(shape, generator=generator)}


@pytest.mark.parametrize("formula", FORMULAS)
def test_every_primitive_and_baseline(formula: str, tmp_path: Path) -> None:
    """The masks of the evaluator's scores where rows compete, though exp, log, tanh and pow may differ by ulps."""
    operands = drawn()
    expression = parse(formula)
    functions = load_functions([expression], tmp_path)
    prepared = prepare(operands["W"], operands, functions.LAYOUT, functions.part)
    pruned = rows.prune_rows(operands["W"], 35, functions.score, prepared)
    expected = rows.reference(operands["W"], 35, evaluate(expression, operands))
    assert torch.equal(pruned, expected)


def test_several_formulas_in_one_score(tmp_path: Path) -> None:
    """As each on its own, to the bit; reductions that they share are computed from one part."""
    operands = drawn()
    W = operands["W"]
    group = [
        parse(text) for text in ("abs(W)*X", "zsn(G)*W/rowsum(G)", "W*W*H/rownorm(G*X)", "mms(G)+rowsum(G)*W", "W")
    ]
    together = load_functions(group, tmp_path)
    assert together.LAYOUT.matrices == ("G", "H")
    assert together.LAYOUT.rows == 2
    for which, expression in enumerate(group):
        prepared = prepare(W, operands, together.LAYOUT, together.part, which)
        alone = load_functions([expression], tmp_path)
        expected = prepare(W, operands, alone.LAYOUT, alone.part)
        assert torch.equal(
            rows.prune_rows(W, 35, together.score, prepared), rows.prune_rows(W, 35, alone.score, expected)
        )
        assert torch.equal(
            pattern.prune_pattern(W, 1, 2, together.score, prepared),
            pattern.prune_pattern(W, 1, 2, alone.score, expected),
        )
        assert torch.equal(
            layer.prune_layer(W, 99, together.score, prepared), layer.prune_layer(W, 99, alone.score, expected)
        )


def test_operands_are_converted_and_named(tmp_path: Path) -> None:
    operands = drawn()
    functions = load_functions([parse("abs(W)*X + G")], tmp_path)
    layout, part = functions.LAYOUT, functions.part
    named = {"X": operands["X"].double(), "G": operands["G"].t().contiguous().t()}
    prepared = prepare(operands["W"], named, layout, part)
    assert torch.equal(prepared.columns[0], operands["X"])
    assert prepared.matrices[0].is_contiguous()
    with pytest.raises(ValueError, match=r"needs the operand X, \[70\]"):
        prepare(operands["W"], {"G": operands["G"]}, layout, part)
    with pytest.raises(ValueError, match=r"operand X must be \[70\] to go with W, but got \[69\]"):
        prepare(operands["W"], operands | {"X": operands["X"][1:]}, layout, part)
