"""Mixtures of experts: each expert is a layer that computes what transformers computes, and is found on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpmetric.experts import expert_family, is_expert
from gpmetric.loading import load, load_model
from gpmetric.models import Model
from gpmetric.stored_experts import gathered
from gpmetric.tensor_file import TensorFile
from tests.mixtures import MIXTURES, plain, save_mixture

TOKENS = torch.randint(1, 250, (3, 24), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module", params=MIXTURES)
def folder(request: pytest.FixtureRequest, save_model: Callable[..., Path]) -> Path:
    return save_mixture(save_model, request.param)


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(str(folder))


def logits(module: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = module(TOKENS, use_cache=False).logits
    return found


def fused_of(folder: Path) -> dict[str, Tensor]:
    """transformers' own fused parameters by name."""
    return {name: one for name, one in plain(folder).named_parameters() if one.dim() == 3 and "experts" in name}


def test_logits_are_those_of_transformers(model: Model, folder: Path) -> None:
    torch.testing.assert_close(logits(model.module), logits(plain(folder)), rtol=1e-5, atol=1e-6)


def test_each_expert_is_a_layer(model: Model, folder: Path) -> None:
    """By name, as [out, in], a view of what the model computes with; routers and shared gates are none."""
    transposed = model.module.config.model_type in ("gpt_oss", "llama4_text")
    layers = {layer.name: layer for layer in model.layers}
    expected = {
        f"{name.rpartition('.')[0]}.{index}.{name.rpartition('.')[2]}": one[index].T if transposed else one[index]
        for name, one in fused_of(folder).items()
        for index in range(4)
    }
    assert {name for name, layer in layers.items() if is_expert(layer.module)} == expected.keys()
    assert all(torch.equal(layers[name].weight, one) for name, one in expected.items())
    assert not any(name.endswith(("gate", "router")) for name in layers)
    layer = next(layer for layer in layers.values() if is_expert(layer.module))
    before = logits(model.module)
    layer.weight.mul_(2)
    assert not torch.equal(logits(model.module), before)
    layer.weight.div_(2)


def test_their_files_hold_them(model: Model, folder: Path) -> None:
    file = TensorFile(folder / "model.safetensors")
    stored = dict.fromkeys(file, file)
    layers = {layer.name: layer for layer in model.layers}
    assert model.experts
    for name, pieces in model.experts.items():
        assert torch.equal(gathered(pieces, stored), layers[name].weight)


def test_load_gives_what_transformers_has(folder: Path) -> None:
    module, other = load(folder), plain(folder)
    assert {name: one.shape for name, one in module.named_parameters()} == {
        name: one.shape for name, one in other.named_parameters()
    }
    assert torch.equal(logits(module), logits(other))


def test_families() -> None:
    assert expert_family("model.layers.3.mlp.experts.7.down_proj") == "model.layers.3.mlp.experts.down_proj"
    assert expert_family("model.layers.3.mlp.shared_experts.down_proj") is None
