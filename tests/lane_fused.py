"""The pipeline on the kernels, in Triton's interpreter, against the pipeline without them; run by `test_kernels.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gpmetric.calibration.accumulators import LayerStatistics
from gpmetric.errors import ExpressionError, MaskError
from gpmetric.evolution.evaluator import Evaluator
from gpmetric.evolution.tasks import ExcessTask, MaskFingerprint, ProbeTask
from gpmetric.expression import parse
from gpmetric.loading import load_model
from gpmetric.metrics import resolve_metric
from gpmetric.pruning import fused
from gpmetric.pruning.bench import bench
from gpmetric.pruning.mask import select_mask
from gpmetric.pruning.updaters import prune_weights
from gpmetric.targets import GRANULARITIES, Granularity, parse_target
from tests.pruning_helpers import session_of, windows_of

pytestmark = [pytest.mark.interpret, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

TARGETS = [parse_target(text) for text in ("0.5", "2:4", "layer:0.6", "block:0.3", "8:16", "0", "row:0.9")]


@pytest.fixture(autouse=True)
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fused._groups.clear()


def sample(dtype: torch.dtype = torch.float32) -> tuple[Tensor, LayerStatistics]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 160, generator=generator).to(dtype)
    inputs = torch.randn(300, 160, generator=generator)
    gradients = torch.rand(5, 160, generator=generator)
    gram = inputs.t() @ inputs / 300
    return weight, LayerStatistics(X=gram.diagonal().sqrt(), G=gradients, H=gradients**2, gram=gram)


@pytest.mark.parametrize(
    ("metric", "update"),
    [
        ("wanda", "none"),
        ("wanda", "obs"),
        ("wanda", "obs-blockwise"),
        ("magnitude", "none"),
        ("block:abs(W)*G", "none"),
        ("ria", "obs"),
    ],
)
def test_pruned_as_without_kernels(metric: str, update: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, statistics = sample()
    rule = resolve_metric(metric)
    targets = TARGETS[:2] if update.startswith("obs") else TARGETS
    found = prune_weights([weight], rule, targets, [statistics], update)
    monkeypatch.setenv("GPMETRIC_KERNELS", "0")
    assert not fused.usable(weight, TARGETS[:1])
    expected = prune_weights([weight], rule, targets, [statistics], update)
    for (one,), (other,) in zip(found, expected, strict=True):
        if rule.update or update != "none":  # sums of fp32 in another order
            assert torch.equal(one != 0, other != 0)
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(one, other)


@pytest.mark.parametrize("row", [Granularity("", columns=32), Granularity("", columns=48, across_rows=True)])
@pytest.mark.parametrize("metric", ["wanda", "ria"])
def test_a_comparison_group_that_is_new(metric: str, row: Granularity, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row in targets.py, and the kernels know it: sums in a formula are still those of the whole matrix."""
    weight, statistics = sample()
    monkeypatch.setitem(GRANULARITIES, "tile", row)
    target = parse_target("tile:0.6")
    assert fused.usable(weight, [target])
    ((found,),) = prune_weights([weight], resolve_metric(metric), [target], [statistics])
    monkeypatch.setenv("GPMETRIC_KERNELS", "0")
    ((expected,),) = prune_weights([weight], resolve_metric(metric), [target], [statistics])
    assert torch.equal(found, expected)
    assert int((found == 0).sum()) == target.removes(weight.shape)


def test_what_the_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _ = sample()
    assert all(fused.usable(weight, [target]) for target in TARGETS)
    assert not any(fused.usable(weight, [parse_target(text)]) for text in ("1:3", "16:32", "3:5"))
    assert not fused.usable(weight.double(), TARGETS)
    assert not fused.usable(weight[:, :159], [parse_target("2:4")])
    assert not fused.usable(weight[:0], TARGETS)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not fused.usable(weight, TARGETS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_keep_their_dtype_and_views_are_read(dtype: torch.dtype) -> None:
    weight, statistics = sample(dtype)
    stored = weight.t().contiguous()
    (pruned,) = fused.prune([stored.t()], parse("abs(W)*X"), [statistics.operands], TARGETS)
    (kept,) = fused.masks([stored.t()], parse("abs(W)*X"), [statistics.operands], TARGETS)
    for target, one, mask in zip(TARGETS, pruned, kept, strict=True):
        assert one.dtype == dtype
        assert torch.equal(mask, select_mask(weight.float().abs() * statistics["X"], target))
        assert torch.equal(one, weight.masked_fill(~mask, 0))


def test_bad_scores_and_operands() -> None:
    weight, statistics = sample()
    weight[2, 7], weight[3, 1] = torch.nan, torch.inf
    for target in TARGETS:
        with pytest.raises(MaskError, match=r"^2 of 800 scores are NaN or infinite$"):
            fused.prune([weight], parse("abs(W)*X"), [statistics.operands], [TARGETS[0], target])
    with pytest.raises(MaskError, match="2 of 800 scores"):
        select_mask(weight, TARGETS[0])
    with pytest.raises(ExpressionError, match="needs the operand D"):
        fused.prune([weight], parse("abs(W)*D"), [{}], TARGETS)


def test_the_host_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all weights and targets, also where scores compete over the layer; nothing else reads a tensor's values."""
    weight, statistics = sample()
    waits: list[str] = []
    for name in ("tolist", "item", "__bool__", "__int__"):
        plain = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda one, name=name, plain=plain: [waits.append(name), plain(one)][1])
    found = fused.prune([weight] * 3, parse("abs(W)*X"), [statistics.operands] * 3, TARGETS)
    assert waits == ["tolist"]
    for one in found:
        for pruned, target in zip(one, TARGETS, strict=True):
            assert int((pruned == 0).sum()) == target.removes(weight.shape)


def test_formulas_compiled_together_prune_as_alone() -> None:
    weight, statistics = sample()
    operands = statistics.operands
    formulas = [parse(text) for text in ("abs(W)*X", "W*W*G/rowsum(G)", "log(abs(W))*X")]
    targets = TARGETS[:4]  # one of each group
    alone = [fused.prune([weight], formula, [operands], targets)[0] for formula in formulas]
    fused._groups.clear()
    fused.compile_together(formulas, [(weight, operands)], targets, bits=False)
    assert [fused._find(formula, operands)[1] for formula in formulas] == [0, 1, 2]
    for formula, expected in zip(formulas, alone, strict=True):
        (found,) = fused.prune([weight], formula, [operands], targets)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_group_that_does_not_serve_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Because another of its formulas wants what this call does not have, or because it failed."""
    weight, statistics = sample()
    operands, formulas = statistics.operands, [parse("abs(W)*X"), parse("W*W*G")]
    fused.compile_together(formulas, [(weight, operands)], TARGETS, bits=False)
    few = {"X": operands["X"]}
    assert fused._find(formulas[0], few)[0] is not fused._find(formulas[0], operands)[0]
    pruned = [fused.prune([weight], formulas[0], [named], TARGETS)[0] for named in (few, operands)]
    assert all(torch.equal(*pair) for pair in zip(*pruned, strict=True))

    def broken(*arguments: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(fused, "load_functions", broken)
        fused.compile_together(formulas, [(weight, operands)], TARGETS, bits=False)
    assert [fused._find(formula, operands)[1] for formula in formulas] == [0, 0]


def test_a_group_that_waits_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    _, statistics = sample()
    formulas = [parse("abs(W)*X"), parse("W*W*G")]
    monkeypatch.delenv("TRITON_INTERPRET")
    with fused._compiling:
        fused.compile_together(formulas, [], TARGETS, bits=False)
        assert fused._find(formulas[1], statistics.operands)[1] == 0
    assert fused._groups[formulas[1]][0].result(timeout=60).LAYOUT.matrices == ("G",)
    assert fused._find(formulas[1], statistics.operands)[1] == 1


def test_no_cache_folder_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, statistics = sample()
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    expected = weight.abs() * statistics["X"]
    ((pruned,),) = fused.prune([weight], parse("X*abs(W)*1"), [statistics.operands], TARGETS[:1])
    assert torch.equal(pruned != 0, select_mask(expected, TARGETS[0]))


def test_a_probe_compiles_what_the_next_rung_prunes_by(tiny_llama: Path, tiny_text: Path) -> None:
    model = load_model(str(tiny_llama), device="cpu", include="layers.0.self_attn.(q|k)_proj")
    windows = windows_of(model, tiny_text, count=2)
    session = session_of(model, windows)
    session.windows = {"calibration": windows, "search": windows}
    session.statistics(["X", "gram"])
    evaluator = Evaluator(session, ["2:4"], "none")
    metrics = tuple(resolve_metric(text) for text in ("abs(W)*X", "W*W*X", "W/X"))
    (first, *_) = evaluator(ProbeTask(metrics))
    assert isinstance(first, MaskFingerprint)
    assert [fused._groups[metric.expression][1] for metric in metrics] == [0, 1, 2]
    figures = evaluator(ExcessTask(metrics[1], 0, 1))
    fused._groups.clear()
    assert evaluator(ExcessTask(metrics[1], 0, 1)) == figures


def test_bench_on_the_kernels(tiny_gpt2: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"model": str(tiny_gpt2), "calibration": str(tiny_text), "text": [str(tiny_text)], "samples": 2}
    options |= {"sequence_length": 16, "windows": 2, "target": ["2:4"], "metric": ["wanda"], "device": "cpu"}
    options["include"] = "h.0.attn"
    found = bench(**options)["results"][0]
    monkeypatch.setenv("GPMETRIC_KERNELS", "0")
    expected = bench(**options)["results"][0]
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}
