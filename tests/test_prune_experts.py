"""Mixtures pruned: by an independent loop over transformers' own modules, in their files, and by every command."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from gpmetric.allocation.allocate import allocate
from gpmetric.calibration.collect import collect
from gpmetric.errors import GpmetricError, ModelError
from gpmetric.evolution.discover import discover
from gpmetric.loading import load_model
from gpmetric.outputs import MANIFEST
from gpmetric.pruning.bench import bench
from gpmetric.pruning.prune import prune
from gpmetric.pruning.verify import verify
from gpmetric.structured.slim import slim
from tests.mixtures import MIXTURES, plain, save_mixture
from tests.pruning_helpers import windows_of

OPTIONS: dict[str, Any] = {"samples": 8, "windows": 4, "sequence_length": 32, "device": "cpu"}
EXPERTS = "model.layers.1.mlp.experts"
SLIM: dict[str, Any] = {"samples": 4, "windows": 2, "sequence_length": 32, "device": "cpu"}
OPTIONS |= {"exclude": "dt_proj"}  # of Jamba, which reads its weight and does not call it


@pytest.fixture(scope="module", params=MIXTURES)
def folder(request: pytest.FixtureRequest, save_model: Callable[..., Path]) -> Path:
    return save_mixture(save_model, request.param)


def kept(weight: Tensor, rows: Tensor) -> Tensor:
    """Wanda's mask of a weight [out, in]: the better half of every row by |W| times the norm of the inputs [n, in]."""
    score = weight.abs() * rows.square().mean(dim=0).sqrt()
    order = score.sort(dim=1, stable=True).indices[:, : weight.shape[1] // 2]
    return torch.ones_like(score, dtype=torch.bool).scatter(1, order, False)


def prune_by_hand(module: Any, tokens: Tensor) -> dict[str, int]:
    """Wanda at half, block by block on the outputs of the pruned ones, over transformers' own modules.

    Of an expert, what it reads is taken from the arguments of the fused module. Returns zeros by layer.
    """
    zeros: dict[str, int] = {}
    for index, block in enumerate(module.model.layers):
        reads: dict[str, list[Tensor]] = {}
        hooks = []
        for name, one in block.named_modules():
            if isinstance(one, nn.Linear) and not name.endswith(("router", "gate", "dt_proj")):
                hooks.append(one.register_forward_pre_hook(partial(note, name, reads)))
            if name.endswith("experts"):
                hooks.append(one.register_forward_pre_hook(partial(see, name, reads), with_kwargs=True))
        with torch.no_grad():
            for batch in tokens:
                module(batch[None], use_cache=False)
        for hook in hooks:
            hook.remove()
        for name, rows in reads.items():
            weight = view(block, name)
            weight[~kept(weight, torch.cat(rows))] = 0
            zeros[f"model.layers.{index}.{name}"] = int((weight == 0).sum())
    return zeros


def transposed(module: Any) -> bool:
    return type(module).__name__ in ("AriaExperts", "GptOssExperts", "Llama4TextExperts")


def view(block: nn.Module, name: str) -> Tensor:
    """A layer's weight [out, in], by the name that gpmetric has for it."""
    if ".experts." not in name:
        return block.get_submodule(name).weight.data
    owner, number, kind = name.rsplit(".", 2)
    experts = block.get_submodule(owner)
    weight = getattr(experts, kind).data[int(number)]
    return weight.T if transposed(experts) else weight


def note(name: str, reads: dict[str, list[Tensor]], _: nn.Module, args: tuple[Tensor]) -> None:
    reads.setdefault(name, []).append(args[0].flatten(0, -2))


def see(name: str, reads: dict[str, list[Tensor]], experts: Any, args: Any, named: dict[str, Any]) -> None:
    """Splits what an experts module is called with by expert, and computes what each one's second layer reads."""
    if not isinstance(getattr(experts, "down_proj", None), nn.Parameter):  # shared ones
        return
    arguments = [*args, *named.values()]
    for number in range(len(experts.down_proj)):
        if len(arguments) == 1:
            rows = arguments[0].view(len(experts.down_proj), -1, arguments[0].shape[-1])[number]
            rows = rows[rows.abs().sum(dim=1) > 0]
        else:
            rows = arguments[0][(arguments[1] == number).any(dim=1)]
        if not len(rows):
            continue
        weight = experts.gate_up_proj[number]
        inner = rows @ weight if transposed(experts) else rows @ weight.T
        if hasattr(experts, "gate_up_proj_bias"):
            inner = inner + experts.gate_up_proj_bias[number]
            gate, up = inner[:, ::2].clamp(max=experts.limit), inner[:, 1::2].clamp(-experts.limit, experts.limit)
            inner = (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
        else:
            half = inner.shape[1] // 2
            inner = functional.silu(inner[:, :half]) * inner[:, half:]
        reads.setdefault(f"{name}.{number}.gate_up_proj", []).append(rows)
        reads.setdefault(f"{name}.{number}.down_proj", []).append(inner)


def zeros_in(folder: Path) -> int:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return sum(int((file.get_tensor(name) == 0).sum()) for name in file.keys())  # noqa: SIM118 - no mapping


@pytest.mark.every(3)
def test_pruned_as_a_loop_of_hooks_would(folder: Path, tiny_text: Path, tmp_path: Path) -> None:
    """Files under their names, shapes and order, loaded by transformers alone: the weights of the loop, bit by bit."""
    told = prune(
        str(folder), output=tmp_path / "out", metric="wanda", target="0.5", calibration=str(tiny_text), **OPTIONS
    )
    tokens = windows_of(load_model(str(folder)), tiny_text, 32, 8).tokens
    expected = plain(folder)
    before = zeros_in(folder)
    zeros = prune_by_hand(expected, tokens)
    found = plain(tmp_path / "out")
    for (name, one), (_, other) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert {layer["name"]: layer["zeros"] for layer in told["layers"]} == zeros
    assert zeros_in(tmp_path / "out") - before == sum(zeros.values())
    with (
        safe_open(folder / "model.safetensors", framework="pt") as dense,
        safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as pruned,
    ):
        assert list(dense.keys()) == list(pruned.keys())
    assert verify(str(tmp_path / "out"), against=str(folder), device="cpu")["problems"] == []


def loss_of(module: Any, tokens: Tensor) -> float:
    """Perplexity of transformers' own model."""
    with torch.no_grad():
        losses = [
            functional.cross_entropy(module(one[None], use_cache=False).logits[0, :-1], one[1:]) for one in tokens
        ]
    return math.exp(float(torch.stack(losses).mean()))


@pytest.mark.every(3)
def test_dense_perplexity_is_that_of_transformers(folder: Path, tiny_text: Path) -> None:
    tokens = windows_of(load_model(str(folder)), tiny_text, 32, 4).tokens
    told = bench(
        str(folder), metric=["wanda"], target=["0.5"], text=[str(tiny_text)], calibration=str(tiny_text), **OPTIONS
    )
    assert next(iter(told["dense"].values())) == pytest.approx(loss_of(plain(folder), tokens), rel=1e-5)
    layers = load_model(str(folder)).layers
    assert told["experts"]["tokens"].keys() == {layer.name for layer in layers if ".experts." in layer.name}


def sums(tokens: dict[str, int]) -> dict[str, int]:
    """Tokens of the experts' first layers, by block."""
    found: dict[str, int] = {}
    for name, count in tokens.items():
        if name.endswith("gate_up_proj"):
            found[name.split(".experts.")[0]] = found.get(name.split(".experts.")[0], 0) + count
    return found


@pytest.mark.every(3)
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "llama4_text"])
@pytest.mark.parametrize("one_shot", [False, True])
def test_bench(model_type: str, one_shot: bool, save_model: Callable[..., Path], tiny_text: Path) -> None:
    folder = save_mixture(save_model, model_type)
    told = bench(
        str(folder), metric=["magnitude", "wanda", "sparsegpt", "W*W*F", "R*abs(W)", "alps"], target=["0.5", "2:4"],
        text=[str(tiny_text)], calibration=str(tiny_text), one_shot=one_shot, **OPTIONS,
    )  # fmt: skip
    assert [row["error"] for row in told["results"]] == [None] * 12
    assert all(row["sparsity"] == pytest.approx(0.5, abs=0.01) for row in told["results"])
    each = 1 if model_type == "llama4_text" else 2
    assert set(sums(told["experts"]["tokens"]).values()) == {8 * 32 * each}


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "options", [{"update": "admm", "fit": "dense"}, {"metric": "sparsegpt"}, {"update": "obs+block"}]
)
def test_updates_are_written(
    options: dict[str, str], save_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    """What transformers loads has the perplexity that was measured in memory; everything else is byte for byte."""
    for model_type in ("gpt_oss", "mixtral"):
        folder, out = save_mixture(save_model, model_type), tmp_path / model_type
        prune(
            str(folder), output=out, **{"metric": "wanda"} | options, target="2:4", calibration=str(tiny_text),
            **OPTIONS, permute=True,
        )  # fmt: skip
        assert verify(str(out), against=str(folder), device="cpu")["problems"] == []
        manifest = json.loads((out / MANIFEST).read_text())
        pruned, dense = load_file(out / "model.safetensors"), load_file(folder / "model.safetensors")
        experts = {piece["tensor"] for layer in manifest["layers"] for piece in layer.get("pieces", ())}
        moved = {name for move in manifest["moves"] for name in move["tensors"]}
        named = experts | moved | {layer["tensor"] for layer in manifest["layers"]}
        assert all(torch.equal(pruned[name], dense[name]) for name in dense.keys() - named)
        for name in experts:
            columns = pruned[name].transpose(-1, -2) if model_type == "gpt_oss" else pruned[name]
            assert int((columns.reshape(-1, 4) != 0).sum(dim=1).max()) == 2
            assert not torch.equal(pruned[name], dense[name])


def test_other_ways_to_store(save_model: Callable[..., Path], tiny_text: Path, tmp_path: Path) -> None:
    """The same mixture, its experts fused in the file, and one tensor for each: the same pruned model of both."""
    folder = save_mixture(save_model, "qwen3_moe")
    apart, fused = load_file(folder / "model.safetensors"), {}
    for name, one in plain(folder).state_dict().items():
        fused[name] = one.clone()
    assert any("experts.0.gate_proj" in name for name in apart)
    other = tmp_path / "fused"
    other.mkdir()
    for path in folder.iterdir():
        if path.name != "model.safetensors":
            (other / path.name).write_bytes(path.read_bytes())
    save_file(fused, other / "model.safetensors", metadata={"format": "pt"})
    for name, source in (("a", folder), ("b", other)):
        prune(str(source), output=tmp_path / name, metric="wanda", calibration=str(tiny_text), **OPTIONS)
    first, second = plain(tmp_path / "a").state_dict(), plain(tmp_path / "b").state_dict()
    assert all(torch.equal(one, second[name]) for name, one in first.items())
    assert load_file(tmp_path / "b" / "model.safetensors").keys() == fused.keys()
    assert load_file(tmp_path / "a" / "model.safetensors").keys() == apart.keys()
    mask = tmp_path / "masks.safetensors"
    prune(str(other), output=tmp_path / "c", metric="wanda", calibration=str(tiny_text), save_masks=mask, **OPTIONS)
    name = "model.layers.0.mlp.experts.3.down_proj"
    assert torch.equal(load_file(mask)[name], first["model.layers.0.mlp.experts.down_proj"][3] != 0)


def test_a_changed_expert_does_not_verify(save_model: Callable[..., Path], tiny_text: Path, tmp_path: Path) -> None:
    for model_type in ("gpt_oss", "mixtral"):
        folder, out = save_mixture(save_model, model_type), tmp_path / model_type
        prune(str(folder), output=out, metric="wanda", calibration=str(tiny_text), **OPTIONS)
        intact = (out / MANIFEST).read_text()
        for key, value in (("expert", 7), ("tensor", "model.none"), ("rows", [0, 5, 1]), ("transposed", "other")):
            manifest = json.loads(intact)
            layer = next(layer for layer in manifest["layers"] if "pieces" in layer)
            layer["pieces"][0][key] = not layer["pieces"][0][key] if value == "other" else value
            (out / MANIFEST).write_text(json.dumps(manifest))
            problems = verify(str(out), against=str(folder), device="cpu")["problems"]
            assert f"layer {layer['name']} is not in the tensors that the manifest says" in problems
        (out / MANIFEST).write_text(intact)
        weights = load_file(out / "model.safetensors")
        name = next(name for name in weights if "experts" in name and "layers.1" in name and weights[name].dim() > 1)
        flat = weights[name].view(-1)
        place = int(flat.nonzero()[5])
        flat[place] *= 1.5
        save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
        problems = verify(str(out), against=str(folder), device="cpu")["problems"]
        assert any(name in problem and "were not pruned are not those of" in problem for problem in problems)


def test_files_that_do_not_hold_the_experts_are_refused(
    save_model: Callable[..., Path], tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name when the model is opened, by value before any work."""
    folder = save_mixture(save_model, "mixtral")
    model = load_model(str(folder))
    model.layers[-1].weight[0, 0] += 1
    monkeypatch.setattr("gpmetric.session.session.open_model", lambda *_, **__: model)
    with pytest.raises(GpmetricError, match=r"not hold the weight of model\.layers\.1\.mlp\.experts\.3\.down_proj"):
        prune(str(folder), output=tmp_path / "out", metric="wanda", calibration=str(tiny_text), **OPTIONS)
    monkeypatch.undo()
    monkeypatch.setattr("gpmetric.loading.stored_shapes", lambda _: {"model.norm.weight": (32,)})
    with pytest.raises(ModelError, match=r"^model\.layers\.0\.mlp\.experts\.gate_up_proj is not in the files"):
        load_model(str(folder))


@pytest.fixture(scope="module")
def routed(save_model: Callable[..., Path]) -> Path:
    return save_mixture(save_model, "qwen3_moe")


def test_an_allocation_is_of_experts(routed: Path, tiny_text: Path, tmp_path: Path) -> None:
    """Each has its own sparsity, and `prune` takes it by their names."""
    text = str(tiny_text)
    found = allocate(
        str(routed), calibration=text, sparsity=0.5, evaluations=12, population=6, samples=4, search_windows=2,
        windows=2, sequence_length=32, device="cpu",
    )  # fmt: skip
    levels = found["allocation"]["sparsity"]
    assert f"{EXPERTS}.3.down_proj" in levels
    assert set(found["experts"]["tokens"]) == {name for name in levels if ".experts." in name}
    file = tmp_path / "allocation.json"
    file.write_text(json.dumps(found["allocation"]))
    told = prune(str(routed), output=tmp_path / "out", metric="wanda", calibration=text, allocation=file, **OPTIONS)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for layer in told["layers"]:
        if layer["name"].endswith("3.down_proj"):
            zeros = int((stored[f"{layer['name']}.weight"] == 0).sum())
            assert zeros == 32 * int(24 * levels[layer["name"]])


def test_a_campaign_on_a_mixture(routed: Path, tiny_text: Path, tmp_path: Path) -> None:
    """With gradients; the same formulas on any number of workers is looked at elsewhere."""
    found = discover(
        str(routed), text=str(tiny_text), target=["0.5"], operands=["W", "X", "G", "F"], population=6, evaluations=8,
        samples=4, search_windows=2, windows=2, calibration_seeds=0, sequence_length=32, include=r"layers\.1\.",
        cache=tmp_path, ledger=tmp_path / "a.sqlite", workers=1, device="cpu",
    )  # fmt: skip
    assert found["evaluations"] == 8
    assert found["experts"]["tokens"].keys() == {
        f"{EXPERTS}.{number}.{kind}" for number in range(4) for kind in ("gate_up_proj", "down_proj")
    }


def test_block_by_block_as_at_once(routed: Path, tiny_text: Path) -> None:
    """Weights brought block by block, and gradients taken so: the same statistics as with all of them in memory."""
    kept, brought = (load_model(str(routed), device="cpu", resident=resident) for resident in (True, False))
    tokens = windows_of(kept, tiny_text, 32, 4).tokens
    assert not brought.resident
    found = [collect(model, tokens, ["D", "F", "R"], at_once=model is kept) for model in (kept, brought)]
    for name, one in found[0].layers.items():
        for operand, value in one.values.items():
            torch.testing.assert_close(found[1].layers[name][operand], value, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("model_type", ["gpt_oss", "mixtral"])
def test_half_precision_in_several_files(
    model_type: str, save_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    """As most mixtures are published: bfloat16, mapped, computed in fp32; an expert's tensors in different files."""
    source = tmp_path / "dense"
    shutil.copytree(save_mixture(save_model, model_type), source)
    (source / "model.safetensors").unlink()
    plain(save_mixture(save_model, model_type)).bfloat16().save_pretrained(source, max_shard_size="30KB")
    names = sorted(path.name for path in source.glob("*.safetensors"))
    assert len(names) > 2
    told = prune(str(source), output=tmp_path / "out", metric="sparsegpt", calibration=str(tiny_text), **OPTIONS)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == names
    for name in names:
        dense, pruned = load_file(source / name), load_file(tmp_path / "out" / name)
        assert [(key, one.dtype, one.shape) for key, one in dense.items()] == [
            (key, one.dtype, one.shape) for key, one in pruned.items()
        ]
    assert verify(str(tmp_path / "out"), against=str(source), device="cpu")["problems"] == []
    tokens = windows_of(load_model(str(source)), tiny_text, 32, 4).tokens
    assert loss_of(plain(tmp_path / "out"), tokens) == pytest.approx(told["perplexity"], rel=1e-3)


def test_slim_refuses_a_mixture(routed: Path, tiny_text: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"qwen3_moe"):
        slim(str(routed), calibration=str(tiny_text), sparsity=0.3, output=tmp_path / "out", steps=2, **SLIM)
