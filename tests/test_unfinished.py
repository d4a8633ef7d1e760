"""A pruning that is killed anywhere and run again writes the files of an uninterrupted one."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpmetric import placement, tensor_file
from gpmetric.errors import GpmetricError, InputError, MaskError
from gpmetric.loading import load_model
from gpmetric.options import make_request
from gpmetric.outputs import MANIFEST
from gpmetric.pruning import prune as module
from gpmetric.pruning import unfinished as folders
from gpmetric.pruning.listeners import PruneListener
from gpmetric.pruning.protocol import Walk
from gpmetric.pruning.prune import prune
from gpmetric.pruning.recipe import Recipe, write_recipe
from gpmetric.pruning.requests import PruneRequest
from gpmetric.pruning.unfinished import Record, unfinished
from gpmetric.pruning.verify import verify
from gpmetric.session.session import open_session

ROOT = Path(__file__).parents[1]
OPTIONS: dict[str, Any] = {"samples": 4, "windows": 4, "sequence_length": 32, "device": "cpu", "target": "2:4"}
TOUCHES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod"}  # events that change a disk, beside opening


class Killed(BaseException):
    """Stands for kill -9: nothing that is raised in its way may touch the disk any more."""


class Mortal:
    """Dies at the `deadline`-th touch of the disk while it is armed, of a write in its middle."""

    armed = False
    touches = 0
    deadline = 10**9

    @classmethod
    def hear(cls, event: str, arguments: tuple[Any, ...]) -> None:
        if cls.armed and (event in TOUCHES or (event == "open" and _for_writing(*arguments))):
            cls.touch()

    @classmethod
    def touch(cls) -> None:
        cls.touches += 1
        if cls.touches >= cls.deadline:
            raise Killed

    @classmethod
    def write(cls, file: Any, content: memoryview) -> None:
        if cls.armed and cls.touches + 1 >= cls.deadline:
            file.write(content[: len(content) // 2])
        if cls.armed:
            cls.touch()
        ORIGINAL(file, content)


ORIGINAL = tensor_file._write_bytes
sys.addaudithook(Mortal.hear)  # of a process it cannot be taken away again


def _for_writing(path: Any, mode: Any, flags: int) -> bool:
    return isinstance(path, str | Path) and "unfinished" in str(path) and bool(flags & (os.O_WRONLY | os.O_RDWR))


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record after every block."""
    monkeypatch.setattr(folders, "_SECONDS", 0.0)
    monkeypatch.setattr(folders, "_SHARE", 0.0)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a kill is no loss of power


@pytest.fixture
def mortal(monkeypatch: pytest.MonkeyPatch, always: None) -> Iterator[None]:
    monkeypatch.setattr(tensor_file, "_write_bytes", Mortal.write)
    yield
    Mortal.armed = False


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "unfinished").mkdir()
    return tmp_path / "unfinished"


@pytest.fixture
def whole(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> dict[str, bytes]:
    """The files of an uninterrupted run."""
    prune(str(tiny_llama), output=tmp_path / "out", calibration=str(tiny_text), **OPTIONS)
    return contents(tmp_path / "out")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def dies(run: Callable[[], object], deadline: int) -> bool:
    Mortal.armed, Mortal.touches, Mortal.deadline = True, 0, deadline
    try:
        run()
    except Killed:
        return True
    finally:
        Mortal.armed = False
    return False


@pytest.fixture
def quickly(tiny_llama: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """`prune` of one loaded model that is dense again before every run; what is written is not loaded again."""
    opened: list[Any] = []
    original = module.open_session

    def open_again(request: Any, **options: Any) -> Any:
        opened.append(opened.pop() if opened else original(request, **options))
        for layer, weight in zip(opened[0].model.layers, dense, strict=True):
            layer.weight.copy_(weight)
        return replace(opened[0], inputs=request, dense=None)

    dense = [layer.weight.clone() for layer in load_model(str(tiny_llama), device="cpu").layers]
    monkeypatch.setattr(module, "open_session", open_again)
    monkeypatch.setattr(module, "verify_files", lambda *_, **__: {"ok": True, "perplexity": 1.0})
    return lambda **options: prune(str(tiny_llama), calibration=str(tiny_text), **OPTIONS | options)


@pytest.mark.usefixtures("mortal")
@pytest.mark.parametrize(
    ("force", "deadlines"),
    [
        (False, range(1, 1000, 3)),
        pytest.param(False, range(1, 1000), marks=pytest.mark.nightly),
        (True, range(80, 1000)),  # around the replacing
    ],
)
def test_killed_anywhere(
    force: bool,
    deadlines: range,
    place: Path,
    whole: dict[str, bytes],
    quickly: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    """At touches of the disk; `make nightly`: at every one."""
    out, masks = place / "out", place / "masks"
    masked: set[bytes] = set()

    def run() -> dict[str, Any]:
        return quickly(output=out, save_masks=masks, force=force)

    for deadline in deadlines:
        if force:
            shutil.copytree(tmp_path / "out", out)
            (out / "config.json").write_text("{}")  # another one
        if not dies(run, deadline):
            break
        there = contents(out) if out.exists() else {}
        assert force or there in ({}, whole)
        if there != whole or list(place.glob(".out.*/progress.safetensors")):  # else it is as good as done
            run()
            assert sorted(path.name for path in place.iterdir()) == ["masks", "out"]
        assert contents(out) == whole
        masked.add(masks.read_bytes())
        shutil.rmtree(place)
        place.mkdir()
    assert deadline > 100
    assert len(masked) == 1
    assert sorted(path.name for path in place.iterdir()) == ["masks", "out"]


@pytest.mark.every(2)
@pytest.mark.usefixtures("mortal")
@pytest.mark.parametrize(
    "follows",
    [
        {"update": "admm", "fit": "dense"},
        {"update": "block", "fit": "dense"},
        {"update": "block", "one_shot": True},
        {"update": "obs+block", "metric": "wandapp_rgs"},
    ],
)
def test_killed_while_layers_follow_the_dense_model(
    follows: dict[str, Any], place: Path, quickly: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """The dense model's hidden states are gone on with, too: behind the first block, the second, and the last."""
    told = Told()
    quickly(output=tmp_path / "out", **follows)
    expected = contents(tmp_path / "out")
    assert json.loads(expected[MANIFEST])["update"] == follows["update"]
    for deadline in range(4, 1000, 5):
        if not dies(lambda: quickly(output=place / "out", **follows), deadline):
            break
        if not (place / "out").exists() or list(place.glob(".out.*/progress.safetensors")):
            quickly(output=place / "out", listener=told, **follows)
        assert contents(place / "out") == expected
        shutil.rmtree(place)
        place.mkdir()
    assert deadline > 80
    assert {block for block, _ in told.places} >= {1, 2, 3}


def test_killed_for_real(tiny_llama: Path, tiny_text: Path, place: Path, whole: dict[str, bytes]) -> None:
    """kill -9 of the command at a moment drawn at random after a record; then it says that it goes on, and ends."""
    words = [str(tiny_llama), "-o", str(place / "out"), "--calibration", str(tiny_text), "--target", "2:4"]
    words += ["--samples", "4", "--windows", "4", "--sequence-length", "32", "--device", "cpu"]
    program = (
        "import time\n"
        "from gpmetric import cli\n"
        "from gpmetric.pruning import checkpoint, unfinished\n"
        "write, unfinished._SECONDS = checkpoint.CheckpointWriter.write_layer, 0\n"
        "checkpoint.CheckpointWriter.write_layer = lambda *told: (time.sleep(0.05), write(*told))[1]\n"  # 1 s in all
        "cli.main()\n"
    )
    command = [sys.executable, "-c", program, "prune", *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(place.glob(".out.*/progress.safetensors")):
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert list(place.glob(".out.*"))
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.fullmatch(
        r"going on (at block \d of 3|behind the last of 3 blocks); --restart begins anew\ndense: .*\n(next: .*\n){2}",
        run.stderr,
    )
    assert contents(place / "out") == whole
    assert [path.name for path in place.iterdir()] == ["out"]
    assert verify(place / "out", against=str(tiny_llama), device="cpu")["problems"] == []
    assert json.loads((place / "out" / MANIFEST).read_text()).keys().isdisjoint({"seconds", "block", "verified"})


class Told(PruneListener):
    """Where a run went on, and whether the dense model was measured."""

    def __init__(self) -> None:
        self.places: list[tuple[int, int]] = []

    def resumed(self, block: int, blocks: int) -> None:
        self.places.append((block, blocks))


@pytest.fixture
def stopped(quickly: Callable[..., dict[str, Any]], place: Path, mortal: None) -> Path:
    """The folder of a run that was killed when its second block was written."""
    assert dies(lambda: quickly(output=place / "out"), 45)
    (folder,) = place.glob(".out.*.partial")
    return folder


def test_it_goes_on_where_it_was(
    stopped: Path, place: Path, whole: dict[str, bytes], quickly: Callable[..., dict[str, Any]]
) -> None:
    told = Told()
    quickly(output=place / "out", listener=told)
    assert told.places == [(1, 3)]
    assert contents(place / "out") == whole


def test_restart_begins_anew(
    stopped: Path, place: Path, whole: dict[str, bytes], quickly: Callable[..., dict[str, Any]]
) -> None:
    (stopped / "files" / "model.safetensors").write_bytes(b"")  # nothing of it is used
    told = Told()
    quickly(output=place / "out", listener=told, resume=False)
    assert told.places == []
    assert contents(place / "out") == whole


def _cut(folder: Path) -> None:
    path = folder / "progress.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _edit(folder: Path, **changes: Any) -> None:
    told = json.loads(tensor_file.TensorFile(folder / "progress.safetensors").metadata["gpmetric"])
    told["record"] |= changes.pop("record", {})
    text = json.dumps(told | changes)
    total = hashlib.blake2b(json.dumps([text, {}]).encode(), digest_size=8).hexdigest()
    tensor_file.write_tensors(folder / "progress.safetensors", {}, torch.empty, {"gpmetric": text, "checksum": total})


def _flip(place: int) -> Callable[[Path], None]:
    """One bit of the state, or of what the record says."""

    def flipped(folder: Path) -> None:
        path = folder / "progress.safetensors"
        content = bytearray(path.read_bytes())
        content[place if place < 0 else content.index(b"dense") + place] ^= 1
        path.write_bytes(content)

    return flipped


@pytest.mark.parametrize(
    "damage",
    [
        _cut,
        lambda folder: (folder / "progress.safetensors").write_bytes(b""),
        lambda folder: (folder / "files" / "model.safetensors").unlink(),
        lambda folder: shutil.rmtree(folder / "files"),
        lambda folder: _edit(folder, digest="0" * 64),
        lambda folder: _edit(folder, record={"novelty": 1}),
        _flip(-3),
        _flip(12),
    ],
)
def test_what_is_damaged_is_begun_anew(
    damage: Callable[[Path], Any],
    stopped: Path,
    place: Path,
    whole: dict[str, bytes],
    quickly: Callable[..., dict[str, Any]],
) -> None:
    damage(stopped)
    told = Told()
    quickly(output=place / "out", listener=told)
    assert told.places == []
    assert contents(place / "out") == whole


@pytest.mark.parametrize("options", [{"target": "1:4"}, {"samples": 3}, {"windows": 3}, {"update": "obs"}])
def test_another_setting_is_another_checkpoint(
    options: Mapping[str, Any],
    stopped: Path,
    place: Path,
    whole: dict[str, bytes],
    tiny_llama: Path,
    tiny_text: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "open_session", open_session)
    before, told = contents(stopped), Told()
    given = OPTIONS | {"calibration": str(tiny_text), "output": place / "out"}
    prune(str(tiny_llama), listener=told, **{**given, **options})
    assert told.places == []
    assert contents(stopped) == before
    assert f"{str(stopped)!r} is of other settings, unfinished, and left alone" in caplog.text
    with pytest.raises(InputError, match="exists already"):
        prune(str(tiny_llama), **given)
    assert contents(stopped) == before
    prune(str(tiny_llama), listener=told, force=True, **given)
    assert told.places == [(1, 3)]
    assert contents(place / "out") == whole


def test_other_names_of_the_same_content_are_the_same_checkpoint(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the recipe, the text and the model; another recipe is another checkpoint."""
    monkeypatch.setattr(folders, "_SECONDS", 0)
    monkeypatch.setattr(folders, "_SHARE", 0)

    class Stopping(Told):
        def progress(self, what: str, done: int, total: int) -> None:
            if (what, done) == ("blocks", 3):
                raise KeyboardInterrupt

    recipe = Recipe("wanda", "0.5", samples=4, sequence_length=32)
    write_recipe(recipe, tmp_path / "a.toml")
    options = {"output": tmp_path / "out", "windows": 4, "device": "cpu"}
    with pytest.raises(KeyboardInterrupt):
        prune(str(tiny_llama), calibration=str(tiny_text), recipe=tmp_path / "a.toml", listener=Stopping(), **options)
    shutil.copytree(tiny_llama, tmp_path / "model")
    shutil.copy(tiny_text, tmp_path / "text.txt")
    write_recipe(replace(recipe, seed=1), tmp_path / "c.toml")
    other = {"calibration": str(tmp_path / "text.txt"), "listener": Stopping()}
    with pytest.raises(KeyboardInterrupt):
        prune(str(tmp_path / "model"), recipe=tmp_path / "c.toml", **options | other)
    assert other["listener"].places == []
    write_recipe(recipe, tmp_path / "b.toml")
    made = prune(
        str(tmp_path / "model"), recipe=tmp_path / "b.toml", **options | other | {"listener": (told := Told())}
    )
    assert told.places == [(2, 3)]
    assert made["recipe"]["file"] == "b.toml"


def test_one_process_at_a_time(stopped: Path, place: Path, quickly: Callable[..., dict[str, Any]]) -> None:
    before = contents(stopped)
    with (
        folders._locked(stopped, place / "out"),
        pytest.raises(InputError, match=r"out' is being written by another process"),
    ):
        quickly(output=place / "out")
    assert contents(stopped) == before


def test_a_folder_that_is_removed_while_it_is_opened(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock of a folder that is gone is no lock."""
    folder, flock, seen = place / "a", fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        seen.append(descriptor)
        if len(seen) == 1:
            folder.rmdir()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with folders._locked(folder, place / "out"):
        assert len(seen) == 2
        assert folder.is_dir()


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (KeyboardInterrupt(), True),
        (OSError(28, "No space left on device"), True),
        (InputError("something is in the way"), True),
        (MaskError("scores are not finite"), False),
        (GpmetricError("does not verify"), False),
    ],
)
def test_what_is_kept_after_an_error(
    error: BaseException, kept: bool, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What can be gone on with, and only once there is something to go on with."""

    def fail(block: int) -> None:
        with unfinished(place / "out", {"a": 1}, resume=True) as found:
            if block:
                found.save(Record(dense=2.0, block=block))
            raise error

    for block in (0, 2):
        with pytest.raises(GpmetricError if isinstance(error, OSError) else type(error)) as caught:
            fail(block)
        assert len(list(place.iterdir())) == (kept and block > 0)
    assert ("the same command goes on from block 2" in caplog.text) == kept
    if isinstance(error, OSError):
        assert str(caught.value) == f"{str(place / 'out')!r} cannot be written: No space left on device"
    if kept:
        with unfinished(place / "out", {"a": 1}, resume=True) as found:
            assert found.record == Record(dense=2.0, block=2)
    assert list(place.iterdir()) == []


def test_records_are_not_made_all_the_time(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 20 s, and of a state that takes long to write, every ten times that."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(folders, "_sync", lambda folder: now.__setitem__(0, now[0] + 5))  # it takes 5 s
    with unfinished(place / "out", {}, resume=True) as found:
        now[0] += 19.9
        assert not found.due
        now[0] += 0.2
        assert found.due
        found.save(Record(block=1), {"hidden": torch.ones(3, dtype=torch.bfloat16)})
        now[0] += 49
        assert not found.due
        now[0] += 1.1
        assert found.due
        assert {name: (one.dtype, one.tolist()) for name, one in found.state().items()} == {
            "hidden": (torch.bfloat16, [1.0, 1.0, 1.0])
        }


def test_a_disk_without_room_is_told_before_the_work(
    place: Path, quickly: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "text_loss", None)
    with pytest.raises(GpmetricError, match=r"the checkpoint needs 0\.000\d+ GB, .* has 1e-06 GB free"):
        quickly(output=place / "out")
    assert list(place.iterdir()) == []


def test_smaller_batches_where_memory_was_too_little_and_a_kill_then(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, always: None
) -> None:
    """What was saved is of the smaller batches, and is gone on with by them."""
    options = OPTIONS | {"calibration": str(tiny_text), "samples": 16, "metric": "wanda"}
    with monkeypatch.context() as patch:
        patch.setattr(placement, "BATCH_TOKENS", 128)
        prune(str(tiny_llama), output=tmp_path / "small", **options)
    step, sizes = Walk._step, list[int]()

    def greedy(self: Walk, index: int) -> Any:
        assert self._model.placement is not None
        sizes.append(self._model.placement.batch_tokens)
        if index == 1 and sizes[-1] > 128:
            raise MemoryError
        return step(self, index)

    class Stopping(PruneListener):
        def progress(self, what: str, done: int, total: int) -> None:
            if (what, done) == ("blocks", 2) and sizes[-1] == 128:
                raise KeyboardInterrupt

    monkeypatch.setattr(Walk, "_step", greedy)
    request = make_request(PruneRequest, {"model": str(tiny_llama), "output": tmp_path / "out", **options})
    with pytest.raises(KeyboardInterrupt):
        module.run_prune(request, Stopping())
    assert sizes == [2048, 2048, 1024, 1024, 512, 512, 256, 256, 128, 128]
    module.run_prune(request)
    assert sizes[10:] == [128, 128]
    assert contents(tmp_path / "out") == contents(tmp_path / "small")
