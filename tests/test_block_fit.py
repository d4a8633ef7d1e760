"""The rounds of `--update block`: what they reach, what they leave alone, and that they are what the walk does."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpmetric.blockwise.hidden import Hidden
from gpmetric.blockwise.replay import record_calls
from gpmetric.blockwise.shelf import Shelf
from gpmetric.calibration.accumulators import LayerStatistics
from gpmetric.demo.text import demo_text
from gpmetric.errors import InputError
from gpmetric.evolution.request import DiscoverRequest
from gpmetric.evolution.workplace import campaign_work
from gpmetric.loading import load_model
from gpmetric.metrics import resolve_metric
from gpmetric.models import Model
from gpmetric.outputs import MANIFEST
from gpmetric.pruning import block_fit
from gpmetric.pruning.allocation import Allocation
from gpmetric.pruning.bench import bench
from gpmetric.pruning.block_fit import _Descent, fit_block
from gpmetric.pruning.mask import select_mask
from gpmetric.pruning.protocol import Protocol, Rule
from gpmetric.pruning.prune import prune
from gpmetric.pruning.requests import BenchRequest, PruneRequest
from gpmetric.pruning.updaters import UPDATERS
from gpmetric.pruning.verify import verify
from gpmetric.session import plan
from gpmetric.session.plan import make_plan
from gpmetric.session.session import plan_session
from gpmetric.session.work import Work
from gpmetric.targets import parse_target
from tests.pruning_helpers import make_layer, prune_weight, session_of, windows_of

BLOCK = [name for name, row in UPDATERS.items() if row.fits_blocks]
BASE = {name: "none" if name == "block" else name.removesuffix("+block") for name in BLOCK}


def pruned_blocks(
    model: Model, text: Path, update: str, target: Any = "0.5", fit: str = "own", once: bool = False
) -> list[dict[str, Tensor]]:
    """By block, the pruned weights of its layers."""
    made = Protocol(session_of(model, windows_of(model, text, 24, 6)), one_shot=once)
    rule = Rule(resolve_metric("wanda"), parse_target(target) if isinstance(target, str) else target, update, fit)
    made.prepare([rule.metric], update)
    return [pruned for _, (pruned,) in made.walk([rule])]


def block_outputs(model: Model, tokens: Tensor) -> list[Tensor]:
    """What every block gives in a run of the whole model, by hooks."""
    outputs: list[Tensor] = []
    hooks = [
        block.module.register_forward_hook(
            lambda _, __, output: outputs.append(output[0] if isinstance(output, tuple) else output)
        )
        for block in model.blocks
    ]
    with torch.no_grad():
        model.module(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return outputs


def put(model: Model, weights: dict[str, Tensor]) -> None:
    for layer in model.layers:
        if layer.name in weights:
            layer.weight.copy_(weights[layer.name])


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def folder(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


# The rows


def test_there_is_a_row_for_every_updater_of_layers() -> None:
    assert BLOCK == ["block", "obs+block", "obs-blockwise+block", "admm+block"]
    for name in BLOCK:
        row, base = UPDATERS[name], UPDATERS[BASE[name]]
        assert replace(row, fits_blocks=False, meaning="") == replace(base, meaning="")
        assert (row.changes, base.fits_blocks) == (True, False)
    assert [name for name, row in UPDATERS.items() if not row.changes] == ["none"]


@pytest.mark.parametrize("update", BLOCK)
def test_weights_without_their_block_are_those_of_the_base(update: str) -> None:
    weight, gram = make_layer(6, 44)
    for text in ("0.5", "2:4"):
        statistics = LayerStatistics(X=gram.diagonal().sqrt(), gram=gram)
        options: Any = (resolve_metric("wanda"), parse_target(text), statistics)
        assert torch.equal(prune_weight(weight, *options, update), prune_weight(weight, *options, BASE[update]))


# The descent


def test_a_step_is_adams() -> None:
    """By torch's own Adam, whose rate is set to the layer's size and half a cosine before every step."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, 7, generator=generator) * (torch.rand(5, 7, generator=generator) > 0.5)
    ours, theirs = _Descent([start], 6), torch.nn.Parameter(start.clone())
    adam = torch.optim.Adam([theirs], betas=(0.9, 0.99), eps=1e-8)
    size = float(start[start != 0].square().mean().sqrt())
    rates = []
    for step in range(6):
        slope = torch.randn(5, 7, generator=generator)
        before = ours.weights[0].clone()
        ours.step([slope])
        adam.param_groups[0]["lr"] = 0.03 * size * (1 + math.cos(math.pi * step / 6)) / 2
        rates.append(adam.param_groups[0]["lr"])
        theirs.grad = slope * (start != 0)
        adam.step()
        torch.testing.assert_close(ours.weights[0], theirs.detach(), rtol=1e-5, atol=1e-7)
        assert not torch.equal(ours.weights[0], before)
    assert rates == sorted(rates, reverse=True)
    assert torch.equal(ours.weights[0] != 0, start != 0)
    ours.step([None])
    torch.testing.assert_close(ours.weights[0], theirs.detach(), rtol=1e-5, atol=1e-7)


def test_a_layer_without_a_kept_weight_stays_empty() -> None:
    descent = _Descent([torch.zeros(2, 3)], 4)
    descent.step([torch.ones(2, 3)])
    assert not descent.weights[0].any()


def error_of(model: Model, index: int, weights: list[Tensor], inputs: Hidden, goals: list[Tensor]) -> float:
    block = model.blocks[index]
    with model.holding(weights, block.layers):
        found = [inputs.calls.call(index, number, states) for number, states in enumerate(inputs)]
    return float(sum((one - goal).square().sum() for one, goal in zip(found, goals, strict=True)))


@torch.no_grad()
def test_the_error_falls_and_zeros_are_zeros(folder: str, tiny_text: Path) -> None:
    """Of a block pruned by magnitude: the error on the windows is less than half; nothing else of the model moves."""
    model = load_model(folder, device="cpu")
    before = {name: one.clone() for name, one in model.module.named_parameters()}
    calls = record_calls(model, windows_of(model, tiny_text, 24, 24).tokens.split(5))
    inputs, goals = Hidden(calls, Shelf()), Hidden(calls, Shelf())
    for number, states in enumerate(calls.hidden):
        goals[number] = calls.call(0, number, states)
    layers = model.blocks[0].layers
    start = [layer.weight * select_mask(layer.weight.abs(), parse_target("row:0.5")) for layer in layers]
    given = [one.clone() for one in start]
    fitted = fit_block(0, layers, start, inputs, goals)
    errors = [error_of(model, 0, weights, inputs, list(goals)) for weights in (start, fitted)]
    assert errors[1] < 0.5 * errors[0]
    for one, other, mine in zip(fitted, start, given, strict=True):
        assert torch.equal(one != 0, other != 0)
        assert torch.equal(other, mine)
        assert not torch.equal(one, other)
    for name, parameter in model.module.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert (parameter.requires_grad, parameter.grad) == (False, None)
    again = fit_block(0, layers, start, inputs, goals)
    assert all(torch.equal(one, other) for one, other in zip(fitted, again, strict=True))


def test_it_is_never_worse_than_before(tiny_llama: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With steps that are far too large the weights given come back; and where there is nothing to learn."""
    model = load_model(str(tiny_llama), device="cpu")
    calls = record_calls(model, windows_of(model, tiny_text, 24, 6).tokens.split(5))
    inputs, goals = Hidden(calls, Shelf()), Hidden(calls, Shelf())
    for number, states in enumerate(calls.hidden):
        goals[number] = calls.call(0, number, states).detach()
    layers = model.blocks[0].layers
    dense = [layer.weight for layer in layers]
    assert all(one is other for one, other in zip(fit_block(0, layers, dense, inputs, goals), dense, strict=True))
    monkeypatch.setattr(block_fit, "_RATE", 100.0)
    start = [one * select_mask(one.abs(), parse_target("row:0.3")) for one in dense]
    assert all(
        torch.equal(one, other) for one, other in zip(fit_block(0, layers, start, inputs, goals), start, strict=True)
    )


# In a walk


@pytest.mark.every(3)
@pytest.mark.parametrize("target", ["0.5", "layer:0.6", "block:0.5", "2:4"])
@pytest.mark.parametrize("update", BLOCK)
def test_masks_are_those_of_the_base(tiny_llama: Path, tiny_text: Path, update: str, target: str) -> None:
    """In the first block, to which nothing has happened before; every block reaches its sparsity."""
    model = load_model(str(tiny_llama), device="cpu")
    base, fitted = (pruned_blocks(model, tiny_text, one, target) for one in (BASE[update], update))
    for name, one in base[0].items():
        assert torch.equal(one != 0, fitted[0][name] != 0)
        assert not torch.equal(one, fitted[0][name])
    for one, other in zip(base, fitted, strict=True):
        assert {name: int((w == 0).sum()) for name, w in one.items()} == {
            name: int((w == 0).sum()) for name, w in other.items()
        }


@pytest.mark.parametrize(("fit", "once"), [("own", False), ("dense", False), ("own", True)])
def test_every_block_comes_nearer_to_its_goal(folder: str, tiny_text: Path, fit: str, once: bool) -> None:
    """By hand: what block after block gives in a whole model, against the dense block on the same inputs or its own."""
    model, dense = load_model(folder, device="cpu"), load_model(folder, device="cpu")
    tokens = windows_of(model, tiny_text, 24, 6).tokens
    theirs = block_outputs(dense, tokens)
    fitted = pruned_blocks(dense, tiny_text, "block", fit=fit, once=once)
    for index, weights in enumerate(fitted):
        masked = {layer.name: layer.weight * (weights[layer.name] != 0) for layer in dense.blocks[index].layers}
        goal = theirs[index] if fit == "dense" or once else block_outputs(model, tokens)[index]
        errors = []
        for candidate in (masked, weights):
            put(model, candidate)
            errors.append(float((block_outputs(model, tokens)[index] - goal).square().mean()))
        assert errors[1] < 0.9 * errors[0], index
        if once:  # the next one reads what the dense model gives
            put(model, {layer.name: layer.weight for layer in dense.blocks[index].layers})


def test_the_fits_differ_behind_the_first_block(tiny_llama: Path, tiny_text: Path) -> None:
    model = load_model(str(tiny_llama), device="cpu")
    own, dense = (pruned_blocks(model, tiny_text, "block", fit=fit) for fit in ("own", "dense"))
    same = [all(torch.equal(one[name], other[name]) for name in one) for one, other in zip(own, dense, strict=True)]
    assert same == [True, False, False]


@pytest.mark.parametrize("update", ["block", "admm+block"])
@pytest.mark.parametrize("fit", ["own", "dense"])
def test_layers_left_dense_are_left_alone(tiny_llama: Path, tiny_text: Path, update: str, fit: str) -> None:
    """One of each block, and all of a block."""
    model = load_model(str(tiny_llama), device="cpu")
    before = {name: one.clone() for name, one in model.module.named_parameters()}
    alone = [layer.name for layer in model.layers if "o_proj" in layer.name or ".1." in layer.name]
    targets = {layer.name: parse_target("0" if layer.name in alone else "0.5") for layer in model.layers}
    found = pruned_blocks(model, tiny_text, update, Allocation("row", targets), fit)
    assert {name for block in found for name in block} == targets.keys() - {*alone}
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.module.named_parameters())


@pytest.mark.every(3)
@pytest.mark.parametrize("update", ["block", "obs+block"])
@pytest.mark.parametrize(("fit", "once"), [("own", False), ("dense", False), ("own", True)])
def test_a_streamed_model_is_pruned_as_a_resident_one(
    folder: str, tiny_text: Path, update: str, fit: str, once: bool
) -> None:
    resident, streamed = (load_model(folder, device="cpu", resident=one) for one in (True, False))
    both = [pruned_blocks(one, tiny_text, update, fit=fit, once=once) for one in (resident, streamed)]
    for one, other in zip(*both, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_half_precision_is_learned_in_full(tiny_llama: Path, tiny_text: Path) -> None:
    """Weights come back in the model's dtype, and the error has fallen as it is in use."""
    model = load_model(str(tiny_llama), device="cpu", dtype="bfloat16")
    tokens = windows_of(model, tiny_text, 24, 6).tokens
    goal = block_outputs(model, tokens)[0].float()
    fitted = pruned_blocks(model, tiny_text, "block")[0]
    masked = {layer.name: layer.weight * (fitted[layer.name] != 0) for layer in model.blocks[0].layers}
    errors = []
    for weights in (masked, fitted):
        put(model, weights)
        errors.append(float((block_outputs(model, tokens)[0].float() - goal).square().mean()))
    assert {one.dtype for one in fitted.values()} == {torch.bfloat16}
    assert errors[1] < 0.9 * errors[0]


# The commands


def test_bench_says_it_and_the_loss_falls(tmp_path: Path) -> None:
    """Of the demo model on another text than it is calibrated on."""
    calibration, text = tmp_path / "c.txt", tmp_path / "t.txt"
    calibration.write_text(demo_text("calibration")[:10_000])  # all of it takes longer to read than the rest together
    text.write_text(demo_text("test")[:10_000])
    options: dict[str, Any] = {"metric": ["wanda"], "target": ["0.6"], "samples": 16, "sequence_length": 32}
    options |= {"windows": 16, "device": "cpu", "calibration": str(calibration), "text": [str(text)]}
    rows = {
        (update, fit): bench(None, update=update, fit=fit, **options)["results"][0]
        for update, fit in (("none", "own"), ("block", "own"), ("block", "dense"), ("obs", "own"), ("obs+block", "own"))
    }
    ppl = {key: next(iter(row["ppl"].values())) for key, row in rows.items()}
    assert {key: (row["update"], row["fit"]) for key, row in rows.items()} == {key: key for key in rows}
    assert ppl["block", "own"] < ppl["none", "own"]
    assert ppl["block", "dense"] < ppl["none", "own"]
    assert ppl["obs+block", "own"] < ppl["obs", "own"]


@pytest.mark.parametrize(("update", "fit"), [("block", "own"), ("obs+block", "dense")])
def test_a_checkpoint_says_it_and_is_what_bench_measures(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, update: str, fit: str
) -> None:
    options: dict[str, Any] = {"update": update, "fit": fit, "samples": 6, "windows": 6, "sequence_length": 32}
    options |= {"device": "cpu", "calibration": str(tiny_text), "target": "2:4"}
    told = prune(str(tiny_llama), output=tmp_path / "a", metric="wanda", **options)
    assert (told["update"], told["fit"]) == (update, fit)
    (row,) = bench(str(tiny_llama), metric=["wanda"], text=[str(tiny_text)], **options)["results"]
    assert told["perplexity"] == pytest.approx(row["ppl"][str(tiny_text)], rel=1e-3)
    assert verify(tmp_path / "a", against=str(tiny_llama), device="cpu")["problems"] == []
    assert json.loads((tmp_path / "a" / MANIFEST).read_text())["update"] == update


@pytest.mark.parametrize("kind", [BenchRequest, PruneRequest])
def test_one_shot_with_the_dense_fit_is_refused(kind: Callable[..., Any]) -> None:
    where: dict[str, Any] = {"metric": ("wanda",)} if kind is BenchRequest else {"output": Path("a"), "metric": "wanda"}
    kind(**where, update="block", one_shot=True).check()
    kind(**where, update="block", fit="dense").check()
    with pytest.raises(InputError, match="--one-shot takes the dense model's"):
        kind(**where, update="block", fit="dense", one_shot=True).check()


def test_what_it_takes(tiny_llama: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph of one window, and six copies of a block's weights; a search plans for it, too."""
    monkeypatch.setattr(plan, "resident_bytes", lambda device=None: 0)
    model = load_model(str(tiny_llama), device="cpu")
    work = Work(length=4096, calibration=4096)
    sizes = [make_plan(model, replace(work, fits_blocks=one), 10**12).memory_bytes for one in (False, True)]
    features = 32 + 2 * 16 + 32 + 2 * 44 + 32
    entries = sum(layer.weight.numel() for layer in model.blocks[0].layers)
    assert sizes[1] - sizes[0] == 2 * 4 * 4096 * features + 26 * entries
    for once in (False, True):
        made = Protocol(session_of(model, windows_of(model, tiny_text, 24, 6)), one_shot=once)
        found = [made.work([resolve_metric("wanda")], update) for update in ("none", "block")]
        assert [one.fits_blocks for one in found] == [False, True]
        assert found[1].forward > 10 * found[0].forward / (1 + once)
        assert found[1].calibration - found[0].calibration == (1 + once) * 6 * 24
    request = DiscoverRequest(model=str(tiny_llama), text=str(tiny_text), sequence_length=32, samples=4, windows=2)
    works = [campaign_work(plan_session(replace(request, update=update))) for update in ("none", "block")]
    assert [one.fits_blocks for one in works] == [False, True]
    assert works[1].forward > works[0].forward
