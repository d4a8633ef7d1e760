"""Experts that read too little have their siblings' statistics, recomputed here from what hooks see."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from gpmetric.calibration.accumulators import curvature
from gpmetric.calibration.collect import collect, collect_blocks, count_tokens
from gpmetric.calibration.siblings import borrowing
from gpmetric.cli import app
from gpmetric.loading import load_model
from gpmetric.models import Model
from gpmetric.pruning.prune import prune
from gpmetric.pruning.recipe import Recipe
from gpmetric.pruning.verify import verify
from tests.mixtures import save_mixture

TOKENS = torch.randint(1, 250, (4, 40), generator=torch.Generator().manual_seed(3))
PLAIN = Recipe("wanda", "0.5", samples=4, sequence_length=40)
IDLE = "model.layers.1.mlp.experts.2."  # no token is routed to it


@pytest.fixture(scope="module")
def folder(save_model: Callable[..., Path]) -> Path:
    """A mixture in whose second block one expert reads nothing."""
    from transformers import AutoModelForCausalLM

    folder = save_mixture(save_model, "gpt_oss")
    module: Any = AutoModelForCausalLM.from_pretrained(folder)
    module.model.layers[1].mlp.router.bias.data[2] = -1e4
    module.save_pretrained(folder)
    return folder


@pytest.fixture
def model(folder: Path) -> Model:
    return load_model(str(folder), device="cpu")


def reads_of(model: Model, tokens: Tensor) -> dict[str, Tensor]:
    """What each layer reads, [tokens, in], nothing of those that no token comes to."""
    found: dict[str, list[Tensor]] = {}

    def note(name: str, _: nn.Module, args: tuple[Tensor]) -> None:
        found.setdefault(name, []).append(args[0].flatten(0, -2))

    hooks = [layer.module.register_forward_pre_hook(partial(note, layer.name)) for layer in model.layers]
    with torch.no_grad():
        model.module(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows) for name, rows in found.items()}


def test_tokens_are_those_that_were_routed(model: Model) -> None:
    reads, counted = reads_of(model, TOKENS), count_tokens(model, TOKENS)
    assert counted == {
        layer.name: len(reads.get(layer.name, ())) for layer in model.layers if ".experts." in layer.name
    }
    assert counted[IDLE + "down_proj"] == 0
    assert sum(count for name, count in counted.items() if "layers.0" in name and "gate_up" in name) == 2 * 160
    layers = [layer for layer in model.layers if ".experts." in layer.name]
    assert borrowing(layers, counted, pairs=False) == [IDLE + "gate_up_proj", IDLE + "down_proj"]


def test_statistics_of_an_expert_are_of_its_tokens(model: Model) -> None:
    """From the first token on for X; the Gram matrix and D only with as many tokens as inputs, else of all experts."""
    reads, few = reads_of(model, TOKENS[:, :20]), set()
    for block in collect_blocks(model, TOKENS[:, :20], ["X", "D", "gram"]):
        for name, found in block.items():
            rows = reads.get(name, torch.empty(0))
            kind = name.rpartition(".")[2]
            siblings = [other for other in reads if other.endswith(kind) and other[:15] == name[:15]]
            pooled = torch.cat([reads[other] for other in siblings])
            expert = ".experts." in name
            lacking = expert and len(rows) < pooled.shape[1]
            assert found.tokens == len(rows)
            own = rows if len(rows) else pooled
            torch.testing.assert_close(found["X"], own.square().mean(dim=0).sqrt(), rtol=1e-4, atol=1e-5)
            used = pooled if lacking else rows
            gram = used.T @ used / len(used)
            torch.testing.assert_close(found["gram"], gram, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found["D"], curvature(gram), rtol=1e-3, atol=1e-4)
            assert set(found.borrowed) == ({"D", "gram"} if lacking else set()) | ({"X"} if not len(rows) else set())
            few |= {name} if lacking and len(rows) else set()
    assert few  # not only the one that reads nothing


@pytest.mark.parametrize("at_once", [True, False])
def test_an_idle_expert_has_its_siblings_gradients(model: Model, at_once: bool) -> None:
    found = collect(model, TOKENS, ["G", "H", "F", "R"], at_once=at_once).layers
    for kind in ("gate_up_proj", "down_proj"):
        for name in "GHFR":
            others = [found[f"model.layers.1.mlp.experts.{number}.{kind}"][name] for number in (0, 1, 3)]
            torch.testing.assert_close(found[f"{IDLE}{kind}"][name], torch.stack(others).mean(dim=0))
            assert all(one.any() for one in others)
            assert not torch.equal(others[0], others[1])


def test_the_idle_are_named(folder: Path, tiny_text: Path, tmp_path: Path) -> None:
    text = str(tiny_text)
    told = prune(
        str(folder), output=tmp_path / "out", metric="wanda", calibration=text, samples=4, windows=4,
        sequence_length=40, device="cpu",
    )  # fmt: skip
    idle = [IDLE + "gate_up_proj", IDLE + "down_proj"]
    assert told["experts"]["starved"] == idle
    assert [layer["name"] for layer in told["layers"] if layer.get("starved")] == idle
    assert told["experts"]["tokens"][idle[0]] == 0
    assert all(layer["sparsity"] == 0.5 for layer in told["layers"])
    assert verify(str(tmp_path / "out"), against=str(folder), device="cpu")["ok"]


def test_tune_names_the_idle_as_prune_does(
    folder: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its document and on the terminal; of few recipes, of which that of Wanda is found to be the best."""
    monkeypatch.setattr("gpmetric.tuning.choice.Choice.run", lambda choice: choice.measure([PLAIN])[0])
    shared = ["--calibration", str(tiny_text), "--samples", "4", "--windows", "4", "--sequence-length", "40"]
    shared += ["--device", "cpu", "--json", str(tmp_path / "told.json")]
    documents, printed = {}, {}
    for command, options in {
        "tune": ["--sparsity", "0.5", "--no-evolve", "--search-windows", "4"],
        "prune": ["--target", "0.5", "--metric", "wanda", "--text", f"{tiny_text}#validation"],
    }.items():
        done = CliRunner().invoke(app, [command, str(folder), "-o", str(tmp_path / command), *options, *shared])
        assert done.exit_code == 0, done.output
        documents[command] = json.loads((tmp_path / "told.json").read_text())
        (printed[command],) = [line for line in done.output.splitlines() if line.startswith("experts read")]
    found = documents["tune"]["experts"]
    assert found["starved"] == [IDLE + "gate_up_proj", IDLE + "down_proj"]
    assert found["tokens"][IDLE + "down_proj"] == 0
    layers, most = len(found["tokens"]), max(found["tokens"].values())
    told = f"experts read 0 to {most} calibration tokens each; 2 of {layers} layers too few: theirs are siblings'"
    assert printed["tune"] == f"{told} statistics"
    assert documents["prune"]["experts"]["starved"] == found["starved"]
    assert printed["prune"].partition("; ")[2] == printed["tune"].partition("; ")[2]
