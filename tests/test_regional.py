"""The operand R, and the baseline of it: against plain autograd through hooks on the whole model's own blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpmetric.blocks import find_blocks
from gpmetric.blockwise.replay import record_calls
from gpmetric.calibration.accumulators import ACCUMULATORS, LayerStatistics
from gpmetric.calibration.collect import Statistics, collect, collect_block, collect_blocks
from gpmetric.evolution.request import DiscoverRequest
from gpmetric.evolution.workplace import campaign_work
from gpmetric.loading import load_model
from gpmetric.metrics import resolve_metric
from gpmetric.models import Model
from gpmetric.operands import OPERANDS, is_regional, needs_gradients
from gpmetric.pruning import protocol
from gpmetric.pruning.protocol import Protocol, Rule
from gpmetric.session import plan
from gpmetric.session.plan import make_plan
from gpmetric.session.session import plan_session
from gpmetric.session.work import Work
from gpmetric.targets import parse_target
from tests.pruning_helpers import session_of, windows_of


def plain_r(model: Model, tokens: Tensor) -> dict[str, Tensor]:
    """R [out, in] by layer: a window at a time, the norm of what each block gives within the model's own forward pass.

    What enters a block is cut off from the blocks before, so that a norm has gradients of its block's weights alone.
    """
    sums = {layer.name: torch.zeros(layer.weight.shape, dtype=torch.float64) for layer in model.layers}
    outputs: list[Tensor] = []

    def cut(_: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (args[0].detach(), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"].detach()}

    def keep(_: Any, __: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [block.module.register_forward_pre_hook(cut, with_kwargs=True) for block in model.blocks]
    hooks += [block.module.register_forward_hook(keep) for block in model.blocks]
    for layer in model.layers:
        layer.parameter.requires_grad_(True)
    try:
        for window in tokens:
            outputs.clear()
            model.module(input_ids=window[None], use_cache=False)
            for block, output in zip(model.blocks, outputs, strict=True):
                norm = output.square().sum().sqrt()
                gradients = torch.autograd.grad(norm, [layer.parameter for layer in block.layers], allow_unused=True)
                for layer, gradient in zip(block.layers, gradients, strict=True):
                    if gradient is not None:
                        sums[layer.name] += layer.oriented(gradient).double().abs()
    finally:
        for hook in hooks:
            hook.remove()
        for layer in model.layers:
            layer.parameter.requires_grad_(False)
    return {name: total / len(tokens) for name, total in sums.items()}


def assert_is(found: Statistics, expected: dict[str, Tensor]) -> None:
    for name, one in expected.items():
        assert found.layers[name]["R"].dtype == torch.float32
        torch.testing.assert_close(found.layers[name]["R"].double(), one, rtol=1e-3, atol=1e-5 * one.max().item())


class Twice(nn.Module):
    """An MLP of one matrix that is applied twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.tanh(self.inner(x)))


class Flat(nn.Module):
    """Two experts, each of which reads the tokens of all windows that come to it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # [tokens, width]
        chosen, output = flat[:, 0] > 0, torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            output[chosen == bool(number)] = expert(flat[chosen == bool(number)])
        return output.view_as(x)


def with_mlp(folder: Path, kind: Callable[[int], nn.Module]) -> Model:
    """A Llama whose second block has another MLP."""
    model = load_model(str(folder), device="cpu")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.module.model.layers[1].mlp = kind(32).eval().requires_grad_(False)
    return replace(model, blocks=find_blocks(model.module))


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_gpt2", None])
def model(request: pytest.FixtureRequest) -> Model:
    """None is the embedded demo model."""
    return load_model(None if request.param is None else str(request.getfixturevalue(request.param)), device="cpu")


def test_r_is_that_of_plain_autograd(model: Model, tiny_text: Path) -> None:
    tokens = windows_of(model, tiny_text, 20, 7).tokens
    assert_is(collect(model, tokens, "R"), plain_r(model, tokens))


@pytest.mark.parametrize("kind", [Twice, Flat])
def test_layers_that_are_called_twice_or_read_all_windows(
    tiny_llama: Path, tiny_text: Path, kind: Callable[[int], nn.Module]
) -> None:
    """A sequence's gradient is the sum of both calls', and of its own tokens alone."""
    model = with_mlp(tiny_llama, kind)
    tokens = windows_of(model, tiny_text, 20, 5).tokens
    assert_is(collect(model, tokens, "R"), plain_r(model, tokens))


def test_it_is_a_mean_of_absolute_gradients() -> None:
    """By hand: gradients 3 and 4 of one weight, of another 0 and 2."""
    row: Any = ACCUMULATORS["R"]
    sums = row.start(torch.Size([1, 2]), torch.device("cpu"))
    for gradient in ([[3.0, 0.0]], [[-4.0, 2.0]]):
        sums.add(torch.tensor(gradient))
    torch.testing.assert_close(sums.result(2), torch.tensor([[3.5, 1.0]]))


def test_it_is_no_gradient_of_the_model() -> None:
    assert (is_regional(["R"]), needs_gradients(["R"])) == (True, False)
    assert not is_regional(set(OPERANDS) - {"R"})
    assert not resolve_metric("wandapp_rgs").needs_gradients


def same_bits(one: Statistics, other: Statistics) -> bool:
    return all(
        one.layers[name].values.keys() == other.layers[name].values.keys()
        and all(torch.equal(value, other.layers[name][key]) for key, value in one.layers[name].values.items())
        for name in one.layers
    )


@pytest.mark.every(3)
@pytest.mark.parametrize("names", ["R", "RD", "XRG", "RGHDF"])
@pytest.mark.parametrize("folder", ["tiny_llama", "tiny_gpt2"])
def test_a_streamed_model_gives_the_same_bits(
    request: pytest.FixtureRequest, folder: str, names: str, tiny_text: Path
) -> None:
    """However it is collected, R is the same too, beside other statistics or alone."""
    path = str(request.getfixturevalue(folder))
    resident, streamed = (load_model(path, device="cpu", resident=one) for one in (True, False))
    tokens = windows_of(resident, tiny_text, 20, 5).tokens
    expected, alone = collect(resident, tokens, names), collect(resident, tokens, "R")
    assert expected.names == {"X", *names}
    for room in (None, 1000):
        assert same_bits(collect(streamed, tokens, names, room=room), expected)
    for name, one in alone.layers.items():
        assert torch.equal(one["R"], expected.layers[name]["R"])


@pytest.mark.parametrize("names", ["R", "RG"])
def test_steps_are_told_to_the_end(model: Model, tiny_text: Path, names: str) -> None:
    tokens = windows_of(model, tiny_text, 20, 3).tokens
    steps: list[tuple[int, int]] = []
    for _ in collect_blocks(model, tokens, names, progress=lambda done, total: steps.append((done, total))):
        pass
    total = len(model.blocks) + (len(tokens) if "G" in names else 0)
    assert steps == [(done, total) for done in range(total + 1)]


def test_a_model_is_left_as_it_was(model: Model, tiny_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is interrupted; and one layer's gradient is there at a time."""
    weights = [layer.weight.clone() for layer in model.layers]
    tokens = windows_of(model, tiny_text, 20, 3).tokens
    alive: list[int] = []

    class Counting:
        def __init__(self, *_: Any) -> None: ...

        def add(self, _: Tensor) -> None:
            alive.append(sum(parameter.grad is not None for parameter in model.module.parameters()))
            if len(alive) == 9:
                raise KeyboardInterrupt

        def result(self, _: int) -> Tensor:
            return torch.zeros(1)

    row: Any = ACCUMULATORS["R"]
    with pytest.raises(KeyboardInterrupt):
        collect(model, tokens, "R", accumulators=ACCUMULATORS | {"R": replace(row, start=Counting)})
    collect(model, tokens, "R")
    assert alive == [1] * 9
    for parameter in model.module.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert not parameter._post_accumulate_grad_hooks
    assert all(torch.equal(layer.weight, one) for layer, one in zip(model.layers, weights, strict=True))


def test_one_block_alone_is_what_the_walk_gives(model: Model, tiny_text: Path) -> None:
    tokens = windows_of(model, tiny_text, 20, 5).tokens
    calls = record_calls(model, tokens.split(2))
    found = collect_block(calls, 0, calls.hidden, {"R"})
    walked = collect(model, tokens, "R").layers
    for layer in model.blocks[0].layers:
        assert found[layer.name].values.keys() == {"X", "R"}
        torch.testing.assert_close(found[layer.name]["R"], walked[layer.name]["R"], rtol=1e-4, atol=1e-6)


# Pruning by it


@contextmanager
def seen_statistics(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, LayerStatistics]]:
    """What each layer is pruned with, by name."""
    original, found = protocol.prune_layer, dict[str, LayerStatistics]()

    def spy(layer: Any, weight: Tensor, rule: Rule, statistics: LayerStatistics, *more: Any) -> Any:
        found[layer.name] = statistics
        return original(layer, weight, rule, statistics, *more)

    with monkeypatch.context() as patch:
        patch.setattr(protocol, "prune_layer", spy)
        yield found


@pytest.mark.parametrize(("update", "fit"), [("none", "own"), ("obs", "dense")])
@pytest.mark.parametrize("folder", ["tiny_llama", "tiny_gpt2"])
def test_sequential_is_on_what_the_pruned_model_gives(
    request: pytest.FixtureRequest, folder: str, tiny_text: Path, monkeypatch: pytest.MonkeyPatch, update: str, fit: str
) -> None:
    """By hand: blocks are pruned in the model, one after the other, and R of the next, dense one is taken then."""
    path = str(request.getfixturevalue(folder))
    model, by_hand = load_model(path, device="cpu"), load_model(path, device="cpu")
    windows = windows_of(model, tiny_text)
    made = Protocol(session_of(model, windows), one_shot=False)
    rule = Rule(resolve_metric("abs(W)*X*R"), parse_target("0.5"), update, fit)
    made.prepare([rule.metric], update)
    assert made.session.dense is None
    dense = plain_r(by_hand, windows.tokens)
    with seen_statistics(monkeypatch) as used:
        walk = made.walk([rule])
        for index, (pruned,) in walk:
            expected = plain_r(by_hand, windows.tokens)
            for layer in by_hand.blocks[index].layers:
                one = expected[layer.name]
                found = used[layer.name]["R"].double()
                torch.testing.assert_close(found, one, rtol=1e-3, atol=1e-4 * one.max().item())
                assert torch.allclose(found, dense[layer.name], rtol=1e-3) == (index == 0)
            for layer in by_hand.blocks[index].layers:
                layer.weight.copy_(pruned[layer.name])


def test_one_shot_is_on_the_dense_model(tiny_llama: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(str(tiny_llama), device="cpu")
    windows = windows_of(model, tiny_text)
    made = Protocol(session_of(model, windows), one_shot=True)
    metric = resolve_metric("abs(W)*R")
    made.prepare([metric], "none")
    dense = plain_r(model, windows.tokens)
    with seen_statistics(monkeypatch) as used:
        for _ in made.walk([Rule(metric, parse_target("0.5"))]):
            pass
    for name, one in dense.items():
        torch.testing.assert_close(used[name]["R"].double(), one, rtol=1e-3, atol=1e-4 * one.max().item())


# What it takes


def test_the_memory_of_one_window_in_one_block(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R, and a graph that does not grow with the blocks; whether it is collected of all layers or block by block."""
    monkeypatch.setattr(plan, "resident_bytes", lambda device=None: 0)
    model = load_model(str(tiny_llama), device="cpu")
    entries = sum(layer.weight.numel() for layer in model.layers)
    block = sum(layer.weight.numel() for layer in model.blocks[0].layers)
    work = Work(length=4096, calibration=4096)
    plans = {
        names: make_plan(model, replace(work, block=frozenset(names)), 10**12).memory_bytes for names in ("X", "XR")
    }
    features = 32 + 2 * 16 + 32 + 2 * 44 + 32  # outputs of q, k and v, o, gate and up, down
    before, graph = 4 * 4096 * features, 3 * 4 * 4096 * features + 2 * 4 * 44 * 32  # of a forward pass; and back
    assert plans["XR"] - plans["X"] == 4 * block + graph - before
    dense = make_plan(model, replace(work, dense=frozenset("XR")), 10**12).memory_bytes
    gradients = make_plan(model, replace(work, dense=frozenset("XG")), 10**12).memory_bytes
    assert 4 * entries < dense - plans["X"]
    assert dense < gradients


def test_a_search_does_not_pay_for_it_unless_it_is_asked_for(tiny_llama: Path, tiny_text: Path) -> None:
    request = DiscoverRequest(model=str(tiny_llama), text=str(tiny_text), sequence_length=32, samples=4, windows=2)
    assert request.operands == tuple(name for name in OPERANDS if name != "R")
    assert "wandapp_rgs" not in {one.name for one in request.baselines}
    asked = replace(request, operands=("W", "X", "R"))
    assert "wandapp_rgs" in {one.name for one in asked.baselines}
    assert not any(one.needs_gradients for one in asked.baselines)
    works = [campaign_work(plan_session(one)) for one in (request, asked)]
    assert ["R" in work.dense | work.block for work in works] == [False, True]
    assert math.isfinite(works[1].forward)
