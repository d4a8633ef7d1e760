"""The solver's kernels in Triton's interpreter against plain torch; `test_kernels.py` runs this file with its others.

A column takes milliseconds there, hence few rows; parts of 32 columns and blocks of 128 are crossed all the same.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gpmetric.calibration.accumulators import LayerStatistics, curvature, inverse_factor
from gpmetric.errors import MaskError
from gpmetric.expression import parse
from gpmetric.kernels import solver
from gpmetric.kernels.launch import Operands, wanda
from gpmetric.metrics import resolve_metric
from gpmetric.pruning import fused_solver
from gpmetric.pruning.sparsegpt import compile_solver
from gpmetric.pruning.updaters import prune_weights
from gpmetric.targets import parse_target
from tests.pruning_helpers import make_layer

pytestmark = [pytest.mark.interpret, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # sums of up to 300 fp32 products in another order
LAYERS = {"two of 5x70": [(5, 70)] * 2, "35x40": [(35, 40)], "3x136": [(3, 136)], "1x260": [(1, 260)]}


def layers(name: str) -> tuple[list[Tensor], list[LayerStatistics]]:
    weights, statistics = [], []
    for seed, shape in enumerate(LAYERS[name]):
        weight, gram = make_layer(*shape, seed)
        G, H = torch.rand(2, *shape, generator=torch.Generator().manual_seed(seed))
        weights.append(weight)
        statistics.append(LayerStatistics(X=gram.diagonal().sqrt(), D=curvature(gram), G=G, H=H, gram=gram))
    return weights, statistics


@pytest.mark.parametrize("name", LAYERS)
def test_given_masks_are_kept_and_made_up_for(name: str) -> None:
    weights, statistics = layers(name)
    factors = torch.stack([inverse_factor(one.gram) for one in statistics])
    masks = torch.rand(len(weights), 2, *weights[0].shape, generator=torch.Generator().manual_seed(1)) > 0.5
    if name == "35x40":  # however they lie in memory
        masks, factors = masks.transpose(2, 3).contiguous().transpose(2, 3), factors.mT.contiguous().mT
    solved = solver.solve(
        torch.stack(weights), factors, 2, lambda block: solver.Given(masks[..., block.first : block.first + block.size])
    )
    assert torch.equal(solved != 0, masks)
    for weight, factor, copies, kept in zip(weights, factors, solved, masks, strict=True):
        for copy, mask in zip(copies, kept, strict=True):
            torch.testing.assert_close(copy, solver.reference(weight, factor, mask), **CLOSE)


@pytest.mark.parametrize(
    ("name", "update", "formula", "targets"),
    [
        ("two of 5x70", "obs-blockwise", "sparsegpt", ("0.5", "0.7", "1:2")),
        ("35x40", "obs-blockwise", "abs(W)**1.5*G/rowsum(H)**0.47", ("0.6", "2:4", "5:8")),
        ("35x40", "obs", "wanda", ("0.6", "layer:0.5", "3:4")),
        ("3x136", "obs-blockwise", "W*W*D+mms(H)*X", ("0.3", "2:4")),
        ("3x136", "obs-blockwise", "abs(W)*2", ("3:8",)),
        ("1x260", "obs-blockwise", "wanda", ("0.999", "1:4")),
        # W in a reduction, and an M that is no power of two: torch chooses, the kernels solve
        ("two of 5x70", "obs-blockwise", "abs(W)/rownorm(W)", ("0.5", "1:2")),
        ("two of 5x70", "obs-blockwise", "wanda", ("2:5",)),
        ("3x136", "obs-blockwise", "W*0+X", ("0.5",)),  # ties in every column
    ],
)  # fmt: skip
def test_pruned_as_without_kernels(
    name: str, update: str, formula: str, targets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, statistics = layers(name)
    arguments = (weights, resolve_metric(formula), [parse_target(one) for one in targets], statistics, update)
    found = prune_weights(*arguments)
    monkeypatch.setenv("GPMETRIC_KERNELS", "0")
    expected = prune_weights(*arguments)
    for target, ours, theirs in zip(targets, found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one != 0, other != 0), target
            torch.testing.assert_close(one, other, **CLOSE)


def test_ties_go_in_row_major_order() -> None:
    """Of a block over all rows; where inputs do not depend on each other, kept weights stay as they are."""
    weight = torch.randn(9, 140, generator=torch.Generator().manual_seed(0)).mul(2).round()
    choice = solver.Choice(
        weight[None], wanda, Operands(columns=(torch.ones(1, 140),)), [lambda size: size // 3, lambda size: 0]
    )
    first, second = solver.solve(weight[None], torch.eye(140)[None], 2, choice)[0]
    for start, end in ((0, 128), (128, 140)):
        part = weight[:, start:end]
        order = part.abs().flatten().sort(stable=True).indices[: part.numel() // 3]
        assert torch.equal(first[:, start:end], part.flatten().scatter(0, order, 0).view_as(part))
    assert torch.equal(second, weight)
    assert not choice.bad


@pytest.mark.parametrize("target", ["0.5", "2:4"])
def test_scores_that_are_not_finite_are_counted(target: str) -> None:
    weights, statistics = layers("35x40")
    weights[0][3, 7], weights[0][30, 33] = torch.nan, torch.inf
    with pytest.raises(MaskError, match=r"[0-9]+ of 2800 scores are NaN or infinite"):
        prune_weights(weights, resolve_metric("wanda"), [parse_target(target)] * 2, statistics, "obs-blockwise")


def test_numbers_that_do_not_go_together_are_refused() -> None:
    weights, score = torch.ones(1, 2, 12), Operands(columns=(torch.ones(1, 12),))
    for group, told in ((8, "divide 12 inputs, but is 8"), (3, "must be of (2, 4, 8) and divide 12 inputs, but is 3")):
        with pytest.raises(ValueError, match=re.escape(told)):
            solver.Choice(weights, wanda, score, [lambda size: 1], group)
    choice = solver.Choice(weights, wanda, score, [lambda size: 1])
    with pytest.raises(ValueError, match="there are 2 copies, but numbers for 1"):
        solver.solve(weights, torch.eye(12)[None], 2, choice)
    with pytest.raises(ValueError, match="width must divide 12 columns, but is 5"):
        solver.solve(weights, torch.eye(12)[None], 1, choice, 12, 5)


def test_blocks_that_are_too_wide_are_refused() -> None:
    assert not fused_solver.usable(torch.ones(1, 2, 200), 200)
    with pytest.raises(ValueError, match="columns must be from 1 to 128, but got 200"):
        solver.solve(torch.ones(1, 2, 200), torch.eye(200)[None], 1, lambda block: None, 200)


def test_kernels_of_formulas_are_made_before_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the first rows and columns of a layer; a formula that fails there does not stop the others."""
    weights, statistics = layers("3x136")
    targets = [parse_target("block:0.5"), parse_target("2:4")]
    formulas = [parse("abs(W)*F"), parse("abs(W)**1.25*X")]
    seen: list[tuple[int, ...]] = []
    solve = fused_solver.solve_by_scores
    monkeypatch.setattr(
        fused_solver, "solve_by_scores", lambda weights, *rest: [seen.append(weights.shape), solve(weights, *rest)][1]
    )
    compile_solver(formulas, statistics[0].operands | {"W": weights[0]}, targets)
    assert seen == [(1, 3, 128)] * 2
    monkeypatch.setenv("GPMETRIC_KERNELS", "0")
    compile_solver(formulas, statistics[0].operands | {"W": weights[0]}, targets)
    assert len(seen) == 2


@pytest.mark.parametrize(("target", "most"), [("obs", 2), ("0.5", 4), ("2:4", 2)])
def test_few_launches_for_a_block(target: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    assert importlib.import_module("kernel_steps").launches(target) == most


def test_operations_of_admm_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """62 products of 3x5 by 5x5, and ten inverses."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    assert importlib.import_module("kernel_steps").alps_operations([(3, 5)]) == 62 * 2 * 75 + 10 * 125


def test_steps_of_the_check_on_a_gpu_run_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    check = importlib.import_module("gpu_check")
    assert check._small_model("cpu").keys() == {"rows", "layer"}
    assert [case.partition(",")[0] for case in check._solver("cpu")] == ["4x40"] * 2
