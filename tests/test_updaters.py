"""Updaters: where targets compete under each, several weights and targets at once, and scores that are given.

What an updater does to the weights that stay is told by tests/test_sparsegpt.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gpmetric.calibration.accumulators import LayerStatistics
from gpmetric.calibration.collect import collect
from gpmetric.errors import InputError
from gpmetric.loading import load_model
from gpmetric.metrics import resolve_metric
from gpmetric.options import check_request
from gpmetric.pruning.mask import select_mask
from gpmetric.pruning.requests import BenchRequest
from gpmetric.pruning.updaters import UPDATERS, prune_weights, resolve_target, updater_of
from gpmetric.targets import parse_target
from tests.pruning_helpers import prune_weight, windows_of


def test_updates() -> None:
    of_layers = ["none", "obs", "obs-blockwise", "admm"]
    assert list(UPDATERS) == [*of_layers, "block", *(f"{name}+block" for name in of_layers[1:])]
    for name in UPDATERS:
        check_request(BenchRequest(update=name))
    for text in ("", "OBS", "obs_blockwise", "all"):
        with pytest.raises(
            InputError, match=rf"must be one of none, .*, admm, block, .*, admm\+block, but got {text!r}"
        ):
            check_request(BenchRequest(update=text))


@pytest.mark.parametrize("update", UPDATERS)
@pytest.mark.parametrize("metric", ["row:wanda", "layer:wanda", "block:wanda", "sparsegpt", "layer:sparsegpt"])
def test_where_a_target_competes(metric: str, update: str) -> None:
    """Under obs-blockwise, SparseGPT's own among them, in blocks whatever is said; else as target, then metric say."""
    rule = resolve_metric(metric)
    blockwise = "sparsegpt" in metric or "obs-blockwise" in update
    assert updater_of(rule, update) is UPDATERS["obs-blockwise" if "sparsegpt" in metric else update]
    for text in ("0.5", "row:0.5", "layer:0.5", "block:0.5"):
        found = resolve_target(parse_target(text), rule, update)
        said = text.partition(":")[0] if ":" in text else metric.partition(":")[0]
        assert found.granularity == ("block" if blockwise else said)
        assert (found.text, found.sparsity, found.group) == (text, 0.5, 0)
    assert resolve_target(parse_target("2:4"), rule, update) == parse_target("2:4")


@pytest.mark.every(5)
@pytest.mark.parametrize("update", UPDATERS)
@pytest.mark.parametrize("metric", ["magnitude", "wanda", "abs(W)*mms(G)"])
def test_layers_and_targets_at_once_are_each_alone(tiny_llama: Path, tiny_text: Path, metric: str, update: str) -> None:
    """Same masks; the same weights too but for fp32 rounding, since products sum in another order."""
    llama = load_model(str(tiny_llama), device="cpu")
    found = collect(llama, windows_of(llama, tiny_text, count=4).tokens, ["X", "G", "D", "gram"]).layers
    statistics = [found[layer.name] for layer in llama.layers]
    targets = [parse_target(text) for text in ("0.5", "2:4", "layer:0.6", "block:0.3", "1:2", "row:0.6", "0.5")]
    rule = resolve_metric(metric)
    together = prune_weights([layer.weight for layer in llama.layers], rule, targets, statistics, update)
    for target, pruned_layers in zip(targets, together, strict=True):
        for layer, one, pruned in zip(llama.layers, statistics, pruned_layers, strict=True):
            alone = prune_weight(layer.weight, rule, target, one, update)
            assert torch.equal(pruned != 0, alone != 0), (layer.name, target.text)
            torch.testing.assert_close(pruned, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("update", UPDATERS)
def test_given_scores_are_used_as_they_are(update: str) -> None:
    """But by obs-blockwise and admm, which score what they have updated."""
    weight, gram = torch.randn(4, 8, generator=torch.Generator().manual_seed(6)), torch.eye(8)
    score, statistics = -weight.abs(), LayerStatistics(X=torch.ones(8), gram=gram)
    pruned = prune_weight(weight, resolve_metric("wanda"), parse_target("0.5"), statistics, update, score)
    group = "layer" if "obs-blockwise" in update else "row"
    by_wanda = prune_weight(weight, resolve_metric(f"{group}:wanda"), parse_target("0.5"), statistics)
    given = select_mask(score, parse_target("0.5"))
    assert torch.equal(pruned != 0, by_wanda != 0 if UPDATERS[update].rescores else given)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", ["wanda", "magnitude", "block:abs(W)*G"])
def test_kernels_prune_as_the_cpu_does(metric: str, dtype: torch.dtype) -> None:
    """To the bit: these scores are products of two numbers."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 4128, generator=generator).to(dtype)
    operands = {"X": torch.rand(4128, generator=generator), "G": torch.rand(weight.shape, generator=generator)}
    targets = [parse_target(text) for text in ("0.5", "0.9", "layer:0.6", "block:0.3", "1:2", "2:4", "4:8", "8:16")]
    found = LayerStatistics(**{name: value.cuda() for name, value in operands.items()})
    pruned = prune_weights([weight.cuda()], resolve_metric(metric), targets, [found])
    expected = prune_weights([weight], resolve_metric(metric), targets, [LayerStatistics(**operands)])
    for target, (one,), (other,) in zip(targets, pruned, expected, strict=True):
        assert one.dtype == dtype
        assert torch.equal(one.cpu(), other), target.text
