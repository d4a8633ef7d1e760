"""The statistics cache: one safetensors file per (model, text, settings), named by the hash of their contents."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gpmetric.calibration.accumulators import LayerStatistics
from gpmetric.calibration.collect import Statistics
from gpmetric.errors import GpmetricError
from gpmetric.models import Model
from gpmetric.operands import shape_of

__all__ = ["cache_key", "cached_statistics", "estimate_bytes", "load_statistics"]

_FORMAT = 2


def cache_key(model: Model, tokens: Tensor, names: Collection[str]) -> str:
    """sha256 of the model's weights, the calibration tokens, the layers and the names of the statistics."""
    content = {
        "format": _FORMAT,
        "model": model.digest,
        "tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "shape": list(tokens.shape),
        "layers": [layer.name for layer in model.layers],
        "names": sorted(names),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def estimate_bytes(model: Model, names: Collection[str]) -> int:
    """Size of statistics in memory and on disk, in bytes (fp32); X is always among them."""
    shapes = [layer.weight.shape for layer in model.layers]
    return 4 * sum(prod(shape_of(name, shape)) for name in {"X", *names} for shape in shapes)


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
            layer, _, statistic = name.rpartition("/")
            layers.setdefault(layer, {})[statistic] = file.get_tensor(name)
    if any(layers[name].keys() != set(sample["names"]) for name in sample["layers"]):
        raise ValueError(f"{path} lacks a statistic of a layer, or has one more")
    found = {name: LayerStatistics(**layers[name]) for name in sample["layers"]}
    return Statistics(found, sequences=sample["sequences"], length=sample["length"])


def _save(statistics: Statistics, path: Path) -> None:
    """Writes beside the final name first, so that a reader never sees half a file."""
    tensors = {
        f"{name}/{statistic}": value.contiguous()
        for name, layer in statistics.layers.items()
        for statistic, value in layer.values.items()
    }
    sample = {
        "layers": list(statistics.layers),
        "names": sorted(statistics.names),
        "sequences": statistics.sequences,
        "length": statistics.length,
    }
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata={"gpmetric": json.dumps(sample)})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
