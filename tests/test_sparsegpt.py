"""The OBS solver against inverses taken outright: in float64, one column at a time, without Cholesky or blocks.

Pruning column i may change columns i and later only, so what counts is the inverse of gram[i:, i:]: its first row is
the update, its first entry the curvature. `inverse_factor` holds the same numbers, found once.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpmetric.calibration.accumulators import LayerStatistics, curvature, inverse_factor
from gpmetric.errors import MaskError, SolverError
from gpmetric.expression import parse
from gpmetric.expression.columns import ColumnScores
from gpmetric.metrics import resolve_metric
from gpmetric.pruning import obs
from gpmetric.pruning import sparsegpt as sparsegpt_file
from gpmetric.pruning.mask import select_mask
from gpmetric.pruning.sparsegpt import block_columns, reconstruct, reconstruct_blockwise
from gpmetric.pruning.updaters import prune_weights
from gpmetric.targets import parse_target
from tests.pruning_helpers import damped, make_layer, output_error, prune_weight

SHAPES = [(1, 1), (3, 6), (5, 42), (4, 123), (4, 128), (4, 129), (3, 200), (2, 256), (6, 300)]
# fp32 against float64: the inverse of a Gram matrix with condition number about 1e3 keeps four digits
CLOSE = {"rtol": 2e-3, "atol": 2e-4}


def first_rows(gram: Tensor) -> list[Tensor]:
    """For each column, the first row of the inverse over the columns that may still change."""
    return [torch.linalg.inv(damped(gram)[column:, column:])[0] for column in range(len(gram))]


def plain_obs(weight: Tensor, inverse: list[Tensor], mask: Tensor, start: int = 0, end: int | None = None) -> Tensor:
    """Columns pruned from left to right, each followed by the OBS update of those to its right."""
    weight = weight.double().clone()
    for column in range(weight.shape[1])[start:end]:
        removed = torch.where(mask[:, column], 0, weight[:, column])
        weight[:, column:] -= removed[:, None] / inverse[column][0] * inverse[column]
        weight[~mask[:, column], column] = 0
    return weight


def repair(weight: Tensor, gram: Tensor, *masks: Tensor) -> list[Tensor]:
    """`reconstruct` of one layer."""
    return list(reconstruct(weight[None], inverse_factor(gram)[None], torch.stack(masks)[None])[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_reconstruct_is_the_plain_solver(shape: tuple[int, int]) -> None:
    weight, gram = make_layer(*shape)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.5
    pruned = repair(weight, gram, mask)[0]
    torch.testing.assert_close(pruned.double(), plain_obs(weight, first_rows(gram), mask), **CLOSE)


@pytest.mark.parametrize("column", [0, 3, 11])
def test_one_pruned_weight_has_a_closed_form(column: int) -> None:
    """Hassibi and Stork 1993: change -w_q / [H^-1]_qq H^-1 e_q, and the error grows by w_q^2 / [H^-1]_qq."""
    weight, gram = make_layer(2, 12)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, column] = False
    pruned = repair(weight, gram, mask)[0].double()
    inverse = first_rows(gram)[column]
    value = float(weight[0, column])
    expected = weight.double().clone()
    expected[0, column:] -= value / inverse[0] * inverse
    torch.testing.assert_close(pruned, expected, **CLOSE)
    assert pruned[0, column] == 0
    assert torch.equal(pruned[1], weight[1].double())
    error = output_error(pruned - weight, damped(gram))
    assert error == pytest.approx(value**2 / float(inverse[0]), rel=1e-3)
    if column == 0:  # all other weights may change: no smaller error exists
        assert error == pytest.approx(value**2 * float(curvature(gram)[0]), rel=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_mask_is_kept_exactly(shape: tuple[int, int]) -> None:
    """Zero where the mask removes, bit for bit, and nowhere else; all kept leaves the weight as it is."""
    weight, gram = make_layer(*shape)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) > 0.6
    some, all_kept, none_kept = repair(weight, gram, mask, torch.ones_like(mask), torch.zeros_like(mask))
    assert torch.equal(some != 0, mask)
    assert torch.equal(all_kept, weight)
    assert not none_kept.any()


def test_the_weight_itself_is_not_written_to() -> None:
    weight, gram = make_layer(3, 20)
    before = weight.clone()
    repair(weight, gram, torch.zeros(3, 20, dtype=torch.bool))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("target", ["0.5", "0.7", "layer:0.5", "2:4"])
def test_reconstruction_helps(target: str, seed: int) -> None:
    """Its error lies between that of the mask alone and that of the best weights there are for the mask."""
    weight, gram = make_layer(6, 44, seed)
    statistics = LayerStatistics(X=gram.diagonal().sqrt(), D=curvature(gram), gram=gram)
    metric, chosen = resolve_metric("wanda"), parse_target(target)
    masked = prune_weight(weight, metric, chosen, statistics)
    repaired = prune_weight(weight, metric, chosen, statistics, "obs")
    assert torch.equal(masked != 0, repaired != 0), "obs keeps the mask chosen from the original weights"
    best = torch.zeros(6, 44, dtype=torch.float64)
    for row, kept in enumerate(masked != 0):  # least squares over the kept columns
        moments = damped(gram)[kept] @ weight[row].double()
        best[row, kept] = torch.linalg.solve(damped(gram)[kept][:, kept], moments)
    errors = [output_error(pruned - weight, damped(gram)) for pruned in (best, repaired, masked)]
    assert errors == sorted(errors)
    assert errors[1] < 0.95 * errors[2]


def sparsegpt(weight: Tensor, gram: Tensor, target: str) -> Tensor:
    """The baseline as `bench` runs it."""
    statistics = LayerStatistics(X=gram.diagonal().sqrt(), D=curvature(gram), gram=gram)
    metric = resolve_metric("sparsegpt")
    assert metric.update == "obs-blockwise"
    return prune_weight(weight, metric, parse_target(target), statistics, metric.update)


def check_choices(weight: Tensor, gram: Tensor, pruned: Tensor, size: int, by_row: bool) -> None:
    """The pruned weight is the plain solver's for its mask, and each `size` columns of the mask were chosen rightly.

    Rightly: on the weights as the plain solver has them by then, the lowest w^2 / [H^-1]_ii are gone.
    """
    mask, current, inverse = pruned != 0, weight.double(), first_rows(gram)
    for start in range(0, weight.shape[1], size):
        end = min(start + size, weight.shape[1])
        score = current[:, start:end].square() / torch.stack([row[0] for row in inverse[start:end]])
        kept = mask[:, start:end]
        for values, keep in zip(score, kept, strict=True) if by_row else [(score, kept)]:
            # fp32 may swap two scores that are equal to two digits
            assert values[~keep].max() <= values[keep].min() * (1 + 1e-2)
        current = plain_obs(current, inverse, mask, start, end)
    torch.testing.assert_close(pruned.double(), current, **CLOSE)


@pytest.mark.parametrize("shape", [(4, 42), (3, 128), (5, 200), (2, 300)])
@pytest.mark.parametrize("target", ["0.5", "0.3", "layer:0.5", "block:0.5"])
def test_sparsegpt_is_its_algorithm(target: str, shape: tuple[int, int]) -> None:
    """Algorithm 1: per 128 columns one threshold over all rows, int(size * sparsity) zeros, the last block included."""
    weight, gram = make_layer(*shape)
    pruned = sparsegpt(weight, gram, target)
    sparsity = parse_target(target).sparsity
    for start in range(0, shape[1], 128):
        block = pruned[:, start : start + 128]
        assert int((block == 0).sum()) == int(block.numel() * sparsity)
    check_choices(weight, gram, pruned, 128, by_row=False)


@pytest.mark.parametrize(
    ("target", "columns"), [("2:4", 44), ("1:4", 132), ("4:8", 136), ("2:3", 129), ("100:150", 300)]
)
def test_sparsegpt_patterns_are_chosen_when_reached(target: str, columns: int) -> None:
    """Each M columns on the weights as updated by everything to their left, whatever block they fall in."""
    weight, gram = make_layer(3, columns)
    pruned = sparsegpt(weight, gram, target)
    keep, group = map(int, target.split(":"))
    assert torch.equal((pruned != 0).view(3, -1, group).sum(dim=2), torch.full((3, columns // group), keep))
    check_choices(weight, gram, pruned, group, by_row=True)


@pytest.mark.every(2)
@pytest.mark.slow
@pytest.mark.parametrize("together", [1, 2**17])
def test_layers_and_targets_solved_together_are_each_their_algorithm(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever shapes, blocks and groups the others have: 2:3 has blocks of 126 columns, 100:132 of one group each."""
    monkeypatch.setattr(obs, "_TOGETHER", together)
    layers = [make_layer(*shape, seed) for seed, shape in enumerate([(4, 264), (3, 132), (4, 264), (3, 264), (4, 264)])]
    statistics = [LayerStatistics(X=gram.diagonal().sqrt(), gram=gram) for _, gram in layers]
    targets = [parse_target(text) for text in ("0.5", "2:4", "0.3", "2:3", "1:4", "0.5", "100:132")]
    weights = [weight for weight, _ in layers]
    results = prune_weights(weights, resolve_metric("sparsegpt"), targets, statistics, "obs-blockwise")
    for target, pruned_layers in zip(targets, results, strict=True):
        for (weight, gram), pruned in zip(layers, pruned_layers, strict=True):
            size = target.group or 128
            for part in pruned.split(size, dim=1):
                removed = len(part) * (size - target.keep) if target.group else int(part.numel() * target.sparsity)
                assert int((part == 0).sum()) == removed
            check_choices(weight, gram, pruned, size, by_row=target.group > 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("update", ["obs", "obs-blockwise"])
def test_cuda_is_the_cpu(update: str) -> None:
    """The inner loop runs on tensors there and on numpy arrays here."""
    weight, gram = make_layer(6, 300)
    targets = [parse_target(text) for text in ("0.5", "2:4", "0.7")]
    found = [LayerStatistics(X=on.diagonal().sqrt(), gram=on) for on in (gram, gram.cuda())]
    here = prune_weights([weight] * 2, resolve_metric("wanda"), targets, [found[0]] * 2, update)
    there = prune_weights([weight.cuda()] * 2, resolve_metric("wanda"), targets, [found[1]] * 2, update)
    for one, other in zip(here, there, strict=True):
        assert other[0].is_cuda
        torch.testing.assert_close(one, [each.cpu() for each in other], **CLOSE)


def test_the_loop_on_tensors_is_the_loop_on_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU runs, without one."""
    weight, gram = make_layer(5, 200)
    mask = torch.rand(5, 200, generator=torch.Generator().manual_seed(3)) > 0.5
    on_arrays = repair(weight, gram, mask)[0]
    monkeypatch.setattr(sparsegpt_file, "_plain", lambda tensor: tensor)
    torch.testing.assert_close(repair(weight, gram, mask)[0], on_arrays, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("target", "columns"), [("0.5", 128), ("2:4", 128), ("2:3", 126), ("7:11", 121), ("1:200", 200)]
)
def test_block_columns(target: str, columns: int) -> None:
    assert block_columns(parse_target(target)) == columns


def test_the_score_sees_the_updated_weights() -> None:
    """The first block's choice is made on the dense weights, the second's on what the first left."""
    weight, gram = make_layer(2, 256)
    seen: list[tuple[Tensor, int, int]] = []

    class Seen(ColumnScores):
        def __call__(self, weights: Tensor, start: int, end: int) -> Tensor:
            seen.append((weights.clone(), start, end))
            return super().__call__(weights, start, end)

    scores = Seen(parse("abs(W)"), [{"W": weight}])
    (pruned,) = reconstruct_blockwise(weight[None], inverse_factor(gram)[None], [parse_target("0.5")], scores)[0]
    assert [(start, end) for _, start, end in seen] == [(0, 128), (128, 256)]
    assert torch.equal(seen[0][0][0, 0], weight)
    ((updated,),) = seen[1][0]
    assert torch.equal(updated[:, :128], pruned[:, :128])
    chosen = select_mask(updated[:, 128:].abs(), parse_target("layer:0.5"))
    assert torch.equal(pruned[:, 128:] != 0, chosen)


def test_reductions_are_taken_over_the_whole_matrix() -> None:
    """mms under obs-blockwise is scaled by the extremes of all columns; by those of the slice, the mask is another."""
    weight, gram = make_layer(2, 256)
    weight[:, 128:] *= 100
    statistics = LayerStatistics(X=gram.diagonal().sqrt(), gram=gram)
    metric = resolve_metric("abs(W)-9*mms(abs(W))*X")
    pruned = prune_weight(weight, metric, parse_target("0.5"), statistics, "obs-blockwise")

    def mask(extremes: Tensor) -> Tensor:
        scaled = (weight.abs() - extremes.min()) / (extremes.max() - extremes.min())
        score = weight.abs() - 9 * scaled * statistics["X"]
        return select_mask(score[:, :128], parse_target("layer:0.5"))

    assert torch.equal(pruned[:, :128] != 0, mask(weight.abs()))
    assert not torch.equal(pruned[:, :128] != 0, mask(weight[:, :128].abs()))


def test_a_dead_input_is_pruned_first() -> None:
    """An input that is always zero: its weights are worth nothing, and the solver stays regular."""
    weight, gram = make_layer(4, 40)
    weight[:, 7] = 50
    gram[7] = gram[:, 7] = 0
    for target in ("0.5", "2:4"):
        pruned = sparsegpt(weight, gram, target)
        assert not pruned[:, 7].any()
        assert torch.isfinite(pruned).all()
        assert int((pruned == 0).sum()) == 80


@pytest.mark.parametrize("update", ["none", "obs", "obs-blockwise", "admm"])
def test_a_remainder_is_refused_under_every_update(update: str) -> None:
    weight, gram = make_layer(2, 42)
    statistics = LayerStatistics(X=gram.diagonal().sqrt(), gram=gram)
    with pytest.raises(MaskError, match=r"^in = 42 is not divisible by 4 \(target 2:4\)$"):
        prune_weight(weight, resolve_metric("wanda"), parse_target("2:4"), statistics, update)


@pytest.mark.parametrize("update", ["obs", "obs-blockwise", "admm"])
def test_a_gram_matrix_that_is_not_finite_is_refused(update: str) -> None:
    weight, gram = make_layer(2, 8)
    statistics = LayerStatistics(X=gram.diagonal().sqrt(), gram=gram * torch.inf)
    with pytest.raises(SolverError, match="NaN or infinity"):
        prune_weight(weight, resolve_metric("wanda"), parse_target("0.5"), statistics, update)
