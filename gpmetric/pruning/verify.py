"""Reading a written checkpoint again: is it whole, finite, as sparse as its manifest says, and else as it was?"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpmetric.errors import DataError, GpmetricError, InputError
from gpmetric.evaluation.perplexity import mean_loss, perplexity
from gpmetric.evaluation.windows import open_text, read_windows
from gpmetric.models import Model, load_model
from gpmetric.pruning.checkpoint import MANIFEST, file_digest, tensors
from gpmetric.pruning.target import BLOCK, GRANULARITIES, Target, parse_target

__all__ = ["read_manifest", "verify"]

_CLOSE = 1e-3  # of a perplexity: what other versions and devices may change


def verify(folder: str | Path, *, against: str | None = None, device: str = "auto", seed: int = 0) -> dict[str, Any]:
    """Re-reads a checkpoint that `prune` wrote.

    Args:
        folder: the checkpoint.
        against: the dense model it was made from, whose other tensors, and kept weights, must be the same bit for bit
            (kept weights not where they were updated).
        device: auto, cpu or cuda, where the reloaded model is measured.
        seed: not used; every command takes one.

    Returns:
        `ok`, `problems` (one line each), `layers`, `sparsity`, and `perplexity` of the reloaded model, None where the
        text that it was measured on is not at hand.

    Raises:
        InputError: no such folder, no manifest in it that can be read, or no dense model.
    """
    path = Path(folder)
    manifest = read_manifest(path)
    dense = None if against is None else load_model(against, device="cpu")
    problems = list(_file_problems(path, manifest))
    found: float | None = None
    try:
        problems += _tensor_problems(path, manifest)
        if dense is not None:
            problems += _differences(path, manifest, dense)
        found = _perplexity(load_model(str(path), device=device, dtype=manifest["dtype"]), manifest)
    except (GpmetricError, SafetensorError, OSError) as error:
        problems.append(f"the checkpoint cannot be read: {error}")
    said = manifest["perplexity"]
    if found is not None and said is not None and not abs(found - said) <= _CLOSE * said:
        problems.append(f"perplexity of the reloaded model is {found:.4f}, the manifest says {said:.4f}")
    return {
        "checkpoint": str(folder),
        "against": against,
        "ok": not problems,
        "problems": problems,
        "layers": len(manifest["layers"]),
        "sparsity": manifest["sparsity"],
        "perplexity": found,
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        InputError: there is none, or it is not one.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        layers = [(one["name"], one["shape"], one["zeros"], one["transposed"]) for one in manifest["layers"]]
        known = all(parse_target(one["target"]) and one["granularity"] in GRANULARITIES for one in manifest["layers"])
        wanted = {"files": dict, "tensors": list, "text": dict, "update": str, "dtype": str, "sparsity": float}
        wrong = [name for name, kind in wanted.items() if not isinstance(manifest[name], kind)]
        if wrong or not layers or not known or not isinstance(manifest["perplexity"], float | None):
            raise ValueError(", ".join(wrong) or "layers or perplexity")
    except OSError as error:
        raise InputError(f"{str(folder)!r} is no checkpoint of gpmetric: {MANIFEST}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, InputError) as error:
        raise InputError(f"{str(path)!r} is no manifest: {type(error).__name__} {error}") from error
    return dict(manifest)


def _file_problems(folder: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    for name, digest in manifest["files"].items():
        path = folder / name
        if path.parent != folder or not path.is_file():
            yield f"{name} is missing"
        elif file_digest(path) != digest:
            yield f"{name} is not as it was written: its sha256 differs"
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in manifest["files"]:
            yield f"{path.name} was not written with the others"


def _tensor_problems(folder: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Tensors that are missing, damaged or not finite, and layers less sparse than they should be."""
    places = tensors(folder)
    for name in manifest["tensors"]:
        if name not in places:
            yield f"tensor {name} is missing"
    for name, path in places.items():
        if not _read(path, name).isfinite().all():
            yield f"tensor {name} holds NaN or infinity"
    for layer in manifest["layers"]:
        name = f"{layer['name']}.weight"
        if name not in places:
            continue
        weight = _oriented(_read(places[name], name), layer)
        if list(weight.shape) != layer["shape"]:
            yield f"layer {layer['name']} is {list(weight.shape)}, the manifest says {layer['shape']}"
            continue
        zeros = int((weight == 0).sum())
        if zeros != layer["zeros"]:
            yield f"layer {layer['name']} has {zeros} zeros, the manifest says {layer['zeros']}"
        rule = parse_target(layer["target"])
        rule = rule if rule.group else rule.with_granularity(layer["granularity"])
        if short := _too_full(weight, rule):
            yield f"layer {layer['name']} has {short} groups with more weights than {rule.text} leaves"


def _too_full(weight: Tensor, rule: Target) -> int:
    """How many comparison groups have fewer zeros than the target removes."""
    if rule.granularity == "block":
        whole = rule.with_granularity("layer")
        return sum(_too_full(part, whole) for part in weight.split(BLOCK, dim=1))
    size = {"row": weight.shape[1], "layer": weight.numel()}.get(rule.granularity, rule.group)
    if weight.numel() % size:
        return 1
    return int(((weight == 0).reshape(-1, size).sum(dim=1) < rule.removed(size)).sum())


def _differences(folder: Path, manifest: Mapping[str, Any], dense: Model) -> Iterator[str]:
    """Tensors that pruning should have left alone; fp32 holds every value of the stored dtypes."""
    layers = {f"{layer['name']}.weight": layer for layer in manifest["layers"]}
    state = dense.module.state_dict()
    for name, path in tensors(folder).items():
        if name not in state:
            yield f"tensor {name} is not in {dense.name!r}"
            continue
        here, there = _read(path, name).float(), state[name].float()
        if here.shape != there.shape:
            yield f"tensor {name} is {list(here.shape)}, in {dense.name!r} {list(there.shape)}"
        elif name not in layers and not torch.equal(here, there):
            yield f"tensor {name} is not that of {dense.name!r}, though it was not pruned"
        elif name in layers and manifest["update"] == "none" and not torch.equal(here, there.where(here != 0, 0)):
            yield f"weights of layer {layers[name]['name']} that were kept are not those of {dense.name!r}"


def _perplexity(model: Model, manifest: Mapping[str, Any]) -> float | None:
    """Of the reloaded model, on the windows of the manifest; None where there is no such text here."""
    said = manifest["text"]
    try:
        text = open_text(said["text"])
    except DataError:
        return None
    if text.digest != said["sha256"]:
        return None
    seed = manifest["seed"] if manifest["shuffle"] else None
    windows = read_windows(model, text, said["sequence_length"], said["windows"], seed)
    return perplexity(mean_loss(model, windows.tokens))


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        found: Tensor = file.get_tensor(name)
    return found


def _oriented(weight: Tensor, layer: Mapping[str, Any]) -> Tensor:
    return weight.t() if layer["transposed"] else weight
