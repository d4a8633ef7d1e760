"""The statistics cache: one safetensors file per (model, text, settings), named by the hash of their contents."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gpmetric.calibration.accumulators import LayerStatistics
from gpmetric.calibration.collect import Statistics
from gpmetric.errors import GpmetricError
from gpmetric.models import Model

__all__ = ["cache_key", "cached_statistics", "default_cache", "estimate_bytes", "load_statistics"]

_FORMAT = 1
_OPERANDS = [field.name for field in fields(LayerStatistics)]


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/gpmetric`, or `~/.cache/gpmetric`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpmetric"


def cache_key(model: Model, tokens: Tensor, settings: dict[str, Any]) -> str:
    """sha256 of the model's weights, the calibration tokens, the layers and the settings."""
    content = {
        "format": _FORMAT,
        "model": model.digest,
        "tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "shape": list(tokens.shape),
        "layers": [layer.name for layer in model.layers],
        "settings": settings,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def estimate_bytes(model: Model, *, gradients: bool, fisher: bool, gram: bool) -> int:
    """Size of the statistics in memory and on disk, in bytes (fp32)."""
    total = 0
    for layer in model.layers:
        out_features, in_features = layer.weight.shape
        matrices = 2 * gradients + fisher  # G and H, F
        total += in_features + matrices * out_features * in_features + (in_features + in_features**2) * gram
    return 4 * total


def cached_statistics(folder: Path, key: str, compute: Callable[[], Statistics]) -> tuple[Statistics, Path]:
    """The statistics under `key`, computed and written when they are not there or not readable, and their file.

    Raises:
        GpmetricError: the folder cannot be written.
    """
    path = folder / f"{key}.safetensors"
    try:
        return load_statistics(path), path
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        pass  # absent, or damaged: it is written anew
    with _explained(folder):  # before the work
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("no permission")
    statistics = compute()
    with _explained(folder):
        _save(statistics, path)
    return statistics, path


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise GpmetricError(f"statistics cache {str(folder)!r} cannot be written: {error}") from error


def load_statistics(path: Path, device: str = "cpu") -> Statistics:
    """Reads a cache file onto a device.

    Raises:
        OSError, SafetensorError, KeyError, TypeError or ValueError: missing or damaged.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    with safe_open(path, framework="pt", device=device) as file:
        sample = json.loads((file.metadata() or {})["gpmetric"])
        for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
            layer, _, operand = name.rpartition("/")
            layers.setdefault(layer, {})[operand] = file.get_tensor(name)
    found = {name: LayerStatistics(**layers[name]) for name in sample["layers"]}
    return Statistics(found, sequences=sample["sequences"], length=sample["length"])


def _save(statistics: Statistics, path: Path) -> None:
    """Writes beside the final name first, so that a reader never sees half a file."""
    tensors = {
        f"{name}/{operand}": value.contiguous()
        for name, layer in statistics.layers.items()
        for operand in _OPERANDS
        if (value := getattr(layer, operand)) is not None
    }
    sample = {"layers": list(statistics.layers), "sequences": statistics.sequences, "length": statistics.length}
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata={"gpmetric": json.dumps(sample)})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
