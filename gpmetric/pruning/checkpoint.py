"""A pruned model as a standard Hugging Face checkpoint: the files of the dense one, with other numbers in its layers.

Every tensor keeps its name, file and dtype. The manifest, `gpmetric_manifest.json`, says what was pruned, how, and from
what, and has a sha256 of every file. `quantization_config` and its like are left out: serving engines refuse them.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from gpmetric import slim_models
from gpmetric.errors import GpmetricError, InputError
from gpmetric.files import finite, write_text
from gpmetric.models import Layer, Model
from gpmetric.targets import Target

__all__ = [
    "FOREIGN_KEYS",
    "MANIFEST",
    "check_folder",
    "file_digest",
    "files_of",
    "printable",
    "replacing",
    "round_weights",
    "tensors",
    "write_checkpoint",
    "write_masks",
]

MANIFEST = "gpmetric_manifest.json"
FOREIGN_KEYS = ("quantization_config", "sparsity_config", "compression_config")  # of a config.json
_INDEX = "model.safetensors.index.json"
# What is taken over from the dense checkpoint beside its tensors: configurations, tokenizer, chat templates.
_KEPT = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "additional_chat_templates/*.jinja")

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [sparsity, pruning, gpmetric]
{base}---

# {name}, pruned

`{formula}` at `{target}`{allocated}: {sparsity:.4f} of the weights of {layers} linear layers are zero.
Made by gpmetric {version}; `{manifest}` says how, and `gpmetric verify` reads it all again.
"""


def check_folder(folder: Path, force: bool, needed: Sequence[Path] = ()) -> None:
    """Refuses a folder that a checkpoint cannot be written to, or that `force` must not replace.

    Args:
        folder: to be written.
        force: whether a checkpoint there may be replaced.
        needed: what is read or written otherwise, which must not be in it where it exists.

    Raises:
        InputError: naming the folder, and what is in the way.
    """
    where = f"--output {str(folder)!r}"
    whole = folder.absolute()
    places = [path.resolve() for path in (Path.cwd(), *needed) if path.exists()]
    if any(whole.resolve() in (place, *place.parents) for place in places):
        raise InputError(f"{where} holds what is needed, or the working directory")
    if os.path.lexists(folder):
        if not force:
            raise InputError(f"{where} exists already; --force replaces a checkpoint")
        if folder.is_symlink() or not folder.is_dir():
            raise InputError(f"{where} is no folder; --force replaces a checkpoint only")
        if foreign := _foreign(folder):
            raise InputError(f"{where} holds {foreign!r}, which gpmetric did not write; --force replaces its own only")
    if not whole.parent.is_dir():
        raise InputError(f"{where}: the directory {str(folder.parent)!r} does not exist")
    if not os.access(whole.parent, os.W_OK):
        raise InputError(f"{where}: {str(folder.parent)!r} is not writable")
    if len(os.fsencode(whole.name)) > 255:
        raise InputError(f"{where}: the name is too long")


@contextmanager
def replacing(folder: Path, force: bool) -> Iterator[Path]:
    """A folder beside it to write to, which takes its place when the block ends well and is removed otherwise.

    Raises:
        GpmetricError: something cannot be written; what was there before is there still.
    """
    folder = folder.absolute()
    aside = [folder.with_name(f".{folder.name[:40]}.{secrets.token_hex(6)}.{kind}") for kind in ("partial", "old")]
    partial, old = aside
    try:
        partial.mkdir()
        yield partial
        check_folder(folder, force)  # it may have come to be meanwhile
        if folder.exists():
            os.rename(folder, old)
            try:
                os.rename(partial, folder)
            except BaseException:
                os.rename(old, folder)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(partial, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise GpmetricError(f"{str(folder)!r} cannot be written: {reason}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def round_weights(model: Model) -> None:
    """Rounds the prunable weights to the dtypes they are stored in, so that they are measured as they will be read.

    Raises:
        GpmetricError: the checkpoint stores a layer under another name.
    """
    places = tensors(_source(model))
    for layer in model.layers:
        name = _stored_name(model, layer, places)
        with safe_open(places[name], framework="pt") as file:
            layer.weight.copy_(layer.weight.to(file.get_tensor(name).dtype))


def write_checkpoint(
    model: Model, folder: Path, made: dict[str, Any], rules: Mapping[str, Target], before: Mapping[str, int]
) -> dict[str, Any]:
    """Writes a pruned model, the other files of the dense one, a model card and the manifest, and returns the manifest.

    Args:
        model: already pruned.
        folder: empty.
        made: what the manifest says of source, metric, target, allocation, calibration, perplexity and versions.
        rules: by layer name, what it was pruned to.
        before: by layer name, how many weights were zero in the dense model.

    Raises:
        GpmetricError: the checkpoint stores a layer under another name.
        OSError, SafetensorError: the files cannot be written.
    """
    source = _source(model)
    places = tensors(source)
    layers = {_stored_name(model, layer, places): layer for layer in model.layers}
    for path in sorted(set(places.values())):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            stored = {name: file.get_tensor(name) for name in sorted(set(file.keys()))}
        for name in stored.keys() & layers.keys():
            updated = made["update"] != "none" and rules[layers[name].name].sparsity > 0
            stored[name] = _written(stored[name], layers[name], updated)
        save_file(stored, folder / path.name, metadata=metadata)
        (folder / path.name).chmod(0o644)  # safetensors' files are their owner's alone
    _copy_others(model, source, folder, {name: made[name] for name in ("metric", "target", "update")})
    described = [_describe(name, layer, rules[layer.name], before[layer.name]) for name, layer in layers.items()]
    zeros, entries = (sum(layer[key] for layer in described) for key in ("zeros", "entries"))
    manifest: dict[str, Any] = {"version": 1} | made | {"sparsity": zeros / entries, "layers": described}
    write_text(folder / "README.md", _card(model, manifest))
    manifest["tensors"] = sorted(places)
    manifest["files"] = {name: file_digest(folder / name) for name in files_of(folder)}
    write_text(folder / MANIFEST, json.dumps(finite(manifest), indent=1, allow_nan=False) + "\n")
    return manifest


def _copy_others(model: Model, source: Path, folder: Path, told: dict[str, Any]) -> None:
    """Takes over configurations, tokenizer and templates; `told` is what the config says of the pruning."""
    for path in (path for pattern in _KEPT for path in source.glob(pattern)):
        if path.name != MANIFEST and not path.name.endswith(".bin.index.json"):
            copy = folder / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
    if model.module.config.model_type.startswith("slim_"):
        shutil.copyfile(slim_models.__file__, folder / slim_models.SLIM_FILE)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in FOREIGN_KEYS}
    config["gpmetric"] = told
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def _card(model: Model, manifest: dict[str, Any]) -> str:
    """The model card."""
    base = f"base_model: {json.dumps(model.name)}\n" if "/" in model.name and not Path(model.name).exists() else ""
    allocation = manifest.get("allocation")
    return _CARD.format(
        base=base, name=printable(Path(model.name).name), formula=printable(manifest["formula"]),
        target=printable(manifest["target"]), sparsity=manifest["sparsity"], layers=len(manifest["layers"]),
        allocated=f", allocated layer by layer by `{printable(allocation['file'])}`" if allocation else "",
        version=manifest["versions"]["gpmetric"], manifest=MANIFEST,
    )  # fmt: skip


def write_masks(model: Model, path: Path) -> None:
    """Writes which weights are not zero, boolean [out, in] by layer name, as one safetensors file.

    Raises:
        GpmetricError: it cannot be written.
    """
    partial = path.with_name(f".{path.name[:40]}.{secrets.token_hex(6)}.partial")
    try:
        save_file({layer.name: (layer.weight != 0).cpu().contiguous() for layer in model.layers}, partial)
        partial.chmod(0o644)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise GpmetricError(f"{str(path)!r} cannot be written: {reason}") from error
    finally:
        partial.unlink(missing_ok=True)


def tensors(folder: Path) -> dict[str, Path]:
    """Every tensor that transformers reads of a checkpoint, and the file that holds it.

    Raises:
        OSError, SafetensorError: a file is missing or damaged.
        GpmetricError: the index names a file elsewhere.
    """
    names = ["model.safetensors"]
    if (folder / _INDEX).is_file():
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        names = sorted(set(map(str, index["weight_map"].values())))
    found: dict[str, Path] = {}
    for name in names:
        if Path(name).name != name:
            raise GpmetricError(f"{_INDEX} names {name!r}, which is not in the folder")
        with safe_open(folder / name, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), folder / name)
    return found


def files_of(folder: Path) -> list[str]:
    """Every file in a folder and its folders, as paths within it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def file_digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _foreign(folder: Path) -> str | None:
    """The first file of a folder that its manifest does not list; None where all are its own, or there are none."""
    found = files_of(folder)
    try:
        listed = set(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]) | {MANIFEST}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        listed = set()
    return next((name for name in found if name not in listed), None)


def _source(model: Model) -> Path:
    assert model.folder is not None  # load_model knows it
    return model.folder


def _stored_name(model: Model, layer: Layer, places: Mapping[str, Path]) -> str:
    """What the files call a layer's weight: some leave out the prefix of the base model."""
    name = f"{layer.name}.weight"
    for found in (name, name.removeprefix(f"{model.module.base_model_prefix}.")):
        if found in places:
            return found
    raise GpmetricError(f"the checkpoint of {model.name!r} stores layer {layer.name} under another name")


def _written(stored: Tensor, layer: Layer, updated: bool) -> Tensor:
    """A layer's weight as its file holds it: the dense numbers masked, or the updated ones, rounded."""
    weight = layer.oriented(layer.weight).cpu()  # as stored
    return weight.to(stored.dtype).contiguous() if updated else stored.where(weight != 0, 0)


def _describe(name: str, layer: Layer, rule: Target, before: int) -> dict[str, Any]:
    """What the manifest says of a layer."""
    weight = layer.weight
    zeros = int((weight == 0).sum())
    return {
        "name": layer.name,
        "tensor": name,
        "shape": list(weight.shape),
        "transposed": isinstance(layer.module, Conv1D),
        "granularity": rule.granularity,
        "target": rule.text,
        "entries": weight.numel(),
        "zeros": zeros,
        "zeros_before": before,
        "sparsity": zeros / weight.numel(),
    }


def printable(text: str) -> str:
    """Without what would end a line or a code span of the card."""
    return "".join(letter for letter in text if letter.isprintable() and letter != "`")
