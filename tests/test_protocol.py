"""Pruning a whole model: the sequential protocol recomputed by hand with hooks, axes, dtypes, and restoring."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpmetric.blockwise.hidden import Hidden
from gpmetric.calibration.accumulators import LayerStatistics
from gpmetric.calibration.collect import collect
from gpmetric.errors import GpmetricError, MaskError, SolverError
from gpmetric.loading import load_model
from gpmetric.metrics import resolve_metric
from gpmetric.models import Block, Model
from gpmetric.pruning import mask, protocol
from gpmetric.pruning.mask import select_mask
from gpmetric.pruning.protocol import Protocol, Rule
from gpmetric.targets import parse_target
from tests.pruning_helpers import restored, session_of, windows_of


@pytest.fixture
def llama(tiny_llama: Path) -> Model:
    return load_model(str(tiny_llama), device="cpu")


@pytest.fixture
def gpt2(tiny_gpt2: Path) -> Model:
    return load_model(str(tiny_gpt2), device="cpu")


def weights(model: Model) -> dict[str, Tensor]:
    return {layer.name: layer.weight.clone() for layer in model.layers}


def sparsity(model: Model) -> float:
    """Fraction of the prunable weights that are zero."""
    zeros = sum(int((layer.weight == 0).sum()) for layer in model.layers)
    return zeros / sum(layer.weight.numel() for layer in model.layers)


def prune(model: Model, text: Path, metric: str, target: str, *, one_shot: bool, update: str, count: int) -> Protocol:
    """Leaves the model pruned."""
    windows = windows_of(model, text, count=count)
    made = Protocol(session_of(model, windows), one_shot=one_shot)
    rule = Rule(made.session.metric(metric), parse_target(target), update)
    made.prepare([rule.metric], update)
    walk = made.walk([rule])
    pruned = {name: weight for _, (block,) in walk for name, weight in block.items()}
    (measured,) = walk.measured()
    if measured.error:
        raise measured.error
    assert pruned.keys() == {layer.name for layer in model.layers}
    for layer in model.layers:
        layer.weight.copy_(pruned[layer.name])
    assert measured.sparsity == sparsity(model)
    return made


def sequential(model: Model, text: Path, metric: str, target: str, update: str = "none", count: int = 12) -> Protocol:
    return prune(model, text, metric, target, one_shot=False, update=update, count=count)


def one_shot(model: Model, text: Path, metric: str, target: str, update: str = "none", count: int = 12) -> Protocol:
    return prune(model, text, metric, target, one_shot=True, update=update, count=count)


@contextmanager
def seen_statistics(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, LayerStatistics]]:
    """What each layer is pruned with, by name."""
    original = protocol.prune_layer
    found: dict[str, LayerStatistics] = {}

    def spy(layer: Any, weight: Tensor, rule: Rule, statistics: LayerStatistics, *rest: Any) -> Any:
        found[layer.name] = statistics
        return original(layer, weight, rule, statistics, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(protocol, "prune_layer", spy)
        yield found


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
    tokens = windows_of(model, tiny_text).tokens
    dense_x = [input_rms(model, block, tokens) for block in model.blocks]
    target = parse_target("0.5")
    with seen_statistics(monkeypatch) as used:
        sequential(model, tiny_text, "wanda", "0.5")
    for index, block in enumerate(by_hand.blocks):
        x = input_rms(by_hand, block, tokens)
        for layer in block.layers:
            # fp32 sums of squares against float64 ones
            torch.testing.assert_close(used[layer.name]["X"].double(), x[layer.name], rtol=1e-4, atol=1e-6)
            kept = select_mask(layer.weight.abs() * used[layer.name]["X"], target)
            layer.weight.masked_fill_(~kept, 0)
        changed = [not torch.allclose(x[name], dense_x[index][name].double(), rtol=1e-2) for name in x]
        assert any(changed) == (index > 0), "after the first block, what is read differs from the dense model"
    for name, weight in weights(by_hand).items():
        assert torch.equal(weight, weights(model)[name]), name


def test_gradients_come_from_the_dense_model(llama: Model, tiny_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = collect(llama, windows_of(llama, tiny_text, count=4).tokens, "GHF").layers
    with seen_statistics(monkeypatch) as used:
        sequential(llama, tiny_text, "abs(W)*X*G*H*F", "0.5", count=4)
    assert list(used) == [layer.name for layer in llama.layers]
    for name, statistics in used.items():
        assert statistics.values.keys() == {"X", "G", "H", "F"}
        assert all(torch.equal(statistics[one], dense[name][one]) for one in "GHF"), name


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize(
    ("metric", "update", "names", "dense"),
    [
        ("magnitude", "none", "X", ""),
        ("wanda", "none", "X", ""),
        ("abs(W)*G", "none", "XG", "XG"),
        ("gblm_l2", "none", "XH", "XH"),
        ("W*F", "none", "XF", "XF"),
        ("W*W*D", "none", "XD", ""),
    ],
)
def test_only_what_a_metric_reads_is_collected(
    llama: Model,
    tiny_text: Path,
    monkeypatch: pytest.MonkeyPatch,
    once: bool,
    metric: str,
    update: str,
    names: str,
    dense: str,
) -> None:
    """X costs nothing; block after block, only what is measured on gradients is collected of the dense model."""
    run = one_shot if once else sequential
    with seen_statistics(monkeypatch) as used:
        session = run(llama, tiny_text, metric, "0.5", update, count=2).session
    assert {frozenset(one.values) for one in used.values()} == {frozenset(names)}
    assert (session.dense.names if session.dense else set()) == set(names if once else dense)


@pytest.mark.parametrize("update", ["obs", "obs-blockwise", "admm"])
@pytest.mark.parametrize("once", [False, True])
def test_an_update_reads_the_gram_matrix(
    llama: Model, tiny_text: Path, monkeypatch: pytest.MonkeyPatch, once: bool, update: str
) -> None:
    with seen_statistics(monkeypatch) as used:
        (one_shot if once else sequential)(llama, tiny_text, "wanda", "0.5", update, count=2)
    assert {frozenset(one.values) for one in used.values()} == {frozenset(["X", "gram"])}


@pytest.mark.parametrize(
    ("metric", "update"),
    [("wanda", "none"), ("ria", "obs"), ("sparsegpt", "none"), ("W*W*D", "none"), ("gblm_l1", "none")],
)
def test_one_block_sequential_is_one_shot(tiny_llama: Path, tiny_text: Path, metric: str, update: str) -> None:
    """Where nothing before a block is pruned, there is nothing to re-collect."""
    models = [load_model(str(tiny_llama), device="cpu", include=r"layers\.0\.") for _ in range(2)]
    sequential(models[0], tiny_text, metric, "0.5", update)
    one_shot(models[1], tiny_text, metric, "0.5", update)
    for name, weight in weights(models[0]).items():
        other = weights(models[1])[name]
        # with gradients, one-shot sums X window by window: the last bit may decide between two scores
        assert ((weight != 0) == (other != 0)).float().mean() > 0.995, name
        if metric != "gblm_l1":
            torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-5)


def test_conv1d_rows_are_outputs(gpt2: Model, tiny_text: Path) -> None:
    """GPT-2 stores [in, out]: each column of the stored weight loses exactly half."""
    sequential(gpt2, tiny_text, "wanda", "0.5")
    for layer in gpt2.layers:
        stored = layer.module.weight
        assert stored.shape == layer.weight.shape[::-1]
        zeros = (stored == 0).sum(dim=0)  # [out]
        assert torch.equal(zeros, torch.full_like(zeros, stored.shape[0] // 2)), layer.name
        assert len((stored == 0).sum(dim=1).unique()) > 1, "inputs lose what they lose"


@pytest.mark.every(5)
@pytest.mark.parametrize("target", ["0.5", "0.37", "row:0.37", "layer:0.5", "block:0.5", "2:4"])
@pytest.mark.parametrize("metric", ["magnitude", "magnitude_row", "wanda", "abs(W)", "sparsegpt", "alps"])
def test_what_each_group_loses(tiny_llama: Path, tiny_text: Path, metric: str, target: str) -> None:
    """Counted in the pruned model; `magnitude` and `alps` take a plain number over the whole matrix, `row:` is rows."""
    model = load_model(str(tiny_llama), device="cpu")
    sequential(model, tiny_text, metric, target, count=4)
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
        elif wanted.granularity == "layer" or (metric in ("magnitude", "alps") and wanted.granularity is None):
            assert int(zeros.sum()) == int(zeros.numel() * wanted.sparsity), layer.name
            assert len(zeros.sum(dim=1).unique()) > 1, "rows compete with each other"
        else:
            assert set(zeros.sum(dim=1).tolist()) == {int(columns * wanted.sparsity)}, layer.name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stored_dtype_is_kept(tiny_llama: Path, tiny_text: Path, dtype: str) -> None:
    """Masks leave kept weights as they were, bit for bit; an update writes them in the stored dtype."""
    model = load_model(str(tiny_llama), device="cpu", dtype=dtype)
    with restored(model):
        dense = weights(model)
        sequential(model, tiny_text, "wanda", "2:4", count=4)
        for layer in model.layers:
            assert layer.weight.dtype == getattr(torch, dtype)
            assert torch.equal(layer.weight, dense[layer.name].where(layer.weight != 0, 0))
        assert sparsity(model) == 0.5
    sequential(model, tiny_text, "sparsegpt", "2:4", count=4)
    assert {layer.weight.dtype for layer in model.layers} == {getattr(torch, dtype)}
    assert sparsity(model) == pytest.approx(0.5, abs=1e-3)  # a small kept weight may round to zero


def test_nothing_but_the_layers_changes(llama: Model, tiny_text: Path) -> None:
    """Embeddings, norms and the head are as they were."""
    pruned = {id(layer.module.weight) for layer in llama.layers}
    before = {name: value.clone() for name, value in llama.module.named_parameters() if id(value) not in pruned}
    assert any("embed" in name for name in before)
    sequential(llama, tiny_text, "sparsegpt", "0.5", count=4)
    for name, value in llama.module.named_parameters():
        assert name not in before or torch.equal(value, before[name])
    assert all(value.grad is None and not value.requires_grad for value in llama.module.parameters())


def test_excluded_layers_stay_dense(tiny_llama: Path, tiny_text: Path) -> None:
    model = load_model(str(tiny_llama), device="cpu", exclude="mlp")
    sequential(model, tiny_text, "magnitude_row", "0.5", count=4)
    for name, module in model.module.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            share = float((module.weight == 0).float().mean())
            assert share == (0.5 if "self_attn" in name else 0.0), name
    assert sparsity(model) == 0.5


@pytest.mark.every(3)
@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("place", ["mask", "block"])
@pytest.mark.parametrize("error", [MaskError("no"), SolverError("no"), KeyboardInterrupt(), RuntimeError("no")])
def test_the_model_is_dense_again_whatever_fails(
    llama: Model, tiny_text: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, place: str, once: bool
) -> None:
    """A failure at the tenth layer, or while pruned blocks are run: bit for bit what it was, and usable again."""
    windows = windows_of(llama, tiny_text, count=4)
    before = weights(llama)
    made, rule = Protocol(session_of(llama, windows), one_shot=once), Rule(resolve_metric("wanda"), parse_target("0.5"))
    made.prepare([rule.metric], "none")
    (expected,) = made.measure([rule], [windows.tokens])
    calls = 0

    def failing(original: Callable[..., Any], last: int) -> Callable[..., Any]:
        def fail(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == last:
                assert place == "mask" or any(
                    not torch.equal(one, before[name]) for name, one in weights(llama).items()
                )
                raise error
            return original(*arguments)

        return fail

    with monkeypatch.context() as patch:
        if place == "mask":
            patch.setattr(mask, "select_mask", failing(select_mask, 10))
        else:
            patch.setattr(Hidden, "advance", failing(Hidden.advance, 3))
        if place == "mask" and isinstance(error, GpmetricError):
            (found,) = made.measure([rule], [windows.tokens])
            assert str(found.error) == f"metric wanda at 0.5: no (layer {llama.layers[9].name})"
            assert type(found.error) is type(error)
            assert found.losses == [math.inf]
        else:
            with pytest.raises(type(error)):
                made.measure([rule], [windows.tokens])
    assert calls == (10 if place == "mask" else 3)
    for layer in llama.layers:
        assert torch.equal(layer.weight.view(torch.int32), before[layer.name].view(torch.int32))
    assert made.measure([rule], [windows.tokens])[0].losses == expected.losses


@pytest.mark.parametrize("once", [False, True])
def test_rules_measured_together_are_as_each_alone(llama: Model, tiny_text: Path, once: bool) -> None:
    """To the bit, on texts of several batches; one that fails costs the others nothing."""
    windows = windows_of(llama, tiny_text, length=24, count=5)
    texts = [windows_of(llama, tiny_text, length=60, count=40).tokens, windows.tokens[:2]]
    metrics = ("wanda", "abs(W)*exp(W*1e9)*1e29", "gblm_l1", "sparsegpt", "wanda")
    targets = ("0.5", "0.5", "2:4", "0.3", "layer:0.6")
    made = Protocol(session_of(llama, windows), one_shot=once)
    rules = [
        Rule(made.session.metric(metric), parse_target(target)) for metric, target in zip(metrics, targets, strict=True)
    ]
    made.prepare([rule.metric for rule in rules], "none")
    together = made.measure(rules, texts)
    for rule, found in zip(rules, together, strict=True):
        (alone,) = made.measure([rule], texts)
        assert found.losses == alone.losses
        if "exp" in rule.metric.name:
            assert str(found.error) == str(alone.error)
            assert isinstance(found.error, MaskError)
        else:
            assert (found.sparsity, found.error) == (alone.sparsity, None)
            assert len(found.losses) == 2
            assert found.seconds > 0
    assert len({found.losses[0] for found in together}) == len(rules)


def test_a_score_that_is_not_finite_names_metric_target_and_layer(llama: Model, tiny_text: Path) -> None:
    with pytest.raises(MaskError) as caught:
        sequential(llama, tiny_text, "abs(W)*exp(W*1e9)*1e29", "0.5", count=4)
    message = str(caught.value)
    assert message.startswith("metric abs(W)*exp(W*1e9)*1e29 at 0.5: ")
    assert message.endswith(f"scores are NaN or infinite (layer {llama.layers[0].name})")
