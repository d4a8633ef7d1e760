"""Calibration against plain autograd loops, explicit inverses in double precision, and the models' own forward pass."""

from __future__ import annotations

import fcntl
import gc
import hashlib
import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gpmetric.blockwise.replay import record_calls
from gpmetric.calibration.accumulators import (
    ACCUMULATORS,
    DAMPING,
    AbsoluteGradients,
    FromGradients,
    InputMoments,
    LayerStatistics,
    SquaredGradients,
    SquareOfMeanGradient,
    TokenMoments,
    curvature,
    inverse_factor,
)
from gpmetric.calibration.cache import Sample, cache_key, cached_statistics, estimate_bytes, load_statistics
from gpmetric.calibration.collect import Statistics, collect, collect_block, collect_blocks, token_batches
from gpmetric.data import cut_windows, read_text
from gpmetric.errors import GpmetricError, ModelError, SolverError
from gpmetric.loading import load_model
from gpmetric.models import Layer, Model
from gpmetric.operands import OPERANDS, needs_gradients, shape_of
from tests.pruning_helpers import restored

ALL = ("X", "G", "H", "D", "F", "gram")
INPUTS = ("X", "D", "gram")


def make_tokens(count: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 300, (count, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_gpt2"])
def model(request: pytest.FixtureRequest) -> Model:
    return load_model(str(request.getfixturevalue(request.param)))


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> Model:
    return load_model(str(tiny_llama))


@pytest.fixture(scope="module")
def tokens(model: Model, tiny_text: Path) -> Tensor:
    text = read_text(str(tiny_text))
    return cut_windows(text, model.tokenizer, 24, 10, vocabulary=model.vocabulary).tokens


@pytest.fixture(scope="module")
def statistics(model: Model, tokens: Tensor) -> Statistics:
    return collect(model, tokens, ALL)


def assert_same_bits(left: Statistics, right: Statistics, names: Collection[str] = ALL) -> None:
    """Of these statistics, those that one has and the other too."""
    assert list(left.layers) == list(right.layers)
    assert (left.sequences, left.length) == (right.sequences, right.length)
    for layer in left.layers:
        one, other = left.layers[layer].values, right.layers[layer].values
        assert one.keys() & set(names) == other.keys() & set(names), layer
        for name in one.keys() & set(names):
            assert torch.equal(one[name], other[name]), (layer, name)


# The statistics of a model


def test_inputs_against_all_activations_at_once(model: Model, tokens: Tensor, statistics: Statistics) -> None:
    """X = sqrt(mean x^2), gram = X^T X / n over the inputs of one forward pass, kept whole and in double precision."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> None:
        inputs[name] = x.double().flatten(0, 1)  # [tokens, in]

    hooks = [
        layer.module.register_forward_pre_hook(lambda _, args, name=layer.name: keep(name, args[0]))
        for layer in model.layers
    ]
    with torch.no_grad():
        model.module(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    for name, found in statistics.layers.items():
        x = inputs[name]
        assert len(x) == tokens.numel()
        assert torch.allclose(found["X"].double(), x.square().mean(dim=0).sqrt(), rtol=1e-5)
        gram = x.t() @ x / len(x)
        assert found.gram is not None
        assert torch.allclose(found.gram.double(), gram, rtol=1e-4, atol=1e-5 * gram.diagonal().mean().item())


def test_gradients_against_a_plain_loop(model: Model, tokens: Tensor, statistics: Statistics) -> None:
    """One backward pass a sequence, of the mean loss of its length - 1 predictions; G = mean |g|, H = mean g^2."""
    gradients = gradients_of_sequences(model, tokens)
    for name, g in gradients.items():
        found = statistics.layers[name]
        assert torch.allclose(found["G"], g.abs().mean(dim=0), rtol=1e-4, atol=1e-7)
        assert torch.allclose(found["H"], g.square().mean(dim=0), rtol=1e-4, atol=1e-9)
    literal = ACCUMULATORS | {"H": FromGradients(SquareOfMeanGradient)}
    accumulated = collect(model, tokens, "GH", accumulators=literal)
    for name, g in gradients.items():
        found = accumulated.layers[name]
        assert torch.allclose(found["H"], g.mean(dim=0).square(), rtol=1e-3, atol=1e-9)
        assert torch.equal(found["G"], statistics.layers[name]["G"])


def test_token_gradients_against_every_token_alone(model: Model, tokens: Tensor, statistics: Statistics) -> None:
    """A token's gradient is the outer product of the loss's gradient of its output and its input; they sum to G's."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor, y: Tensor) -> None:
        inputs[name], outputs[name] = x[0], y

    squares = {layer.name: torch.zeros_like(layer.weight) for layer in model.layers}
    whole = {layer.name: torch.zeros_like(layer.weight) for layer in model.layers}
    hooks = [
        layer.module.register_forward_hook(lambda _, args, y, name=layer.name: keep(name, args[0], y))
        for layer in model.layers
    ]
    try:
        for window in tokens:
            for layer in model.layers:
                layer.parameter.requires_grad_(True)
            loss = model.module(input_ids=window[None], labels=window[None]).loss
            slopes = torch.autograd.grad(loss, list(outputs.values()))
            for name, slope in zip(outputs, slopes, strict=True):
                by_token = slope[0][:, :, None] * inputs[name].detach()[:, None, :]  # [tokens, out, in]
                squares[name] += by_token.square().sum(dim=0) / len(tokens)
                whole[name] += by_token.sum(dim=0).abs() / len(tokens)
    finally:
        for hook in hooks:
            hook.remove()
        for layer in model.layers:
            layer.parameter.requires_grad_(False)
    for name, found in statistics.layers.items():
        assert torch.allclose(found["F"], squares[name], rtol=1e-3, atol=1e-9)
        assert torch.allclose(found["G"], whole[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("names", ["", "X", "G", "H", "F", "GH", "XGF", "GHF", "D", "XDGH"])
def test_only_what_is_asked_for_is_collected(
    model: Model, tokens: Tensor, statistics: Statistics, monkeypatch: pytest.MonkeyPatch, names: str
) -> None:
    """Nothing else is accumulated; X alone is always there, and what is there is what it is beside all others."""
    started: list[str] = []
    for kind in (AbsoluteGradients, SquaredGradients, TokenMoments, InputMoments):
        original = kind.__init__

        def count(self: Any, *arguments: Any, original: Any = original, **options: Any) -> None:
            started.append(type(self).__name__ + " with pairs" * options.get("gram", False))
            original(self, *arguments, **options)

        monkeypatch.setattr(kind, "__init__", count)
    found = collect(model, tokens, names)
    wanted = {"G": "AbsoluteGradients", "H": "SquaredGradients", "F": "TokenMoments"}
    inputs = "InputMoments with pairs" if "D" in names else "InputMoments"
    expected = sorted([inputs, *(wanted[name] for name in names if name in wanted)] * len(model.layers))
    assert sorted(started) == expected
    assert found.names == {"X", *names}
    assert all(layer.values.keys() == {"X", *names} for layer in found.layers.values())
    assert_same_bits(found, statistics, set("GHF") & set(names))
    assert_close(found, statistics, {"X", *names})


def test_the_gram_matrix_is_no_operand(statistics: Statistics) -> None:
    for layer in statistics.layers.values():
        assert layer.values.keys() == {*ALL}
        assert layer.operands.keys() == {*ALL} - {"gram"}
        assert layer.gradients.keys() == {"G", "H", "F"}
        assert layer.gram is layer["gram"]
        assert layer.factor is layer.factor, "factorised once"
    empty = LayerStatistics(X=torch.ones(2), G=None)
    assert (empty.operands.keys(), empty.gradients, empty.gram) == ({"X"}, {}, None)


def assert_close(left: Statistics, right: Statistics, names: Collection[str]) -> None:
    for layer, found in left.layers.items():
        for name in names:
            torch.testing.assert_close(found[name], right.layers[layer][name], rtol=1e-3, atol=1e-6)


def gradients_of_sequences(model: Model, tokens: Tensor) -> dict[str, Tensor]:
    """[sequences, out, in] by layer."""
    weights = [layer.parameter for layer in model.layers]
    found: dict[str, list[Tensor]] = {layer.name: [] for layer in model.layers}
    for window in tokens:
        for weight in weights:
            weight.requires_grad_(True)
        logits = model.module(input_ids=window[None]).logits[0, :-1]
        loss = -logits.log_softmax(dim=-1)[torch.arange(len(window) - 1), window[1:]].mean()
        for layer, gradient in zip(model.layers, torch.autograd.grad(loss, weights), strict=True):
            found[layer.name].append(gradient.t() if isinstance(layer.module, Conv1D) else gradient)
        for weight in weights:
            weight.requires_grad_(False)
    return {name: torch.stack(rows) for name, rows in found.items()}


def test_shapes_and_sample(model: Model, tokens: Tensor, statistics: Statistics) -> None:
    assert (statistics.sequences, statistics.length) == (10, 24) == tuple(tokens.shape)
    assert list(statistics.layers) == [layer.name for layer in model.layers]
    for layer in model.layers:
        out_features, in_features = layer.weight.shape
        found = statistics.layers[layer.name]
        shapes = {"X": (in_features,), "D": (in_features,), "gram": (in_features, in_features)}
        shapes |= dict.fromkeys("GHF", (out_features, in_features))
        assert {name: tuple(value.shape) for name, value in found.values.items()} == shapes
        assert {name: shape_of(name, layer.weight.shape) for name in ALL} == shapes
        assert all(value.dtype == torch.float32 for value in found.values.values())
        assert torch.equal(found["D"], curvature(found["gram"]))


@pytest.mark.parametrize("names", [ALL, INPUTS])
def test_blocks_come_one_after_the_other(model: Model, tokens: Tensor, names: tuple[str, ...]) -> None:
    """Each with its own layers; a step is a window's way through all blocks, or a block's pass over all windows."""
    steps: list[tuple[int, int]] = []
    found = list(collect_blocks(model, tokens, names, progress=lambda done, total: steps.append((done, total))))
    assert [list(one) for one in found] == [[layer.name for layer in block.layers] for block in model.blocks]
    merged = {name: one for block in found for name, one in block.items()}
    collected = collect(model, tokens, names)
    assert_same_bits(replace(collected, layers=merged), collected, names)
    total = len(tokens) if names == ALL else len(model.blocks)
    assert steps == [(done, total) for done in range(total + 1)]


@pytest.mark.parametrize("names", [ALL, INPUTS])
def test_statistics_of_one_block_are_in_memory_at_a_time(
    model: Model, tokens: Tensor, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    """No moment of another block is alive while one is collected, nor any statistics, without a garbage collection."""
    kinds = (InputMoments, AbsoluteGradients, SquaredGradients, TokenMoments, LayerStatistics)
    made: WeakSet[Any] = WeakSet()
    alive: list[list[int]] = []

    def count() -> list[int]:
        return [sum(type(one) is kind for one in made) for kind in kinds]

    for kind in kinds:
        start: Any = kind.__init__

        def registered(self: Any, *arguments: Any, start: Any = start, **options: Any) -> None:
            made.add(self)
            start(self, *arguments, **options)

        monkeypatch.setattr(kind, "__init__", registered)
    for kind in kinds[:-1]:
        add: Any = kind.add

        def counted(self: Any, *arguments: Any, add: Any = add) -> None:
            alive.append(count())
            add(self, *arguments)

        monkeypatch.setattr(kind, "add", counted)
    gc.disable()
    try:
        for block in collect_blocks(load_model(model.name, resident=False), tokens[:1], names):
            assert count()[-1] == len(block)
            del block  # or the loop would keep it while the next is made
        assert count() == [0] * len(kinds)
    finally:
        gc.enable()
    size = len(model.blocks[0].layers)
    gradients = [[size, *[size] * 3, 0]] if names == ALL else []  # beside each, moments of inputs without any tokens
    assert {*map(tuple, alive)} == {*map(tuple, [[size, 0, 0, 0, 0], *gradients])}


@pytest.mark.parametrize("name", ["G", "H", "F"])
def test_what_is_given_is_let_go_of(model: Model, tokens: Tensor, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Collected at once, a sum is gone when its block was given: no graph's hooks hold it."""
    kind = {"G": AbsoluteGradients, "H": SquaredGradients, "F": TokenMoments}[name]
    made: WeakSet[Any] = WeakSet()
    start: Any = kind.__init__

    def registered(self: Any, *arguments: Any) -> None:
        made.add(self)
        start(self, *arguments)

    monkeypatch.setattr(kind, "__init__", registered)
    gc.collect()
    gc.disable()
    try:
        left = [len(made) for _ in collect_blocks(model, tokens[:2], [name])]
    finally:
        gc.enable()
    sizes = [len(block.layers) for block in model.blocks]
    assert left == [sum(sizes[index + 1 :]) for index in range(len(sizes))]


def test_forward_only_agrees(model: Model, tokens: Tensor, statistics: Statistics) -> None:
    """To rounding: without gradients several windows go through the model at once."""
    for names in (("X",), INPUTS):
        forward = collect(model, tokens, names)
        for name, found in forward.layers.items():
            assert torch.allclose(found["X"], statistics.layers[name]["X"], rtol=1e-5)
            assert found.values.keys() == set(names)


def test_a_model_is_left_as_it_was(model: Model, tokens: Tensor) -> None:
    digest = Model(model.name, model.module, model.tokenizer, model.blocks).digest

    def interrupt(done: int, total: int) -> None:
        if done == 0:  # nothing has begun yet
            return
        assert any(layer.parameter.requires_grad for layer in model.layers)
        raise KeyboardInterrupt

    collect(model, tokens[:1], ALL)
    with pytest.raises(KeyboardInterrupt):
        collect(model, tokens, ALL, progress=interrupt)
    for parameter in model.module.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert not parameter._post_accumulate_grad_hooks
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.module.modules())
    assert Model(model.name, model.module, model.tokenizer, model.blocks).digest == digest


def test_one_gradient_is_alive_at_a_time(model: Model, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []
    add = AbsoluteGradients.add

    def count(self: AbsoluteGradients, gradient: Tensor) -> None:
        alive.append(sum(parameter.grad is not None for parameter in model.module.parameters()))
        add(self, gradient)

    monkeypatch.setattr(AbsoluteGradients, "add", count)
    collect(model, tokens[:2], "GH")
    assert alive == [1] * (2 * len(model.layers))


def test_a_layer_without_tokens_is_refused(llama: Model) -> None:
    """Zeros for its X would pass for a measurement: a decoder's cross-attention, a vision tower, an idle expert."""
    stray = Layer("blocks.0.idle", nn.Linear(4, 4))
    idle = replace(llama, blocks=tuple(replace(block, layers=(stray,)) for block in llama.blocks))
    for names in ("", "X", "D", "G", "F"):
        with pytest.raises(ModelError, match=r"^layer blocks\.0\.idle is not reached by a text"):
            collect(idle, make_tokens(1, 8), names)


def test_overflowing_activations_are_an_error(llama: Model) -> None:
    with restored(llama), torch.no_grad():
        llama.layers[3].weight.fill_(1e38)
        with pytest.raises(SolverError, match=r"^layer model\.layers\.0\.mlp\.gate_proj: .* holds NaN or infinity"):
            collect(llama, make_tokens(1, 8), "D")


def test_operands_and_accumulators_are_one_table() -> None:
    """Every operand but the weight can be measured, the Gram matrix too; those of gradients by way of them.

    R is looked at in tests/test_regional.py.
    """
    assert set(ACCUMULATORS) == set(OPERANDS) - {"W"} | {"gram"} == {*ALL, "R"}
    assert [name for name in ALL if needs_gradients([name])] == ["G", "H", "F"]
    assert not needs_gradients(["W", *INPUTS])
    assert [OPERANDS[name].cost for name in "WXDG"] == sorted(OPERANDS[name].cost for name in "WXDG")


def test_batches_hold_about_2048_tokens() -> None:
    assert [len(batch) for batch in token_batches(make_tokens(20, 256))] == [8, 8, 4]
    assert [len(batch) for batch in token_batches(make_tokens(2, 3000))] == [1, 1]


# Replaying blocks

NOT_MATRICES = (nn.LayerNorm, nn.Embedding)


def test_replaying_the_blocks_is_the_model(architecture: Model) -> None:
    """Bit by bit, block after block, against hooks on the blocks of the whole model; 20 tokens outrun every window."""
    tokens = make_tokens(5, 20)
    outputs: list[list[Tensor]] = [[] for _ in architecture.blocks]
    hooks = [
        block.module.register_forward_hook(lambda _, __, output, kept=kept: kept.append(output))
        for block, kept in zip(architecture.blocks, outputs, strict=True)
    ]
    batches = [tokens[:3], tokens[3:]]
    with torch.no_grad():
        for batch in batches:
            architecture.module(input_ids=batch)
    for hook in hooks:
        hook.remove()
    calls = record_calls(architecture, batches)
    assert not any("forward" in vars(block.module) for block in architecture.blocks)
    for _ in range(2):  # a replay leaves nothing behind
        hidden = calls.hidden
        for index, expected in enumerate(outputs):
            hidden = calls.replay(index, hidden)
            assert not any(states.requires_grad for states in hidden)
            for states, output in zip(hidden, expected, strict=True):
                assert torch.equal(states, output[0] if isinstance(output, tuple) else output), index


def test_every_matrix_of_a_block_is_a_layer(architecture: Model) -> None:
    names = {layer.name for layer in architecture.layers}
    for name, module in architecture.module.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            inside = any(parameter is other for block in architecture.blocks for other in block.module.parameters())
            if inside and parameter.dim() >= 2 and not isinstance(module, NOT_MATRICES):
                assert key == "weight"
                assert name in names
    assert architecture.module.get_output_embeddings() not in {layer.module for layer in architecture.layers}


def test_every_layer_is_calibrated(architecture: Model) -> None:
    """Layers are reached, and gradients too, whatever the order of the module's attributes."""
    found = collect(architecture, make_tokens(2, 12), ALL)
    for name, layer in found.layers.items():
        for operand in "XGHF":
            assert (layer[operand] > 0).any(), (name, operand)


def test_equal_arguments_share_their_memory(llama: Model) -> None:
    """Position embeddings and masks of every block and batch are held once, where batches are alike."""
    calls = record_calls(llama, list(make_tokens(6, 16).split(2)))
    first = calls.arguments[0][0][1]
    for block in calls.arguments:
        for _, named in block:
            for key in ("position_ids", "position_embeddings"):
                assert named[key] is first[key] or named[key][0] is first[key][0]


def test_a_block_on_dense_inputs_has_the_dense_statistics(model: Model, tokens: Tensor) -> None:
    """Replayed block by block on the outputs of the dense blocks before: bit by bit what one pass collects."""
    dense = collect(model, tokens, INPUTS)
    calls = record_calls(model, token_batches(tokens))
    hidden = calls.hidden
    for index in range(len(model.blocks)):
        found = collect_block(calls, index, hidden, ALL)
        for name, layer in found.items():
            assert layer.values.keys() == set(INPUTS), "what inputs alone tell"
            assert all(torch.equal(layer[one], dense.layers[name][one]) for one in INPUTS)
        (few, *_) = collect_block(calls, index, hidden, ["X"]).values()
        assert few.values.keys() == {"X"}
        hidden = calls.replay(index, hidden)


# Accumulators and solvers


def test_input_moments_by_hand() -> None:
    """Rows (1, 2), (3, 4), (5, 0): mean squares 35/3 and 20/3, mean product 14/3."""
    for gram in (False, True):
        moments = InputMoments(2, torch.device("cpu"), gram=gram)
        moments.add(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
        moments.add(torch.tensor([5.0, 0.0], dtype=torch.float16))
        assert moments.tokens == 3
        assert torch.allclose(moments.rms(), torch.tensor([35 / 3, 20 / 3]).sqrt())
    assert torch.allclose(moments.gram(), torch.tensor([[35.0, 14.0], [14.0, 20.0]]) / 3)


def test_squares_of_half_precision_do_not_overflow() -> None:
    moments = InputMoments(1, torch.device("cpu"), gram=False)
    moments.add(torch.full((4, 1), 60000.0, dtype=torch.float16))
    assert moments.rms().item() == pytest.approx(60000)


def test_gradient_moments_by_hand() -> None:
    """Gradients 1 and -3: mean |g| = 2, mean g^2 = 5, square of the mean = 1."""
    for kind, expected in ((AbsoluteGradients, 2.0), (SquaredGradients, 5.0), (SquareOfMeanGradient, 1.0)):
        moments = kind(torch.Size((1, 1)), torch.device("cpu"))
        for gradient in (1.0, -3.0):
            moments.add(torch.tensor([[gradient]]))
        assert moments.result(2).item() == expected


def test_token_moments_by_hand() -> None:
    """Inputs 1, 2 and output gradients 3, -1: (3 * 1)^2 + (-1 * 2)^2 = 13; a sequence of zeros halves it."""
    moments = TokenMoments(torch.Size((1, 1)), torch.device("cpu"))
    moments.add(torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[3.0], [-1.0]]]))
    moments.add(torch.zeros(1, 2, 1, dtype=torch.float16), torch.ones(1, 2, 1))
    assert moments.result(2).item() == 6.5


def damped(gram: Tensor) -> Tensor:
    """The definition, in double precision."""
    gram = gram.double()
    return gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def make_gram(width: int, rows: int, seed: int = 0) -> Tensor:
    inputs = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    inputs = inputs * torch.logspace(-1, 1, width) + 0.5
    return inputs.t() @ inputs / rows


GRAMS = {
    "one": torch.tensor([[4.0]]),
    "odd": make_gram(7, 50),
    "wide": make_gram(123, 400),
    "fewer tokens than inputs": make_gram(42, 5),
    "identical rows": torch.ones(64, 64) * 3,
    "dead inputs": torch.block_diag(make_gram(6, 30), torch.zeros(3, 3)),
    "large": make_gram(16, 40) * 1e8,
    "small": make_gram(16, 40) * 1e-8,
}


@pytest.mark.parametrize("name", GRAMS)
def test_curvature_and_factor_against_the_explicit_inverse(name: str) -> None:
    gram = GRAMS[name]
    inverse = torch.linalg.inv(damped(gram))
    assert torch.allclose(curvature(gram).double(), 1 / inverse.diagonal(), rtol=2e-3)
    factor = inverse_factor(gram).double()
    assert torch.equal(factor, factor.triu())
    assert (factor.diagonal() > 0).all()
    assert torch.allclose(factor.t() @ factor, inverse, rtol=2e-3, atol=2e-3 * inverse.abs().max().item())


def test_curvature_by_hand() -> None:
    """gram = diag(1, 3): damping 0.02, so D = (1.02, 3.02); an input that is always zero has the damping alone."""
    assert torch.allclose(curvature(torch.diag(torch.tensor([1.0, 3.0]))), torch.tensor([1.02, 3.02]))
    assert torch.allclose(curvature(torch.diag(torch.tensor([2.0, 0.0]))), torch.tensor([2.01, 0.01]))


def test_an_all_zero_gram_matrix() -> None:
    """A layer whose inputs are all zero: every input alike, and finite."""
    for factor in (0.0, 1e-38):
        gram = factor * torch.eye(5)
        found = curvature(gram)
        assert torch.isfinite(found).all()
        assert (found > 0).all()
        assert len(set(found.tolist())) == 1
        assert torch.isfinite(inverse_factor(gram)).all()


def test_damping_grows_until_the_matrix_is_regular() -> None:
    """Eigenvalues 2.5 and -0.5, mean diagonal 1: damping by 0.01 and 0.1 leaves it indefinite, by 1 does not."""
    gram = torch.tensor([[1.0, 1.5], [1.5, 1.0]])
    inverse = torch.linalg.inv(gram.double() + torch.eye(2, dtype=torch.float64))
    assert torch.allclose(curvature(gram).double(), 1 / inverse.diagonal())


def test_factors_of_several_layers() -> None:
    """The same bits as one by one, also where one needs more damping; each is factorised once, whoever asks."""
    grams = [make_gram(2, 9), torch.tensor([[1.0, 1.5], [1.5, 1.0]]), torch.zeros(2, 2), make_gram(2, 5)]
    several = [LayerStatistics(gram=gram) for gram in grams]
    known = several[3].factor
    found = LayerStatistics.factors([*several, several[0]])
    assert all(torch.equal(one, inverse_factor(gram)) for one, gram in zip(found, [*grams, grams[0]], strict=True))
    assert several[3].factor is known
    assert torch.equal(several[0].factor, found[0])
    with pytest.raises(SolverError, match="holds NaN or infinity"):
        LayerStatistics.factors([several[0], *(LayerStatistics(gram=torch.full((2, 2), torch.nan)) for _ in range(2))])


@pytest.mark.parametrize("solve", [curvature, inverse_factor])
def test_gram_matrices_without_an_inverse(solve: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(SolverError, match=r"^a Gram matrix \[2, 2\] is not positive definite even at 100 times"):
        solve(torch.tensor([[1.0, 1e4], [1e4, 1.0]]))
    for value in (torch.nan, torch.inf):
        with pytest.raises(SolverError, match="holds NaN or infinity"):
            solve(torch.tensor([[1.0, value], [value, 1.0]]))


# The cache


Blocks = Iterable[Mapping[str, LayerStatistics]]


def fail() -> Blocks:
    raise AssertionError("computed again")


def sample_of(model: Model, statistics: Statistics) -> Sample:
    """What a file of statistics holds."""
    return replace(
        Sample.of(model, torch.empty(0, 0), statistics.names), sequences=statistics.sequences, length=statistics.length
    )


def backwards(statistics: Statistics) -> Callable[[], Blocks]:
    """Layer by layer from the last, as gradients come."""
    return lambda: [{name: statistics.layers[name]} for name in reversed(list(statistics.layers))]


def test_cache_round_trip(statistics: Statistics, model: Model, tmp_path: Path) -> None:
    folder, sample = tmp_path / "a" / "cache", sample_of(model, statistics)
    path = cached_statistics(folder, "k" * 64, sample, backwards(statistics))
    assert path == folder / f"{'k' * 64}.safetensors"
    assert os.listdir(folder) == [path.name]
    assert cached_statistics(folder, "k" * 64, sample, fail) == path
    for kept in (True, False):
        assert_same_bits(load_statistics(path, kept=kept), statistics)


def test_cache_keeps_what_was_not_collected_apart(model: Model, tokens: Tensor, tmp_path: Path) -> None:
    plain = collect(model, tokens, "X")
    sample = sample_of(model, plain)
    cached_statistics(tmp_path, "plain", sample, backwards(plain))
    again = load_statistics(cached_statistics(tmp_path, "plain", sample, fail))
    assert_same_bits(again, plain)
    assert again.names == {"X"}


def test_cache_key_is_of_everything_that_counts(tiny_llama: Path, tiny_gpt2: Path) -> None:
    names = ["G", "H"]
    tokens = make_tokens(2, 6)
    changed = load_model(str(tiny_llama))
    changed.layers[0].weight[0, 0] += 1
    one = tokens.clone()
    one[1, 5] += 1
    keys = [
        cache_key(load_model(str(tiny_llama)), tokens, names),
        cache_key(load_model(str(tiny_gpt2)), tokens, names),
        cache_key(load_model(str(tiny_llama), dtype="bfloat16"), tokens, names),
        cache_key(load_model(str(tiny_llama), include="mlp"), tokens, names),
        cache_key(changed, tokens, names),
        cache_key(load_model(str(tiny_llama)), one, names),
        cache_key(load_model(str(tiny_llama)), tokens.view(3, 4), names),
        cache_key(load_model(str(tiny_llama)), tokens, [*names, "gram"]),
        cache_key(load_model(str(tiny_llama)), tokens, ["G"]),
    ]
    assert len(set(keys)) == len(keys)
    assert cache_key(load_model(str(tiny_llama)), tokens.clone(), {*reversed(names)}) == keys[0]


def test_estimate_is_the_size_of_the_file(statistics: Statistics, model: Model, tokens: Tensor, tmp_path: Path) -> None:
    def written(statistics: Statistics, key: str) -> int:
        path = cached_statistics(tmp_path, key, sample_of(model, statistics), backwards(statistics))
        with safe_open(path, framework="pt") as file:
            return sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118

    assert written(statistics, "all") == estimate_bytes(model.layers, ALL)
    for names in ("X", "XD", "XGF"):
        assert written(collect(model, tokens[:1], names), f"of {names}") == estimate_bytes(model.layers, names)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    save_file({"a": torch.ones(2)}, path)


def listed(path: Path) -> None:
    save_file(load_file(path), path, metadata={"gpmetric": "[]"})


def unparsed(path: Path) -> None:
    save_file(load_file(path), path, metadata={"gpmetric": "{"})


def other_operand(path: Path) -> None:
    rewrite(path, lambda tensors, layer: tensors.update({f"{layer}/Q": torch.ones(2)}))


def no_activations(path: Path) -> None:
    rewrite(path, lambda tensors, layer: tensors.pop(f"{layer}/X"))


def no_layer(path: Path) -> None:
    rewrite(path, lambda tensors, layer: [tensors.pop(name) for name in list(tensors) if name.startswith(layer)])


def rewrite(path: Path, change: Callable[[dict[str, Tensor], str], Any]) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors, min(tensors).rpartition("/")[0])
    save_file(tensors, path, metadata=metadata)


def no_gradients_of_one(path: Path) -> None:
    rewrite(path, lambda tensors, layer: tensors.pop(f"{layer}/G"))


def another_number(path: Path) -> None:
    rewrite(path, lambda tensors, layer: tensors[f"{layer}/X"].mul_(2))


def not_finite(path: Path) -> None:
    rewrite(path, lambda tensors, layer: tensors[f"{layer}/G"].fill_(math.nan))


def half_precision(path: Path) -> None:
    rewrite(path, lambda tensors, layer: tensors.update({f"{layer}/G": tensors[f"{layer}/G"].bfloat16()}))


def another_shape(path: Path) -> None:
    rewrite(path, lambda tensors, layer: tensors.update({f"{layer}/G": tensors[f"{layer}/G"].reshape(-1)}))


def of_more_windows(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'sequences\\": 2', b'sequences\\": 3'))


@pytest.mark.parametrize(
    "damage",
    [
        cut_short, empty, foreign, listed, unparsed, other_operand, no_activations, no_gradients_of_one, no_layer,
        another_number, not_finite, half_precision, another_shape, of_more_windows,
    ],
)  # fmt: skip
def test_a_damaged_cache_file_is_written_anew(
    damage: Callable[[Path], None], llama: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    statistics = collect(llama, make_tokens(2, 8), ALL)
    sample = sample_of(llama, statistics)
    damage(cached_statistics(tmp_path, "k", sample, backwards(statistics)))
    assert not caplog.messages
    path = cached_statistics(tmp_path, "k", sample, backwards(statistics))
    (told,) = caplog.messages
    assert told.startswith(f"statistics cache {str(path)!r} is damaged, and measured again: ")
    assert cached_statistics(tmp_path, "k", sample, fail) == path
    assert_same_bits(load_statistics(path), statistics)
    assert os.listdir(tmp_path) == ["k.safetensors"]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_neither_stored_nor_read(
    number: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the digest is right, as of a file of a version that stored what it was given."""
    sample = Sample({"a.b": (2, 3)}, frozenset("XG"), 2, 8, torch.bfloat16)
    good = {"X": torch.ones(3), "G": torch.ones(2, 3)}

    def measured() -> Blocks:
        return [{"a.b": LayerStatistics(**good)}]

    bad = good["G"].clone()
    bad[1, 2] = number
    with pytest.raises(
        GpmetricError, match=r"^statistic G of layer a\.b is not finite on the calibration windows: try"
    ):
        cached_statistics(tmp_path, "k", sample, lambda: [{"a.b": LayerStatistics(X=good["X"], G=bad)}])
    assert not list(tmp_path.iterdir())
    path = cached_statistics(tmp_path, "k", sample, measured)
    stored = {"a.b/G": bad.bfloat16(), "a.b/X": good["X"]}
    sums = {name: hashlib.sha256(one.view(torch.uint8).numpy().tobytes()).hexdigest() for name, one in stored.items()}
    told = {"layers": ["a.b"], "names": ["G", "X"], "sequences": 2, "length": 8}
    digest = hashlib.sha256(json.dumps([told, sums], sort_keys=True).encode()).hexdigest()
    save_file(stored, path, metadata={"gpmetric": json.dumps(told), "digest": digest})
    assert cached_statistics(tmp_path, "k", sample, measured) == path
    assert caplog.messages == [
        f"statistics cache {str(path)!r} is damaged, and measured again: a.b/G holds a number that is not finite"
    ]
    assert torch.equal(load_statistics(path).layers["a.b"]["G"], good["G"].bfloat16())
    assert cached_statistics(tmp_path, "k", sample, fail) == path


def test_every_flipped_bit_of_a_cache_file_is_seen(tmp_path: Path) -> None:
    """One in each byte of a small file."""
    sample = Sample({"a.b": (2, 3)}, frozenset("XG"), 2, 8)
    values = {"X": torch.rand(3), "G": torch.rand(2, 3)}
    path = cached_statistics(tmp_path, "k", sample, lambda: [{"a.b": LayerStatistics(**values)}])
    content = path.read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(AssertionError, match="computed again"):
            cached_statistics(tmp_path, "k", sample, fail)
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_what_a_killed_command_left_is_removed(
    statistics: Statistics, model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Only where its process is dead here, and where nobody who may be elsewhere holds its lock."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    names = [f"{'a' * 64}.{number}.partial" for number in (child.pid, os.getpid(), 2**22 + 1, 2**22 + 2)]
    for name in [*names, "another.partial"]:
        (tmp_path / name).write_bytes(b"begun")
    with (tmp_path / names[3]).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        path = cached_statistics(tmp_path, "k", sample_of(model, statistics), backwards(statistics))
    assert set(os.listdir(tmp_path)) == {path.name, names[1], names[3], "another.partial"}
    removed = {f"removed {str(tmp_path / names[one])!r}, which a command that was killed had begun" for one in (0, 2)}
    assert set(caplog.messages) == removed


def test_a_folder_that_cannot_be_written_is_said_before_the_work(llama: Model, tmp_path: Path) -> None:
    sample = Sample.of(llama, make_tokens(2, 8), "X")
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(GpmetricError, match=r"^statistics cache '.*' cannot be written: [^\n]*$"):
            cached_statistics(folder, "k", sample, fail)
    if os.getuid():  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o555)
        with pytest.raises(GpmetricError, match="cannot be written: no permission"):
            cached_statistics(tmp_path / "locked", "k", sample, fail)


def test_a_full_disk_leaves_nothing_behind(statistics: Statistics, model: Model, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(GpmetricError, match=r"^statistics cache '.*' cannot be written: [^\n]*$"):
            cached_statistics(tmp_path, "k", sample_of(model, statistics), backwards(statistics))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []
