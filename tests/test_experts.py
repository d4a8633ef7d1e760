"""Mixtures of experts: each expert is a layer that computes what transformers computes, and is found on disk."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import core_model_loading as conversion

from gpmetric.errors import ModelError
from gpmetric.experts import Fused, expert_family, is_expert, split_experts
from gpmetric.loading import load, load_model
from gpmetric.models import Model
from gpmetric.stored_experts import gathered, map_experts, put_back
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


# Where a tensor lies in memory changes last bits on some processors, which a state space carries on from token to token
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def test_logits_are_those_of_transformers(model: Model, folder: Path) -> None:
    torch.testing.assert_close(logits(model.module), logits(plain(folder)), **CLOSE)


def test_each_expert_is_a_layer(model: Model, folder: Path) -> None:
    """By name, as [out, in], a view of what the model computes with; routers and shared gates are none."""
    transposed = model.module.config.model_type in ("aria_text", "gpt_oss", "llama4_text")
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
    theirs = dict(other.named_parameters())
    assert {name: one.shape for name, one in module.named_parameters()} == {
        name: one.shape for name, one in theirs.items()
    }
    assert all(torch.equal(one, theirs[name]) for name, one in module.named_parameters())
    torch.testing.assert_close(logits(module), logits(other), **CLOSE)


def test_families() -> None:
    assert expert_family("model.layers.3.mlp.experts.7.down_proj") == "model.layers.3.mlp.experts.down_proj"
    assert expert_family("model.layers.3.mlp.shared_experts.down_proj") is None


# Ways in which files become fused parameters

E, OUT, IN = 3, 8, 5
WAYS: dict[str, tuple[list[str], list[Any], dict[str, tuple[int, ...]]]] = {
    "renamed": (["experts.w13"], [], {"experts.w13": (E, OUT, IN)}),
    "interleaved": (["experts.w13"], [conversion.Interleave(dim=1)], {"experts.w13": (E, OUT, IN)}),
    "in halves": (["experts.w13"], [conversion.Interleave(dim=1, inverse=True)], {"experts.w13": (E, OUT, IN)}),
    "transposed": (["experts.w13"], [conversion.Transpose(1, 2)], {"experts.w13": (E, IN, OUT)}),
    "two": (
        ["experts.gate", "experts.up"],
        [conversion.Concatenate(dim=1)],
        {"experts.gate": (E, 3, IN), "experts.up": (E, 5, IN)},
    ),
    "one each": (
        ["experts.*.w3", "experts.*.w1"],
        [conversion.MergeModulelist(dim=0), conversion.Concatenate(dim=1)],
        {f"experts.{index}.{name}": (4, IN) for index in range(E) for name in ("w1", "w3")},
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_pieces_are_what_transformers_makes(way: str, tmp_path: Path) -> None:
    """Its own operations on the same tensors; a weight that is put back is read again, and all else is untouched."""
    patterns, operations, shapes = WAYS[way]
    generator = torch.Generator().manual_seed(4)
    stored = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(stored, tmp_path / "model.safetensors")
    target = "experts.gate_up_proj"
    converter: Any = (
        conversion.WeightConverter(list(patterns), target, operations)
        if operations
        else conversion.WeightRenaming(patterns[0], target)
    )
    values: Any = {pattern: [one for name, one in stored.items() if matches(name, pattern)] for pattern in patterns}
    for operation in operations:
        values = operation.convert(values, source_patterns=patterns, target_patterns=[target])
    expected = next(iter(values.values()))
    expected = expected[0] if isinstance(expected, list) else expected
    module = SimpleNamespace(_weight_conversions=[converter], base_model_prefix="")
    layers = tuple(f"experts.{index}.gate_up_proj" for index in range(E))
    found = map_experts(module, [target], {target: Fused(layers, (OUT, IN), False)}, shapes)
    file = TensorFile(tmp_path / "model.safetensors")
    files = dict.fromkeys(file, file)
    for index, layer in enumerate(layers):
        assert torch.equal(gathered(found[layer], files), expected[index])
    put_back(found[layers[1]], files, expected[1] * 2)
    assert torch.equal(gathered(found[layers[1]], files), expected[1] * 2)
    for index in (0, 2):
        assert torch.equal(gathered(found[layers[index]], files), expected[index])


def matches(name: str, pattern: str) -> bool:
    return re.fullmatch(pattern.replace("*", r"\d+"), name) is not None


def test_ways_that_are_not_known_are_refused() -> None:
    converter = conversion.WeightConverter("experts.w", "experts.down_proj", [conversion.PermuteForRope()])
    module = SimpleNamespace(_weight_conversions=[converter], base_model_prefix="")
    fused = {"experts.down_proj": Fused(("experts.0.down_proj",), (4, 4), False)}
    with pytest.raises(ModelError, match=r"^experts\.down_proj is put together from the files by PermuteForRope"):
        map_experts(module, ["experts.down_proj"], fused, {"experts.w": (1, 4, 4)})


def test_experts_that_compute_something_else_are_refused(save_model: Callable[..., Path]) -> None:
    """A class of the known form whose forward pass is its own."""
    module = plain(save_mixture(save_model, "mixtral"))
    kind = type(module.model.layers[0].mlp.experts)
    for block in module.model.layers:
        block.mlp.experts.__class__ = type("Other", (kind,), {"forward": lambda *a: 2 * kind.forward(*a)})
    with pytest.raises(ModelError, match=r"^model\.layers\.0\.mlp\.experts \(Other\) does not compute what"):
        split_experts(module)
