"""Models: weights as views, digests, and every model that must be refused, in one line each."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from gpmetric.blocks import find_blocks
from gpmetric.errors import InputError, ModelError
from gpmetric.experts import refuse_unsplit
from gpmetric.loading import load_model, pick_device
from gpmetric.models import Model
from tests.pruning_helpers import restored

EITHER = pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])


@pytest.fixture
def model(family: str, request: pytest.FixtureRequest) -> Model:
    return load_model(str(request.getfixturevalue(family)))


@pytest.fixture
def damaged(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama to damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def refused(source: str | Path, message: str, error: type[InputError] = ModelError, **options: Any) -> None:
    with pytest.raises(error, match=message) as caught:
        load_model(str(source), **options)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 500


# What a loaded model offers


@EITHER
def test_weights_are_out_by_in(model: Model) -> None:
    """x W^T + b of the view is what the module computes, whatever it stores."""
    layers = model.layers
    assert {type(layer.module) for layer in layers} == {nn.Linear if "llama" in model.name else Conv1D}
    for layer in layers:
        inputs = torch.randn(5, layer.weight.shape[1], generator=torch.Generator().manual_seed(0))
        bias = getattr(layer.module, "bias", None)
        assert torch.allclose(
            inputs @ layer.weight.t() + (0 if bias is None else bias), layer.module(inputs), atol=1e-5
        )
        assert layer.parameter is layer.module.weight
        assert torch.equal(layer.oriented(layer.parameter), layer.weight)


@EITHER
def test_writing_a_weight_changes_the_model(model: Model) -> None:
    tokens = torch.tensor([[5, 6, 7]])
    before = model.module(input_ids=tokens).logits
    layer = model.layers[-1]
    layer.weight[0, 1] = 9.0
    assert layer.parameter[(1, 0) if isinstance(layer.module, Conv1D) else (0, 1)] == 9
    assert not torch.equal(model.module(input_ids=tokens).logits, before)


@EITHER
def test_blocks_layers_and_facts(model: Model) -> None:
    assert len(model.blocks) == 3
    assert [len(block.layers) for block in model.blocks] == [len(model.layers) // 3] * 3
    assert len({layer.name for layer in model.layers}) == len(model.layers)
    assert all(layer.module is model.module.get_submodule(layer.name) for layer in model.layers)
    embeddings = {model.module.get_input_embeddings(), model.module.get_output_embeddings()}
    assert not embeddings & {layer.module for layer in model.layers}
    assert (model.vocabulary, model.context, model.positions) == (300, 64, 64)
    assert (model.dtype, str(model.device)) == ("float32", "cpu")
    assert not model.module.training
    assert not any(parameter.requires_grad for parameter in model.module.parameters())


@EITHER
def test_holding_puts_other_weights_in_place_and_the_own_ones_back(model: Model) -> None:
    """The same storage afterwards, not a copy of it; what computes inside is what the weights would compute."""
    tokens = torch.tensor([[5, 6, 7, 8]])
    own = [(layer.parameter.data_ptr(), layer.parameter.stride(), layer.parameter.clone()) for layer in model.layers]
    others = [layer.weight * 0.5 for layer in model.layers]
    with restored(model):
        for layer in model.layers:
            layer.weight.mul_(0.5)
        expected = model.module(input_ids=tokens).logits
    for failing in (False, True):
        try:
            with model.holding(others):
                assert all(map(torch.equal, (layer.weight for layer in model.layers), others))
                assert [layer.weight.data_ptr() for layer in model.layers] == [one.data_ptr() for one in others]
                torch.testing.assert_close(model.module(input_ids=tokens).logits, expected)
                if failing:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert failing
        for layer, (place, stride, bits) in zip(model.layers, own, strict=True):
            assert (layer.parameter.data_ptr(), layer.parameter.stride()) == (place, stride)
            assert torch.equal(layer.parameter.view(torch.int32), bits.view(torch.int32))


@EITHER
def test_holding_the_wrong_number_of_weights_changes_nothing(model: Model) -> None:
    places = [layer.parameter.data_ptr() for layer in model.layers]
    weights = [torch.zeros_like(layer.weight) for layer in model.layers]
    for wrong in (weights[:-1], [*weights, weights[0]]):
        with pytest.raises(ValueError, match="zip"), model.holding(wrong):
            pytest.fail("held")
        assert [layer.parameter.data_ptr() for layer in model.layers] == places


def test_holding_converts_to_the_models_dtype(tiny_gpt2: Path) -> None:
    model = load_model(str(tiny_gpt2), dtype="bfloat16")
    weights = [torch.full(layer.weight.shape, 1 / 3) for layer in model.layers]
    with model.holding(weights):
        assert {layer.parameter.dtype for layer in model.layers} == {torch.bfloat16}
        assert model.layers[0].weight[0, 0] == torch.tensor(1 / 3).bfloat16()


@EITHER
def test_digest_is_of_the_contents(model: Model, family: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(family)
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    assert load_model(str(copy)).digest == model.digest
    assert load_model(str(folder), dtype="bfloat16").digest != model.digest
    changed = replace(load_model(str(folder)), folder=None)  # else the digest of its files is remembered
    weight = changed.layers[3].weight
    weight[1, 2] = torch.nextafter(weight[1, 2], torch.tensor(9.0))
    assert changed.digest != model.digest


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": 0.1},
        {"num_attention_heads": 8, "head_dim": 4, "num_key_value_heads": 4},
        {"hidden_act": "gelu"},
    ],
)
def test_digest_is_of_the_config_too(damaged: Path, tiny_llama: Path, changes: dict[str, Any]) -> None:
    """The same weights compute something else: cached statistics of the one are not those of the other."""
    edit_config(damaged, **changes)
    assert load_model(str(damaged)).digest != load_model(str(tiny_llama)).digest


def test_include_and_exclude(tiny_llama: Path) -> None:
    def names(**options: str) -> list[str]:
        return [layer.name for layer in load_model(str(tiny_llama), **options).layers]

    assert names(include=r"[qk]_proj", exclude=r"layers\.[01]\.") == [
        "model.layers.2.self_attn.q_proj",
        "model.layers.2.self_attn.k_proj",
    ]
    assert names(include="down_proj") == [f"model.layers.{index}.mlp.down_proj" for index in range(3)]
    assert len(names(exclude="mlp")) == 12


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype(tiny_llama: Path, dtype: str) -> None:
    assert load_model(str(tiny_llama), dtype=dtype).dtype == dtype


def test_pick_device() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        assert pick_device("auto") == torch.device("cpu")
        with pytest.raises(InputError, match="torch sees no CUDA device here"):
            pick_device("cuda")
    with pytest.raises(InputError, match="--device must be auto, cpu or cuda, but got 'tpu'"):
        pick_device("tpu")


# Which layers are found


class Toy(nn.Module):
    """A block holding whatever modules it is given."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict(modules)])

    def get_decoder(self) -> nn.Module:
        return self


def test_routers_are_left_out() -> None:
    linears = {name: nn.Linear(2, 2) for name in ("router", "gate", "gate_proj", "shared_gate", "up")}
    found = find_blocks(Toy(**linears, norm=nn.LayerNorm(2), table=nn.Embedding(3, 2)), None, None)
    assert [layer.name for layer in found[0].layers] == ["blocks.0.gate_proj", "blocks.0.shared_gate", "blocks.0.up"]


def test_convolutions_are_no_experts() -> None:
    found = find_blocks(Toy(mixer=nn.Conv1d(2, 2, 3), up=nn.Linear(2, 2)), None, None)
    assert [layer.name for layer in found[0].layers] == ["blocks.0.up"]


def test_a_larger_vision_tower_is_not_taken_for_the_model(save_model: Callable[..., Path]) -> None:
    text = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 48}
    folder = save_model("gemma3", text_config=text | heads, vision_config=vision | {"image_size": 28, "patch_size": 14})
    model = load_model(str(folder))
    assert len(model.blocks) == 2
    assert all(".language_model.layers." in layer.name for layer in model.layers)
    assert model.context == 48


# What is refused

_WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
UNKNOWN_MIXTURES: dict[str, tuple[dict[str, Any], str]] = {  # whose experts transformers holds in its own way
    "jetmoe": (_WIDTHS | {"intermediate_size": 24, "num_local_experts": 2, "kv_channels": 8}, "ParallelExperts"),
    "dbrx": (
        {"d_model": 32, "n_layers": 2, "n_heads": 4, "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}}
        | {"ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2}},
        "DbrxExpertGLU",
    ),
}


@pytest.mark.parametrize("model_type", UNKNOWN_MIXTURES)
def test_experts_of_an_unknown_form_are_refused(model_type: str, save_model: Callable[..., Path]) -> None:
    options, form = UNKNOWN_MIXTURES[model_type]
    folder = save_model(model_type, **options)
    refused(folder, rf"\.0\..* is a fused expert weight \[.*\] of .*{form}, a form that is not known: a mixture of ")


def test_three_axes_alone_are_no_reason_to_refuse() -> None:
    """RWKV's decays and convolutions have three, too, and stay dense."""
    block = nn.Module()
    block.register_parameter("time_mix", nn.Parameter(torch.ones(1, 1, 8)))
    block.add_module("conv", nn.Conv1d(2, 2, 3))
    refuse_unsplit("blocks.0", block)
    block.add_module("experts", nn.Module())
    block.experts.register_parameter("weight", nn.Parameter(torch.ones(2, 4, 8)))
    with pytest.raises(ModelError, match=r"^blocks\.0\.experts\.weight is a fused expert weight \[2, 4, 8\] of Module"):
        refuse_unsplit("blocks.0", block)


def test_encoders_are_refused(save_model: Callable[..., Path], damaged: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4}
    refused(save_model("bert", **sizes, initializer_range=0.2), "is not causal: its prediction after a token depends")
    for model_type in ("t5", "bart"):
        (damaged / "config.json").write_text(json.dumps({"model_type": model_type}))
        refused(damaged, rf"\({model_type}\) is an encoder-decoder; a causal model is wanted")


@pytest.mark.parametrize("model_type", ["step3p7", "clip"])
def test_what_is_no_language_model_is_refused(model_type: str, damaged: Path) -> None:
    """Step 3.7, a mixture with a vision tower that transformers has no causal language model of; no page of classes."""
    (damaged / "config.json").write_text(json.dumps({"model_type": model_type}))
    unknown = "" if model_type == "clip" else f"|model type `{model_type}` but Transformers"  # as an earlier one says
    refused(damaged, rf"is of type '{model_type}', for which transformers has no causal language model${unknown}")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def missing_shard(folder: Path) -> None:
    names = list(load_file(folder / "model.safetensors"))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00002-of-00003.safetensors")}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def renamed_pickle(folder: Path) -> None:
    torch.save({"model.norm.weight": torch.ones(32)}, folder / "model.safetensors")


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "kept")
    torch.save(load_file(folder / "kept"), folder / "pytorch_model.bin")


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base", "peft_type": "LORA"}')
    (folder / "config.json").unlink()


def gguf_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-Q4_K_M.gguf")


def nan_weight(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights["model.layers.1.mlp.up_proj.weight"][3, 4:5].fill_(torch.nan))


def missing_keys(folder: Path) -> None:
    edit_weights(
        folder, lambda weights: [weights.pop(f"model.layers.1.mlp.{name}_proj.weight") for name in ("up", "down")]
    )


def small_vocabulary(folder: Path) -> None:
    """The embedding loses its last ten rows, and the config knows it; the tokenizer does not."""
    name = "model.embed_tokens.weight"
    edit_weights(folder, lambda weights: weights.update({name: weights[name][:290].clone()}))
    edit_config(folder, vocab_size=290)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (no_config, "holds no config.json"),
    "no weights": (no_weights, "no file named model.safetensors"),
    "no tokenizer": (no_tokenizer, "^tokenizer of model .* cannot be loaded: "),
    "missing shard": (missing_shard, "model-00002-of-00003.safetensors"),
    "truncated": (truncated, "incomplete metadata, file not fully covered"),
    "renamed pickle": (renamed_pickle, "header too large"),
    "pickle": (pickle_only, r"holds pytorch_model\.bin, a pickle, which is not opened .* save_pretrained"),
    "adapter": (adapter, r"is a LoRA adapter of 'org/base', not a model: merge it \(peft's merge_and_unload"),
    "GGUF": (gguf_only, "holds GGUF files only, converted for llama.cpp: give the safetensors checkpoint"),
    "NaN": (nan_weight, r"weight model\.layers\.1\.mlp\.up_proj\.weight of .* holds NaN or infinity"),
    "missing keys": (missing_keys, r"has 2 missing weights, first model\.layers\.1\.mlp\.down_proj\.weight"),
    "config cut short": (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON file"),
    "list for config": (lambda folder: (folder / "config.json").write_text("[]"), "Unrecognized model|list indices"),
    "unknown type": (lambda folder: edit_config(folder, model_type="nope"), "`nope`"),
    "no language model": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "clip"}'),
        r"^model '.*' is of type 'clip', for which transformers has no causal language model$",
    ),
    "unknown activation": (lambda folder: edit_config(folder, hidden_act="nope"), "cannot be loaded: KeyError 'nope'"),
    "quantised": (
        lambda folder: edit_config(folder, quantization_config={"quant_method": "gptq"}),
        r"is quantised \(gptq\): give the full-precision checkpoint",
    ),
    "quantised by MLX": (lambda folder: edit_config(folder, quantization={"bits": 4}), "is quantised: give the full"),
    "other shape": (lambda folder: edit_config(folder, intermediate_size=40), "9 mismatched weights, first .*44"),
    "no block": (lambda folder: edit_config(folder, num_hidden_layers=0), "has no list of repeated blocks"),
    "vocabulary": (small_vocabulary, "the tokenizer has 300 entries, the model's embedding 290"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_directories(name: str, damaged: Path) -> None:
    damage, message = DAMAGES[name]
    damage(damaged)
    refused(damaged, message)


def test_weights_that_the_config_does_not_use_are_said(damaged: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_config(damaged, num_hidden_layers=2)
    with caplog.at_level(logging.WARNING):
        assert len(load_model(str(damaged)).blocks) == 2
    assert "ignores 9 weights that its files hold, first model.layers.2." in caplog.text


def test_code_of_a_checkpoint_is_not_run(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even asked about: transformers would read the answer from the terminal."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    (damaged / "modeling_nope.py").write_text("raise SystemExit('this ran')")
    code = {"AutoConfig": "modeling_nope.NopeConfig", "AutoModelForCausalLM": "modeling_nope.NopeForCausalLM"}
    edit_config(damaged, model_type="nope", auto_map=code)
    refused(damaged, "contains custom code")


@pytest.mark.parametrize(
    ("options", "message", "error"),
    [
        ({"dtype": "float64"}, "--dtype must be one of float32, bfloat16, float16, but got 'float64'", InputError),
        ({"device": "gpu"}, "--device must be auto, cpu or cuda, but got 'gpu'", InputError),
        ({"include": "("}, r"--include '\(' is not a regular expression: ", InputError),
        ({"exclude": "*"}, r"--exclude '\*' is not a regular expression: ", InputError),
        ({"include": "experts"}, r"no prunable layer is left .*\(--include, --exclude\)", ModelError),
        ({"exclude": ""}, "no prunable layer is left", ModelError),
    ],
)
def test_bad_options(options: dict[str, str], message: str, error: type, tiny_llama: Path) -> None:
    refused(tiny_llama, message, error, **options)


@pytest.mark.parametrize("name", ["./nothing", "a/b/c", "/nothing/here", "~", "nul\0", "two words", "x" * 97])
def test_paths_that_are_no_directory(name: str) -> None:
    refused(name, "^model directory .* does not exist$")


def test_other_paths(tiny_text: Path, tmp_path: Path) -> None:
    refused(tiny_text, "^model directory .* does not exist$")
    for name, message in {"m.gguf": "is a GGUF file, converted", "m.safetensors": "is a file of weights: give"}.items():
        path = tmp_path / name
        path.write_bytes(b"GGUF")
        refused(path, message)
    refused("x" * 300, "cannot be read: File name too long")
    refused("", "holds no config.json")


# The Hub


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def use(endpoint: str) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    return use


class NotFound(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def empty_hub() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), NotFound) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["no-such-org/no-such-model", "no-such-model"])
def test_an_unreachable_hub_is_not_waited_for(name: str, online: Callable[[str], None]) -> None:
    """transformers alone would retry for 23 s."""
    online("http://127.0.0.1:9")  # nothing listens there
    start = time.monotonic()
    refused(name, rf"^model '{name}' \(no directory here\) cannot be loaded: ")
    assert time.monotonic() - start < 5


def test_a_model_that_the_hub_does_not_have(online: Callable[[str], None], empty_hub: str) -> None:
    online(empty_hub)
    refused("org/none", r"^model 'org/none' \(no directory here\) cannot be loaded: org/none is not a local folder")


def test_offline_mode_asks_nobody() -> None:
    assert constants.HF_HUB_OFFLINE
    refused("no-such-org/no-such-model", r"\(no directory here\) cannot be loaded: ")


def test_two_threads_load_at_once(tiny_llama: Path, tiny_gpt2: Path) -> None:
    """Both whole, and transformers' logging is what it was [transformers issue 41782]."""
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    found: dict[str, Any] = {}

    def load(path: Path) -> None:
        try:
            found[path.name] = load_model(str(path), device="cpu").digest
        except Exception as error:
            found[path.name] = error

    alone = {path.name: load_model(str(path), device="cpu").digest for path in (tiny_llama, tiny_gpt2)}
    for _ in range(4):
        threads = [threading.Thread(target=load, args=(path,)) for path in (tiny_llama, tiny_gpt2, tiny_llama)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == alone
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before
