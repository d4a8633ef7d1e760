"""Digests of models that are remembered: of the same value, and never of other weights."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpmetric import digests, models
from gpmetric.digests import remembered_digest
from gpmetric.loading import load_model

DIGEST = "a" * 64


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny Llama; its files count as settled at once, and the cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "_SETTLED", -1.0)
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def entry(tmp_path: Path) -> Path:
    (found,) = (tmp_path / "cache" / "gpmetric" / "digests").iterdir()
    return found


def unexpected() -> str:
    raise AssertionError("computed again")


def test_the_value_is_that_of_the_definition(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sha256 over the config and every parameter's name, dtype, shape and bytes; ledgers hold it."""
    monkeypatch.setattr(models, "_PIECE", 7)
    model = load_model(str(folder), device="cpu")
    volatile = {"_name_or_path", "transformers_version", "use_cache"}
    config = {key: value for key, value in model.module.config.to_diff_dict().items() if key not in volatile}
    whole = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, one in model.module.named_parameters():
        whole.update(f"{name} {one.dtype} {tuple(one.shape)}\n".encode() + one.detach().numpy().tobytes())
    assert model.digest == whole.hexdigest()
    monkeypatch.setattr(models.Model, "_computed_digest", lambda self, config: unexpected())
    assert load_model(str(folder), device="cpu").digest == whole.hexdigest()


def test_another_dtype_or_config_or_weight_is_another_digest(folder: Path) -> None:
    found = [
        load_model(str(folder), device="cpu").digest,
        load_model(str(folder), device="cpu", dtype="bfloat16").digest,
    ]
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    found.append(load_model(str(folder), device="cpu").digest)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    found.append(load_model(str(folder), device="cpu").digest)
    assert len(set(found)) == 4


def test_a_model_pruned_in_memory_is_not_that_of_its_files(folder: Path) -> None:
    dense = load_model(str(folder), device="cpu").digest
    model = load_model(str(folder), device="cpu")
    for layer in model.layers:
        layer.weight[:, ::2] = 0
    assert model.digest != dense


def _touch(folder: Path) -> None:
    os.utime(folder / "model.safetensors", ns=(1, 1))


def _same_size_and_time(folder: Path) -> None:
    """As `cp -p` of another file of the same size."""
    path = folder / "model.safetensors"
    before = path.stat()
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [_touch, _same_size_and_time, lambda folder: (folder / "b.safetensors").write_bytes(b"")],
)
def test_files_that_changed_are_read_again(change: Callable[[Path], Any], folder: Path) -> None:
    assert remembered_digest(folder, "a", lambda: DIGEST) == DIGEST
    assert remembered_digest(folder, "a", unexpected) == DIGEST
    change(folder)
    assert remembered_digest(folder, "a", lambda: "b" * 64) == "b" * 64


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"digests": {"a": 1}}', '{"digests": [["x"]]}', "[" * 100_000])
def test_a_damaged_entry_is_written_anew(content: str, folder: Path, tmp_path: Path) -> None:
    remembered_digest(folder, "a", lambda: DIGEST)
    entry(tmp_path).write_text(content)
    assert remembered_digest(folder, "a", lambda: "b" * 64) == "b" * 64
    assert remembered_digest(folder, "a", unexpected) == "b" * 64


@pytest.mark.nightly
def test_no_flipped_bit_of_what_is_remembered_is_taken_for_true(folder: Path, tmp_path: Path) -> None:
    remembered_digest(folder, "a", lambda: DIGEST)
    path = entry(tmp_path)
    content = path.read_bytes()
    for place in range(0, 8 * len(content), 3):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        assert remembered_digest(folder, "a", lambda: DIGEST) == DIGEST
        path.write_bytes(content)


def test_few_are_remembered_of_a_folder(folder: Path, tmp_path: Path) -> None:
    for number in range(12):
        remembered_digest(folder, number, lambda: DIGEST)
    assert len(json.loads(entry(tmp_path).read_text())["digests"]) == 8
    assert remembered_digest(folder, 11, unexpected) == DIGEST


def test_a_file_that_has_just_changed_is_not_remembered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may change again before the clock of its file system does."""
    monkeypatch.setattr(digests, "_SETTLED", 60.0)
    remembered_digest(folder, "a", lambda: DIGEST)
    assert remembered_digest(folder, "a", lambda: "b" * 64) == "b" * 64


@pytest.mark.parametrize("home", ["/proc/nowhere", ""])
def test_without_a_cache_it_is_computed(home: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # a user without a home
    assert [remembered_digest(folder, "a", lambda: DIGEST) for _ in range(2)] == [DIGEST] * 2
    assert remembered_digest(folder / "gone", "a", lambda: DIGEST) == DIGEST


def test_any_tensor_is_sampled() -> None:
    assert models._sample(torch.ones(0)) == []
    assert models._sample(torch.tensor(2.5)) == [2.5]
    assert len(models._sample(torch.ones(7, 41))) in range(16, 19)
