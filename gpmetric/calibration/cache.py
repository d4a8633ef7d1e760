"""The statistics cache: one safetensors file per (model, text, settings), named by the hash of their contents.

A file holds a digest of itself, which is compared before the file is used, and every number is looked at: what was
damaged, or is not finite, is measured again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpmetric.calibration.accumulators import LayerStatistics
from gpmetric.calibration.collect import Statistics
from gpmetric.errors import GpmetricError
from gpmetric.files import locked
from gpmetric.models import Layer, Model
from gpmetric.operands import OPERANDS, shape_of
from gpmetric.plugins import digests_of
from gpmetric.tensor_file import TensorFile, create_file, tensor_sum, write_header

__all__ = [
    "Sample", "as_stored", "cache_key", "cached_statistics", "estimate_bytes", "load_statistics", "stored_dtype",
]  # fmt: skip

_LOG = logging.getLogger(__name__)
_FORMAT = 3


def cache_key(model: Model, tokens: Tensor, names: Collection[str], dtype: torch.dtype | None = None) -> str:
    """sha256 of the model's weights, the calibration tokens, the layers, the statistics' names and their dtype."""
    content: dict[str, Any] = {
        "format": _FORMAT,
        "model": model.digest,
        "tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "shape": list(tokens.shape),
        "layers": [layer.name for layer in model.layers],
        "names": sorted({"X", *names}),
    }
    if measured := digests_of("operand", names):  # by what plug-ins say
        content["plugins"] = measured
    if dtype is not None:
        content["dtype"] = str(dtype)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def estimate_bytes(layers: Iterable[Layer], names: Collection[str], dtype: torch.dtype | None = None) -> int:
    """Size of statistics of some layers in memory and on disk, in bytes, matrices [out, in] being in `dtype`."""
    shapes = [layer.weight.shape for layer in layers]
    return sum(stored_dtype(name, dtype).itemsize * prod(shape_of(name, shape)) for name in names for shape in shapes)


@dataclass(frozen=True)
class Sample:
    """What a file of the cache holds: statistics by layer with their shapes, and the windows they were measured on."""

    shapes: Mapping[str, tuple[int, int]]  # [out, in] by layer
    names: frozenset[str]
    sequences: int
    length: int
    dtype: torch.dtype | None = None  # of matrices [out, in]; None is fp32

    @classmethod
    def of(cls, model: Model, tokens: Tensor, names: Collection[str], dtype: torch.dtype | None = None) -> Sample:
        """That of a model's statistics on windows [sequences, length]."""
        shapes = {layer.name: (layer.weight.shape[0], layer.weight.shape[1]) for layer in model.layers}
        return cls(shapes, frozenset({"X", *names}), len(tokens), tokens.shape[1], dtype)

    @property
    def kinds(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor of the file."""
        return {
            f"{layer}/{name}": (stored_dtype(name, self.dtype), tuple(shape_of(name, shape)))
            for layer, shape in self.shapes.items()
            for name in sorted(self.names)
        }

    def describe(self) -> dict[str, Any]:
        """What the file says of itself."""
        names = {"layers": list(self.shapes), "names": sorted(self.names)}
        return names | {"sequences": self.sequences, "length": self.length}


def stored_dtype(name: str, dtype: torch.dtype | None) -> torch.dtype:
    """That a statistic is kept in, where matrices [out, in] are to be in `dtype`."""
    matrix = name in OPERANDS and OPERANDS[name].axes != "in"
    return dtype if dtype is not None and matrix else torch.float32


def as_stored(layer: str, name: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A layer's statistic on the CPU as it is kept, contiguous, where matrices [out, in] are to be in `dtype`.

    Raises:
        GpmetricError: a number is not finite.
    """
    stored = value.cpu().to(stored_dtype(name, dtype)).contiguous()
    if not stored.isfinite().all():
        raise GpmetricError(
            f"statistic {name} of layer {layer} is not finite on the calibration windows: try --dtype float32, or "
            "leave the statistic out"
        )
    return stored


def cached_statistics(
    folder: Path,
    key: str,
    sample: Sample,
    blocks: Callable[[], Iterable[Mapping[str, LayerStatistics]]],
    checking: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """The file of the statistics under `key`, computed and written when it is not there or damaged, which is told.

    Args:
        folder: of the cache.
        key: see `cache_key`.
        sample: what the file holds.
        blocks: computes them, some layers at a time in any order; each is written as soon as it is there.
        checking: told of tensors of a file that is there, (compared with its digest, in all).

    Raises:
        GpmetricError: the folder cannot be written, or what is computed is not finite.
    """
    path = folder / f"{key}.safetensors"
    _remove_abandoned(folder)
    try:
        _check(path, sample, checking)
        return path
    except FileNotFoundError:
        pass
    except (OSError, GpmetricError, ValueError) as error:
        _LOG.warning("statistics cache %r is damaged, and measured again: %s", str(path), error)
    with _explained(folder):  # before the work
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("no permission")
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        with _explained(folder):
            lock = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locked(lock)  # so that nobody who sees other process numbers takes it for abandoned
            _fill(partial, folder, sample, blocks)
            with _explained(folder):
                os.replace(partial, path)
        finally:
            os.close(lock)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _fill(
    partial: Path, folder: Path, sample: Sample, blocks: Callable[[], Iterable[Mapping[str, LayerStatistics]]]
) -> None:
    """Writes what a file of the cache holds; its digest, which is known at the end, has its place from the start."""
    with _explained(folder):
        file = create_file(partial, sample.kinds, _metadata(sample, "0" * 64))
    sums: dict[str, str] = {}
    for block in blocks():
        with _explained(folder):
            for layer, statistics in block.items():
                for name, value in statistics.values.items():
                    place = f"{layer}/{name}"
                    stored = as_stored(layer, name, value, sample.dtype)  # or it would be measured again each time
                    file.write(place, stored)
                    sums[place] = tensor_sum([stored])
    with _explained(folder):
        write_header(partial, sample.kinds, _metadata(sample, _digest(sample, sums)))


def _check(path: Path, sample: Sample, told: Callable[[int, int], None]) -> None:
    """Compares a file with what it is to hold and with its digest; reads all of it.

    Raises:
        FileNotFoundError: there is none.
        OSError, GpmetricError or ValueError: it is damaged; what is wrong with it.
    """
    file = TensorFile(path)
    if {name: (place.dtype, place.shape) for name, place in file.places.items()} != sample.kinds:
        raise ValueError("it holds other tensors than it should")
    sums = {}
    for done, name in enumerate(file.places):
        told(done, len(file.places))
        sums[name] = tensor_sum(_finite(name, file.pieces(name)))
    told(len(file.places), len(file.places))
    if file.metadata != _metadata(sample, _digest(sample, sums)):
        raise ValueError("its digest is another")


def _finite(name: str, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """The pieces of a tensor; ValueError where a number is not finite."""
    for piece in pieces:
        if not piece.isfinite().all():
            raise ValueError(f"{name} holds a number that is not finite")
        yield piece


def _metadata(sample: Sample, digest: str) -> dict[str, str]:
    return {"gpmetric": json.dumps(sample.describe()), "digest": digest}


def _digest(sample: Sample, sums: Mapping[str, str]) -> str:
    """Of a file whose tensors have these."""
    return hashlib.sha256(json.dumps([sample.describe(), sums], sort_keys=True).encode()).hexdigest()


def _remove_abandoned(folder: Path) -> None:
    """Removes files that a killed process had begun: its number is nobody's, and nobody holds their lock."""
    for path in folder.glob("*.partial"):
        number = re.fullmatch(r".+\.([1-9][0-9]{0,9})\.partial", path.name, re.ASCII)
        if number is None or _lives(int(number[1])):
            continue
        with suppress(OSError):
            lock = os.open(path, os.O_RDONLY)
            try:
                if locked(lock):
                    path.unlink()
                    _LOG.warning("removed %r, which a command that was killed had begun", str(path))
            finally:
                os.close(lock)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise GpmetricError(f"statistics cache {str(folder)!r} cannot be written: {error}") from error


class _Stored(Mapping[str, LayerStatistics]):
    """The layers of a file of the cache, each read when it is asked for."""

    def __init__(self, path: Path, names: Mapping[str, Sequence[str]], device: str) -> None:
        self._path, self._names, self._device = path, names, device

    def __getitem__(self, layer: str) -> LayerStatistics:
        with safe_open(self._path, framework="pt", device=self._device) as file:
            return LayerStatistics(**{name: file.get_tensor(f"{layer}/{name}") for name in self._names[layer]})

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load_statistics(path: Path, device: str = "cpu", *, kept: bool = True) -> Statistics:
    """Reads a cache file onto a device.

    Args:
        path: of the file.
        device: where the statistics come to.
        kept: whether all are read now, or each layer's when they are asked for.

    Raises:
        OSError, SafetensorError, KeyError, TypeError or ValueError: missing or damaged.
    """
    layers: dict[str, list[str]] = {}
    with safe_open(path, framework="pt", device=device) as file:
        sample = json.loads((file.metadata() or {})["gpmetric"])
        for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
            layer, _, statistic = name.rpartition("/")
            layers.setdefault(layer, []).append(statistic)
    if any(set(layers[name]) != set(sample["names"]) for name in sample["layers"]):
        raise ValueError(f"{path} lacks a statistic of a layer, or has one more")
    stored = _Stored(path, {name: layers[name] for name in sample["layers"]}, device)
    return Statistics(dict(stored) if kept else stored, sequences=sample["sequences"], length=sample["length"])
