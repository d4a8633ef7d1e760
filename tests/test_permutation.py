"""Channel permutation before N:M: the same function, the pattern in the file, more of the scores kept."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from gpmetric.blockwise.couplings import Coupling, find_couplings
from gpmetric.blockwise.replay import record_calls
from gpmetric.errors import InputError
from gpmetric.loading import load_model
from gpmetric.pruning.bench import bench
from gpmetric.pruning.checkpoint import CheckpointWriter
from gpmetric.pruning.output_folder import MANIFEST, file_digest
from gpmetric.pruning.permutation import best_order, kept_score
from gpmetric.pruning.prune import prune
from gpmetric.pruning.verify import verify
from gpmetric.targets import parse_target

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
    "olmo2": ("olmo2", GROUPED),  # not in the table: its names are Llama's
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}),
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
    made = dict.fromkeys(("metric", "update", "formula", "target"), "x") | {"versions": {"gpmetric": "0"}}
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
