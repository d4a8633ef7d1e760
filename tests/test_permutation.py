"""Channel permutation before N:M: the same function, the pattern in the file, more of the scores kept."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from gpmetric.blockwise.couplings import Coupling, find_couplings
from gpmetric.blockwise.replay import record_calls
from gpmetric.errors import InputError
from gpmetric.loading import load_model
from gpmetric.outputs import MANIFEST
from gpmetric.pruning import unfinished
from gpmetric.pruning.bench import bench
from gpmetric.pruning.checkpoint import CheckpointWriter
from gpmetric.pruning.listeners import PruneListener
from gpmetric.pruning.output_folder import file_digest
from gpmetric.pruning.permutation import best_order, kept_score
from gpmetric.pruning.prune import prune
from gpmetric.pruning.verify import verify
from gpmetric.targets import parse_target
from tests.mixtures import save_mixture
from tests.pruning_helpers import sign_manifest

QUICK: dict[str, Any] = {"samples": 4, "windows": 4, "sequence_length": 32, "device": "cpu", "target": "2:4"}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = SIZES | {"num_key_value_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.3}
GROUPED = LLAMA | {"num_key_value_heads": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama-gqa": ("llama", GROUPED),
    "llama-biases": ("llama", GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", GROUPED | {"sliding_window": 5}),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", GROUPED | {"head_dim": 8}),
    "olmo2": ("olmo2", GROUPED),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}),
}
# Architectures whose layers have other names, queries, keys and values in one layer in one order or another, gates and
# channels in one layer, or attention and MLP beside each other.
_NEOX = SIZES | {"max_position_embeddings": 64, "initializer_range": 0.3}
_GPTJ = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4, "initializer_range": 0.3}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("phi3", GROUPED | {"pad_token_id": 0}),
    "phi": ("phi", LLAMA),
    "gpt_neox": ("gpt_neox", _NEOX),
    "gpt_neo": ("gpt_neo", {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}),
    "gptj": ("gptj", _GPTJ),
    "gpt_bigcode": ("gpt_bigcode", FAMILIES["gpt2"][1]),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}),
    "falcon": ("falcon", SIZES | {"new_decoder_architecture": True, "num_kv_heads": 2, "initializer_range": 0.3}),
    "falcon-mq": ("falcon", SIZES | {"multi_query": True, "new_decoder_architecture": False, "initializer_range": 0.3}),
    "opt": ("opt", SIZES | {"ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "init_std": 0.3}),
    "mpt": ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "gemma2": ("gemma2", GROUPED | {"head_dim": 8}),
    "starcoder2": ("starcoder2", GROUPED),
    "stablelm": ("stablelm", GROUPED),
    "cohere": ("cohere", GROUPED),
    "glm4": ("glm4", GROUPED | {"head_dim": 8, "pad_token_id": 0}),
}


@pytest.fixture(scope="module")
def folder(save_model: Callable[..., Path]) -> Callable[[str], Path]:
    """The folder of a random model with random biases, written once."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            kind, config = FAMILIES[name]
            made[name] = save_model(kind, **config)
            model = AutoModelForCausalLM.from_pretrained(made[name])
            torch.manual_seed(1)
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.data += 0.3 * torch.randn_like(parameter)
            model.save_pretrained(made[name])
        return made[name]

    return of


def logits(path: Path) -> Tensor:
    tokens = torch.arange(24).view(2, 12) * 7 % 200
    with torch.no_grad():
        found: Tensor = AutoModelForCausalLM.from_pretrained(path)(tokens).logits
    return found


def shuffled(coupling: Coupling) -> Tensor:
    _, groups, size = coupling.columns.shape
    return torch.stack([torch.randperm(size) for _ in range(groups)])


@pytest.mark.every(3)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_function_is_preserved(name: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Every coupling in a random order, written without pruning, gives the logits of the dense checkpoint."""
    source = folder(name)
    model = load_model(str(source), device="cpu")
    calls = record_calls(model, [torch.arange(20).view(2, 10)])
    targets = {layer.name: parse_target("0") for layer in model.layers}
    writer = CheckpointWriter(model, tmp_path, targets, update=False)
    writer.copy_files()
    torch.manual_seed(2)
    states, layers, moved = calls.hidden[0], [], 0
    for index, block in enumerate(model.blocks):
        couplings = find_couplings(calls, index, states)
        assert len(couplings) == 2
        moves = [move for one in couplings.values() for move in one.moves(shuffled(one))]
        layers += [writer.write_layer(layer, None, moves) for layer in block.layers]
        moved += len(writer.write_moves(moves, block.layers))
        states = calls.call(index, 0, states)
    made: dict[str, Any] = dict.fromkeys(("metric", "update", "formula", "target"), "x")
    made |= {"versions": {"gpmetric": "0"}, "text": {"text": "t.txt", "windows": 1, "sequence_length": 20}}
    writer.finish(made, layers)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    changed = {key.split(".", 3 if name != "gpt2" else 2)[-1] for key in before if not before[key].equal(after[key])}
    mlp = {"mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"}
    expected = mlp | {"self_attn.v_proj.weight", "self_attn.o_proj.weight"}
    if name == "llama-biases":
        expected |= {"mlp.gate_proj.bias", "mlp.up_proj.bias", "self_attn.v_proj.bias"}
    if name == "qwen2":
        expected |= {"self_attn.v_proj.bias"}
    if name == "gpt2":
        expected = {f"{layer}.weight" for layer in ("mlp.c_fc", "mlp.c_proj", "attn.c_attn", "attn.c_proj")}
        expected |= {"mlp.c_fc.bias", "attn.c_attn.bias"}
        changed = {key.partition(".")[2] if key[0].isdigit() else key for key in changed}
    assert changed == expected
    assert moved
    assert torch.allclose(logits(source), logits(tmp_path), rtol=1e-5, atol=1e-5)


@pytest.mark.every(3)
@pytest.mark.parametrize("name", OTHERS)
def test_channels_are_found_by_what_they_do(name: str, save_model: Callable[..., Path]) -> None:
    """Those of attention and MLP in every block, in a random order that leaves what the block gives as it was."""
    kind, config = OTHERS[name]
    model = load_model(str(save_model(kind, **config)), device="cpu")
    calls = record_calls(model, [torch.arange(20).view(2, 10)])
    states = calls.hidden[0]
    for index in range(len(model.blocks)):
        couplings = find_couplings(calls, index, states)
        assert len(couplings) == 2
        after = calls.call(index, 0, states)
        for one in couplings.values():
            with one.placed(shuffled(one)):
                torch.testing.assert_close(calls.call(index, 0, states), after, rtol=1e-4, atol=1e-4)
        states = after


def test_names_alone_are_not_trusted(folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a layer that writes the channels, or only its bias, stays behind, the block is left alone."""
    model = load_model(str(folder("gpt2")), device="cpu")
    calls = record_calls(model, [torch.arange(20).view(2, 10)])
    assert len(find_couplings(calls, 0, calls.hidden[0])) == 2
    monkeypatch.setattr("gpmetric.blockwise.couplings._Member.axes", property(_without_bias))
    assert find_couplings(calls, 0, calls.hidden[0]) == {}
    model = load_model(str(folder("llama")), device="cpu")
    calls = record_calls(model, [torch.arange(20).view(2, 10)])
    assert len(find_couplings(calls, 0, calls.hidden[0])) == 2
    mlp = model.blocks[0].module.mlp
    mlp.gate_proj = torch.nn.Sequential(mlp.gate_proj)  # no longer beside the layer that reads its channels
    assert [one.layer for one in find_couplings(calls, 0, calls.hidden[0]).values()] == [
        "model.layers.0.self_attn.o_proj"
    ]


def test_weights_of_two_layers_are_left_alone(folder: Callable[[str], Path]) -> None:
    """In another order for one block, they would be in a wrong one for the other."""
    model = load_model(str(folder("llama")))
    calls = record_calls(model, [torch.arange(24).view(2, 12)])
    assert len(find_couplings(calls, 0, calls.hidden[0])) == 2
    first, second = (block.module for block in model.blocks)
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    (alone,) = find_couplings(calls, 0, calls.hidden[0])
    assert alone.endswith("o_proj")


def _without_bias(member: Any) -> dict[str, int]:
    return {"weight": int(member.reads != isinstance(member.module, Conv1D))}


def test_a_killed_run_goes_on_to_the_same_files(
    folder: Callable[[str], Path], tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the first block, and again when all numbers of the second are written, but not the record of it."""
    given = QUICK | {"calibration": str(tiny_text), "metric": "ria", "permute": True}
    (tmp_path / "whole").mkdir()
    prune(str(folder("gpt2")), output=tmp_path / "whole" / "out", **given)
    monkeypatch.setattr(unfinished, "_SECONDS", 0.0)
    monkeypatch.setattr(unfinished, "_SHARE", 0.0)
    for blocks in (2, 2):
        with pytest.raises(KeyboardInterrupt):
            prune(str(folder("gpt2")), output=tmp_path / "out", listener=Stopping(blocks), **given)
    told = Stopping(3)
    prune(str(folder("gpt2")), output=tmp_path / "out", listener=told, **given)
    assert told.begun == 1
    for path in (tmp_path / "whole" / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


class Stopping(PruneListener):
    """Interrupts behind a block, and tells at which it was gone on with."""

    def __init__(self, after: int) -> None:
        self.after, self.begun = after, 0

    def resumed(self, block: int, blocks: int) -> None:
        self.begun = block

    def progress(self, phase: str, done: int, total: int) -> None:
        if phase == "blocks" and done == self.after:
            raise KeyboardInterrupt


def pattern_holds(weight: Tensor, transposed: bool) -> bool:
    groups = (weight.t() if transposed else weight).reshape(-1, 4)
    return bool(((groups != 0).sum(dim=1) <= 2).all())


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama-gqa", {"metric": "wanda"}),
        ("gpt2", {"metric": "ria"}),
        ("llama-biases", {"metric": "sparsegpt"}),
        ("qwen2", {"metric": "alps"}),
        ("llama", {"metric": "abs(W)*X", "update": "obs", "fit": "dense"}),
        ("mistral", {"metric": "W*W*F", "update": "admm", "one_shot": True}),
        ("qwen3", {"metric": "neg(X/abs(W))"}),
    ],
)
def test_written_as_measured(
    name: str, options: dict[str, Any], folder: Callable[[str], Path], tiny_text: Path, tmp_path: Path
) -> None:
    """Pattern and zeros in the file, the perplexity of `bench`, more kept than without; verified against the dense."""
    source, given = folder(name), QUICK | options | {"calibration": str(tiny_text)}
    result = prune(str(source), output=tmp_path / "out", permute=True, save_masks=tmp_path / "masks", **given)
    tensors, masks = load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "masks")
    layers = result["layers"]
    assert result["permuted"] == {"layers": 4, "of": len(layers)}
    for layer in layers:
        weight = tensors[layer["tensor"]]
        assert pattern_holds(weight, layer["transposed"]), layer["name"]
        assert masks[layer["name"]].equal((weight.t() if layer["transposed"] else weight) != 0)
    assert verify(tmp_path / "out", against=str(source), device="cpu")["problems"] == []
    keys = [key for key in given if key not in ("metric", "target")]
    rows = bench(
        str(source), metric=[given["metric"]], target=["2:4", "0.5"], text=[str(tiny_text)], permute=True,
        **{key: given[key] for key in keys},
    )["results"]  # fmt: skip
    assert [row["permuted"] for row in rows] == [True, False]
    assert result["perplexity"] == pytest.approx(rows[0]["ppl"][str(tiny_text)], rel=1e-4)
    plain = prune(str(source), output=tmp_path / "plain", **given)
    assert "permuted" not in plain
    assert plain["perplexity"] != pytest.approx(result["perplexity"], rel=1e-4)


def moves_of(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / MANIFEST).read_text())["moves"]
    return found


@pytest.fixture(scope="module")
def permuted(folder: Callable[[str], Path], tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with biases at 2:4, permuted."""
    out = tmp_path_factory.mktemp("permuted") / "out"
    prune(str(folder("llama-biases")), output=out, calibration=str(tiny_text), permute=True, **QUICK)
    return out


def test_the_manifest_says_which_axis_is_in_which_order(permuted: Path, folder: Callable[[str], Path]) -> None:
    """Applied to the dense tensors here, the orders give the numbers of the file, wherever those are not zero."""
    dense, written = load_file(folder("llama-biases") / "model.safetensors"), load_file(permuted / "model.safetensors")
    assert {tuple(sorted(move["tensors"].values())) for move in moves_of(permuted)} == {(0, 0), (0, 0, 0, 0, 1), (1,)}
    for move in moves_of(permuted):
        order = [int(one) for one in move["order"].split()]
        assert order != sorted(order)
        for name, axis in move["tensors"].items():
            dense[name] = dense[name][order] if axis == 0 else dense[name][:, order]
    for name, tensor in written.items():
        assert tensor.equal(dense[name].where(tensor != 0, 0.0)), name


@pytest.mark.parametrize(("kind", "moved"), [("mixtral", 2), ("qwen2_moe", 4)])
def test_experts_of_a_mixture_stay_in_their_order(
    kind: str, moved: int, save_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    """Attention, and an expert that every token comes to, are in an order that leaves the dense function as it was."""
    source = save_mixture(save_model, kind)
    result = prune(str(source), output=tmp_path / "out", calibration=str(tiny_text), permute=True, **QUICK)
    assert result["permuted"]["layers"] == moved
    dense, written = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    experts = [name for name in dense if ".experts." in name]
    assert len(experts) == 2 * 4 * 3
    for name in experts:  # masked in place
        assert written[name].equal(dense[name].where(written[name] != 0, 0.0)), name
        assert pattern_holds(written[name], False), name
        assert int((written[name] == 0).sum()) == dense[name].numel() // 2
    ordered = dict(dense)
    for move in moves_of(tmp_path / "out"):
        order = [int(one) for one in move["order"].split()]
        for name, axis in move["tensors"].items():
            assert name not in experts
            ordered[name] = (ordered[name][order] if axis == 0 else ordered[name][:, order]).contiguous()
    for name, tensor in written.items():
        assert tensor.equal(ordered[name].where(tensor != 0, 0.0)), name
    assert any(not ordered[name].equal(dense[name]) for name in dense)
    shutil.copytree(source, tmp_path / "ordered")
    save_file(ordered, tmp_path / "ordered" / "model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(logits(tmp_path / "ordered"), logits(source), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        ("model.layers.1.mlp.down_proj.weight", "weights of layer model.layers.1.mlp.down_proj that were kept are not"),
        ("model.layers.0.mlp.up_proj.weight", "weights of layer model.layers.0.mlp.up_proj that were kept are not"),
        ("model.layers.1.self_attn.v_proj.bias", "tensor model.layers.1.self_attn.v_proj.bias is not that of"),
        ("model.layers.0.mlp.down_proj.bias", "tensor model.layers.0.mlp.down_proj.bias is not that of"),
    ],
)
def test_verify_notices_one_number(
    tensor: str, problem: str, permuted: Path, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in permuted.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    weights = load_file(copy / "model.safetensors")
    flat = weights[tensor].view(-1)
    flat[int(flat.nonzero()[0])] *= 1.001
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["files"]["model.safetensors"] = file_digest(copy / "model.safetensors")
    sign_manifest(copy, manifest)
    (found,) = verify(copy, against=str(folder("llama-biases")), device="cpu")["problems"]
    assert found.startswith(problem)


@pytest.mark.parametrize("order", ["0 1 2", " ".join(["0"] * 48), "a", "-1"])
def test_verify_refuses_what_is_no_order(
    order: str, permuted: Path, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in permuted.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["moves"][0]["order"] = order
    (copy / MANIFEST).write_text(json.dumps(manifest))
    problems = verify(copy, against=str(folder("llama-biases")), device="cpu")["problems"]
    assert any("cannot have the order that the manifest says" in one for one in problems)


def brute_force(scores: Tensor) -> float:
    """The most that 2:4 keeps of 8 columns in any order: there are 35 ways to make two groups of four."""
    orders = [
        [0, *rest, *(one for one in range(1, 8) if one not in rest)] for rest in itertools.combinations(range(1, 8), 3)
    ]
    return max(float(scores[:, order].view(-1, 2, 4).topk(2, dim=2).values.sum()) for order in orders)


@pytest.mark.parametrize("seed", range(4))
def test_close_to_the_best_of_all_orders(seed: int) -> None:
    scores = torch.rand(16, 8, generator=torch.Generator().manual_seed(seed)) ** 2
    given, best = kept_score(scores, torch.arange(8), 2, 4), brute_force(scores)
    order = best_order(scores, 2, 4)
    assert sorted(order.tolist()) == list(range(8))
    found = float(scores[:, order].view(-1, 2, 4).topk(2, dim=2).values.sum())
    assert given <= found * (1 + 1e-6)
    assert found >= best - 0.2 * (best - given) - 1e-6


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("kind", ["random", "heavy", "negative", "constant", "sorted"])
def test_never_less_than_in_the_given_order(kind: str, keep: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(30, 64, generator=generator)
    scores = {
        "random": scores, "heavy": (0.5 - scores).abs() ** -3, "negative": -100 - scores,
        "constant": torch.ones(30, 64), "sorted": torch.linspace(1, 4, 64) * scores,
    }[kind]  # fmt: skip
    order = best_order(scores, keep, 4)
    given, found = kept_score(scores, torch.arange(64), keep, 4), kept_score(scores, order, keep, 4)
    assert found >= given
    assert kind == "constant" or found > given
    assert best_order(scores, keep, 4).equal(order)
    assert kind != "random" or best_order(scores - 7, keep, 4).equal(order)  # what is added changes nothing


def test_large_and_small_columns_are_spread() -> None:
    """Four large columns side by side: 2:4 keeps two of them as given, and all in an order that spreads them."""
    scores = torch.ones(5, 8)
    scores[:, :4] = 10
    assert kept_score(scores, torch.arange(8), 2, 4) == 5 * (20 + 2)
    assert kept_score(scores, best_order(scores, 2, 4), 2, 4) == 5 * 40


def test_what_is_not_known_is_left_alone_and_told(
    folder: Callable[[str], Path], tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpmetric.blockwise.couplings._holds", lambda *_: False)
    source = folder("llama")
    result = prune(str(source), output=tmp_path / "out", calibration=str(tiny_text), permute=True, **QUICK)
    assert result["permuted"]["layers"] == 0 < result["permuted"]["of"]
    assert moves_of(tmp_path / "out") == []


def test_heads_that_hold_no_whole_groups_are_left_alone(
    save_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    """Heads of 8, 4:16: only the channels of the MLPs change places."""
    source = save_model("llama", **GROUPED)
    given = QUICK | {"target": "8:16", "calibration": str(tiny_text)}
    result = prune(str(source), output=tmp_path / "out", permute=True, **given)
    assert result["permuted"]["layers"] == 2
    assert verify(tmp_path / "out", against=str(source), device="cpu")["ok"]


def test_an_allocation(folder: Callable[[str], Path], tiny_text: Path, tmp_path: Path) -> None:
    """Layers that stay dense are moved with those that are pruned."""
    source = folder("llama-biases")
    names = [layer.name for layer in load_model(str(source), device="cpu").layers]
    pattern = {name: "dense" if "up_proj" in name or "0.self_attn.o" in name else "1:4" for name in names}
    (tmp_path / "a.json").write_text(json.dumps({"version": 1, "granularity": "n:m", "pattern": pattern}))
    given = {key: value for key, value in QUICK.items() if key != "target"} | {"calibration": str(tiny_text)}
    result = prune(
        str(source), output=tmp_path / "out", allocation=tmp_path / "a.json", permute=True, update="obs", **given
    )
    assert result["permuted"] == {"layers": 3, "of": 11}
    assert verify(tmp_path / "out", against=str(source), device="cpu")["problems"] == []


def test_writers_that_are_not_pruned_are_moved(folder: Callable[[str], Path], tiny_text: Path, tmp_path: Path) -> None:
    given = QUICK | {"calibration": str(tiny_text), "include": "down_proj"}
    prune(str(folder("llama")), output=tmp_path / "out", permute=True, **given)
    (first, _) = moves_of(tmp_path / "out")
    assert sorted(first["tensors"]) == [f"model.layers.0.mlp.{name}_proj.weight" for name in ("down", "gate", "up")]
    assert verify(tmp_path / "out", against=str(folder("llama")), device="cpu")["problems"] == []


def test_refused_without_n_m(folder: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--permute .* --target 0.5 is not N:M"):
        prune(str(folder("llama")), output=tmp_path / "out", permute=True)
    with pytest.raises(InputError, match=r"--permute .* --target 0.6, layer:0.7 is not N:M"):
        bench(str(folder("llama")), target=["0.6", "layer:0.7"], permute=True)
    sparsity = {"version": 1, "granularity": "row", "sparsity": {"a": 0.25}}
    (tmp_path / "a.json").write_text(json.dumps(sparsity))
    with pytest.raises(InputError, match="--permute"):
        prune(str(folder("llama")), output=tmp_path / "out", permute=True, allocation=tmp_path / "a.json")


def test_a_recipe(folder: Callable[[str], Path], tiny_text: Path, tmp_path: Path, permuted: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    text = 'version = 1\nmetric = "wanda"\ntarget = "2:4"\nsamples = 4\nsequence_length = 32\npermute = true\n'
    recipe.write_text(text)
    given = {"calibration": str(tiny_text), "windows": 4, "device": "cpu"}
    prune(str(folder("llama-biases")), output=tmp_path / "out", recipe=recipe, **given)
    assert file_digest(tmp_path / "out" / "model.safetensors") == file_digest(permuted / "model.safetensors")
    recipe.write_text(text.replace("2:4", "0.5"))
    with pytest.raises(InputError, match=r"--permute .* --target 0.5 is not N:M"):
        prune(str(folder("llama-biases")), output=tmp_path / "none", recipe=recipe, **given)
