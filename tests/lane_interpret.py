"""Kernels in Triton's interpreter against plain torch; `test_kernels.py` runs this file in a process begun for it.

The interpreter must be chosen before Triton is imported, and cannot share a process with compilation. Matrices are
small: it takes milliseconds for what a GPU does in microseconds. What kernels choose by is compared in
`lane_interpret_values.py`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from gpmetric.codegen.loading import load_functions
from gpmetric.expression import PRIMITIVES, parse
from gpmetric.expression.evaluate import evaluate
from gpmetric.kernels import layer, pattern, rows
from gpmetric.kernels.launch import Operands, weight_itself
from gpmetric.kernels.reduce import prepare
from gpmetric.metrics import BASELINES, resolve_metric
from gpmetric.pruning.mask import select_mask
from gpmetric.targets import parse_target

pytestmark = [pytest.mark.interpret, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["normal", "ties", "zeros", "both zeros", "subnormal", "nan", "nan rows", "infinite", "signed"]
# Of every shape every kind, whose dtypes take turns.
CASES = [(shape, kind, DTYPES[(turn + add) % 3]) for add, shape in enumerate([(3, 5), (1, 2), (2, 300), (2, 528)])
         for turn, kind in enumerate(KINDS)]  # fmt: skip
CASES += [((1, 4500), "normal", torch.bfloat16), ((2, 4500), "nan rows", torch.float32)]
CASES += [((1, 4500), "ties", torch.float16)]


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
    elif kind == "both zeros":  # -0 and G make G
        X, G = torch.full((shape[1],), -0.0), W.round().where(odd > 0.6, G.copysign(W))
    elif kind == "subnormal":  # of fp32; the interpreter reads those of bf16 wrongly
        X, G = torch.full((shape[1],), -0.0), W * 1e-44
    elif kind == "nan":
        G[odd > 0.6] = torch.nan
    elif kind == "nan rows":  # the first; the last but for one entry
        G[0], G[-1, : shape[1] // 2], G[-1, shape[1] // 2 + 1 :] = torch.nan, torch.nan, torch.nan
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


@pytest.mark.parametrize(("shape", "kind", "dtype"), CASES)
def test_every_kernel_chooses_as_a_stable_sort(
    shape: tuple[int, int], kind: str, dtype: torch.dtype, score: object
) -> None:
    W, X, G = sample(shape, kind, dtype)
    operands, scores = Operands((G,), (X,)), W.float().abs() * X + G
    total, ones = W.numel(), torch.ones(shape)
    wrong = int((~scores.isfinite()).sum())
    few = shape[1] < 100  # then also what removes nothing, one, or all
    for removed in {0, 1, shape[1] // 2, shape[1] - 1, shape[1]} if few else {shape[1] // 2, shape[1] - 1}:
        bad = torch.zeros(1, dtype=torch.int64)
        expected = rows.reference(W, removed, scores)
        assert torch.equal(rows.prune_rows(W, removed, score, operands, bad=bad), expected)
        assert bad.item() == wrong
    bits = rows.prune_rows(W, shape[1] // 2, score, operands, bits=True)
    assert torch.equal(mask_of(bits, shape[1]), rows.reference(ones, shape[1] // 2, scores) != 0)
    for removed in {0, 1, total // 3, total - 1, total} if few else {total // 3, total - 1}:
        bad = torch.zeros(1, dtype=torch.int64)
        assert torch.equal(layer.prune_layer(W, removed, score, operands, bad=bad), layer.reference(W, removed, scores))
        assert bad.item() == wrong
    bits = layer.prune_layer(W, (total + 1) // 2, score, operands, bits=True)
    kept = layer.reference(ones, (total + 1) // 2, scores) != 0
    assert torch.equal(mask_of(bits[None], total).view(shape), kept)
    for keep, group in ((1, 2), (3, 4), (4, 8), (5, 16)):
        if shape[1] % group == 0 and shape[1] < 1000:
            bad = torch.zeros(1, dtype=torch.int64)
            expected = pattern.reference(W, keep, group, scores)
            assert torch.equal(pattern.prune_pattern(W, keep, group, score, operands, bad=bad), expected)
            assert bad.item() == wrong
    if shape[1] % 4 == 0:
        bits = pattern.prune_pattern(W, 2, 4, score, operands, bits=True)
        assert torch.equal(mask_of(bits, shape[1]), pattern.reference(ones, 2, 4, scores) != 0)


def test_rows_of_one_program_follow_each_other() -> None:
    """What the rows before were like is a guess only: here no row is like the one before."""
    draw = torch.Generator().manual_seed(0)
    score = torch.randn(9, 21, generator=draw).mul(2).round() * torch.tensor([1e-30, 1, 1e30]).repeat(3)[:, None]
    score[3], score[5, :11], score[7] = torch.nan, torch.nan, 0
    for removed in (1, 7, 10, 15, 20):
        bits = rows.prune_rows(score, removed, weight_itself, Operands(), bits=True)
        assert torch.equal(mask_of(bits, 21), rows.reference(torch.ones(9, 21), removed, score) != 0)


def test_zeros_among_scores_of_both_signs() -> None:
    """-0 has a key of its own, at which 0 counts: an end of the search there holds other scores than it did before."""
    draw = torch.Generator().manual_seed(1)
    score = torch.randn(24, 30, generator=draw).mul(2).round()  # -0 and 0
    for removed in (9, 14, 19):
        bits = rows.prune_rows(score, removed, weight_itself, Operands(), bits=True)
        assert torch.equal(mask_of(bits, 30), rows.reference(torch.ones(24, 30), removed, score) != 0)


@pytest.mark.parametrize(("kind", "most"), [("abs(W)*X", 5), ("abs(W) in bf16", 7), ("rounded", 9)])
def test_few_reductions_find_a_threshold(kind: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows of 576 on average; a binary search of the keys takes 32."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    benchmark = importlib.import_module("kernel_steps")
    found = benchmark.steps(benchmark.scores(kind, 12, 576), 288)
    assert len(found) == 12
    assert sum(found) / 12 <= most


def test_rows_that_are_too_wide_are_refused() -> None:
    wide = torch.zeros(1, rows.MOST_COLUMNS + 1)
    with pytest.raises(ValueError, match="a row must have at most 65535 columns, but has 65536"):
        rows.prune_rows(wide, 1, weight_itself, Operands())


@pytest.mark.parametrize("kind", ["normal", "ties", "both zeros", "subnormal"])
def test_references_choose_as_select_mask(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that kernels and the CPU path, which is compared with a stable sort in `lane_cpu.py`, make the same masks."""
    monkeypatch.setenv("GPMETRIC_KERNELS", "0")
    W, X, G = sample((6, 48), kind, torch.float32)
    scores, ones = W.abs() * X + G, torch.ones(6, 48)
    assert torch.equal(rows.reference(ones, 16, scores) != 0, select_mask(scores, parse_target("0.34")))
    assert torch.equal(layer.reference(ones, 144, scores) != 0, select_mask(scores, parse_target("layer:0.5")))
    assert torch.equal(pattern.reference(ones, 3, 8, scores) != 0, select_mask(scores, parse_target("3:8")))


@pytest.mark.parametrize("shape", [(1, 7), (9, 1), (1, 1)])
def test_one_row_or_one_column(shape: tuple[int, int], score: object) -> None:
    """At every count."""
    for kind in ("ties", "nan rows"):
        W, X, G = sample(shape, kind, torch.float32)
        scores, operands = W.abs() * X + G, Operands((G,), (X,))
        for removed in range(W.numel() + 1):
            pruned = layer.prune_layer(W, removed, score, operands)
            assert torch.equal(pruned, layer.reference(W, removed, scores))
        for removed in range(shape[1] + 1):
            assert torch.equal(rows.prune_rows(W, removed, score, operands), rows.reference(W, removed, scores))


def test_a_layer_of_few_samples_and_little_room(monkeypatch: pytest.MonkeyPatch, score: object) -> None:
    """Bounds that miss, and more between them than there is room for, are tried again."""
    monkeypatch.setattr(layer, "_SAMPLE", 4)
    monkeypatch.setattr(layer, "_ROOM", 1000)
    for kind in ("normal", "ties", "both zeros", "nan", "infinite", "signed"):
        W, X, G = sample((7, 300), kind, torch.float32)
        scores = W.abs() * X + G
        for removed in (1, 700, 1050, 2099):
            pruned = layer.prune_layer(W, removed, score, Operands((G,), (X,)))
            assert torch.equal(pruned, layer.reference(W, removed, scores)), (kind, removed)


def test_the_host_looks_once_at_a_layer(monkeypatch: pytest.MonkeyPatch, score: object) -> None:
    """When all is done; before that, nothing waits for what a kernel finds."""
    looks: list[str] = []
    for name in ("tolist", "item", "__int__", "__bool__", "__float__", "__index__"):
        kept = getattr(Tensor, name)

        def looking(one: Tensor, name: str = name, kept: Any = kept) -> Any:
            looks.append(name)
            return kept(one)

        monkeypatch.setattr(Tensor, name, looking)
    for kind in ("normal", "ties", "zeros"):
        W, X, G = sample((7, 300), kind, torch.float32)
        looks.clear()
        pruned = layer.prune_layer(W, 1000, score, Operands((G,), (X,)))
        assert looks == ["tolist"]
        assert torch.equal(pruned, layer.reference(W, 1000, W.abs() * X + G))


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_and_into_another_tensor(dtype: torch.dtype, score: object) -> None:
    W, X, G = sample((3, 40), "normal", dtype)
    operands = Operands((G,), (X,))
    for prune in (
        lambda weight, **options: rows.prune_rows(weight, 19, score, operands, **options),
        lambda weight, **options: pattern.prune_pattern(weight, 2, 8, score, operands, **options),
        lambda weight, **options: layer.prune_layer(weight, 50, score, operands, **options),
    ):
        before, again, other = W.clone(), W.clone(), torch.full_like(W, torch.nan)
        expected = prune(W)
        assert prune(W, out=other) is other
        assert prune(again, out=again) is again
        assert torch.equal(W, before)
        assert torch.equal(other, expected)
        assert torch.equal(again, expected)
        assert not torch.equal(again, W)


def test_bad_scores_are_added_up(score: object) -> None:
    W, X, G = sample((3, 8), "nan", torch.float32)
    bad = torch.full((1,), 100)
    for _ in range(2):
        rows.prune_rows(W, 2, score, Operands((G,), (X,)), bad=bad)
        pattern.prune_pattern(W, 1, 2, score, Operands((G,), (X,)), bad=bad)
        layer.prune_layer(W, 2, score, Operands((G,), (X,)), bad=bad)
    assert bad.item() == 100 + 6 * int(G.isnan().sum())


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
    with pytest.raises(ValueError, match="removed must be from 0 to 32, but got 33"):
        rows.prune_rows(W, 33, score, good)
    with pytest.raises(ValueError, match="removed must be from 0 to 128, but got -1"):
        layer.prune_layer(W, -1, score, good)
    for keep, group in ((2, 3), (0, 4), (4, 4), (1, 32)):
        with pytest.raises(ValueError, match=f"{keep}:{group} of 32 inputs"):
            pattern.prune_pattern(W, keep, group, score, good)
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


def drawn(matrices: torch.dtype = torch.float32, weight: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (3, 70)
    operands = {name: torch.rand(shape, generator=generator).to(matrices) for name in "GHFR"}
    operands |= {name: torch.rand(shape[1], generator=generator) for name in "XD"}
    return operands | {"W": torch.randn(shape, generator=generator).to(weight)}


def assert_pruned_alike(functions: ModuleType, operands: dict[str, Tensor], scores: Tensor, which: int = 0) -> None:
    """Rows, pairs and the layer are pruned as by these scores."""
    W = operands["W"]
    prepared = prepare(W, operands, functions.LAYOUT, which)
    assert torch.equal(rows.prune_rows(W, 35, functions.score, prepared), rows.reference(W, 35, scores))
    pairs = pattern.prune_pattern(W, 1, 2, functions.score, prepared)
    assert torch.equal(pairs, pattern.reference(W, 1, 2, scores))
    assert torch.equal(layer.prune_layer(W, 99, functions.score, prepared), layer.reference(W, 99, scores))


@pytest.mark.parametrize("formula", FORMULAS)
def test_every_primitive_and_baseline(formula: str, tmp_path: Path) -> None:
    """The masks of the evaluator's scores, though exp, log, tanh and pow may differ by ulps."""
    operands, expression = drawn(), parse(formula)
    assert_pruned_alike(load_functions([expression], tmp_path), operands, evaluate(expression, operands))


@pytest.mark.parametrize("weight", DTYPES)
@pytest.mark.parametrize("matrices", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("formula", ["W*W*G", "abs(W)*X+colsum(H)*F", "mms(abs(W)*H)+W*D"])
def test_operands_of_half_precision(formula: str, matrices: torch.dtype, weight: torch.dtype, tmp_path: Path) -> None:
    """They are computed with in fp32."""
    operands, expression = drawn(matrices, weight), parse(formula)
    in_single = {name: one.float() for name, one in operands.items()}
    assert_pruned_alike(load_functions([expression], tmp_path), operands, evaluate(expression, in_single))


def test_several_formulas_in_one_score(tmp_path: Path) -> None:
    """As each on its own; reductions that they share are computed from one part."""
    operands = drawn()
    group = [
        parse(text) for text in ("abs(W)*X", "zsn(G)*W/rowsum(G)", "W*W*H/rownorm(G*X)", "mms(G)+rowsum(G)*W", "W")
    ]
    together = load_functions(group, tmp_path)
    assert together.LAYOUT.matrices == ("G", "H")
    assert together.LAYOUT.rows == 2
    for which, expression in enumerate(group):
        assert_pruned_alike(together, operands, evaluate(expression, operands), which)


def test_operands_are_converted_and_named(tmp_path: Path) -> None:
    operands = drawn()
    functions = load_functions([parse("abs(W)*X + G")], tmp_path)
    layout = functions.LAYOUT
    named = {"X": operands["X"].double(), "G": operands["G"].t().contiguous().t()}
    prepared = prepare(operands["W"], named, layout)
    assert torch.equal(prepared.columns[0], operands["X"])
    assert prepared.matrices[0].is_contiguous()
    with pytest.raises(ValueError, match=r"needs the operand X, \[70\]"):
        prepare(operands["W"], {"G": operands["G"]}, layout)
    with pytest.raises(ValueError, match=r"operand X must be \[70\] to go with W, but got \[69\]"):
        prepare(operands["W"], operands | {"X": operands["X"][1:]}, layout)
