"""Pruning a whole model: the sequential protocol recomputed by hand with hooks, axes, dtypes, and restoring."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gpmetric.calibration.accumulators import LayerStatistics
from gpmetric.calibration.collect import collect_statistics, token_batches
from gpmetric.calibration.replay import record_calls
from gpmetric.errors import GpmetricError, MaskError, SolverError
from gpmetric.evaluation.windows import read_windows
from gpmetric.models import Block, Model, load_model
from gpmetric.pruning import prune
from gpmetric.pruning.bench import Bench
from gpmetric.pruning.mask import select_mask
from gpmetric.pruning.metrics import Update, resolve_metric
from gpmetric.pruning.prune import prune_one_shot, prune_sequential, prune_weight, prune_weights, sparsity
from gpmetric.pruning.target import parse_target

LENGTH = 32


@pytest.fixture
def llama(tiny_llama: Path) -> Model:
    return load_model(str(tiny_llama), device="cpu")


@pytest.fixture
def gpt2(tiny_gpt2: Path) -> Model:
    return load_model(str(tiny_gpt2), device="cpu")


def windows(model: Model, text: Path, count: int = 12) -> Tensor:
    return read_windows(model, str(text), LENGTH, count).tokens


def weights(model: Model) -> dict[str, Tensor]:
    return {layer.name: layer.weight.clone() for layer in model.layers}


def sequential(model: Model, tokens: Tensor, metric: str, target: str, update: str = "none") -> None:
    rule = resolve_metric(metric, *tokens.shape)
    dense = collect_statistics(model, tokens, gram=False) if rule.needs_gradients else None
    calls = record_calls(model, token_batches(tokens))
    prune_sequential(model, rule, parse_target(target), calls, dense, rule.update or update)


def one_shot(model: Model, tokens: Tensor, metric: str, target: str, update: str = "none") -> None:
    rule = resolve_metric(metric, *tokens.shape)
    found = collect_statistics(model, tokens, gradients=rule.needs_gradients).layers
    prune_one_shot(model, rule, parse_target(target), found, rule.update or update)


@contextmanager
def seen_statistics(monkeypatch: pytest.MonkeyPatch, model: Model) -> Iterator[dict[str, LayerStatistics]]:
    """What each layer is pruned with, by name."""
    found: list[LayerStatistics] = []
    original = prune.prune_weight

    def spy(weight: Tensor, metric: object, target: object, statistics: LayerStatistics, *rest: object) -> Tensor:
        found.append(statistics)
        return original(weight, metric, target, statistics, *rest)

    by_name: dict[str, LayerStatistics] = {}
    with monkeypatch.context() as patch:
        patch.setattr(prune, "prune_weight", spy)
        yield by_name
    by_name.update(zip((layer.name for layer in model.layers), found, strict=True))


def input_rms(model: Model, block: Block, tokens: Tensor) -> dict[str, Tensor]:
    """X of a block's layers by plain hooks on a run of the whole model, in float64."""
    squares: dict[str, Tensor] = {}

    def add(name: str, inputs: Tensor) -> None:
        total = inputs.double().flatten(0, -2).square().sum(dim=0)
        squares[name] = squares.get(name, 0) + total

    hooks = [
        layer.module.register_forward_pre_hook(lambda _, args, name=layer.name: add(name, args[0]))
        for layer in block.layers
    ]
    with torch.no_grad():
        model.module(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return {name: (total / tokens.numel()).sqrt() for name, total in squares.items()}


@pytest.mark.parametrize("architecture", ["tiny_llama", "tiny_gpt2"])
def test_sequential_is_block_after_pruned_block(
    architecture: str, request: pytest.FixtureRequest, tiny_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: prune block 1 with what it reads, run the whole model again, prune block 2 with what it reads then."""
    folder = str(request.getfixturevalue(architecture))
    model, by_hand = load_model(folder, device="cpu"), load_model(folder, device="cpu")
    tokens = windows(model, tiny_text)
    dense_x = [input_rms(model, block, tokens) for block in model.blocks]
    target = parse_target("0.5")
    with seen_statistics(monkeypatch, model) as used:
        sequential(model, tokens, "wanda", "0.5")
    for index, block in enumerate(by_hand.blocks):
        x = input_rms(by_hand, block, tokens)
        for layer in block.layers:
            # fp32 sums of squares against float64 ones
            torch.testing.assert_close(used[layer.name].X.double(), x[layer.name], rtol=1e-4, atol=1e-6)
            kept = select_mask(layer.weight.abs() * used[layer.name].X, target)
            layer.weight.masked_fill_(~kept, 0)
        changed = [not torch.allclose(x[name], dense_x[index][name].double(), rtol=1e-2) for name in x]
        assert any(changed) == (index > 0), "after the first block, what is read differs from the dense model"
    for name, weight in weights(by_hand).items():
        assert torch.equal(weight, weights(model)[name]), name


def test_gradients_come_from_the_dense_model(llama: Model, tiny_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = windows(llama, tiny_text, 4)
    dense = collect_statistics(llama, tokens).layers
    with seen_statistics(monkeypatch, llama) as used:
        sequential(llama, tokens, "gblm_l2", "0.5")
    for name, statistics in used.items():
        assert torch.equal(statistics.G, dense[name].G), name
        assert torch.equal(statistics.H, dense[name].H), name


@pytest.mark.parametrize(
    ("metric", "update"),
    [("wanda", "none"), ("ria", "obs"), ("sparsegpt", "none"), ("W*W*D", "none"), ("gblm_l1", "none")],
)
def test_one_block_sequential_is_one_shot(tiny_llama: Path, tiny_text: Path, metric: str, update: str) -> None:
    """Where nothing before a block is pruned, there is nothing to re-collect."""
    models = [load_model(str(tiny_llama), device="cpu", include=r"layers\.0\.") for _ in range(2)]
    tokens = windows(models[0], tiny_text)
    sequential(models[0], tokens, metric, "0.5", update)
    one_shot(models[1], tokens, metric, "0.5", update)
    for name, weight in weights(models[0]).items():
        other = weights(models[1])[name]
        # with gradients, one-shot sums X window by window: the last bit may decide between two scores
        assert ((weight != 0) == (other != 0)).float().mean() > 0.995, name
        if metric != "gblm_l1":
            torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-5)


def test_conv1d_rows_are_outputs(gpt2: Model, tiny_text: Path) -> None:
    """GPT-2 stores [in, out]: each column of the stored weight loses exactly half."""
    sequential(gpt2, windows(gpt2, tiny_text), "wanda", "0.5")
    for layer in gpt2.layers:
        stored = layer.module.weight
        assert stored.shape == layer.weight.shape[::-1]
        zeros = (stored == 0).sum(dim=0)  # [out]
        assert torch.equal(zeros, torch.full_like(zeros, stored.shape[0] // 2)), layer.name
        assert len((stored == 0).sum(dim=1).unique()) > 1, "inputs lose what they lose"


@pytest.mark.parametrize("target", ["0.5", "0.37", "layer:0.5", "block:0.5", "2:4"])
@pytest.mark.parametrize("metric", ["magnitude", "magnitude_row", "wanda", "abs(W)", "sparsegpt"])
def test_what_each_group_loses(tiny_llama: Path, tiny_text: Path, metric: str, target: str) -> None:
    """Counted in the pruned model; only `magnitude` takes a plain number over the whole matrix."""
    model = load_model(str(tiny_llama), device="cpu")
    sequential(model, windows(model, tiny_text, 4), metric, target)
    wanted = parse_target(target)
    for layer in model.layers:
        zeros = layer.weight == 0
        columns = zeros.shape[1]
        if wanted.group:
            per_group = zeros.reshape(-1, wanted.group).sum(dim=1)
            assert set(per_group.tolist()) == {wanted.group - wanted.keep}, layer.name
        elif metric == "sparsegpt" or wanted.granularity == "block":
            per_block = [int(block.sum()) for block in zeros.split(128, dim=1)]
            assert per_block == [int(block.numel() * wanted.sparsity) for block in zeros.split(128, dim=1)]
        elif wanted.granularity == "layer" or metric == "magnitude":
            assert int(zeros.sum()) == int(zeros.numel() * wanted.sparsity), layer.name
            assert len(zeros.sum(dim=1).unique()) > 1, "rows compete with each other"
        else:
            assert set(zeros.sum(dim=1).tolist()) == {int(columns * wanted.sparsity)}, layer.name


@pytest.mark.parametrize("update", ["none", "obs", "obs-blockwise"])
@pytest.mark.parametrize("metric", ["magnitude", "wanda", "abs(W)*mms(G)"])
def test_layers_and_targets_at_once_are_each_alone(llama: Model, tiny_text: Path, metric: str, update: Update) -> None:
    """Same masks; the same weights too but for fp32 rounding, since products sum in another order."""
    found = collect_statistics(llama, windows(llama, tiny_text, 4), gram=True).layers
    statistics = [found[layer.name] for layer in llama.layers]
    targets = [parse_target(text) for text in ("0.5", "2:4", "layer:0.6", "block:0.3", "1:2", "0.5")]
    rule = resolve_metric(metric)
    together = prune_weights([layer.weight for layer in llama.layers], rule, targets, statistics, update)
    for target, pruned_layers in zip(targets, together, strict=True):
        for layer, one, pruned in zip(llama.layers, statistics, pruned_layers, strict=True):
            alone = prune_weight(layer.weight, rule, target, one, update)
            assert torch.equal(pruned != 0, alone != 0), (layer.name, target.text)
            torch.testing.assert_close(pruned, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("update", ["none", "obs", "obs-blockwise"])
def test_given_scores_are_used_as_they_are(update: Update) -> None:
    """But by obs-blockwise, which scores what it has updated."""
    weight, gram = torch.randn(4, 8, generator=torch.Generator().manual_seed(6)), torch.eye(8)
    score, statistics = -weight.abs(), LayerStatistics(torch.ones(8), gram=gram)
    pruned = prune_weight(weight, resolve_metric("wanda"), parse_target("0.5"), statistics, update, score)
    by_wanda = prune_weight(weight, resolve_metric("layer:wanda"), parse_target("0.5"), statistics)
    given = select_mask(score, parse_target("0.5"))
    assert torch.equal(pruned != 0, by_wanda != 0 if update == "obs-blockwise" else given)


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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stored_dtype_is_kept(tiny_llama: Path, tiny_text: Path, dtype: str) -> None:
    """Masks leave kept weights as they were, bit for bit; an update writes them in the stored dtype."""
    model = load_model(str(tiny_llama), device="cpu", dtype=dtype)
    tokens = windows(model, tiny_text, 4)
    with model.restored():
        dense = weights(model)
        sequential(model, tokens, "wanda", "2:4")
        for layer in model.layers:
            assert layer.weight.dtype == getattr(torch, dtype)
            assert torch.equal(layer.weight, dense[layer.name].where(layer.weight != 0, 0))
        assert sparsity(model) == 0.5
    sequential(model, tokens, "sparsegpt", "2:4")
    assert {layer.weight.dtype for layer in model.layers} == {getattr(torch, dtype)}
    assert sparsity(model) == pytest.approx(0.5, abs=1e-3)  # a small kept weight may round to zero


def test_nothing_but_the_layers_changes(llama: Model, tiny_text: Path) -> None:
    """Embeddings, norms and the head are as they were."""
    pruned = {id(layer.module.weight) for layer in llama.layers}
    before = {name: value.clone() for name, value in llama.module.named_parameters() if id(value) not in pruned}
    assert any("embed" in name for name in before)
    sequential(llama, windows(llama, tiny_text, 4), "sparsegpt", "0.5")
    for name, value in llama.module.named_parameters():
        assert name not in before or torch.equal(value, before[name])
    assert all(value.grad is None and not value.requires_grad for value in llama.module.parameters())


def test_excluded_layers_stay_dense(tiny_llama: Path, tiny_text: Path) -> None:
    model = load_model(str(tiny_llama), device="cpu", exclude="mlp")
    sequential(model, windows(model, tiny_text, 4), "magnitude_row", "0.5")
    for name, module in model.module.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            share = float((module.weight == 0).float().mean())
            assert share == (0.5 if "self_attn" in name else 0.0), name
    assert sparsity(model) == 0.5


@pytest.mark.parametrize("one_shot", [False, True])
@pytest.mark.parametrize("error", [MaskError("no"), SolverError("no"), KeyboardInterrupt(), RuntimeError("no")])
def test_the_model_is_dense_again_whatever_fails(
    llama: Model, tiny_text: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, one_shot: bool
) -> None:
    """A failure at the tenth layer, deep in the second block: bit for bit what it was, and usable again."""
    tokens = windows(llama, tiny_text, 4)
    before = weights(llama)
    bench = Bench(llama, tokens, one_shot=one_shot)
    metric, target = resolve_metric("wanda"), parse_target("0.5")
    bench.prepare([metric], "none")
    expected = bench.losses(metric, target, "none", [tokens])
    calls = 0

    def fail(score: Tensor, target: object) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 10:
            assert not torch.equal(llama.layers[0].weight, before[llama.layers[0].name]), "half pruned"
            raise error
        return select_mask(score, target)

    with monkeypatch.context() as patch:
        patch.setattr(prune, "select_mask", fail)
        with pytest.raises(type(error)) as caught:
            bench.losses(metric, target, "none", [tokens])
    if isinstance(error, GpmetricError):
        assert str(caught.value) == f"metric wanda at 0.5: no (layer {llama.layers[9].name})"
    assert calls == 10
    for layer in llama.layers:
        assert torch.equal(layer.weight.view(torch.int32), before[layer.name].view(torch.int32))
    assert bench.losses(metric, target, "none", [tokens]) == expected


def test_a_score_that_is_not_finite_names_metric_target_and_layer(llama: Model, tiny_text: Path) -> None:
    with pytest.raises(MaskError) as caught:
        sequential(llama, windows(llama, tiny_text, 4), "abs(W)*exp(W*1e9)*1e29", "0.5")
    message = str(caught.value)
    assert message.startswith("metric abs(W)*exp(W*1e9)*1e29 at 0.5: ")
    assert message.endswith(f"scores are NaN or infinite (layer {llama.layers[0].name})")
