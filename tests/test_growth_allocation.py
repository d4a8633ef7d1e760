"""Growth of allocate and slim: a row is added to a table, and a command runs with it. CONTRIBUTING tells the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import gpmetric
from gpmetric.allocation.allocate import allocate
from gpmetric.allocation.allocators import Problem
from gpmetric.allocation.levels import Levels
from gpmetric.allocation.request import ALLOCATORS, Allocator
from gpmetric.errors import InputError
from gpmetric.evaluation.objectives import OBJECTIVES, Objective
from gpmetric.pruning.allocation import read_allocation
from gpmetric.pruning.prune import prune
from gpmetric.structured.request import UNIT_KINDS, UnitKind
from gpmetric.structured.slim import slim
from gpmetric.targets import GRANULARITIES, Granularity, parse_target

SIZE: dict[str, Any] = {"samples": 4, "search_windows": 8, "windows": 4, "sequence_length": 32, "device": "cpu"}


@pytest.fixture
def wide(save_model: Callable[..., Path]) -> Path:
    """A Llama whose inputs are 96 and 160 wide."""
    return save_model(
        "llama", hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip


pytestmark = pytest.mark.usefixtures("here")


def late(problem: Problem, sparsity: float) -> Levels:
    """Later blocks lose more."""
    return problem.at_budget([sparsity + 0.1 * block for block in problem.blocks], sparsity)


def test_an_allocator(tiny_llama: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule is asked for by name, stands beside the front, and in the first population of nsga2."""
    monkeypatch.setitem(ALLOCATORS, "late", Allocator("later blocks lose more", late))
    options: dict[str, Any] = {"calibration": str(tiny_text), "sparsity": 0.6, "evaluations": 30, **SIZE}
    found = allocate(str(tiny_llama), allocator="late", **options)
    means = [
        sum(share for name, share in found["allocation"]["sparsity"].items() if f"layers.{block}." in name) / 7
        for block in range(3)
    ]
    assert means == sorted(means)
    assert means[2] - means[0] == pytest.approx(0.2, abs=0.02)
    assert {"late", "uniform", "owl"} <= allocate(str(tiny_llama), **options)["baselines"].keys()
    with pytest.raises(InputError, match="--init needs --allocator nsga2"):
        allocate(str(tiny_llama), allocator="late", init="x.json", **options)


def test_a_granularity(wide: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """96 inputs are groups of 64 and 32; the file is read back, pruned with, and meets the budget."""
    monkeypatch.setitem(GRANULARITIES, "segment", Granularity("each 64 consecutive inputs of one output", columns=64))
    file, text = tmp_path / "a.json", str(tiny_text)
    options: dict[str, Any] = {"sparsity": 0.6, "granularity": "segment", "genes": "module", "evaluations": 30}
    found = allocate(str(wide), output=file, calibration=text, **options, **SIZE)
    allocation = read_allocation(file)
    assert found["granularity"] == allocation.granularity == "segment"
    target = allocation.targets["model.layers.0.self_attn.q_proj"]
    assert target.groups((96, 96)) == [(96, 64), (96, 32)]
    pruned = prune(
        str(wide), output=tmp_path / "pruned", calibration=text, target="segment:0.6", allocation=file,
        samples=4, windows=4, sequence_length=32, device="cpu",
    )  # fmt: skip
    assert pruned["sparsity"] == pytest.approx(found["picked"]["sparsity"])
    weight = load_file(tmp_path / "pruned" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    for part in weight.split(64, dim=1):
        assert ((part == 0).sum(dim=1) == int(part.shape[1] * target.sparsity)).all()
    assert parse_target("segment:0.6").granularity == "segment"


class Squares:
    """Squared differences of log-probabilities."""

    bytes = 0

    def __init__(self, logits: Tensor, labels: Tensor) -> None:
        self.predictions = len(labels)
        self._dense = logits.log_softmax(-1)

    def excess(self, logits: Tensor) -> Tensor:
        return (logits.log_softmax(-1) - self._dense).square().mean(dim=-1).sum()


def test_an_objective(tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, "squares", Objective("squared differences of log-probabilities", Squares))
    options: dict[str, Any] = {"calibration": str(tiny_text), "objective": "squares", **SIZE}
    found = allocate(str(tiny_llama), sparsity=0.6, genes="block", evaluations=30, **options)
    assert found["objective"] == "squares"
    assert found["picked"]["sparsity"] == pytest.approx(0.6, abs=0.01)
    small = slim(str(tiny_llama), output=tmp_path / "small", steps=4, **options)
    assert small["objective"] == small["progress"][-1]["objective"] == "squares"
    assert small["progress"][-1]["loss"] > 0


@pytest.mark.every(3)
@pytest.mark.parametrize("form", ["hetero", "uniform", "padded"])
def test_a_structured_unit(
    form: str, tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pairs of neighbouring channels go together, in every format; what is written is opened again."""
    monkeypatch.setitem(UNIT_KINDS, "pair", UnitKind("pairs of channels", "mlp", together=2))
    options: dict[str, Any] = {"calibration": str(tiny_text), "sparsity": 0.4, "steps": 4, "repair": "none", **SIZE}
    found = slim(str(tiny_llama), output=tmp_path / "small", granularity="head,pair", format=form, **options)
    assert all(width["channels"] % 2 == 0 for width in found["widths"])
    assert any(0 < width["channels"] < 44 for width in found["widths"])
    opened = gpmetric.load(tmp_path / "small", device="cpu")
    assert sum(one.numel() for one in opened.parameters()) == found["parameters_after"]
    stored, dense = (load_file(folder / "model.safetensors") for folder in (tmp_path / "small", tiny_llama))
    if form != "hetero":  # whose blocks may have other numbers
        name = "model.layers.0.mlp.up_proj.weight"
        kept = [place for place, row in enumerate(dense[name]) if any(torch.equal(row, one) for one in stored[name])]
        assert [place // 2 for place in kept[::2]] == [place // 2 for place in kept[1::2]]
    assert json.loads((tmp_path / "small" / "gpmetric_manifest.json").read_text())["granularity"] == ["head", "pair"]
    with pytest.raises(InputError, match="--granularity channel,pair: an mlp is cut into units of one kind"):
        slim(str(tiny_llama), output=tmp_path / "other", granularity="channel,pair", **options)


def test_units_that_do_not_divide(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(UNIT_KINDS, "seven", UnitKind("seven channels", "mlp", together=7))
        with pytest.raises(InputError, match="--granularity seven: 44 channels"):
            slim(str(tiny_llama), output=tmp_path / "small", calibration=str(tiny_text), granularity="seven", **SIZE)
