"""A pruned model as a standard Hugging Face checkpoint: dense safetensors in the stored dtype, with a manifest.

The manifest, `gpmetric_manifest.json`, says what was pruned, how, and from what, and has a sha256 of every file. No
`quantization_config` or `sparsity_config` is written: serving engines refuse checkpoints that have one.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from gpmetric.errors import GpmetricError, InputError
from gpmetric.models import Layer, Model
from gpmetric.provenance import finite, write_text
from gpmetric.pruning.target import Target

__all__ = [
    "MANIFEST",
    "check_folder",
    "file_digest",
    "replacing",
    "round_weights",
    "tensors",
    "write_checkpoint",
    "write_masks",
]

MANIFEST = "gpmetric_manifest.json"
_VERSION = 1
_SHARD = "5GB"  # of one file at most

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [sparsity, pruning, gpmetric]
{base}---

# {name}, pruned

`{formula}` at `{target}`: {sparsity:.4f} of the weights of {layers} linear layers are zero. Made by gpmetric {version};
`{manifest}` says how, and `gpmetric verify` reads it all again.
"""


def check_folder(folder: Path, force: bool) -> None:
    """Refuses a folder that a checkpoint could not be written to at the end, before any work is done.

    Raises:
        InputError: it exists and `force` is not given, or it is not a checkpoint that may be replaced, or it cannot be
            written.
    """
    where = f"--output {str(folder)!r}"
    if os.path.lexists(folder):
        if not force:
            raise InputError(f"{where} exists already; --force replaces a checkpoint")
        if folder.is_symlink() or not folder.is_dir() or (any(folder.iterdir()) and not (folder / MANIFEST).is_file()):
            raise InputError(f"{where} is no checkpoint of gpmetric, which alone --force replaces")
    if not folder.absolute().parent.is_dir():
        raise InputError(f"{where}: the directory {str(folder.parent)!r} does not exist")
    if not os.access(folder.absolute().parent, os.W_OK):
        raise InputError(f"{where}: {str(folder.parent)!r} is not writable")


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A folder beside it to write to, which takes its place when the block ends well and is removed otherwise."""
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name[:40]}.{secrets.token_hex(6)}.partial")
    try:
        partial.mkdir()
        yield partial
        if folder.exists():
            old = folder.with_name(f".{folder.name[:40]}.{secrets.token_hex(6)}.old")
            os.replace(folder, old)
            os.replace(partial, folder)
            shutil.rmtree(old)
        else:
            os.replace(partial, folder)
    except OSError as error:
        raise GpmetricError(f"{str(folder)!r} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def round_weights(model: Model) -> None:
    """Rounds the prunable weights to the dtype the model is stored in, so that it is measured as it will be read."""
    for layer in model.layers:
        layer.weight.copy_(layer.weight.to(_stored_dtype(model)))


def write_checkpoint(
    model: Model, folder: Path, made: dict[str, Any], rules: dict[str, Target], dense: dict[str, int]
) -> dict[str, Any]:
    """Writes a pruned model, its tokenizer, a model card and the manifest, and returns the manifest.

    The model is converted to the dtype it was stored in, and is not to be used afterwards.

    Args:
        model: already pruned.
        folder: empty.
        made: what the manifest says of source, metric, target, calibration, perplexity and versions.
        rules: by layer name, what each was pruned to.
        dense: by layer name, how many weights were zero before.

    Raises:
        GpmetricError: the files cannot be written, or transformers stores a pruned weight under another name.
    """
    module = model.module
    module.to(_stored_dtype(model))
    module.config.use_cache = getattr(model.stored, "use_cache", True)
    module.config.gpmetric = {name: made[name] for name in ("metric", "target", "update")}
    module.save_pretrained(folder, max_shard_size=_SHARD)
    model.tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod((folder / "config.json").stat().st_mode)  # safetensors' files are their owner's alone
    names = set(tensors(folder))
    lost = [layer.name for layer in model.layers if f"{layer.name}.weight" not in names]
    if lost:
        raise GpmetricError(f"transformers stores layer {lost[0]} under another name; nothing written")
    layers = [_describe(layer, rules[layer.name], dense[layer.name]) for layer in model.layers]
    zeros, entries = (sum(layer[key] for layer in layers) for key in ("zeros", "entries"))
    manifest: dict[str, Any] = {"version": _VERSION} | made | {"sparsity": zeros / entries, "layers": layers}
    base = f"base_model: {json.dumps(model.name)}\n" if "/" in model.name and not Path(model.name).exists() else ""
    card = {name: _plain(str(made[name])) for name in ("formula", "target")}
    sparsity, version = manifest["sparsity"], made["versions"]["gpmetric"]
    name = _plain(Path(model.name).name)
    text = _CARD.format(
        base=base, name=name, sparsity=sparsity, layers=len(layers), version=version, manifest=MANIFEST, **card
    )
    write_text(folder / "README.md", text)
    manifest["tensors"] = sorted(names)
    manifest["files"] = {path.name: file_digest(path) for path in sorted(folder.iterdir())}
    write_text(folder / MANIFEST, json.dumps(finite(manifest), indent=1, allow_nan=False) + "\n")
    return manifest


def write_masks(model: Model, path: Path) -> None:
    """Writes what is kept, boolean [out, in] by layer name, as one safetensors file.

    Raises:
        GpmetricError: it cannot be written.
    """
    partial = path.with_name(f".{path.name[:40]}.{secrets.token_hex(6)}.partial")
    try:
        save_file({layer.name: (layer.weight != 0).contiguous() for layer in model.layers}, partial)
        os.replace(partial, path)
    except OSError as error:
        raise GpmetricError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def tensors(folder: Path) -> dict[str, Path]:
    """Every tensor of a checkpoint's safetensors files, and which file holds it."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def file_digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _describe(layer: Layer, rule: Target, dense: int) -> dict[str, Any]:
    """What the manifest says of a layer: `removed` of each `group` entries go, within rows, the layer or N:M."""
    weight = layer.weight
    zeros = int((weight == 0).sum())
    return {
        "name": layer.name,
        "shape": list(weight.shape),
        "transposed": isinstance(layer.module, Conv1D),
        "granularity": rule.granularity,
        "target": rule.text,
        "entries": weight.numel(),
        "zeros": zeros,
        "zeros_before": dense,
        "sparsity": zeros / weight.numel(),
    }


def _stored_dtype(model: Model) -> torch.dtype:
    return getattr(model.stored, "dtype", None) or torch.float32


def _plain(text: str) -> str:
    """Without what would end a line or a code span of the card."""
    return "".join(letter for letter in text if letter.isprintable() and letter != "`")
