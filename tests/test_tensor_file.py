"""Safetensors files read and written in place, beside the reference library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.modeling_utils import _get_resolved_checkpoint_files

from gpmetric import tensor_file
from gpmetric.errors import GpmetricError
from gpmetric.tensor_file import TensorFile, weight_files, write_tensors

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.uint8]


@pytest.fixture
def values() -> dict[str, Tensor]:
    """Of every dtype, odd shapes, with an empty tensor and a scalar."""
    draw = torch.Generator().manual_seed(0)
    found = {str(dtype): (torch.randn(6, 41, generator=draw) * 50).abs().to(dtype) for dtype in DTYPES}
    return found | {"mask": torch.rand(7, 3, generator=draw) > 0.5, "empty": torch.ones(0, 3), "one": torch.tensor(2.5)}


@pytest.fixture
def path(values: dict[str, Tensor], tmp_path: Path) -> Path:
    save_file(values, tmp_path / "a.safetensors", metadata={"format": "pt", "größe": "1"})
    return tmp_path / "a.safetensors"


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())


def test_reads_what_the_library_wrote(values: dict[str, Tensor], path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "_PIECE", 64)
    file = TensorFile(path)
    assert file.metadata == {"format": "pt", "größe": "1"}
    with safe_open(path, framework="pt") as reference:
        assert sorted(file.places) == sorted(reference.keys())
    for name, value in values.items():
        assert same(file[name].float(), value.float())
        assert file[name].dtype == value.dtype
        assert same(torch.cat([value.reshape(-1)[:0], *file.pieces(name)]).float(), value.reshape(-1).float())


def test_writes_one_tensor_and_nothing_else(values: dict[str, Tensor], path: Path) -> None:
    before = path.read_bytes()
    for name, value in values.items():
        TensorFile(path).write(name, value)
    assert path.read_bytes() == before
    TensorFile(path).write("torch.bfloat16", torch.full((41, 6), 7, dtype=torch.bfloat16).t())  # not contiguous
    for name, value in load_file(path).items():
        assert same(value.float(), torch.full((6, 41), 7.0) if name == "torch.bfloat16" else values[name].float())
    with pytest.raises(AssertionError):
        TensorFile(path).write("mask", torch.ones(7, 3))


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}])
@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16])
def test_a_file_is_that_of_the_library(dtype: torch.dtype, metadata: dict[str, str], tmp_path: Path) -> None:
    made = {name: (torch.arange(n * 3).reshape(n, 3) % 2).to(dtype) for name, n in (("é", 5), ("b", 1), ("a", 0))}
    save_file(made, tmp_path / "theirs", metadata=metadata or None)
    kinds = {name: (one.dtype, one.shape) for name, one in made.items()}
    write_tensors(tmp_path / "ours", kinds, made.__getitem__, metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_tensors_of_several_dtypes_are_aligned(values: dict[str, Tensor], tmp_path: Path) -> None:
    kinds = {name: (one.dtype, one.shape) for name, one in values.items()}
    write_tensors(tmp_path / "ours", kinds, values.__getitem__, {})
    found = load_file(tmp_path / "ours")
    assert all(same(found[name].float(), value.float()) for name, value in values.items())
    assert all(place.start % place.dtype.itemsize == 0 for place in TensorFile(tmp_path / "ours").places.values())


def header(content: object, data: bytes = b"") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: object = (2,), offsets: object = (0, 8), dtype: object = "F32") -> bytes:
    return header({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}, b"\0" * 8)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "its header has 0 bytes, the file 0"),
        (b"\0" * 7, "its header has 0 bytes"),
        ((2**63).to_bytes(8, "little") + b"{}", "its header has 9223372036854775808 bytes"),
        (header({})[:-1], "its header has 2 bytes, the file 9"),
        (header([]), "its header is no table"),
        (header(b"\xff\xfe"), "codec can't decode"),
        (header(b"[" * 100_000), "recursion"),
        (header({"a": 1}), "not subscriptable"),
        (header({"a": {"dtype": "F32"}}), "no 'shape'"),
        (entry(dtype="F4"), "tensor a is of dtype 'F4'"),
        (entry(dtype=[]), "unhashable"),
        (entry(offsets=(0, 8, 9)), "too many values"),
        (entry(offsets=(-8, 0)), "tensor a has no place in it"),
        (entry(offsets=(0.0, 8.0)), "tensor a has no place in it"),
        (entry(shape=(-1, -2)), "tensor a has no place in it"),
        (entry(shape=(3,)), "tensor a does not fit into its place"),
        (entry(offsets=(8, 16)), "tensor a does not fit into its place"),
    ],
)
def test_damage_is_told_in_one_line(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(GpmetricError, match=f"is no whole safetensors file: .*{reason}") as caught:
        TensorFile(tmp_path / "a")
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_cut_short_meanwhile_is_told(path: Path) -> None:
    file = TensorFile(path)
    path.write_bytes(path.read_bytes()[:600])
    last = max(file.places, key=lambda name: file.places[name].end)
    with pytest.raises(GpmetricError, match="ends before its tensors do"):
        file[last]


@pytest.mark.parametrize(
    ("files", "told", "read"),
    [
        (["model.safetensors", "consolidated.safetensors"], {}, ["model.safetensors"]),
        (["model.safetensors", "a.safetensors", "model.safetensors.index.json"], {}, ["model.safetensors"]),
        (["a.safetensors", "b.safetensors", "model.safetensors.index.json"], {}, ["a.safetensors"]),
        (["model.safetensors", "b.safetensors"], {"transformers_weights": "b.safetensors"}, ["b.safetensors"]),
        ([], {}, ["model.safetensors"]),
    ],
)
def test_the_files_that_are_read_are_those_of_transformers(
    files: list[str], told: dict[str, str], read: list[str], tmp_path: Path
) -> None:
    """Also as its own function resolves them, where there are any."""
    for name in files:
        (tmp_path / name).write_text(json.dumps({"metadata": {}, "weight_map": {"x": "a.safetensors"}}))
    (tmp_path / "config.json").write_text(json.dumps(told))
    assert [path.name for path in weight_files(tmp_path)] == read
    if files:
        named = told.get("transformers_weights")
        found, _ = _get_resolved_checkpoint_files(str(tmp_path), None, None, True, {}, False, named)
        assert [Path(one).name for one in found] == read


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": []}', '{"weight_map": {"x": "../a.safetensors"}}'])
def test_an_index_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(GpmetricError, match=r"is no index of weights|which is not in the folder"):
        weight_files(tmp_path)
