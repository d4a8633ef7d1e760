"""Many weights and targets in one launch, in Triton's interpreter; `test_kernels.py` runs this file with its others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpmetric.calibration.accumulators import LayerStatistics
from gpmetric.errors import MaskError
from gpmetric.expression import parse
from gpmetric.expression.evaluate import evaluate
from gpmetric.kernels import layer, layers, pattern, rows
from gpmetric.kernels.launch import Job, Operands, table, together, wanda, weight_itself
from gpmetric.metrics import resolve_metric
from gpmetric.pruning import fused
from gpmetric.pruning.mask import select_mask, select_masks
from gpmetric.pruning.updaters import prune_weights
from gpmetric.targets import Target, parse_target

pytestmark = [pytest.mark.interpret, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

TARGETS = [parse_target(text) for text in ("0.5", "0.7", "2:4", "1:4", "4:8", "layer:0.5", "layer:0.3", "layer:0.9")]


def weights(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(rows, 48, generator=draw).to(dtype) for rows in (5, 1, 12)]


def job(weight: Tensor, removed: int, operands: Operands, bits: tuple[int, ...] | None = None) -> Job:
    out = torch.empty_like(weight) if bits is None else torch.empty(bits, dtype=torch.uint8)
    return Job(weight, out, torch.zeros(1, dtype=torch.int64), removed, operands)


@pytest.mark.parametrize(
    ("formula", "bits", "dtype"), [("abs(W)*X", False, torch.bfloat16), ("W*W*G/rowsum(G)", True, torch.float32)]
)
def test_each_is_pruned_as_without_kernels(
    formula: str, bits: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every target, though all are launched together."""
    draw = torch.Generator().manual_seed(1)
    found = weights(dtype)
    operands = [{"X": torch.rand(48, generator=draw), "G": torch.rand(one.shape, generator=draw)} for one in found]
    prune = fused.masks if bits else fused.prune
    at_once = prune(found, parse(formula), operands, TARGETS)
    monkeypatch.setenv("GPMETRIC_KERNELS", "0")
    for weight, its, results in zip(found, operands, at_once, strict=True):
        score = evaluate(parse(formula), its | {"W": weight})
        for target, result in zip(TARGETS, results, strict=True):
            mask = select_mask(score, target)
            assert torch.equal(result, mask if bits else weight.masked_fill(~mask, 0)), target.text


@pytest.mark.parametrize("kind", ["ties", "zeros of both signs", "nan", "infinite"])
def test_small_layers_choose_as_a_stable_sort(kind: str) -> None:
    draw = torch.Generator().manual_seed(2)
    jobs, expected, wrong = [], [], 0
    for weight in weights():
        score = weight.mul(2).round() if kind != "infinite" else weight
        odd = torch.rand(weight.shape, generator=draw)
        if kind == "zeros of both signs":
            score = score.where(odd > 0.5, 0.0 * weight)
        if kind in ("nan", "infinite"):
            score = score.where(odd > 0.2, torch.nan if kind == "nan" else -torch.inf)
            wrong += int((odd <= 0.2).sum())
        total = score.numel()
        for removed in (0, 1, total // 3, total - 1, total):
            jobs.append(job(score, removed, Operands()))
            expected.append(layer.reference(score, removed, score))
    layers.prune_layers_together(jobs, weight_itself)
    for one, other in zip(jobs, expected, strict=True):
        assert torch.equal(one.out.nan_to_num(7), other.nan_to_num(7))
    assert sum(int(one.bad) for one in jobs) == wrong


@pytest.mark.parametrize("target", TARGETS[-3:] + TARGETS[:3], ids=lambda target: target.text)
def test_a_weight_that_is_shared_has_the_statistics_of_each(target: Target) -> None:
    """And views that begin at one address are weights of their own."""
    weight = weights()[2]
    operands = [{"X": one} for one in torch.rand(3, 48, generator=torch.Generator().manual_seed(3))]
    found = fused.prune([weight, weight, weight[:5]], parse("abs(W)*X"), operands, [target])
    for one, its, (pruned,) in zip((weight, weight, weight[:5]), operands, found, strict=True):
        assert torch.equal(pruned, one.masked_fill(~select_mask(one.abs() * its["X"], target), 0))


def test_nothing_to_prune() -> None:
    assert fused.prune([], parse("abs(W)*X"), [], TARGETS) == []
    assert fused.prune(weights(), parse("abs(W)*X"), [{"X": torch.ones(48)}] * 3, []) == [[], [], []]
    assert select_masks([], []) == []


def test_one_that_kernels_cannot_take_leaves_the_others_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [*weights(), torch.rand(2, 48, dtype=torch.float64)]
    statistics = [LayerStatistics(X=torch.ones(48))] * 4
    taken: list[int] = []
    prune = fused.prune
    monkeypatch.setattr(fused, "prune", lambda some, *rest: [taken.append(len(some)), prune(some, *rest)][1])
    pruned = prune_weights(found, resolve_metric("wanda"), TARGETS, statistics)
    assert taken == [1, 1, 1]
    for target, by_weight in zip(TARGETS, pruned, strict=True):
        assert [int((one == 0).sum()) for one in by_weight] == [target.removes(one.shape) for one in found]


def test_jobs_are_launched_together_where_they_are_alike() -> None:
    first, second, third = weights()
    X = torch.rand(48)
    half = Operands(columns=(X.half(),))
    jobs = [job(one, 3, Operands(columns=(X,))) for one in (first, second)]
    jobs += [job(third, 3, half), job(third.half(), 3, half), job(torch.rand(3, 40), 3, half), job(third, 4, half)]
    assert together(jobs) == [[0, 1], [2, 5], [3], [4]]
    shifted = torch.rand(4 * 48 + 1)[1:].view(4, 48)  # 4 bytes beyond what is divisible by 16
    assert together([job(shifted, 3, half), job(shifted, 4, half)]) == [[0], [1]]


@pytest.mark.parametrize("programs", [1, 2, 7, 1000])
def test_every_row_has_one_program(programs: int) -> None:
    jobs = [job(one, 3, Operands()) for one in weights()]
    found, count = table(jobs, programs)
    begin, fields = 3 * count, 6
    seen = []
    for start, first, step in found[:begin].view(-1, 3).tolist():
        height, removed, place = found[start : start + 3].tolist()
        assert (start - begin, removed, height) == (place * fields, 3, jobs[place].weight.shape[0])
        assert found[start + 3 : start + fields].tolist() == [one.data_ptr() for one in jobs[place].tensors]
        seen += [(place, row) for row in range(first, height, step)]
    assert sorted(seen) == [(place, row) for place, one in enumerate(jobs) for row in range(one.weight.shape[0])]


def test_few_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three weights at eight targets, reductions aside: one for rows, one for each M, three for whole layers."""
    launched: list[str] = []

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(module, name)

        def __getitem__(self, grid: tuple[int, ...]) -> object:
            launched.append(self.name)
            return self.kernel[grid]

    for module, names in ((rows, ("_prune_rows", "_prune_rows_together")), (layer, ("_gather", "_apply")),
                          (pattern, ("_prune_pattern", "_prune_pattern_together")),
                          (layers, ("_write_keys", "_pick_many", "_mask_many"))):  # fmt: skip
        for name in names:
            monkeypatch.setattr(module, name, Counted(name))
    fused.prune(weights(), parse("mms(abs(W))*X/rownorm(W)"), [{"X": torch.ones(48)}] * 3, TARGETS)
    assert sorted(launched) == sorted(
        ["_prune_rows_together", *["_prune_pattern_together"] * 2, "_write_keys", "_pick_many", "_mask_many"]
    )


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.text)
def test_bad_scores_are_those_of_one_target(target: Target) -> None:
    found = weights()
    found[2][3, 7], found[2][4, 1] = torch.nan, torch.inf
    with pytest.raises(MaskError, match=r"^2 of 576 scores are NaN or infinite$"):
        fused.prune(found, parse("abs(W)*X"), [{"X": torch.ones(48)}] * 3, [target, TARGETS[0]])


def test_a_launch_that_is_refused() -> None:
    wide = torch.zeros(2, rows.MOST_COLUMNS + 1)
    with pytest.raises(ValueError, match="at most 65535 columns"):
        rows.prune_rows_together([job(wide, 1, Operands()), job(wide, 2, Operands())], weight_itself)
    with pytest.raises(ValueError, match=r"uint8 \[5, 6\]"):
        rows.prune_rows(weights()[0], 3, wanda, Operands(columns=(torch.ones(48),)), out=weights()[0], bits=True)
