"""`gpmetric slim` from end to end, on tiny random models: every format read again by transformers and by gpmetric."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import gpmetric
from gpmetric.errors import GpmetricError, InputError
from gpmetric.models import Model
from gpmetric.pruning.prune import prune
from gpmetric.pruning.verify import verify
from gpmetric.session import session
from gpmetric.session.evaluate import evaluate
from gpmetric.slim_models import SLIM_FILE, SLIM_MODELS
from gpmetric.structured import slim_checkpoint
from gpmetric.structured.draw_objective import DrawObjective
from gpmetric.structured.export import Slimmed
from gpmetric.structured.open_units import open_units
from gpmetric.structured.repair import DAMPINGS
from gpmetric.structured.request import SlimRequest
from gpmetric.structured.slim import SearchStart, prepare, slim
from gpmetric.tuning.tune import tune

SMALL: dict[str, Any] = {
    "samples": 4, "search_windows": 8, "windows": 4, "sequence_length": 32, "steps": 6, "batch": 2, "device": "cpu",
}  # fmt: skip


def run(model: Path | None, text: Path, output: Path, **options: Any) -> dict[str, Any]:
    return slim(None if model is None else str(model), output=output, calibration=str(text), **SMALL | options)


def stock(folder: Path) -> Any:
    """As transformers opens it without trust."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()


@pytest.mark.usefixtures("here")
def test_channels_are_a_multiple(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    """The next one above what stays without the option, in every block and in the config."""
    options = {"format": "uniform", "repair": "none", "granularity": "channel", "sparsity": 0.25, "steps": 0}
    widths = []
    for multiple in (1, 8):
        found = run(tiny_llama, tiny_text, tmp_path / str(multiple), **options, multiple_of=multiple)
        widths.append([one["channels"] for one in found["widths"]])
        assert stock(tmp_path / str(multiple)).config.intermediate_size == widths[-1][0]
    assert all(one % 8 == 0 and one - 8 < other <= one for other, one in zip(*widths, strict=True))


@pytest.mark.every(3)
@pytest.mark.slow
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize(
    ("form", "repair"), [("hetero", "none"), ("hetero", "least-squares"), ("uniform", "bias"), ("padded", "bias")]
)
def test_every_format_holds_what_was_found(
    name: str, form: str, repair: str, request: pytest.FixtureRequest, tiny_text: Path, tmp_path: Path
) -> None:
    """What is told is what `gpmetric.load` opens; all but hetero are stock models."""
    output = tmp_path / "small"
    model = request.getfixturevalue(name)
    found = run(model, tiny_text, output, format=form, repair=repair, add_bias=repair != "none", sparsity=0.4)
    assert found["perplexity"] == pytest.approx(found["perplexity_before_writing"], rel=1e-5)
    assert len(found["generated"]) == 8
    assert 0.3 < found["sparsity"] <= 0.4 + 5e-3  # what goes with a sublayer's last unit comes on top
    opened = gpmetric.load(output, device="cpu")
    total = sum(one.numel() for one in opened.parameters())
    assert total == found["parameters_after"]
    if form == "padded":
        assert total >= found["parameters_before"]
    else:
        assert total < found["parameters_before"]
        widths = {(one["heads"], one["channels"]) for one in found["widths"]}
        assert len(widths) == 1 or form == "hetero"
    tokens = torch.arange(20)[None] + 3
    with torch.no_grad():
        logits = opened(tokens).logits
        if form != "hetero":
            assert torch.equal(logits, stock(output)(tokens).logits)
    checked = verify(output, device="cpu")
    assert checked["ok"], checked["problems"]
    assert checked["perplexity"] == pytest.approx(found["perplexity"], rel=1e-5)
    assert json.loads((output / "gpmetric_manifest.json").read_text(encoding="utf-8"))["format"] == form


@pytest.mark.slow
def test_a_hetero_folder_opens_with_trust_and_says_so_without(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path
) -> None:
    """Elsewhere: a process that knows nothing of gpmetric runs the file in the folder; before, a fresh one read it."""
    run(tiny_llama, tiny_text, tmp_path / "small", sparsity=0.4)
    code = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise SystemExit("opened without trust")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32).eval()
assert "gpmetric" not in sys.modules
tokens = torch.arange(20)[None] + 3
out = model.generate(tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False)
save_file({"logits": model(tokens).logits.detach(), "out": out.contiguous()}, sys.argv[2])
"""
    told = tmp_path / "told.safetensors"
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "small"), str(told)],
        check=True, cwd=tmp_path, env=environment, capture_output=True,
    )  # fmt: skip
    opened, found = gpmetric.load(tmp_path / "small", device="cpu"), load_file(told)
    tokens = torch.arange(20)[None] + 3
    with torch.no_grad():
        assert torch.equal(opened(tokens).logits, found["logits"])
    generated = opened.generate(tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(generated, found["out"])


@pytest.mark.parametrize("kind", SLIM_MODELS)
def test_widths_of_every_architecture(kind: str, tmp_path: Path) -> None:
    """A first layer without heads, a layer with nothing but a bias, one of each: saved, opened, generated from."""
    config_class, model_class = SLIM_MODELS[kind]
    widths = [
        {"heads": 0, "channels": 5, "attention_bias": True, "mlp_bias": True},
        {"heads": 0, "channels": 0, "attention_bias": False, "mlp_bias": True},
        {"heads": 1, "channels": 7, "attention_bias": False, "mlp_bias": False},
    ]
    shape: dict[str, Any] = {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 64}
    if kind != "gpt2":
        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
        shape |= {"num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        model = model_class(config_class(vocab_size=50, widths=widths, **ends, **shape)).eval()
    model.save_pretrained(tmp_path)
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    opened = stock(tmp_path)
    tokens = torch.arange(18).view(2, 9)
    with torch.no_grad():
        assert torch.equal(opened(tokens).logits, model(tokens).logits)
        steps = tokens[:1]
        for _ in range(6):
            steps = torch.cat([steps, model(steps, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        for cache in (None, "static"):
            found = opened.generate(
                tokens[:1], max_new_tokens=6, min_new_tokens=6, do_sample=False, cache_implementation=cache
            )
            assert torch.equal(found, steps)


@pytest.mark.usefixtures("here")
def test_whole_layers_go(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    """A block of which nothing is left is not written."""
    found = run(tiny_llama, tiny_text, tmp_path / "small", sparsity=0.8, granularity="layer", repair="none")
    assert all(one["heads"] in (0, 2) and one["channels"] in (0, 44) for one in found["widths"])
    config = json.loads((tmp_path / "small" / "config.json").read_text(encoding="utf-8"))
    left = [one for one in found["widths"] if one["heads"] or one["channels"]]
    assert config["num_hidden_layers"] == len(left) < 3
    assert len(gpmetric.load(tmp_path / "small", device="cpu").model.layers) == len(left)


@pytest.mark.parametrize("estimator", ["exchange", "rloo"])
@pytest.mark.usefixtures("here")
def test_no_steps_are_the_start_alone(estimator: str, tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    """The units that the rule's scores leave, and no word of a search that found nothing."""
    options = {"sparsity": 0.4, "start": "magnitude_sp", "repair": "none", "estimator": estimator, "steps": 0}
    found = run(tiny_llama, tiny_text, tmp_path / "small", **options)
    told = {name: value for name, value in (SMALL | options).items() if name != "windows"}
    request = SlimRequest(model=str(tiny_llama), calibration=str(tiny_text), windows=4, **told)
    begun = prepare(request, open_units(request))
    assert found["widths"] == begun.chosen(begun.start).widths()
    assert (found["steps"], found["share"], found["progress"]) == (0, 0.0, [])
    assert found["initial"] == found["found"]
    assert not any("search" in line for line in found["warnings"])


@pytest.mark.every(2)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
@pytest.mark.usefixtures("here")
def test_whole_blocks_leave_a_stock_model_of_fewer(
    kind: str, save_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    """What transformers opens computes, without and with a cache, what the dense model does without those blocks."""
    config: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
    }  # fmt: skip
    layers = ["full_attention", "sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    if kind == "qwen2":
        config |= {"layer_types": layers, "use_sliding_window": True, "sliding_window": 4}
    if kind == "gpt2":
        config = {"n_embd": 16, "n_layer": 5, "n_head": 2, "n_positions": 64, "initializer_range": 0.2}
    model, output = save_model(kind, **config), tmp_path / "small"
    found = run(model, tiny_text, output, sparsity=0.4, granularity="block", steps=2)
    assert (found["format"], found["repair"], found["damping"]) == ("uniform", "none", None)
    assert found["sparsity"] == pytest.approx(0.4)
    stays = [index for index, one in enumerate(found["widths"]) if one["heads"]]
    assert len(stays) == 3
    assert all(not any(one.values()) for index, one in enumerate(found["widths"]) if index not in stays)
    opened, cut = stock(output), stock(model)
    assert opened.config.num_hidden_layers == 3
    if kind == "qwen2":
        assert opened.config.layer_types == [layers[index] for index in stays]
    body = cut.transformer if kind == "gpt2" else cut.model
    name = "h" if kind == "gpt2" else "layers"
    setattr(body, name, torch.nn.ModuleList(getattr(body, name)[index] for index in stays))
    cut.config.num_hidden_layers = 3
    if kind == "qwen2":
        cut.config.layer_types = [layers[index] for index in stays]
    tokens = torch.arange(20)[None] + 3
    with torch.no_grad():
        assert torch.equal(opened(tokens).logits, cut(tokens, use_cache=False).logits)
    steps = tokens
    for _ in range(6):
        steps = torch.cat([steps, opened(steps, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(opened.generate(tokens, max_new_tokens=6, min_new_tokens=6, do_sample=False), steps)
    assert found["perplexity"] == pytest.approx(found["perplexity_before_writing"], rel=1e-5)
    checked = verify(output, device="cpu")
    assert checked["ok"], checked["problems"]
    assert checked["perplexity"] == pytest.approx(found["perplexity"], rel=1e-5)


@pytest.mark.usefixtures("here")
def test_what_is_left_of_blocks_is_slimmed_again(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    run(tiny_llama, tiny_text, tmp_path / "fewer", sparsity=0.34, granularity="block", steps=2)
    found = run(tmp_path / "fewer", tiny_text, tmp_path / "narrower", sparsity=0.4)
    assert [one["heads"] for one in found["widths"]].count(0) == 0
    assert len(found["widths"]) == 2


def test_blocks_that_depend_on_their_number_are_not_renumbered(
    save_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    model = save_model("gpt2", n_embd=16, n_layer=3, n_head=2, n_positions=64, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(InputError, match=r"\(scale_attn_by_inverse_layer_idx\), .* accepted is hetero or padded"):
        run(model, tiny_text, tmp_path / "small", sparsity=0.4, granularity="block")


@pytest.mark.every(2)
@pytest.mark.parametrize("kind", ["untied", "bfloat16", "attention biases"])
@pytest.mark.usefixtures("here")
def test_models_of_other_makes(kind: str, save_model: Callable[..., Path], tiny_text: Path, tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.2,
        "tie_word_embeddings": kind != "untied",
    }  # fmt: skip
    model = save_model("qwen2" if kind == "attention biases" else "llama", **config)
    if kind == "bfloat16":
        path = model / "model.safetensors"
        save_file({name: one.bfloat16() for name, one in load_file(path).items()}, path, metadata={"format": "pt"})
    found = run(model, tiny_text, tmp_path / "small", sparsity=0.5, dtype="bfloat16" if kind == "bfloat16" else None)
    assert found["perplexity"] == pytest.approx(found["perplexity_before_writing"], rel=5e-2)
    stored = load_file(tmp_path / "small" / "model.safetensors")
    assert {one.dtype for one in stored.values()} == {torch.bfloat16 if kind == "bfloat16" else torch.float32}
    dense = load_file(model / "model.safetensors")
    assert torch.equal(stored["model.embed_tokens.weight"], dense["model.embed_tokens.weight"])
    assert ("lm_head.weight" in stored) == (kind == "untied")


def recast(model: Path, folder: Path, dtypes: Callable[[str], torch.dtype]) -> Path:
    """A copy of a model with each tensor in the dtype of its name."""
    shutil.copytree(model, folder)
    path = folder / "model.safetensors"
    save_file({name: one.to(dtypes(name)) for name, one in load_file(path).items()}, path, metadata={"format": "pt"})
    return folder


@pytest.mark.every(3)
@pytest.mark.parametrize("form", ["hetero", "padded"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.usefixtures("here")
def test_what_stays_is_as_it_was_stored(
    form: str, dtype: str, tiny_llama: Path, tiny_text: Path, tmp_path: Path
) -> None:
    """Matrices in float16, norms in float32, whatever the dtype of the search; a fit is written in its layer's."""
    dense_folder = recast(
        tiny_llama, tmp_path / "dense", lambda name: torch.float32 if "norm" in name else torch.float16
    )
    run(dense_folder, tiny_text, tmp_path / "small", dtype=dtype, repair="least-squares", sparsity=0.4, format=form)
    stored, dense = (load_file(tmp_path / name / "model.safetensors") for name in ("small", "dense"))
    assert torch.equal(stored["model.embed_tokens.weight"], dense["model.embed_tokens.weight"])
    assert stored["model.norm.weight"].dtype == torch.float32
    rows = [*dense["model.layers.0.mlp.up_proj.weight"].tolist(), [0.0] * 32]
    assert all(row in rows for row in stored["model.layers.0.mlp.up_proj.weight"].tolist())
    assert {one.dtype for name, one in stored.items() if "norm" not in name} == {torch.float16}
    assert (tmp_path / "small" / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_dtype_that_cannot_be_written_is_refused_before_the_search(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path
) -> None:
    model = recast(tiny_llama, tmp_path / "dense", lambda _: torch.float64)
    with pytest.raises(InputError, match="is stored as F64: accepted are F32, F16, BF16"):
        run(model, tiny_text, tmp_path / "small")


@pytest.mark.usefixtures("here")
def test_a_slimmed_model_is_pruned_and_verified_as_any(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    """Transformers opens what `prune` makes of it; verify finds a manifest that is another model's."""
    run(tiny_llama, tiny_text, tmp_path / "small", sparsity=0.4)
    options: dict[str, Any] = {"samples": 4, "windows": 4, "sequence_length": 32, "device": "cpu"}
    prune(
        str(tmp_path / "small"), output=tmp_path / "pruned", calibration=str(tiny_text), metric="magnitude", **options
    )
    assert verify(tmp_path / "pruned", device="cpu")["ok"]
    assert (tmp_path / "pruned" / SLIM_FILE).read_bytes() == (tmp_path / "small" / SLIM_FILE).read_bytes()
    path = tmp_path / "small" / "gpmetric_manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["parameters_after"] += 1
    manifest["widths"][0]["channels"] += 1
    path.write_text(json.dumps(manifest), encoding="utf-8")
    problems = " ".join(verify(tmp_path / "small", device="cpu")["problems"])
    assert "parameters, the manifest says" in problems
    assert "other widths than the manifest says" in problems


@pytest.mark.usefixtures("here")
def test_a_config_that_leaves_weights_out_is_refused(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    """`channels: 0`, by which an MLP that is in the file would not be used."""
    run(tiny_llama, tiny_text, tmp_path / "small", sparsity=0.4)
    path = tmp_path / "small" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["widths"][0]["channels"] = 0
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match=r"has \d+ unexpected weights, first model\.layers\.0\."):
        gpmetric.load(tmp_path / "small", device="cpu")
    problems = " ".join(verify(tmp_path / "small", device="cpu")["problems"])
    assert "unexpected weights" in problems


@pytest.mark.usefixtures("here")
def test_a_slimmed_model_is_evaluated_as_any(tiny_gpt2: Path, tiny_text: Path, tmp_path: Path) -> None:
    found = run(tiny_gpt2, tiny_text, tmp_path / "small", sparsity=0.4)
    told = evaluate(str(tmp_path / "small"), text=[str(tiny_text)], sequence_length=32, windows=4, device="cpu")
    assert told["ppl"][str(tiny_text)] > 1
    with pytest.raises(GpmetricError, match="is a slim_gpt2 model, whose channels"):
        run(tmp_path / "small", tiny_text, tmp_path / "smaller")
    assert found["parameters_after"] < found["parameters_before"]


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_a_resumed_search_writes_the_same_model(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpmetric.structured.search._STATE", 1)  # at each report, not only at the last
    ledger, options = tmp_path / "a.jsonl", {"steps": 55, "sparsity": 0.4}
    whole = run(tiny_llama, tiny_text, tmp_path / "whole", ledger=ledger, **options)
    content = ledger.read_bytes()
    ledger.write_bytes(content[: content.rindex(b"\n", 0, len(content) - 10)])  # killed before the last state
    again = run(tiny_llama, tiny_text, tmp_path / "again", ledger=ledger, resume=True, **options)
    assert again["widths"] == whole["widths"]
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(one, second[name]) for name, one in first.items())
    monkeypatch.setattr("gpmetric.structured.slim.prepare", None)  # refused before that
    with pytest.raises(InputError, match=r"is another search's: sparsity is 0\.4 there, 0\.5 here"):
        run(tiny_llama, tiny_text, tmp_path / "other", ledger=ledger, resume=True, **options | {"sparsity": 0.5})


@pytest.mark.usefixtures("here")
def test_what_is_not_what_was_found_is_not_delivered(
    tiny_llama: Path,
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The search is kept, and the same command with it writes what an uninterrupted one does."""
    write = slim_checkpoint.write_model

    def damaged(model: Any, shrinker: Any, slimmed: Any, kind: str, folder: Path) -> None:
        write(model, shrinker, slimmed, kind, folder)
        path = folder / "model.safetensors"
        stored = load_file(path)
        stored["model.layers.1.mlp.down_proj.weight"] *= 2
        save_file(stored, path, metadata={"format": "pt"})

    monkeypatch.setattr(slim_checkpoint, "write_model", damaged)
    with pytest.raises(GpmetricError, match="is not the one that was found: its logits are off by"):
        run(tiny_llama, tiny_text, tmp_path / "small")
    assert not (tmp_path / "small").exists()
    (kept,) = tmp_path.iterdir()
    assert f"--ledger {kept} --resume" in caplog.text
    monkeypatch.setattr(slim_checkpoint, "write_model", write)
    again = run(tiny_llama, tiny_text, tmp_path / "small", ledger=kept, resume=True)
    whole = run(tiny_llama, tiny_text, tmp_path / "whole")
    assert (again["steps"], again["widths"]) == (6, whole["widths"])


@pytest.mark.parametrize("command", ["slim", "tune"])
@pytest.mark.parametrize("form", ["hetero", "padded"])
def test_a_disk_without_room_is_told_before_the_work(
    command: str, form: str, tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer parameters by 0.4 of those inside the blocks, or as many as before."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))  # type: ignore[attr-defined]
    monkeypatch.setattr("gpmetric.structured.slim.prepare", None)
    monkeypatch.setattr("gpmetric.tuning.structured.UnitTrials", None)
    module = stock(tiny_llama)
    inside, parameters = (sum(one.numel() for one in part.parameters()) for part in (module.model.layers, module))
    stays = 1 if form == "padded" else 1 - 0.4 * inside / parameters
    needed = stays * (tiny_llama / "model.safetensors").stat().st_size
    told = re.escape(f"the checkpoint needs {needed / 1e9:.3g} GB, {str(tmp_path)!r} has 1e-06 GB free")
    options: dict[str, Any] = {name: SMALL[name] for name in SMALL if name not in ("steps", "batch")}
    options |= {"calibration": str(tiny_text), "output": tmp_path / "small", "format": form, "sparsity": 0.4}
    called = {"slim": slim, "tune": partial(tune, structured=True)}[command]
    with pytest.raises(GpmetricError, match=f"^{told}$"):
        called(str(tiny_llama), **options)
    assert not list(tmp_path.iterdir())


def test_a_ledger_is_held_from_before_the_work(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever comes second is told before it loads the model; what failed before the search began leaves no search."""
    ledger, loaded = tmp_path / "a.jsonl", list[Any]()

    def prepared(request: SlimRequest, units: Any) -> Any:
        loaded.append(units)
        for resume in (False, True):
            with pytest.raises(
                InputError, match=r"^--ledger '.*a\.jsonl' is in use by another process, which must end"
            ):
                run(tiny_llama, tiny_text, tmp_path / "b", ledger=ledger, resume=resume)
        raise GpmetricError("so far")

    monkeypatch.setattr("gpmetric.structured.slim.prepare", prepared)
    monkeypatch.setattr("gpmetric.structured.slim.open_units", lambda *told: loaded.append(told) or open_units(*told))
    for _ in range(2):
        with pytest.raises(GpmetricError, match="so far"):
            run(tiny_llama, tiny_text, tmp_path / "a", ledger=ledger)
    assert len(loaded) == 4  # twice by each of those that began, not by those that were refused


@pytest.mark.usefixtures("here")
def test_nothing_but_the_checkpoint_is_left_where_all_is_well(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path
) -> None:
    run(tiny_llama, tiny_text, tmp_path / "small")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sparsity": 1.0}, "--sparsity must be above 0 and below 1, but got 1.0"),
        ({"granularity": "channels"}, "--granularity"),
        ({"granularity": "layer", "format": "uniform"}, "none can go as a whole"),
        ({"format": "onnx"}, "--format"),
        ({"start": "wandasp"}, "wandasp"),
        ({"draws": 3, "estimator": "rloo"}, "--draws must be at least 2, and even"),
        ({"rate": float("nan")}, "--rate must be above 0, but got nan"),
        ({"add_bias": True, "repair": "none"}, "--add-bias"),
        ({"rate": 0.1}, "--rate is of --estimator rloo or paper, but got --estimator exchange"),
        ({"steps": -1}, "--steps must be at least 0, but got -1"),
        ({"resume": True}, "--ledger FILE"),
        ({"granularity": "layer", "sparsity": 0.05}, "cannot be met by --granularity layer"),
        ({"granularity": "block", "sparsity": 0.3}, "cannot be met by --granularity block in --format uniform"),
        ({"granularity": "block,head"}, "--granularity block,head: whole blocks go alone"),
        ({"granularity": "block", "add_bias": True}, "--granularity block repairs nothing"),
        ({"granularity": "block", "budget": "kind"}, "--granularity block: --budget kind gives all layers the same"),
        ({"granularity": "head", "format": "uniform", "sparsity": 0.05}, "cannot be met by --granularity head"),
        ({"format": "uniform", "cost": "macs"}, "--budget and --cost do not apply"),
        ({"multiple_of": 8}, "--multiple-of 8 is of --granularity channel with equal widths"),
        ({"multiple_of": 8, "format": "uniform", "granularity": "head"}, "--multiple-of 8 is of --granularity channel"),
        ({"multiple_of": 0, "format": "uniform"}, "--multiple-of must be at least 1"),
        ({"granularity": "layer", "budget": "block"}, "--budget block gives all layers the same share"),
        ({"budget": "block", "cost": "macs"}, "--cost macs does not apply"),
        ({"sparsity": 0.98, "granularity": "head"}, "--sparsity 0.98 is out of reach"),
        ({"search": "s.txt"}, "--search and --validation belong together"),
    ],
)
def test_bad_input(options: dict[str, Any], told: str, tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    with pytest.raises(GpmetricError, match=told):
        run(tiny_llama, tiny_text, tmp_path / "small", **options)
    assert not list(tmp_path.iterdir())


def test_weights_are_resident_whatever_memory_there_is(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shrinking takes rows out of them."""
    asked: list[bool] = []
    prepare = session.prepare_model

    def spy(model: Model, *, resident: bool, **told: Any) -> Model:
        asked.append(resident)
        return prepare(model, resident=resident, **told)

    monkeypatch.setattr(session, "prepare_model", spy)
    request = SlimRequest(model=str(tiny_llama), calibration=str(tiny_text), output=tmp_path / "small", sparsity=0.4)
    assert open_units(request).model.resident
    assert asked == [True]


@pytest.mark.usefixtures("here")
def test_what_is_written_is_compared_in_float32(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Searched in bfloat16, whose last bits would be 4e-3 of a logit."""
    monkeypatch.setattr(slim_checkpoint, "_CLOSE", 1e-6)
    options = {"dtype": "bfloat16", "repair": "least-squares", "sparsity": 0.4}
    assert run(tiny_llama, tiny_text, tmp_path / "small", **options)["logits_off"] <= 1e-6


@pytest.mark.usefixtures("here")
def test_auto_begins_from_its_best_start(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    """Measured one by one on the windows that they were compared on, no start is better than the one it took."""
    options = SMALL | {"sparsity": 0.4, "granularity": ("channel", "head", "layer")}
    found = run(tiny_llama, tiny_text, tmp_path / "small", **options)
    assert found["start"] == "auto"
    assert set(found["starts"]) == {"taylor2", "magnitude_sp", "wanda_sp", "flap", "block_influence"}
    request = SlimRequest(model=str(tiny_llama), calibration=str(tiny_text), output=tmp_path / "nowhere", **options)
    units = open_units(request)
    figures = {}
    for name in found["starts"]:
        begun = prepare(replace(request, start=name), units)
        begun = replace(begun, repairer=begun.repairer.damped(DAMPINGS[-2]))
        objective = DrawObjective(units.model, units.session.windows["search"].tokens, "kl", 2, request.seed)
        slimmed, total = begun.chosen(begun.start), 0.0
        for step in range(4):
            objective.turn(step)
            with begun.shrinker.keeping(slimmed.kept, slimmed.repairs):
                total += objective() / 4
        figures[name] = total
    assert found["starts"] == pytest.approx(figures, rel=1e-6)
    assert found["begun"] == min(figures, key=lambda name: figures[name])
    assert found["damping"] in DAMPINGS


@pytest.mark.parametrize("better", [False, True])
@pytest.mark.usefixtures("here")
def test_what_is_worse_than_its_start_on_validation_is_not_delivered(
    better: bool, tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search that found another model, whose loss on validation is told to be 0.1 above or below its start's."""
    losses = [2.0, 2.1 - 0.2 * better]
    kept: list[torch.Tensor] = []
    told = [pytest.approx(math.exp(one)) for one in losses]

    def search(request: SlimRequest, begun: SearchStart, *_: Any) -> tuple[Slimmed, dict[str, Any]]:
        start = begun.chosen(begun.start).kept
        kept.extend([start, start.roll(1)])
        return begun.slimmed(kept[1]), {"share": 0.5, "steps": 6, "tokens": 0, "seconds": 0.0}

    monkeypatch.setattr("gpmetric.structured.slim.search", search)
    monkeypatch.setattr("gpmetric.structured.slim._held_out", lambda *_: losses.pop(0))
    found = run(tiny_llama, tiny_text, tmp_path / "small", sparsity=0.4, start="wanda_sp")
    channels = [int(one[2:46].sum()) for one in kept]  # behind two key/value groups
    assert found["widths"][0]["channels"] == channels[better]
    assert found["share"] == 0.5 * better
    assert [found["initial"], found["found"]] == told
    above = f"above its start on validation, {math.exp(2.1):.3f} from {math.exp(2):.3f}: the start was kept"
    assert any(above in line for line in found["warnings"]) == (not better)
