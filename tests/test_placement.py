"""Where weights are: one block's copies at a time, everything back at home afterwards, and the memory it takes."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gpmetric import placement as module
from gpmetric.calibration.collect import collect_blocks
from gpmetric.data import Text, Windows
from gpmetric.errors import ModelError
from gpmetric.evaluation.perplexity import mean_loss
from gpmetric.loading import load_model
from gpmetric.models import Model
from gpmetric.placement import FRONT, HEAD, Part, Placement
from gpmetric.pruning.protocol import Protocol, Rule
from gpmetric.targets import parse_target
from tests.pruning_helpers import session_of

TOKENS = torch.arange(2, 38).view(3, 12)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def halved(save_model: Callable[..., Path]) -> Path:
    """A Llama of four blocks, stored in bfloat16, its embeddings tied."""
    folder = save_model(
        "llama", hidden_size=32, intermediate_size=44, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    weights = {name: weight.bfloat16() for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return folder


@pytest.fixture
def streamed(halved: Path) -> Model:
    return load_model(str(halved), dtype="float32", resident=False)


def where(model: Model) -> list[tuple[int, torch.dtype]]:
    """Place and dtype of every parameter."""
    return [(one.data_ptr(), one.dtype) for one in model.module.parameters()]


def placed(*parameters: nn.Parameter) -> bool:
    """Whether these are all copies in fp32; none must be, otherwise."""
    (found,) = {one.dtype for one in parameters}
    return found == torch.float32


def block(model: Model, index: int) -> list[nn.Parameter]:
    return list(model.blocks[index].module.parameters())


# One part at a time


def losses(model: Model) -> None:
    mean_loss(model, TOKENS)


def statistics(model: Model) -> None:
    for _ in collect_blocks(model, TOKENS, ["X", "G", "H", "F", "D"]):
        pass


def rules(model: Model) -> None:
    windows = Windows(Text("text", ""), TOKENS)
    made = Protocol(session_of(model, windows), one_shot=False)
    wanted = [Rule(made.session.metric(name), parse_target("0.5")) for name in ("wanda", "sparsegpt")]
    made.prepare([rule.metric for rule in wanted], "none")
    made.measure(wanted, [TOKENS])


@pytest.mark.parametrize("work", [losses, statistics, rules])
def test_copies_of_one_block_are_alive_at_a_time(
    streamed: Model, work: Callable[[Model], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a block arrives, nothing is left of another, without a garbage collection; nor of any in the end."""
    arrive = Placement._arrive
    copies: dict[Part, list[ref[Tensor]]] = {}
    alive: list[list[Part]] = []
    home = where(streamed)

    def watched(self: Placement, part: Part) -> list[Tensor]:
        alive.append([other for other, kept in copies.items() if any(one() is not None for one in kept)])
        found = arrive(self, part)
        storages = [one.untyped_storage() for one in found]
        copies[part] = [ref(one) for one in found] + [ref(one) for one in storages]
        return found

    monkeypatch.setattr(Placement, "_arrive", watched)
    work(streamed)
    assert copies.keys() == {0, 1, 2, 3, FRONT, HEAD}
    assert alive == [[]] * len(alive)
    assert not any(one() is not None for kept in copies.values() for one in kept)
    assert where(streamed) == home


def test_contexts_of_one_part_are_nested(streamed: Model) -> None:
    first, second, home = block(streamed, 0), block(streamed, 1), where(streamed)
    with streamed.at_hand(0):
        places = [one.data_ptr() for one in first]
        with streamed.at_hand(0), streamed.at_hand(1):
            assert [one.data_ptr() for one in first] == places
            assert placed(*first, *second)
        assert [one.data_ptr() for one in first] == places
        assert placed(*first)
        assert not placed(*second)
    assert where(streamed) == home


def test_parts_that_share_an_embedding_keep_it_while_one_is_open(streamed: Model) -> None:
    """Tied embeddings are read before the blocks and behind them; the inner context ends first, or the outer one."""
    tied, home = streamed.module.get_output_embeddings().weight, where(streamed)
    assert tied is streamed.module.get_input_embeddings().weight
    for outer, inner in ((FRONT, HEAD), (HEAD, FRONT)):
        with streamed.at_hand(outer):
            place = tied.data_ptr()
            with streamed.at_hand(inner):
                assert tied.data_ptr() == place
            assert placed(tied, *streamed.module.model.norm.parameters())
            assert tied.data_ptr() == place
        assert where(streamed) == home
    one, other = streamed.at_hand(FRONT), streamed.at_hand(HEAD)
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert placed(tied)
    other.__exit__(None, None, None)
    assert where(streamed) == home


def test_blocks_that_share_a_parameter() -> None:
    """One weight in two blocks, both open: one copy, which stays until the last is closed."""
    shared, own = nn.Parameter(torch.ones(3).bfloat16()), nn.Parameter(torch.zeros(2).bfloat16())
    home = Placement({0: [shared], 1: [shared, own]}, torch.device("cpu"), torch.float32)
    assert home.bytes(0) == 12
    assert home.bytes(1) == 20
    assert home.total_bytes == 20
    with home.at_hand(1):
        with home.at_hand(0):
            assert placed(shared, own)
        assert placed(shared, own)
    assert not placed(shared, own)
    with home.at_hand(0):
        assert placed(shared)
        assert not placed(own)
    home.settle()
    assert placed(shared, own)
    with home.at_hand(0):
        assert placed(shared)
    assert placed(shared, own)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_parameters_are_at_home_again_after_an_error(streamed: Model, error: type[BaseException]) -> None:
    home, expected = where(streamed), mean_loss(streamed, TOKENS)
    with pytest.raises(error), streamed.at_hand(HEAD), streamed.at_hand(0), streamed.at_hand(0):
        raise error
    assert where(streamed) == home
    hook = streamed.blocks[2].layers[0].module.register_forward_hook(lambda *_: (_ for _ in ()).throw(error))
    for work in (losses, statistics, rules):
        with pytest.raises((error, ModelError)):  # of a model's own forward pass
            work(streamed)
        assert where(streamed) == home
    hook.remove()
    assert mean_loss(streamed, TOKENS) == expected


def test_the_next_block_is_read_ahead_in_either_direction(streamed: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and back, one block ahead; an arrival that was not foreseen is right all the same."""
    fetched: list[Part] = []
    monkeypatch.setattr(Placement, "_fetch", lambda self, part: fetched.append(part))
    for index in (0, 1, 2, 3, 3, 2, 1, 0, 0, 2):
        with streamed.at_hand(index):
            assert placed(*block(streamed, index))
    assert fetched == [1, 2, 3, 4, 4, 1, 0, 1, 1, 3]


@pytest.mark.parametrize("lacks", ["Linux", "/proc"])
def test_other_systems_do_without_advice(
    halved: Path, streamed: Model, lacks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = mean_loss(streamed, TOKENS)
    if lacks == "Linux":
        monkeypatch.setattr(module.sys, "platform", "darwin")
        monkeypatch.setattr(module.ctypes, "CDLL", lambda *_, **__: pytest.fail("called the system"))
    else:
        monkeypatch.setattr(
            module, "Path", lambda path: Path("/no/such/folder") if path.startswith("/proc") else Path(path)
        )
    model = load_model(str(halved), dtype="float32", resident=False)
    assert mean_loss(model, TOKENS) == expected


# On the device for good


def mapped(folder: Path) -> list[str]:
    """Files of a folder that this process has mapped into its memory."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if str(folder) in line]


@LINUX
def test_nothing_is_mapped_behind_copies(halved: Path) -> None:
    """A resident model that was widened has let go of its files; one that was not is in them."""
    streamed = load_model(str(halved), dtype="float32", resident=False)
    assert mapped(halved)
    del streamed
    gc.collect()  # models are in reference cycles
    model = load_model(str(halved), dtype="float32")
    assert placed(*model.module.parameters())
    assert not mapped(halved)
    home = where(model)
    with model.at_hand(0), model.at_hand(FRONT):
        assert where(model) == home
    assert where(load_model(str(halved), dtype="bfloat16"))[0][1] == torch.bfloat16


def test_writing_to_a_resident_model_leaves_its_files_alone(tiny_llama: Path) -> None:
    """Its weights are the mapped files, of which the process has a copy where it writes."""
    before = (tiny_llama / "model.safetensors").read_bytes()
    model = load_model(str(tiny_llama))
    for layer in model.layers:
        layer.weight.fill_(1)
    mean_loss(model, TOKENS)
    assert all((layer.weight == 1).all() for layer in model.layers)
    assert (tiny_llama / "model.safetensors").read_bytes() == before


@LINUX
def test_what_is_read_is_let_go_of(save_model: Callable[..., Path]) -> None:
    """Pages of a streamed model's files that are in memory, after each pass over all of them."""
    folder = save_model("llama", hidden_size=512, intermediate_size=1400, num_hidden_layers=2, num_attention_heads=4)
    size = (folder / "model.safetensors").stat().st_size
    model = load_model(str(folder), resident=False)
    passes: list[Callable[[], Any]] = [
        lambda: None, lambda: model.digest, lambda: mean_loss(model, TOKENS), lambda: statistics(model)
    ]  # fmt: skip
    for work in passes:
        work()
        assert resident_bytes(folder) < 0.1 * size


def resident_bytes(folder: Path) -> int:
    """Of a folder's mapped files, what is in memory."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.partition(" ")[0]:
            inside = str(folder) in line
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


# A model that is larger than what may be used


def write_shards(folder: Path, tokenizer: Any) -> int:
    """A Llama of random bfloat16 weights, written shard by shard; its size in bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=300, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=8,
        max_position_embeddings=64, tie_word_embeddings=True, dtype="bfloat16", architectures=["LlamaForCausalLM"],
        pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: one.shape for name, one in LlamaForCausalLM(config).state_dict().items()}
    del shapes["lm_head.weight"]
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        number = int(name.split(".")[2]) if ".layers." in name else 12
        shards.setdefault(f"model-{number:05d}.safetensors", {})[name] = shape
    generator, size = torch.Generator().manual_seed(0), 0
    for file, held in shards.items():
        weights = {
            name: (torch.randn(shape, generator=generator) * 0.02 if len(shape) > 1 else torch.ones(shape)).bfloat16()
            for name, shape in held.items()
        }
        save_file(weights, folder / file, metadata={"format": "pt"})
        size += sum(weight.nbytes for weight in weights.values())
    index = {
        "metadata": {"total_size": size},
        "weight_map": {name: file for file, held in shards.items() for name in held},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """Directory of a model of 309 MB."""
    folder = tmp_path_factory.mktemp("large")
    assert 290e6 < write_shards(folder, tiny_tokenizer) < 320e6
    return folder


WALK = """
import json, sys
import torch
from pathlib import Path
from transformers import LlamaForCausalLM
from gpmetric.calibration.collect import collect
from gpmetric.data import Text, Windows
from gpmetric.evaluation.perplexity import mean_loss
from gpmetric.loading import load_model
from gpmetric.pruning.protocol import Protocol, Rule
from gpmetric.targets import parse_target
from tests.pruning_helpers import session_of

def status(field):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024

torch.ones(8, 8) @ torch.ones(8, 8)
imports = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
tokens = torch.arange(2, 66).view(2, 32)
model = load_model(sys.argv[1], dtype=sys.argv[2], resident=False)
losses = [mean_loss(model, tokens)]
collect(model, tokens, "X")
read = status("VmHWM")
protocol = Protocol(session_of(model, Windows(Text("text", ""), tokens)), one_shot=False)
rule = Rule(protocol.session.metric("wanda"), parse_target("0.5"))
protocol.prepare([rule.metric], "none")
losses += protocol.measure([rule], [tokens])[0].losses
print(json.dumps({"read": read - imports, "pruned": status("VmHWM") - imports, "losses": losses}))
"""


@pytest.mark.every(2)
@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_streamed_model_takes_the_memory_of_a_block(large: Path, dtype: str) -> None:
    """Of 309 MB of weights, 618 in fp32, a process has a block at a time, and where it prunes another in its place."""
    command = [sys.executable, "-c", WALK, str(large), dtype]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=os.environ | {"PYTHONPATH": "."}
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    block = 25.7e6 * (1 if dtype == "bfloat16" else 2)
    choosing = 4 * 4 * 1024 * 2816  # copies of the largest matrix in fp32, whatever the weights' dtype
    assert found["read"] < 120e6
    assert found["pruned"] < 120e6 + 2 * block + choosing
    assert all(0 < loss < 20 for loss in found["losses"])
