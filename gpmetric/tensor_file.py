"""A safetensors file read and written in place, one tensor at a time: nothing is mapped, nothing else is in memory.

A file is 8 bytes with the length of its header, the header in JSON with the place of each tensor, and the tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from gpmetric.errors import GpmetricError, ModelError

__all__ = [
    "Place", "TensorFile", "create_file", "dtype_name", "tensor_sum", "weight_bytes", "weight_files", "write_header",
    "write_tensors",
]  # fmt: skip

_INDEX = ".safetensors.index.json"
_LONGEST = 100_000_000  # bytes of a header, as safetensors has it
_PIECE = 2**24  # bytes of a tensor read at once where it is not needed as a whole
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
Kinds = Mapping[str, tuple[torch.dtype, Sequence[int]]]  # dtype and shape by name
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Place:
    """Where a tensor is in its file, [start, end) in bytes, and what it is."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file by name, in the order of its header, each read when it is asked for.

    Args:
        path: of the file.

    Attributes:
        places: by name, in the order of the header.
        metadata: texts that the file says of itself.

    Raises:
        OSError: it cannot be read.
        GpmetricError: it is damaged or cut short, or holds a dtype that is not known.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            try:
                header = _read_header(file, size)
                self.metadata: dict[str, str] = dict(header.pop("__metadata__", {}))
                begin = file.tell()
                self.places = {name: _place(name, entry, begin, size) for name, entry in header.items()}
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                reason = f"no {error}" if isinstance(error, KeyError) else str(error)
                raise GpmetricError(f"{str(path)!r} is no whole safetensors file: {reason:.120}") from error

    def __getitem__(self, name: str) -> Tensor:
        """A tensor of the file, in memory of its own."""
        return self.slice(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor of the file, flat, piece by piece of at most 16 MiB."""
        place = self.places[name]
        size = place.dtype.itemsize
        with self.path.open("rb", buffering=0) as file:
            for start in range(place.start, place.end, _PIECE):
                found = torch.empty(min(_PIECE, place.end - start) // size, dtype=place.dtype)
                self._fill(file, found, start)
                yield found

    def write(self, name: str, value: Tensor, index: int | None = None) -> None:
        """Puts other numbers, of the same shape and dtype, in the place of a tensor or of a slice of its first axis."""
        place = self._slice(name, index)
        assert (value.shape, value.dtype) == (place.shape, place.dtype), name
        with self.path.open("r+b", buffering=0) as file:
            file.seek(place.start)
            _write_all(file, value)

    def slice(self, name: str, index: int | None) -> Tensor:
        """A tensor's slice along its first axis, or all of it, in memory of its own."""
        place = self._slice(name, index)
        found = torch.empty(math.prod(place.shape), dtype=place.dtype)
        with self.path.open("rb", buffering=0) as file:
            self._fill(file, found, place.start)
        return found.reshape(place.shape)

    def _slice(self, name: str, index: int | None) -> Place:
        place = self.places[name]
        if index is None:
            return place
        size = (place.end - place.start) // place.shape[0]
        return Place(place.dtype, place.shape[1:], place.start + index * size, place.start + (index + 1) * size)

    def _fill(self, file: BinaryIO, values: Tensor, start: int) -> None:
        """Reads a flat tensor from its place in the file."""
        file.seek(start)
        free = _bytes_of(values)
        while free:
            if not (count := file.readinto(free)):  # type: ignore[attr-defined]  # of a file without a buffer
                raise GpmetricError(f"{str(self.path)!r} ends before its tensors do")
            free = free[count:]


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads the tensors of a checkpoint from, by its rule.

    The file or index that the config names; else one file, where it is there; else those of the index. What else lies
    in the folder, an index beside one file for instance, is not read.

    Raises:
        OSError: no such file.
        ModelError: an index that cannot be read, or names a file elsewhere.
    """
    name = "model.safetensors"
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        told = json.loads((folder / "config.json").read_text(encoding="utf-8"))["transformers_weights"]
        name = told if isinstance(told, str) and told else name
    index = name if name.endswith(_INDEX) else f"{name.removesuffix('.safetensors')}{_INDEX}"
    if name != index and (os.path.isfile(folder / name) or not os.path.isfile(folder / index)):
        return [_within(folder, name)]
    try:
        named = set(map(str, json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelError(f"{str(folder / index)!r} is no index of weights: {error!s:.120}") from error
    return [_within(folder, one) for one in sorted(named)]


def weight_bytes(folder: Path) -> int:
    """Size of the files of `weight_files`; errors as of it."""
    return sum(path.stat().st_size for path in weight_files(folder))


def _within(folder: Path, name: str) -> Path:
    if name == ".." or Path(name).name != name or not name.isprintable():
        raise ModelError(f"{str(folder)!r} names weights in {name!r}, which is not in the folder")
    return folder / name


def dtype_name(dtype: torch.dtype) -> str:
    """What safetensors calls a dtype."""
    return _NAMES[dtype]


def tensor_sum(pieces: Iterable[Tensor]) -> str:
    """sha256 of the bytes of a tensor on the CPU that comes in contiguous pieces, in hexadecimal."""
    found = hashlib.sha256()
    for piece in pieces:
        found.update(_bytes_of(piece))
    return found.hexdigest()


def write_tensors(
    path: Path,
    kinds: Kinds,
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Writes a safetensors file as `save_file` does, asking for one tensor at a time.

    Args:
        path: of the file.
        kinds: by name, dtype and shape.
        read: gives the tensor of a name, on any device.
        metadata: texts that the file says of itself.

    Raises:
        OSError: it cannot be written.
    """
    names, text, _ = _laid_out(kinds, metadata)
    with path.open("wb", buffering=0) as file:
        _write_bytes(file, memoryview(text))
        for name in names:
            _write_all(file, read(name).to("cpu", kinds[name][0]))
        os.fsync(file.fileno())


def create_file(path: Path, kinds: Kinds, metadata: Mapping[str, str]) -> TensorFile:
    """A safetensors file of zeros, for tensors to be written into it in any order; arguments as of `write_tensors`.

    Raises:
        OSError: it cannot be written.
    """
    _, text, size = _laid_out(kinds, metadata)
    with path.open("wb", buffering=0) as file:
        _write_bytes(file, memoryview(text))
        file.truncate(len(text) + size)
    return TensorFile(path)


def write_header(path: Path, kinds: Kinds, metadata: Mapping[str, str]) -> None:
    """Puts other texts, as long as those before, into the header of a file of `create_file`.

    Raises:
        OSError: it cannot be written.
    """
    _, text, _ = _laid_out(kinds, metadata)
    with path.open("r+b", buffering=0) as file:
        assert file.read(8) == text[:8], "the header would have another length"
        file.seek(0)
        _write_bytes(file, memoryview(text))
        os.fsync(file.fileno())


def _laid_out(kinds: Kinds, metadata: Mapping[str, str]) -> tuple[list[str], bytes, int]:
    """Names in the order of the file, what stands before the tensors, and their bytes."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    names = sorted(kinds, key=lambda name: (-kinds[name][0].itemsize, name))  # so that each is aligned
    for name in names:
        dtype, shape = kinds[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return names, len(text).to_bytes(8, "little") + text, end


def _write_all(file: BinaryIO, value: Tensor) -> None:
    _write_bytes(file, _bytes_of(value.detach().contiguous()))


def _write_bytes(file: BinaryIO, content: memoryview) -> None:
    while content:
        content = content[file.write(content) :]


def _bytes_of(value: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied."""
    return value.reshape(-1).view(torch.uint8).numpy().data  # [bytes]


def _read_header(file: BinaryIO, size: int) -> dict[str, Any]:
    """The header of a file; ValueError says what is wrong with it."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(_LONGEST, size - 8):
        raise ValueError(f"its header has {length} bytes, the file {size}")
    header = json.loads(file.read(length).decode())
    if not isinstance(header, dict):
        raise ValueError("its header is no table")
    return header


def _place(name: str, entry: Any, begin: int, size: int) -> Place:
    """What a header says of a tensor; its offsets count from `begin`, and the file has `size` bytes."""
    dtype, shape = _DTYPES.get(entry["dtype"]), tuple(entry["shape"])
    if dtype is None:
        raise ValueError(f"tensor {name} is of dtype {entry['dtype']!r}")
    start, end = entry["data_offsets"]
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, start, end)):
        raise ValueError(f"tensor {name} has no place in it")
    if end - start != math.prod(shape) * dtype.itemsize or end > size - begin:
        raise ValueError(f"tensor {name} does not fit into its place")
    return Place(dtype, shape, begin + start, begin + end)
