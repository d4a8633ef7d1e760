"""The updater `admm` and the baseline `alps`, against ALPS in plain float64 loops and exact least squares."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpmetric.calibration.accumulators import LayerStatistics, curvature
from gpmetric.calibration.collect import collect
from gpmetric.errors import MaskError, SolverError
from gpmetric.loading import load_model
from gpmetric.metrics import resolve_metric
from gpmetric.pruning.admm import fit_on_support
from gpmetric.pruning.bench import bench
from gpmetric.pruning.protocol import Protocol, Rule
from gpmetric.pruning.updaters import prune_weights
from gpmetric.targets import Target, parse_target
from tests.pruning_helpers import damped, make_layer, output_error, prune_weight, session_of, windows_of

TARGETS = ("0.5", "row:0.6", "row:0.37", "layer:0.5", "layer:0.7", "block:0.6", "2:4", "1:4", "3:4")
Score = Callable[[Tensor], Tensor]


def measured(weight: Tensor, gram: Tensor) -> LayerStatistics:
    """Statistics with an F of very unequal rows."""
    generator = torch.Generator().manual_seed(9)
    F = torch.rand(weight.shape, generator=generator) * torch.linspace(-3, 3, len(weight)).exp()[:, None]
    return LayerStatistics(X=gram.diagonal().sqrt(), D=curvature(gram), F=F, gram=gram)


def pruned_by(metric: str, weight: Tensor, gram: Tensor, target: str, update: str = "admm") -> Tensor:
    return prune_weight(weight, resolve_metric(metric), parse_target(target), measured(weight, gram), update)


def plain_mask(score: Tensor, target: Target) -> Tensor:
    """1 where kept, else 0; group by group, the lowest by sorting."""
    rows, columns = score.shape
    width = target.group or {"row": columns, "layer": columns, "block": 128}[str(target.granularity)]
    mask = torch.ones_like(score)
    for start in range(0, columns, width):
        part = score[:, start : start + width]
        groups = [part.reshape(1, -1)] if target.granularity in ("layer", "block") else [row[None] for row in part]
        kept = torch.ones(len(groups), groups[0].numel(), dtype=score.dtype)
        for place, group in enumerate(groups):
            count = target.group - target.keep if target.group else int(group.numel() * target.sparsity)
            kept[place, group[0].argsort(stable=True)[:count]] = 0
        mask[:, start : start + width] = kept.reshape(rows, -1)
    return mask


def best_on(mask: Tensor, weight: Tensor, gram: Tensor) -> Tensor:
    """The least squares of every row over its kept columns, float64."""
    fitted = torch.zeros(weight.shape, dtype=torch.float64)
    for row, kept in enumerate(mask != 0):
        fitted[row, kept] = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ weight[row].double())
    return fitted


def plain_alps(weight: Tensor, gram: Tensor, target: Target, score: Score) -> Tensor:
    """Algorithm 1 of Meng et al. 2024 in its notation, W D V rho, with the penalties that ours has; float64."""
    gram = damped(gram)
    scale = gram.diagonal().sqrt()
    H, dense = gram / (scale[:, None] * scale[None]), weight.double() * scale
    D = dense * plain_mask(score(weight.double()), target)
    V, rho, eye = torch.zeros_like(D), 0.1, torch.eye(len(gram), dtype=torch.float64)
    for step in range(30):
        W = torch.linalg.solve(H + rho * eye, (dense @ H - V + rho * D).t()).t()
        mask = plain_mask(score((W + V / rho) / scale), target)
        D = (W + V / rho) * mask
        V = V + rho * (W - D)
        if step % 3 == 2:
            rho *= 1.4
    return best_on(mask, weight, gram)


@pytest.mark.parametrize("target", ["row:0.6", "layer:0.6", "block:0.6", "2:4"])
def test_admm_is_the_plain_algorithm(target: str) -> None:
    """The support but for a few entries, which fp32 decides otherwise, and the reconstruction error."""
    weight, gram = make_layer(24, 160)
    X = gram.diagonal().sqrt().double()
    expected = plain_alps(weight, gram, parse_target(target), lambda values: values.abs() * X)
    found = pruned_by("abs(W)*X", weight, gram, target)
    assert ((found != 0) != (expected != 0)).double().mean() < 0.005
    errors = [output_error(one - weight, damped(gram)) for one in (found.double(), expected)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
    if torch.equal(found != 0, expected != 0):
        torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("metric", ["abs(W)*X", "W*W*D", "sqr(W*X)*rowsum(F/sqr(X))"])
def test_the_weights_are_the_exact_fit_on_their_support(metric: str) -> None:
    weight, gram = make_layer(12, 42)
    found = pruned_by(metric, weight, gram, "layer:0.6")
    torch.testing.assert_close(found.double(), best_on(found, weight, damped(gram)), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", [(6, 44), (5, 132), (3, 260)])
def test_every_group_loses_what_the_target_says(target: str, shape: tuple[int, int]) -> None:
    weight, gram = make_layer(*shape)
    found = pruned_by("abs(W)*X", weight, gram, target)
    asked = parse_target(target).resolved("row")
    assert (found.dtype, found.shape) == (torch.float32, weight.shape)
    assert torch.isfinite(found).all()
    zeros = found == 0
    assert int(zeros.sum()) == asked.removes(shape)
    if asked.group:
        counts = zeros.reshape(-1, asked.group).sum(dim=1)
        assert set(counts.tolist()) == {asked.group - asked.keep}
    elif asked.granularity == "row":
        assert set(zeros.sum(dim=1).tolist()) == {int(shape[1] * asked.sparsity)}
    elif asked.granularity == "block":
        parts = zeros.split(128, dim=1)
        assert [int(part.sum()) for part in parts] == [int(part.numel() * asked.sparsity) for part in parts]
    else:
        assert int(zeros.sum()) == int(zeros.numel() * asked.sparsity)


def test_nothing_removed_is_the_dense_weight() -> None:
    weight, gram = make_layer(6, 44)
    torch.testing.assert_close(pruned_by("abs(W)*X", weight, gram, "0"), weight, rtol=1e-4, atol=1e-5)


def test_targets_and_layers_together_are_each_alone() -> None:
    layers = [make_layer(*shape, seed) for seed, shape in enumerate([(6, 44), (3, 132), (6, 44)])]
    targets = [parse_target(text) for text in TARGETS]
    metric, statistics = resolve_metric("abs(W)*X"), [measured(*layer) for layer in layers]
    together = prune_weights([weight for weight, _ in layers], metric, targets, statistics, "admm")
    for target, found in zip(targets, together, strict=True):
        for (weight, _), one, pruned in zip(layers, statistics, found, strict=True):
            alone = prune_weight(weight, metric, target, one, "admm")
            assert torch.equal(pruned != 0, alone != 0), target.text
            torch.testing.assert_close(pruned, alone, rtol=1e-4, atol=1e-6)  # products sum in another order


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("target", ["0.5", "0.7", "layer:0.6", "2:4"])
def test_its_error_is_below_the_column_by_column_solvers(target: str, seed: int) -> None:
    """Of the same comparison groups but for SparseGPT's, which has its own."""
    weight, gram = make_layer(24, 64, seed)
    found = pruned_by("abs(W)*X", weight, gram, target)
    rivals = [
        pruned_by("abs(W)*X", weight, gram, target, "obs"),
        pruned_by("abs(W)*X", weight, gram, target, "obs-blockwise"),
        pruned_by("sparsegpt", weight, gram, target),
    ]
    errors = [output_error(one - weight, damped(gram)) for one in rivals]
    assert output_error(found - weight, damped(gram)) < 0.97 * min(errors)


def test_fit_on_support_is_least_squares_row_by_row() -> None:
    """From the dense weights, of several masks at once; a row without support stays empty, one with all is left."""
    weight, gram = make_layer(7, 40)
    gram = damped(gram)
    scale = gram.diagonal().sqrt()
    gram = gram / (scale[:, None] * scale)
    masks = (torch.rand(3, 7, 40, generator=torch.Generator().manual_seed(1)) > 0.6).float()
    masks[0, 2] = 0
    masks[1, 3] = 1
    found = fit_on_support(weight * masks, masks, gram.float(), weight @ gram.float())
    for one, mask in zip(found, masks, strict=True):
        torch.testing.assert_close(one.double(), best_on(mask, weight, gram), rtol=1e-3, atol=1e-4)
        assert not one[mask == 0].any()
    torch.testing.assert_close(found[1, 3], weight[3], rtol=1e-3, atol=1e-4)
    assert not found[0, 2].any()


def test_inputs_that_are_all_zero() -> None:
    """Nothing tells the weights apart: the later columns stay, as they were."""
    weight = make_layer(4, 12)[0]
    found = pruned_by("abs(W)*X", weight, torch.zeros(12, 12), "0.5")
    assert not found[:, :6].any()
    torch.testing.assert_close(found[:, 6:], weight[:, 6:])


def test_one_input_that_is_always_zero() -> None:
    """Its weights go first."""
    weight, gram = make_layer(4, 40)
    weight[:, 7] = 50
    gram[7] = gram[:, 7] = 0
    for target in ("0.5", "2:4", "layer:0.5"):
        found = pruned_by("abs(W)*X", weight, gram, target)
        assert torch.isfinite(found).all()
        assert not found[:, 7].any()
        assert int((found == 0).sum()) == 80


@pytest.mark.parametrize("tokens", [1, 5])
def test_fewer_tokens_than_inputs(tokens: int) -> None:
    """The Gram matrix has that rank: with as many weights kept, the output is nearly kept."""
    inputs = torch.randn(tokens, 44, generator=torch.Generator().manual_seed(4))
    weight, gram = make_layer(6, 44)[0], inputs.t() @ inputs / tokens
    found = pruned_by("abs(W)*X", weight, gram, "0.5")
    assert torch.isfinite(found).all()
    assert set((found == 0).sum(dim=1).tolist()) == {22}
    assert output_error(found - weight, gram) < 0.05 * output_error(weight, gram)


@pytest.mark.parametrize("target", ["0.5", "layer:0.5", "2:4"])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_a_constant_weight(value: float, target: str) -> None:
    gram = make_layer(4, 44)[1]
    weight = torch.full((4, 44), value)
    found = pruned_by("abs(W)*X", weight, gram, target)
    assert torch.isfinite(found).all()
    assert int((found == 0).sum()) == (4 * 22 if value else 4 * 44)
    assert value == 0 or output_error(found - weight, gram) < output_error(weight, gram)


@pytest.mark.parametrize(
    ("shape", "target", "kept"), [((1, 1), "0.5", 1), ((3, 1), "0.5", 3), ((3, 1), "layer:0.7", 1)]
)
def test_one_input(shape: tuple[int, int], target: str, kept: int) -> None:
    """Nothing can make up for it: what stays is as it was, the largest."""
    weight = torch.tensor([[-2.0], [1.0], [0.5]])[: shape[0]]
    found = pruned_by("abs(W)*X", weight, torch.tensor([[4.0]]), target)
    torch.testing.assert_close(found, torch.cat([weight[:kept], torch.zeros(shape[0] - kept, 1)]))


def test_one_output() -> None:
    weight, gram = make_layer(1, 42)
    found = [pruned_by("abs(W)*X", weight, gram, target) for target in ("row:0.5", "layer:0.5")]
    assert torch.equal(*found)
    assert int((found[0] == 0).sum()) == 21


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_are_pruned_in_fp32(dtype: torch.dtype) -> None:
    weight, gram = make_layer(6, 44)
    half = weight.to(dtype)
    found = pruned_by("abs(W)*X", half, gram, "2:4")
    assert found.dtype == torch.float32
    assert torch.equal(found, pruned_by("abs(W)*X", half.float(), gram, "2:4"))
    assert torch.equal(half, weight.to(dtype)), "what was given is not written to"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gram_matrix_with_one_bad_entry_is_refused(value: float) -> None:
    weight, gram = make_layer(2, 8)
    bad = gram.clone()
    bad[3, 5] = bad[5, 3] = value
    statistics = LayerStatistics(X=gram.diagonal().sqrt(), gram=bad)
    with pytest.raises(SolverError, match="NaN or infinity"):
        prune_weight(weight, resolve_metric("abs(W)*X"), parse_target("0.5"), statistics, "admm")


@pytest.mark.parametrize("metric", ["abs(W)*exp(W*1e9)*1e29", "abs(W)-exp(abs(W)*1e9)*1e29"])
def test_scores_that_are_not_finite_are_refused(metric: str) -> None:
    weight, gram = make_layer(4, 44)
    with pytest.raises(MaskError, match="scores are NaN or infinite"):
        pruned_by(metric, weight, gram, "0.5")


def test_a_formula_chooses_the_support() -> None:
    """A factor for each row, of F: the rows that it favours keep more; the plain algorithm agrees."""
    weight, gram = make_layer(24, 80)
    statistics, target = measured(weight, gram), parse_target("layer:0.6")
    formula = "sqr(W*X)*rowsum(F/sqr(X))"
    by_formula = pruned_by(formula, weight, gram, "layer:0.6")
    published = pruned_by("abs(W)*X", weight, gram, "layer:0.6")
    assert ((by_formula != 0) != (published != 0)).double().mean() > 0.05
    kept = (by_formula != 0).sum(dim=1)
    assert kept[-4:].sum() > 2 * kept[:4].sum()
    X, F = statistics["X"].double(), statistics["F"].double()
    factor = (F / X.square()).sum(dim=1, keepdim=True)
    expected = plain_alps(weight, gram, target, lambda values: (values * X).square() * factor)
    assert ((by_formula != 0) != (expected != 0)).double().mean() < 0.005


def test_alps_is_its_formula_over_the_whole_layer() -> None:
    weight, gram = make_layer(6, 44)
    alps = pruned_by("alps", weight, gram, "0.6", update="none")
    assert torch.equal(alps, pruned_by("abs(W)*X", weight, gram, "layer:0.6"))
    assert torch.equal(pruned_by("alps", weight, gram, "2:4"), pruned_by("wanda", weight, gram, "2:4"))


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_one_shot_is_every_layer_with_its_dense_statistics(
    family: str, tiny_text: Path, request: pytest.FixtureRequest
) -> None:
    """The weights of the walk, and the bench's row."""
    folder = str(request.getfixturevalue(family))
    model = load_model(folder, device="cpu")
    windows = windows_of(model, tiny_text, count=8)
    made, rule = Protocol(session_of(model, windows), one_shot=True), Rule(resolve_metric("alps"), parse_target("2:4"))
    made.prepare([rule.metric], "none")
    walk = made.walk([rule], [windows.tokens])
    pruned = {name: weight for _, (block,) in walk for name, weight in block.items()}
    found = collect(model, windows.tokens, ["X", "gram"]).layers
    for layer in model.layers:
        alone = prune_weight(layer.weight, rule.metric, parse_target("2:4"), found[layer.name])
        torch.testing.assert_close(pruned[layer.name], alone, rtol=1e-4, atol=1e-6)
    options: dict[str, Any] = {"samples": 8, "windows": 8, "sequence_length": 32, "device": "cpu"}
    options |= {"text": [str(tiny_text)], "calibration": str(tiny_text), "target": ["2:4", "0.5"], "one_shot": True}
    rows = bench(folder, metric=["wanda", "alps"], update="admm", **options)["results"]
    assert [row["update"] for row in rows] == ["admm"] * 4
    assert [row["error"] for row in rows] == [None] * 4
    assert [row["sparsity"] for row in rows] == [0.5] * 4
    (measured,) = walk.measured()
    told = [row["ppl"][str(tiny_text)] for row in rows if row["target"] == "2:4"]
    assert told == pytest.approx([torch.tensor(measured.losses[0]).exp().item()] * 2, rel=1e-3)
