"""Which blocks and layers are found in a model, what stays dense and why, and how files call them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gpmetric import layers
from gpmetric.blocks import find_blocks, find_layers, leave_dense
from gpmetric.blockwise.choosing import Choosing
from gpmetric.blockwise.replay import check_blocks
from gpmetric.calibration.collect import collect
from gpmetric.errors import GpmetricError, ModelError
from gpmetric.loading import load_model
from gpmetric.models import Model
from gpmetric.pruning.prune import prune
from gpmetric.stored_names import stored_names
from tests.mixtures import MIXTURES
from tests.test_blockwise import make_tokens, toy


class Body(nn.Module):
    """What holds lists and other modules, under their names."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)

    def get_decoder(self) -> nn.Module:
        return self


def blocks_of(count: int, width: int = 2, **others: Callable[[], nn.Module]) -> nn.ModuleList:
    return nn.ModuleList(
        Body(up=nn.Linear(width, width), **{name: make() for name, make in others.items()}) for _ in range(count)
    )


def names(module: nn.Module, **options: str) -> list[list[str]]:
    return [[layer.name for layer in block.layers] for block in find_blocks(module, **options)]


# Lists of blocks


def test_all_lists_of_a_decoder_are_blocks() -> None:
    """Of the same parent; a list of layers, one inside a block, and a larger tower of images are none."""
    body = Body(
        first=blocks_of(1),
        second=blocks_of(2, experts=lambda: blocks_of(2)),
        projections=nn.ModuleList([nn.Linear(9, 9)]),
        vision_tower=Body(layers=blocks_of(3, width=50)),
    )
    assert names(body) == [
        ["first.0.up"],
        *([f"second.{index}.up", f"second.{index}.experts.0.up", f"second.{index}.experts.1.up"] for index in (0, 1)),
    ]


def test_a_list_elsewhere_is_a_list_of_blocks_if_its_classes_are() -> None:
    class Other(Body):
        pass

    alike, other = Body(layers=blocks_of(2)), Body(layers=nn.ModuleList([Other(up=nn.Linear(1, 1))]))
    body = Body(high=Body(layers=blocks_of(2, width=3)), low=alike, head=other)
    assert [name for (name,) in names(body)] == [
        f"{part}.layers.{index}.up" for part in ("high", "low") for index in (0, 1)
    ]


def test_a_decoder_without_lists_is_the_output_layer() -> None:
    """ModernBERT's decoder calls its output layer so: its blocks are in the base model."""

    class Headed(Body):
        def get_decoder(self) -> nn.Module:
            return self.decoder

    body = Headed(base_model=Body(layers=blocks_of(2)), decoder=nn.Linear(2, 9))
    assert names(body) == [["base_model.layers.0.up"], ["base_model.layers.1.up"]]


def test_routers_by_name() -> None:
    routers = ["router", "modality_router", "gate", "shared_expert_gate"]
    inside = ["gate.wg", "router.layer", "router.classifier"]
    others = ["gate_proj", "up", "gated", "routed"]
    block = Body(**{name: nn.Linear(2, 2) for name in [*routers, *others]})
    for number, name in enumerate(inside):
        holder, child = name.split(".")
        setattr(block, f"part{number}", Body(**{holder: Body(**{child: nn.Linear(2, 2)})}))
    blocks, dense = find_layers(Body(blocks=nn.ModuleList([block])))
    assert {layer.name for layer in blocks[0].layers} == {f"blocks.0.{name}" for name in others}
    expected = [*routers, *(f"part{number}.{name}" for number, name in enumerate(inside))]
    assert dense == {f"blocks.0.{name}": "a router, by its name" for name in expected}


def test_routers_by_use() -> None:
    """What is chosen among are scores of experts, whatever is done to them before; products of inputs are none."""
    linears = {name: nn.Linear(4, 4) for name in ("scores", "query", "plain")}
    states = torch.randn(2, 3, 4)
    with Choosing(linears) as watched:
        (linears["scores"](states).float().softmax(dim=-1) + 0.5).view(-1, 4).topk(2)
        (linears["query"](states) @ states.transpose(1, 2)).topk(1)
        linears["plain"](states).softmax(dim=-1)
    assert watched.found == {"scores"}
    assert not any(layer._forward_hooks for layer in linears.values())


def test_vectors_of_three_dimensions_are_no_experts_but_experts_are() -> None:
    vector, expert = Body(), Body()
    vector.mix, expert.experts_up = (nn.Parameter(torch.ones(1, 1, 4)) for _ in range(2))
    assert names(Body(blocks=blocks_of(1, mix=lambda: vector))) == [["blocks.0.up"]]
    with pytest.raises(ModelError, match=r"^blocks\.0\.mix\.experts_up is a fused expert weight \[1, 1, 4\]"):
        find_blocks(Body(blocks=blocks_of(1, mix=lambda: expert)))


# Shared weights


def test_a_weight_of_two_layers_is_one_layer_of_one_block() -> None:
    """Two modules hold the first and third block's weight: it is one layer, and the three blocks are one."""
    found = blocks_of(4)
    found[2].up.weight, found[2].up.bias = found[0].up.weight, found[0].up.bias
    body = Body(blocks=found)
    assert names(body) == [["blocks.0.up", "blocks.1.up"], ["blocks.3.up"]]
    assert body.blocks[2].up is body.blocks[0].up


def test_a_weight_that_something_else_uses_stays_dense() -> None:
    found, table = blocks_of(2), nn.Embedding(2, 2)
    found[1].up.weight = table.weight
    blocks, dense = find_layers(Body(table=table, blocks=found))
    assert [layer.name for block in blocks for layer in block.layers] == ["blocks.0.up"]
    assert dense == {"blocks.1.up": "shared with a module that uses it otherwise"}


def test_statistics_of_a_shared_layer_are_of_all_its_uses() -> None:
    """Toy blocks 0 and 2 are one layer: the sum of squares is that of both inputs, seen by plain hooks."""
    model = toy()
    model.module.base_model.blocks[2].up = model.module.base_model.blocks[0].up
    type(model.module).get_decoder = lambda self: self.base_model
    shared = type(model)(model.name, model.module, None, find_blocks(model.module))
    tokens, seen = make_tokens(2, 5), list[Tensor]()
    layer = shared.layers[0]
    assert [layer.name for layer in shared.layers] == ["base_model.blocks.0.up", "base_model.blocks.1.up"]
    with layer.module.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 8))):
        model.module(tokens)
    assert len(seen) == 2
    expected = torch.cat(seen).square().mean(dim=0).sqrt()
    torch.testing.assert_close(collect(shared, tokens, "X").layers[layer.name]["X"], expected)


# What stays dense


def test_layers_tell_every_parameter_once(tiny_gpt2: Path) -> None:
    told = layers(tiny_gpt2, exclude="c_fc")
    model = load_model(str(tiny_gpt2))
    shapes = {name: list(one.shape) for name, one in model.module.named_parameters()}
    prunable, left = ([one for one in told["layers"] if one["prunable"] is which] for which in (True, False))
    pruned = {f"{one['name']}.weight": one["shape"][::-1] for one in prunable}  # a Conv1D has [in, out]
    dense = {one["name"]: one["shape"] for one in left}
    assert pruned | dense == shapes
    assert len(pruned) + len(dense) == len(shapes)
    assert told["weights"] == sum(shape[0] * shape[1] for shape in pruned.values())
    assert told["parameters"] == sum(one.numel() for one in model.module.parameters())
    whys = {one["name"]: one["reason"] for one in told["layers"] if not one["prunable"]}
    assert whys["transformer.h.1.mlp.c_fc.weight"] == "left out by --include or --exclude"
    assert whys["transformer.h.1.mlp.c_fc.bias"] == "a bias"
    assert whys["transformer.wte.weight"] == whys["transformer.wpe.weight"] == "an embedding"
    assert {one["block"] for one in prunable} == {0, 1, 2}
    assert {one["reason"] for one in prunable} == {one["block"] for one in left} == {None}
    assert told["share"] == told["weights"] / told["parameters"]


MAMBAS: dict[str, tuple[dict[str, Any], str]] = {  # its config, and its first mixer
    "mamba": ({"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}, "backbone.layers.0.mixer"),
    "falcon_mamba": ({"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}, "backbone.layers.0.mixer"),
    "jamba": (MIXTURES["jamba"], "model.layers.0.mamba"),
}


@pytest.mark.parametrize("kind", MAMBAS)
def test_a_layer_that_is_read_but_not_called_stays_dense(
    kind: str, save_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    """By every command: nothing is known of its inputs, and its gradient would be all that formulas have of it."""
    config, mixer = MAMBAS[kind]
    folder = save_model(kind, **config)
    told = layers(folder)
    pruned = [one["name"] for one in told["layers"] if one["prunable"]]
    assert [name.rpartition(".")[2] for name in pruned if name.startswith(f"{mixer}.")] == [
        "in_proj", "x_proj", "out_proj"
    ]  # fmt: skip
    whys = {one["name"]: one["reason"] for one in told["layers"] if not one["prunable"]}
    assert whys[f"{mixer}.dt_proj.weight"] == "never called, so that nothing is known of its inputs"
    assert whys[f"{mixer}.conv1d.weight"] == "a convolution"
    made = prune(
        str(folder), calibration=str(tiny_text), metric="abs(W)*X*G", output=tmp_path / "out", samples=4, windows=4,
        sequence_length=32, device="cpu",
    )  # fmt: skip
    assert {layer["name"] for layer in made["layers"]} == set(pruned)
    before, after = (load_file(one / "model.safetensors") for one in (folder, tmp_path / "out"))
    for name, weight in after.items():
        zeros = int((weight == 0).sum() - (before[name] == 0).sum())
        assert zeros == (weight.numel() // 2 if name.removesuffix(".weight") in pruned else 0) or ".experts." in name
    assert after[f"{mixer}.dt_proj.weight"].equal(before[f"{mixer}.dt_proj.weight"])


def test_what_no_token_reaches_stays_dense_unless_it_may_be_an_expert() -> None:
    """An expert is a member of a list, or is called one."""
    module = toy().module
    others = {"cross": Body(k=nn.Linear(8, 8)), "expert_1": Body(k=nn.Linear(8, 8)), "many": blocks_of(2, 8)}
    for name, other in others.items():
        setattr(module.base_model.blocks[0], name, other)
    type(module).get_decoder = lambda self: self.base_model
    model = Model("toy", module, None, find_blocks(module))
    assert len(model.layers) == 3 + 4
    told = "never called, so that nothing is known of its inputs"
    assert check_blocks(model) == {"base_model.blocks.0.cross.k": told}


def test_attention_to_an_encoder_that_is_not_there_stays_dense(save_model: Callable[..., Path]) -> None:
    """As it is told when the model is opened; an expert that reads no token is another matter."""
    sizes = {"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 24}
    folder = save_model("bart", **sizes, is_decoder=True, is_encoder_decoder=False)
    told = layers(folder)
    pruned = [one["name"].partition("layers.")[2] for one in told["layers"] if one["prunable"]]
    own = [f"self_attn.{name}_proj" for name in ("k", "v", "q", "out")] + ["fc1", "fc2"]
    assert pruned == [f"{index}.{name}" for index in (0, 1) for name in own]
    whys = {one["name"]: one["reason"] for one in told["layers"] if not one["prunable"]}
    unused = [name for name in whys if "encoder_attn." in name and name.endswith("weight")]
    assert len(unused) == 8
    assert {whys[name] for name in unused} == {"never called, so that nothing is known of its inputs"}


def test_layers_left_dense_are_told_and_some_must_stay(tiny_llama: Path) -> None:
    model = load_model(str(tiny_llama), include="q_proj")
    first, *others = [layer.name for layer in model.layers]
    left = leave_dense(model, {first: "odd"})
    assert [layer.name for layer in left.layers] == others
    assert left.dense[first] == "odd"
    with pytest.raises(ModelError, match=r"no prunable layer is left in model .*: model\.layers\.0\.\S+ is odd$"):
        leave_dense(model, dict.fromkeys([first, *others], "odd"))


# Names in files

FULL_GEMMA: dict[str, Any] = {
    "text_config": {
        "vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 2, "num_key_value_heads": 1,
    },
    "vision_config": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    },
}  # fmt: skip


def test_names_in_files_are_those_of_the_same_values(save_model: Callable[..., Path]) -> None:
    """Gemma 3 with its vision tower is stored under other names than it has in memory."""
    folder = save_model("gemma3", **FULL_GEMMA)
    model, stored = load_model(str(folder)), load_file(folder / "model.safetensors")
    found = stored_names(model.module, stored)
    other = [layer.name for layer in model.layers if f"{layer.name}.weight" not in stored]
    assert other
    for layer in model.layers:
        assert torch.equal(stored[found[f"{layer.name}.weight"]], layer.parameter)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_names_without_the_prefix_of_the_base_model(prefix: str, tiny_llama: Path) -> None:
    model = load_model(str(tiny_llama))
    stored = [prefix + name.removeprefix("model.") for name in model.module.state_dict()]
    found = stored_names(model.module, stored)
    assert all(found[f"{layer.name}.weight"] == prefix + layer.name.removeprefix("model.") + ".weight"
               for layer in model.layers)  # fmt: skip


def test_a_renamed_checkpoint_is_pruned_in_its_own_names(
    save_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    from gpmetric.pruning.prune import prune

    folder, sizes = save_model("gemma3", **FULL_GEMMA), {"samples": 2, "sequence_length": 16, "windows": 2}
    prune(folder, metric="magnitude_row", target="0.5", calibration=tiny_text, text=tiny_text, output=tmp_path / "new",
          device="cpu", **sizes)  # fmt: skip
    dense, written = (load_file(one / "model.safetensors") for one in (folder, tmp_path / "new"))
    assert dense.keys() == written.keys()
    changed = {name for name in dense if not torch.equal(dense[name], written[name])}
    assert len(changed) == 14
    for name in changed:
        assert ((written[name] == 0).sum(dim=1) == written[name].shape[1] // 2).all()
        assert "vision" not in name
    manifest = json.loads((tmp_path / "new" / "gpmetric_manifest.json").read_text())
    assert {layer["tensor"] for layer in manifest["layers"]} == changed


def test_a_layer_that_files_hold_in_another_form_is_refused_before_the_work(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpmetric.pruning import checkpoint, prune

    monkeypatch.setattr(checkpoint, "stored_names", lambda module, stored: {})
    monkeypatch.setattr(prune.Protocol, "prepare", lambda *_: pytest.fail("worked"))
    with pytest.raises(GpmetricError, match=r"does not store layer model\.layers\.0\.self_attn\.q_proj as the model"):
        prune.prune(tiny_llama, metric="magnitude_row", target="0.5", calibration=tiny_text, text=tiny_text,
                    output=tmp_path / "new", samples=2, sequence_length=16, windows=2)  # fmt: skip
