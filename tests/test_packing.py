"""Archives: every bit comes back, zeros take a bit each, names stay in the folder, damage is found."""

from __future__ import annotations

import json
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import gpmetric
from gpmetric.errors import GpmetricError, InputError
from gpmetric.packing import pack as packing
from gpmetric.packing import pieces, spans
from gpmetric.packing.pieces import decode, encode, is_masked
from gpmetric.packing.spans import spans_of

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.int64, torch.bool]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with pruned and dense tensors of every dtype, an empty one, another file, and one in a folder."""
    made = tmp_path / "model"
    (made / "more").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {"empty": torch.zeros(0, 3), "scalar": torch.tensor(1.5)}
    for dtype in DTYPES:
        values = torch.randn(48, 64, generator=generator) * 3
        tensors[f"dense.{dtype}"] = values.to(dtype)
        tensors[f"pruned.{dtype}"] = (values * (torch.rand(48, 64, generator=generator) > 0.5)).to(dtype)
    tensors["negative zeros"] = torch.full((9, 9), -0.0)
    tensors["odd values"] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e-45, 0.0, -0.0] * 7)
    save_file(tensors, made / "model.safetensors", {"format": "pt"})
    (made / "config.json").write_text('{"model_type": "llama"}\n')
    (made / "nothing").touch()
    (made / "more" / "cut.safetensors").write_bytes((made / "model.safetensors").read_bytes()[:5000])
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_bit_comes_back(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of tensors that are longer than a piece, links to files, and files that are no whole safetensors files."""
    for module in (pieces, spans):
        monkeypatch.setattr(module, "PIECE", 1024)
    (folder / "link").symlink_to(folder / "config.json")
    found = gpmetric.pack(folder, output=tmp_path / "m.pack")
    back = gpmetric.unpack(tmp_path / "m.pack", output=tmp_path / "back")
    assert contents(tmp_path / "back") == contents(folder)
    assert found["bytes_before"] == back["bytes"] == sum(map(len, contents(folder).values()))
    assert found["bytes_after"] == (tmp_path / "m.pack").stat().st_size
    assert found["files"] == back["files"] == 5
    assert not (tmp_path / "back" / "link").is_symlink()


@given(
    size=st.sampled_from([1, 2, 4, 8]), rotated=st.booleans(), zeros=st.floats(0, 1), length=st.integers(0, 70),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_pieces_come_back(size: int, rotated: bool, zeros: float, length: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    values = draw.integers(0, 2 ** (8 * size), length, dtype=f"u{size}", endpoint=False)
    values[draw.random(length) < zeros] = 0
    content = values.tobytes()
    assert decode(encode(content, size, rotated), len(content), size, rotated) == content


def test_half_of_the_weights_of_a_layer_are_zero() -> None:
    """In bf16: a bit for each weight, and of those that are left 8 bits and some 3 of the exponent."""
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)).mul(0.02).to(torch.bfloat16)
    weight.view(-1)[torch.randperm(2**20, generator=torch.Generator().manual_seed(1))[: 2**19]] = 0
    content = weight.view(torch.uint8).numpy().tobytes()
    coded = encode(content, 2, True)
    assert is_masked(coded)
    assert 1 / 16 + 0.5 * (8 + 2) / 16 < len(coded) / len(content) < 1 / 16 + 0.5 * (8 + 3.4) / 16
    pattern = torch.tensor([1, 1, 0, 0], dtype=torch.bfloat16).repeat(2**18)
    assert len(encode((pattern * 0.5).view(torch.uint8).numpy().tobytes(), 2, True)) < 2000


def test_the_share_is_of_tensors_with_zeros(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    save_file({"dense": weight}, tmp_path / "a" / "model.safetensors")
    assert gpmetric.pack(tmp_path / "a", output=tmp_path / "a.pack")["prunable_share"] is None
    save_file({"dense": weight, "pruned": weight * (weight > 0)}, tmp_path / "a" / "model.safetensors")
    share = gpmetric.pack(tmp_path / "a", output=tmp_path / "b.pack")["prunable_share"]
    coded = encode((weight * (weight > 0)).numpy().tobytes(), 4, True)
    assert share == len(coded) / (4 * 256 * 256)


def test_spans_make_up_a_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    found = spans_of(path)
    assert sum(span.bytes for span in found) == path.stat().st_size
    header = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]
    assert (found[0].bytes, found[0].size) == (header, 1)
    assert {span.size for span in found[1:]} == {1, 2, 4, 8}
    assert {(span.size, span.rotated) for span in found[1:]} >= {(8, True), (8, False), (2, True), (1, False)}
    assert len(spans_of(folder / "more" / "cut.safetensors")) == 1


def test_no_damage_passes(folder: Path, tmp_path: Path) -> None:
    """300 single bits anywhere, and ends that are missing: an error, or the same folder; nothing is left of others."""
    gpmetric.pack(folder, output=tmp_path / "m.pack")
    whole, draw = (tmp_path / "m.pack").read_bytes(), random.Random(0)
    damaged = [whole[:length] for length in (0, 10, len(whole) // 2, len(whole) - 1)]
    for _ in range(300):
        place = draw.randrange(8 * len(whole))
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        damaged.append(bytes(content))
    refused = 0
    for number, content in enumerate(damaged):
        (tmp_path / "d.pack").write_bytes(content)
        try:
            gpmetric.unpack(tmp_path / "d.pack", output=tmp_path / str(number))
        except GpmetricError:
            refused += 1
            assert not (tmp_path / str(number)).exists()
        else:
            assert contents(tmp_path / str(number)) == contents(folder)
    assert refused > 250
    assert not list(tmp_path.glob(".*partial*"))


@pytest.mark.parametrize(
    "name", ["../up", "/root", "a/../../b", "a//b", "", ".", "a\\b", "c:x", "nul\0", "line\nend", 3, "config.json"]
)
def test_names_stay_in_the_folder(name: Any, folder: Path, tmp_path: Path) -> None:
    gpmetric.pack(folder, output=tmp_path / "m.pack")
    rewrite(tmp_path / "m.pack", lambda index: index["files"][1].update(name=name))
    before = set(tmp_path.iterdir())
    with pytest.raises(GpmetricError, match="is damaged, or no archive of gpmetric pack"):
        gpmetric.unpack(tmp_path / "m.pack", output=tmp_path / "out")
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda index: index.update(version=2), "version 2, and 1 is known"),
        (lambda index: index.update(format="x"), "another format"),
        (lambda index: index.update(files=7), "the index"),
        (lambda index: index["files"][0].update(sha256="0" * 64), "is not what was packed"),
        (lambda index: index["files"][0].update(bytes=5), "the length of"),
        (lambda index: index["files"][0].update(spans=[[2**50, 1, False]], bytes=2**50), "are free there"),
        (lambda index: index["files"][0].update(spans=[[3, 2, False]], bytes=3), "a span of"),
        (lambda index: index["files"][0].update(spans=[[-4, 2, False]], bytes=-4), "a span of"),
    ],
)
def test_what_an_index_must_not_say(change: Any, told: str, folder: Path, tmp_path: Path) -> None:
    gpmetric.pack(folder, output=tmp_path / "m.pack")
    rewrite(tmp_path / "m.pack", change)
    with pytest.raises(GpmetricError, match=told):
        gpmetric.unpack(tmp_path / "m.pack", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def rewrite(archive: Path, change: Any) -> None:
    """The same archive with another index."""
    with zipfile.ZipFile(archive) as file:
        members = {name: file.read(name) for name in file.namelist()}
    index = json.loads(members["index.json"])
    change(index)
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in (members | {"index.json": json.dumps(index).encode()}).items():
            file.writestr(name, content)


def test_nothing_is_written_over(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").write_text("dear")
    with pytest.raises(InputError, match="exists, and gpmetric did not write it"):
        gpmetric.pack(folder, output=tmp_path / "there")
    with pytest.raises(InputError, match="does not exist"):
        gpmetric.pack(folder, output=tmp_path / "nowhere" / "m.pack")
    gpmetric.pack(folder, output=tmp_path / "m.pack")
    gpmetric.pack(folder, output=tmp_path / "m.pack")  # ours
    with pytest.raises(InputError, match="exists already"):
        gpmetric.unpack(tmp_path / "m.pack", output=folder)
    with pytest.raises(InputError, match="is no folder"):
        gpmetric.pack(tmp_path / "m.pack", output=tmp_path / "n.pack")
    with pytest.raises(InputError, match="is no file"):
        gpmetric.unpack(folder, output=tmp_path / "n")
    with pytest.raises(GpmetricError, match="no archive of gpmetric pack"):
        gpmetric.unpack(folder / "config.json", output=tmp_path / "n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no file"):
        gpmetric.pack(tmp_path / "empty", output=tmp_path / "n.pack")
    (folder / "elsewhere").symlink_to(tmp_path)
    with pytest.raises(InputError, match="neither a file nor a folder"):
        gpmetric.pack(folder, output=tmp_path / "n.pack")
    (folder / "elsewhere").unlink()
    monkeypatch.setattr(packing, "encode", lambda *told: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gpmetric.pack(folder, output=tmp_path / "n.pack")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "m.pack", "model", "there"]
