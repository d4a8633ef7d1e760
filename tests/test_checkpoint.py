"""Pruned checkpoints: what is written, that stock transformers reads it, and every damage that `verify` must notice."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpmetric.errors import GpmetricError, InputError
from gpmetric.loading import load_model
from gpmetric.outputs import MANIFEST
from gpmetric.pruning import checkpoint
from gpmetric.pruning import prune as module
from gpmetric.pruning.bench import bench
from gpmetric.pruning.output_folder import check_folder, file_digest
from gpmetric.pruning.prune import prune
from gpmetric.pruning.verify import verify
from gpmetric.stored_names import stored_names
from tests.pruning_helpers import sign_manifest

QUICK = {"samples": 4, "windows": 4, "sequence_length": 32, "device": "cpu"}


@pytest.fixture
def pruned(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> Path:
    """The tiny Llama at 2:4."""
    folder = tmp_path / "pruned"
    prune(str(tiny_llama), output=folder, calibration=str(tiny_text), target="2:4", **QUICK)
    return folder


def edit_file(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Changes tensors of a file."""
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any], sign: bool = True) -> None:
    """Changes tensors, and the manifest's digest with them unless the file is to look damaged."""
    edit_file(folder / "model.safetensors", change)
    if sign:
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["files"]["model.safetensors"] = file_digest(folder / "model.safetensors")
        sign_manifest(folder, manifest)


QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.every(3)
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize(
    ("metric", "target", "update"),
    [
        ("wanda", "0.5", "none"),
        ("abs(W)*X", "2:4", "obs"),
        ("layer:abs(W)", "0.3", "none"),
        ("block:abs(W)", "0.6", "none"),
        ("magnitude", "layer:0.5", "none"),
        ("sparsegpt", "0.5", "none"),
        ("sparsegpt", "1:2", "none"),
        ("alps", "0.5", "none"),
    ],
)
def test_stock_transformers_reads_what_bench_measured(
    family: str, metric: str, target: str, update: str, tiny_text: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(family)
    options = QUICK | {"calibration": str(tiny_text), "update": update}
    result = prune(str(source), output=tmp_path / "out", metric=metric, target=target, **options)
    measured = bench(str(source), text=[str(tiny_text)], metric=[metric], target=[target], **options)
    (row,) = measured["results"]
    assert result["perplexity"] == pytest.approx(row["ppl"][str(tiny_text)], rel=1e-3)
    assert result["sparsity"] == pytest.approx(row["sparsity"])
    assert {layer["name"] for layer in result["layers"]} >= {"model.layers.0.mlp.up_proj"} or family == "tiny_gpt2"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded.config.use_cache
    zeros = sum(int((one == 0).sum()) for name, one in loaded.named_parameters() if name.endswith("proj.weight"))
    assert family == "tiny_gpt2" or zeros == sum(layer["zeros"] for layer in result["layers"])
    found = verify(tmp_path / "out", against=str(source), device="cpu")
    assert found["problems"] == []
    assert found["perplexity"] == pytest.approx(result["perplexity"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("update", ["none", "obs", "admm"])
def test_the_stored_dtype_is_kept(
    update: str, save_model: Callable[..., Path], tiny_llama: Path, tiny_text: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(half)
    options = QUICK | {"calibration": str(tiny_text), "update": update}
    prune(str(half), output=tmp_path / "out", **options)
    assert {one.dtype for one in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert verify(tmp_path / "out", against=str(half), device="cpu")["problems"] == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda w: w[QUERY].view(-1)[:8].fill_(1.0),
            "layer model.layers.0.self_attn.q_proj has .* zeros, the manifest",
        ),
        (lambda w: w[QUERY].view(-1)[:4].copy_(w[QUERY].view(-1)[:4] * 1.01), "were kept are not those of"),
        (lambda w: w["model.norm.weight"].mul_(1.001), "tensor model.norm.weight is not that of"),
        (lambda w: w["model.norm.weight"].view(-1)[:1].fill_(torch.nan), "tensor model.norm.weight holds NaN"),
        (lambda w: w.pop("model.norm.weight"), "tensor model.norm.weight is missing"),
        (lambda w: w.update({QUERY: w[QUERY][:-1].clone()}), "the manifest says"),
    ],
)
def test_verify_notices(
    change: Callable[[dict[str, Tensor]], Any], problem: str, pruned: Path, tiny_llama: Path
) -> None:
    edit(pruned, change)
    found = verify(pruned, against=str(tiny_llama), device="cpu")
    assert not found["ok"]
    assert any(re.search(problem, one) for one in found["problems"]), found["problems"]


def test_verify_notices_a_pattern_that_is_not_kept(pruned: Path) -> None:
    """As many zeros as before, in other groups."""

    def swap(weights: dict[str, Tensor]) -> None:
        weight = weights[QUERY]
        kept, gone = (weight[0, :4] != 0).nonzero()[0, 0], (weight[0, 4:8] == 0).nonzero()[0, 0] + 4
        weight[0, gone], weight[0, kept] = weight[0, kept].item(), 0.0

    edit(pruned, swap)
    assert any("1 groups with more weights than 2:4 leaves" in one for one in verify(pruned)["problems"])


def test_verify_notices_files(pruned: Path, tiny_llama: Path) -> None:
    edit(pruned, lambda weights: weights[QUERY].mul_(2), sign=False)
    assert "model.safetensors is not as it was written: its sha256 differs" in verify(pruned)["problems"]
    (pruned / "extra.safetensors").write_bytes(b"")
    assert "extra.safetensors was not written with the others" in verify(pruned)["problems"]
    whole = (pruned / "model.safetensors").read_bytes()
    (pruned / "model.safetensors").write_bytes(whole[:5000])
    assert any("cannot be read" in one for one in verify(pruned, against=str(tiny_llama))["problems"])
    (pruned / "model.safetensors").unlink()
    assert "model.safetensors is missing" in verify(pruned)["problems"]


def test_verify_measures_only_the_text_it_was_measured_on(pruned: Path, tiny_text: Path) -> None:
    manifest = json.loads((pruned / MANIFEST).read_text())
    assert manifest["text"]["text"] == str(tiny_text)
    sign_manifest(pruned, manifest | {"text": manifest["text"] | {"text": "gone.txt"}})
    found = verify(pruned)
    assert (found["ok"], found["perplexity"]) == (True, None)
    (pruned / MANIFEST).write_text(json.dumps(manifest | {"perplexity": manifest["perplexity"] * 1.01}))
    assert any("perplexity of the reloaded model is" in one for one in verify(pruned)["problems"])


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"layers": []}', '{"layers": [{"name": 1}]}'])
def test_what_is_no_checkpoint_is_refused(content: str, pruned: Path, tmp_path: Path) -> None:
    (pruned / MANIFEST).write_text(content)
    with pytest.raises(InputError, match="is no manifest"):
        verify(pruned)
    with pytest.raises(InputError, match="is no checkpoint of gpmetric"):
        verify(tmp_path / "missing")


def test_a_wrong_dense_model_is_not_the_checkpoints_fault(pruned: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        verify(pruned, against="./nowhere")


def test_an_existing_folder_is_replaced_by_force_alone(
    tiny_llama: Path, tiny_text: Path, pruned: Path, tmp_path: Path
) -> None:
    options = QUICK | {"calibration": str(tiny_text)}
    with pytest.raises(InputError, match="exists already; --force"):
        prune(str(tiny_llama), output=pruned, **options)
    prune(str(tiny_llama), output=pruned, target="1:4", force=True, **options)
    assert json.loads((pruned / MANIFEST).read_text())["target"] == "1:4"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("dear")
    with pytest.raises(InputError, match=r"holds 'thesis\.tex', which gpmetric did not write"):
        prune(str(tiny_llama), output=mine, force=True, **options)
    with pytest.raises(InputError, match="does not exist"):
        prune(str(tiny_llama), output=tmp_path / "a" / "b", **options)
    assert (mine / "thesis.tex").read_text() == "dear"


def test_a_failure_leaves_nothing(
    tiny_llama: Path, tiny_text: Path, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a new folder nor a change of the old one."""
    before = (pruned / MANIFEST).read_text()
    monkeypatch.setattr(
        module, "verify_files", lambda *a, **k: {"ok": False, "problems": ["it rained"], "perplexity": 1.0}
    )
    for folder in (tmp_path / "new", pruned):
        with pytest.raises(GpmetricError, match="does not verify: it rained"):
            prune(str(tiny_llama), output=folder, calibration=str(tiny_text), force=True, **QUICK)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned"]
    assert (pruned / MANIFEST).read_text() == before


def test_names_of_the_files_are_looked_up_once(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers' renamings are tried on every tensor there is."""
    calls = list[Any]()
    monkeypatch.setattr(checkpoint, "stored_names", lambda *told: calls.append(told) or stored_names(*told))
    model = load_model(str(tiny_llama), device="cpu")
    writer = checkpoint.CheckpointWriter(model, tmp_path, {}, update=False)
    assert len(calls) == 1
    assert writer.dtypes == {layer.name: torch.float32 for layer in model.layers}


def test_masks_are_saved(tiny_gpt2: Path, tiny_text: Path, tmp_path: Path) -> None:
    result = prune(
        str(tiny_gpt2),
        output=tmp_path / "out",
        calibration=str(tiny_text),
        target="2:4",
        include="h.0.",
        save_masks=tmp_path / "masks.safetensors",
        **QUICK,
    )
    masks = load_file(tmp_path / "masks.safetensors")
    assert {name: list(mask.shape) for name, mask in masks.items()} == {
        layer["name"]: layer["shape"] for layer in result["layers"]
    }
    assert all(mask.dtype == torch.bool and mask.float().mean() == 0.5 for mask in masks.values())


def test_a_sharded_checkpoint(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(source, max_shard_size="50KB")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(source)
    prune(str(source), output=tmp_path / "out", calibration=str(tiny_text), **QUICK)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert verify(tmp_path / "out", against=str(tiny_llama), device="cpu")["problems"] == []
    shards[0].unlink()
    assert f"{shards[0].name} is missing" in verify(tmp_path / "out")["problems"]


def test_what_is_read_is_what_is_written_whatever_index_lies_beside(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path
) -> None:
    """An index of shards that are gone, beside a whole file, which is what transformers reads."""
    source = tmp_path / "source"
    shutil.copytree(tiny_llama, source)
    index = {"metadata": {}, "weight_map": {QUERY: "model-00001-of-00002.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    prune(str(source), output=tmp_path / "out", calibration=str(tiny_text), **QUICK)
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert verify(tmp_path / "out", against=str(source), device="cpu")["problems"] == []


def test_an_index_of_one_file_is_kept(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    source, name = tmp_path / "source", "model-00001-of-00001.safetensors"
    shutil.copytree(tiny_llama, source)
    (source / "model.safetensors").rename(source / name)
    names = list(load_file(source / name))
    (source / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, name)})
    )
    prune(str(source), output=tmp_path / "out", calibration=str(tiny_text), **QUICK)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers


def test_a_tensor_of_no_use_that_is_not_finite_is_refused_before_the_work(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_llama, source)
    edit_file(source / "model.safetensors", lambda weights: weights.update({"extra": torch.full((3,), torch.nan)}))
    monkeypatch.setattr(module.Protocol, "prepare", None)
    with pytest.raises(InputError, match=r"tensor extra of '.*' holds NaN or infinity; the model does not use it"):
        prune(str(source), output=tmp_path / "out", calibration=str(tiny_text), **QUICK)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_force_spares_what_is_not_ours(tiny_llama: Path, tiny_text: Path, pruned: Path, tmp_path: Path) -> None:
    options = QUICK | {"calibration": str(tiny_text), "force": True}
    (pruned / "notes.md").write_text("dear")
    with pytest.raises(InputError, match=r"holds 'notes\.md', which gpmetric did not write"):
        prune(str(tiny_llama), output=pruned, **options)
    (pruned / "notes.md").unlink()
    with pytest.raises(InputError, match=r"holds what is needed|is also read"):
        prune(str(pruned), output=pruned, **options)
    with pytest.raises(InputError, match="lies in --output"):
        prune(str(tiny_llama), output=pruned, save_masks=pruned / "masks.safetensors", **options)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / MANIFEST).write_text("")
    with pytest.raises(InputError, match="which gpmetric did not write"):
        prune(str(tiny_llama), output=empty, **options)


def test_a_name_of_the_hub_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`prune gpt2 -o gpt2` writes beside nothing."""
    monkeypatch.chdir(tmp_path)
    check_folder(Path("gpt2"), force=False, needed=[Path("gpt2")])
    (tmp_path / "gpt2").mkdir()
    with pytest.raises(InputError, match=r"holds what is needed|is also read"):
        check_folder(Path("gpt2"), force=True, needed=[Path("gpt2")])


def test_a_folder_that_appears_meanwhile_is_spared(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once it is gone again, what was pruned takes its place."""
    original, options = module.verify_files, QUICK | {"calibration": str(tiny_text)}

    def slow(*arguments: Any, **keywords: Any) -> Any:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("dear")
        return original(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(module, "verify_files", slow)
        with pytest.raises(InputError, match="exists already"):
            prune(str(tiny_llama), output=tmp_path / "out", **options)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    with pytest.raises(InputError, match="which gpmetric did not write"):
        prune(str(tiny_llama), output=tmp_path / "out", **options)
    (tmp_path / "out" / "thesis.tex").rename(tmp_path / "thesis.tex")
    (tmp_path / "out").rmdir()
    monkeypatch.setattr(module, "text_loss", None)  # nothing is measured again
    prune(str(tiny_llama), output=tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "thesis.tex"]


def test_an_interrupt_between_the_renames_loses_nothing(
    tiny_llama: Path, tiny_text: Path, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what was there before, nor what was pruned."""
    before, options = (pruned / MANIFEST).read_text(), QUICK | {"calibration": str(tiny_text), "force": True}
    rename, calls = os.rename, []

    def once(source: Any, target: Any) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", once)
    with pytest.raises(KeyboardInterrupt):
        prune(str(tiny_llama), output=pruned, **options)
    assert (pruned / MANIFEST).read_text() == before
    prune(str(tiny_llama), output=pruned, **options)
    assert json.loads((pruned / MANIFEST).read_text())["target"] == "0.5"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned"]


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}])
def test_every_tensor_keeps_its_dtype_and_every_file_its_place(
    options: dict[str, str], tiny_llama: Path, tiny_text: Path, tmp_path: Path
) -> None:
    """A bf16 checkpoint with fp32 norms, another dtype in its configuration, chat templates, and a sparsity_config."""
    source = tmp_path / "source"
    shutil.copytree(tiny_llama, source)
    weights = load_file(source / "model.safetensors")
    weights = {name: one if "norm" in name else one.bfloat16() for name, one in weights.items()}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "float16", "sparsity_config": {}}))
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    prune(str(source), output=tmp_path / "out", calibration=str(tiny_text), **QUICK | options)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: one.dtype for name, one in found.items()} == {name: one.dtype for name, one in weights.items()}
    assert (tmp_path / "out" / "additional_chat_templates" / "tool.jinja").is_file()
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "sparsity_config" not in written
    assert written["dtype"] == "float16"
    assert verify(tmp_path / "out", against=str(source), device="cpu")["problems"] == []


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"tensors": [[1]]},
        {"files": {"x" * 5000: ""}},
        {"text": {}},
        {"seed": -1},
        {"update": "magic"},
        {"dtype": "float8"},
        {"sparsity": "0.5"},
        {"perplexity": "inf"},
        {"layers": [{"name": "x"}]},
    ],
)
def test_an_edited_manifest_is_told_in_one_line(change: dict[str, Any], pruned: Path) -> None:
    manifest = json.loads((pruned / MANIFEST).read_text())
    (pruned / MANIFEST).write_text(json.dumps(manifest | change))
    if "files" in change:
        assert f"{'x' * 5000} is missing" in verify(pruned)["problems"]
    else:
        with pytest.raises(InputError, match=f"is no manifest: {next(iter(change))}"):
            verify(pruned)
    (pruned / MANIFEST).write_text("[" * 200_000)
    with pytest.raises(InputError, match="is no manifest"):
        verify(pruned)


def test_what_is_checked_is_what_is_loaded(pruned: Path, tmp_path: Path) -> None:
    """Neither an index nor a link leads out of the folder unnoticed."""
    shutil.copyfile(pruned / "model.safetensors", tmp_path / "outer.safetensors")
    index = {"metadata": {}, "weight_map": {"x": "../outer.safetensors"}}
    (pruned / "model.safetensors.index.json").write_text(json.dumps(index))
    problems = verify(pruned)["problems"]
    assert "model.safetensors.index.json was not written with the others" in problems
    assert not any("cannot be read" in one for one in problems)  # the whole file beside it is what is read
    (pruned / "model.safetensors.index.json").unlink()
    (pruned / "model.safetensors").unlink()
    (pruned / "model.safetensors").symlink_to(tmp_path / "outer.safetensors")
    assert "model.safetensors is not as it was written: its sha256 differs" in verify(pruned)["problems"]


@pytest.fixture
def allocated(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> Path:
    """The tiny Llama with 10 of each 32 inputs removed in the first layer, half in the others, the last one dense."""
    names = [layer.name for layer in load_model(str(tiny_llama), device="cpu").layers]
    sparsity = dict.fromkeys(names, 0.5) | {names[0]: 10 / 32, names[-1]: 0.0}
    (tmp_path / "a.json").write_text(json.dumps({"version": 1, "granularity": "row", "sparsity": sparsity}))
    options = QUICK | {"calibration": str(tiny_text), "allocation": tmp_path / "a.json", "update": "obs"}
    prune(str(tiny_llama), output=tmp_path / "allocated", **options)
    return tmp_path / "allocated"


@pytest.mark.parametrize("zeros", [9, 11])
@pytest.mark.parametrize("counted", [False, True])
def test_verify_notices_one_zero_of_an_allocated_layer(zeros: int, counted: bool, allocated: Path) -> None:
    """One too few also where the manifest counts it: the layer has a target of its own. One more is no harm then."""

    def change(weights: dict[str, Tensor]) -> None:
        row = weights[QUERY][0]
        assert int((row == 0).sum()) == 10
        place = (row == 0).nonzero()[0] if zeros < 10 else row.nonzero()[0]
        row[place] = 0.5 if zeros < 10 else 0.0

    assert verify(allocated)["ok"]
    edit(allocated, change)
    manifest = json.loads((allocated / MANIFEST).read_text())
    said = manifest["layers"][0]["zeros"]
    if counted:
        manifest["layers"][0]["zeros"] += zeros - 10
        sign_manifest(allocated, manifest)
    problems = [
        one for one in verify(allocated)["problems"] if "perplexity" not in one and "weights are zero" not in one
    ]
    where = "layer model.layers.0.self_attn.q_proj has"
    full = [f"{where} 1 groups with more weights than 0.3125 leaves"] if zeros < 10 else []
    count = [] if counted else [f"{where} {said + zeros - 10} zeros, the manifest says {said}"]
    assert problems == count + full


def test_verify_compares_a_dense_layer_whatever_the_update(allocated: Path, tiny_llama: Path) -> None:
    assert verify(allocated, against=str(tiny_llama), device="cpu")["ok"]
    edit(allocated, lambda weights: weights["model.layers.2.mlp.down_proj.weight"].mul_(1.001))
    told = "weights of layer model.layers.2.mlp.down_proj that were kept are not those of"
    assert any(told in one for one in verify(allocated, against=str(tiny_llama), device="cpu")["problems"])


@pytest.mark.parametrize(("folder", "layers"), [("pruned", 14), ("slimmed", 0)])
def test_a_checkpoint_of_the_last_version_still_verifies(
    monkeypatch: pytest.MonkeyPatch, folder: str, layers: int
) -> None:
    """Written by version 0.1.0 before sessions; the text that its manifest names lies beside it."""
    monkeypatch.chdir(Path(__file__).parent / "golden")
    found = verify(folder, device="cpu")
    assert (found["ok"], found["problems"], found["layers"]) == (True, [], layers)
    assert found["perplexity"] is not None
    assert any("earlier versions wrote no digest" in one for one in found["unchecked"])
    assert (folder == "pruned") == any("does not list" in one for one in found["unchecked"])


def test_a_manifest_has_a_digest_of_itself(pruned: Path, tiny_llama: Path) -> None:
    """Recomputed here; one that is lost is told, of what says things that only this version wrote."""
    manifest = json.loads((pruned / MANIFEST).read_text())
    before = (pruned / MANIFEST).read_text()
    sign_manifest(pruned, dict(manifest))
    assert json.loads((pruned / MANIFEST).read_text()) == manifest
    found = verify(pruned)
    assert (found["ok"], found["sparsity"]) == (True, 0.5)
    assert found["unchecked"] == ["tensors that were not pruned, and kept weights: --against MODEL compares them"]
    assert verify(pruned, against=str(tiny_llama), device="cpu")["unchecked"] == []
    (pruned / MANIFEST).write_text(before.replace('"metric": "wanda"', '"metric": "ria"'))
    assert f"{MANIFEST} is not as it was written: its sha256 differs" in verify(pruned)["problems"]
    del manifest["manifest_sha256"]
    (pruned / MANIFEST).write_text(json.dumps(manifest))
    assert f"{MANIFEST} has lost its digest of itself" in verify(pruned)["problems"]


def leave_out(manifest: dict[str, Any]) -> None:
    """A dense layer would go unnoticed."""
    del manifest["layers"][3]


def relax(manifest: dict[str, Any]) -> None:
    manifest["layers"][3]["target"] = "0.1"


def exchange(manifest: dict[str, Any]) -> None:
    """Two layers of one shape, each under the other's tensor."""
    first, second = manifest["layers"][0], manifest["layers"][7]
    first["tensor"], second["tensor"] = second["tensor"], first["tensor"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (leave_out, r"layer model\.layers\.0\.self_attn\.o_proj of the model is not in the manifest"),
        (relax, r"layer model\.layers\.0\.self_attn\.o_proj has the target 0\.1, the manifest says 2:4"),
        (
            exchange,
            r"self_attn\.q_proj is stored as .*layers\.0.*, the manifest says .*layers\.1",
        ),
        (lambda one: one.update(sparsity=0.6), r"0\.500000 of the layers' weights are zero, the manifest says 0\.6"),
        (
            lambda one: one["layers"].append(one["layers"][0] | {"name": "model.layers.9.x"}),
            r"layer model\.layers\.9\.x of the manifest is none of the model's",
        ),
    ],
)
def test_what_a_manifest_says_is_not_believed(
    change: Callable[[dict[str, Any]], Any], problem: str, pruned: Path
) -> None:
    """Signed anew: the model and its tensors say otherwise."""
    manifest = json.loads((pruned / MANIFEST).read_text())
    change(manifest)
    sign_manifest(pruned, manifest)
    found = verify(pruned)
    assert any(re.search(problem, one) for one in found["problems"]), found["problems"]
    assert found["sparsity"] == 0.5


def test_layers_that_were_left_out_on_purpose_are_no_problem(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    prune(str(tiny_llama), output=tmp_path / "out", calibration=str(tiny_text), exclude="mlp", **QUICK)
    assert verify(tmp_path / "out")["problems"] == []


def test_code_and_licence_are_taken_over_and_the_card_tells(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    """`auto_map` with its files, or not at all; that of another repository names no file here."""
    source, text = tmp_path / "source", tmp_path / "a|b.txt"
    shutil.copytree(tiny_llama, source)
    shutil.copyfile(tiny_text, text)
    for name in ("config.json", "tokenizer_config.json"):
        config = json.loads((source / name).read_text())
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own", "AutoTokenizer": ["a/b--own.Own", None]}
        (source / name).write_text(json.dumps(config))
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md", "licensed_words.csv"):
        (source / name).write_text("terms")
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: own\ntags: [a]\n---\nlicense: not this\n")
    options = QUICK | {"calibration": str(text), "force": True}
    result = prune(str(source), output=tmp_path / "out", **options)
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert "auto_map" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"LICENSE", "NOTICE.txt", "USE_POLICY.md"}
    assert not (tmp_path / "out" / "licensed_words.csv").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert {"license: other", "license_name: own", "library_name: transformers"} <= set(head.splitlines())
    assert "not this" not in card
    assert "Base model: `source`." in body
    assert f"| dense | {result['dense']:.4g} |\n| this model | {result['perplexity']:.4g} |" in body
    assert str(tmp_path) not in card
    for name in ("modeling_own.py", "used_by_it.py"):
        (source / name).write_text("raise RuntimeError\n")
    prune(str(source), output=tmp_path / "out", **options)
    assert {path.name for path in (tmp_path / "out").glob("*.py")} == {"modeling_own.py", "used_by_it.py"}
    assert verify(tmp_path / "out", device="cpu")["problems"] == []
    (tmp_path / "out" / "modeling_own.py").unlink()
    told = "a configuration names code in modeling_own.py, which is missing"
    assert told in verify(tmp_path / "out", device="cpu")["problems"]


def test_links_and_stray_folders_are_seen(pruned: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "code.py").write_text("")
    (pruned / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (pruned / "empty").mkdir()
    problems = verify(pruned)["problems"]
    assert problems == [
        "linked was not written with the others", "empty is a folder that was not written with the others"
    ]  # fmt: skip
    with pytest.raises(InputError, match="holds 'linked', which gpmetric did not write"):
        check_folder(pruned, force=True)
