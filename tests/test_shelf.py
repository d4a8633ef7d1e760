"""The shelf: what it is given it gives back, from memory or from files, which go with it or after its process."""

from __future__ import annotations

import gc
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gpmetric.blockwise.shelf import Shelf
from gpmetric.errors import GpmetricError
from gpmetric.files import scratch_folder


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return scratch_folder()


def files(scratch: Path) -> list[Path]:
    return sorted(scratch.glob("*/*"))


def tensors(seed: int, size: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(size, 5, generator=generator)
    return {"x": whole, "half": whole.bfloat16(), "t": whole.t(), "ids": torch.arange(size), "none": torch.empty(0, 3)}


def assert_holds(shelf: Shelf, key: object, expected: dict[str, Tensor]) -> None:
    found = shelf.get(key)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


SIZE = sum(one.nbytes for one in tensors(0).values())


@pytest.mark.parametrize("limit", [None, 0, SIZE, 2 * SIZE + 1, 10 * SIZE])
def test_what_is_put_is_got(scratch: Path, limit: int | None) -> None:
    """In memory up to the limit, to the byte; what comes then is in files, one for each key."""
    with Shelf(limit) as shelf:
        for seed in range(4):
            assert (("layer", seed), "x") not in shelf
            shelf.put(("layer", seed), tensors(seed))
            assert ("layer", seed) in shelf
        for seed in (3, 0, 2, 1, 1):
            assert_holds(shelf, ("layer", seed), tensors(seed))
        assert len(files(scratch)) == (0 if limit is None else 4 - min(4, limit // SIZE))
    assert not files(scratch)


@pytest.mark.parametrize("limit", [None, 0, SIZE])
def test_a_key_that_is_put_again_holds_what_came_last(scratch: Path, limit: int | None) -> None:
    shelf = Shelf(limit)
    for seed in range(3):
        shelf.put("a", tensors(seed))
        assert_holds(shelf, "a", tensors(seed))
        assert len(files(scratch)) == (limit == 0)


def test_what_is_dropped_makes_room(scratch: Path) -> None:
    shelf = Shelf(SIZE)
    shelf.put("a", tensors(0))
    shelf.put("b", tensors(1))
    shelf.drop("a")
    shelf.drop("never there")
    assert ("a" in shelf, "b" in shelf) == (False, True)
    shelf.put("c", tensors(2))
    assert len(files(scratch)) == 1, "c is in memory"
    shelf.drop("b")
    assert not files(scratch)
    with pytest.raises(KeyError):
        shelf.get("b")
    assert_holds(shelf, "c", tensors(2))
    shelf.close()
    assert "c" not in shelf
    shelf.put("d", tensors(3))
    assert_holds(shelf, "d", tensors(3))


def test_what_was_got_outlives_its_file() -> None:
    shelf = Shelf(0)
    shelf.put("a", tensors(0))
    found = shelf.get("a")
    shelf.close()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(0).items())


def test_what_has_gradients_is_kept_without() -> None:
    shelf = Shelf(0)
    shelf.put("a", {"x": torch.ones(3, requires_grad=True) * 2})
    assert not shelf.get("a")["x"].requires_grad


def test_files_go_with_their_shelf(scratch: Path) -> None:
    """Closed or not, each with its own."""
    first, second = Shelf(0), Shelf(0)
    first.put("a", tensors(0))
    second.put("a", tensors(1))
    assert len(files(scratch)) == 2
    del first
    gc.collect()
    assert len(files(scratch)) == 1
    assert_holds(second, "a", tensors(1))
    del second
    gc.collect()
    assert not list(scratch.iterdir())


def test_files_of_a_killed_process_are_removed(scratch: Path) -> None:
    """By the next one that needs any; those of another machine, of living processes and of strangers stay."""
    code = "import os, torch; from gpmetric.blockwise.shelf import Shelf; s = Shelf(0); s.put(1, {'x': torch.ones(3)})"
    subprocess.run([sys.executable, "-c", f"{code}; os._exit(1)"], check=False)
    assert len(files(scratch)) == 1
    (dead,) = scratch.iterdir()
    owner, _, rest = dead.name.partition("-")
    assert rest.startswith(f"{platform.node()}-")
    elsewhere, living = scratch / f"{owner}-elsewhere-{rest}", scratch / f"{os.getppid()}-{rest}"
    for folder in (elsewhere, living, scratch / "notes"):
        folder.mkdir()
    shelf = Shelf(0)
    shelf.put("a", tensors(0))
    (own,) = {path.parent for path in files(scratch)}
    assert own.name.startswith(f"{os.getpid()}-")
    assert {*scratch.iterdir()} == {own, elsewhere, living, scratch / "notes"}


@contextmanager
def full_disk() -> Iterator[None]:
    """A limit on the size of files stands for it; safetensors meets it in the middle of its write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_in_one_line(scratch: Path) -> None:
    shelf = Shelf(0)
    shelf.put("a", tensors(0))
    with full_disk(), pytest.raises(GpmetricError, match=r"^scratch file '.*' cannot be written: [^\n]*$"):
        shelf.put("b", tensors(1, size=1000))
    assert "b" not in shelf
    assert len(files(scratch)) == 1, "half a file"
    assert_holds(shelf, "a", tensors(0))
    shelf.put("b", tensors(1))
    assert_holds(shelf, "b", tensors(1))


def test_a_folder_that_cannot_be_written_is_told_in_one_line(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(GpmetricError, match=r"^'.*scratch' cannot be made: [^\n]*; XDG_CACHE_HOME can name another$"):
        Shelf(0).put("a", tensors(0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.mkdtemp", lambda **_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(GpmetricError, match=r"^scratch folder '.*' cannot be written: No space left on device$"):
        Shelf(0).put("a", tensors(0))
