"""A checkpoint on its way: a hidden folder beside the output, which the same command goes on with after a kill.

    .NAME.DIGEST.partial/
        files/                the new checkpoint, complete but for some layers
        progress.safetensors  the last place to go on from: a record, and the tensors needed there
        statistics/           of gradients of the dense model
        old/                  for a moment, the checkpoint that is being replaced

DIGEST is of the output's name and of everything that determines the result. Whoever writes holds a lock on the folder,
which ends with the process however it ends.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from gpmetric.errors import GpmetricError, InputError, OutOfMemoryError, TimeOverError
from gpmetric.files import checksum, locked
from gpmetric.outputs import MANIFEST
from gpmetric.pruning.output_folder import check_folder, exchange, file_digest, unwritable
from gpmetric.tensor_file import TensorFile, tensor_sum, write_header, write_tensors

__all__ = ["Record", "Unfinished", "is_begun", "unfinished"]

_LOG = logging.getLogger(__name__)
_SECONDS = 20.0  # between two records while blocks are pruned
_SHARE = 10.0  # and at least so many times what the last one took: states of a large model are gigabytes


@dataclass(frozen=True)
class Record:
    """How far a checkpoint has come.

    Attributes:
        dense: perplexity of the dense model.
        block: number of the first block that is not pruned yet.
        batch: tokens of a forward pass, by which hidden states are saved.
        layers: what the manifest says of the layers before it.
        moves: what the manifest says of tensors of those blocks that are in another order.
        seconds: that pruning took, once all blocks are pruned, since it was last gone on with.
        perplexity: of the pruned model, once all blocks are.
        manifest: sha256 of the manifest, once all files are written.
        verified: perplexity of the written checkpoint, once it was read again.
    """

    dense: float | None = None
    block: int = 0
    batch: int = 0
    layers: list[dict[str, Any]] = field(default_factory=list)
    moves: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    perplexity: float | None = None
    manifest: str | None = None
    verified: float | None = None


class Unfinished:
    """The folder of one checkpoint on its way, locked by this process.

    Args:
        output: where the checkpoint goes.
        folder: the hidden folder.
        digest: of what determines the result.

    Attributes:
        files: the folder of the new checkpoint.
        statistics: a folder for what is measured of the dense model.
        record: of the last place that was saved; a new one where there is none.
    """

    def __init__(self, output: Path, folder: Path, digest: str) -> None:
        self.output, self.files = output, folder / "files"
        self._folder, self._digest = folder, digest
        self.statistics = folder / "statistics"
        self._progress, self._old = folder / "progress.safetensors", folder / "old"
        self._due = time.monotonic() + _SECONDS
        if self._old.exists() and not output.exists():  # killed between the two renames
            os.rename(self._old, output)
        self.record = Record()
        with suppress(OSError, GpmetricError, ValueError, TypeError, KeyError, RecursionError):  # not there, or damaged
            file = TensorFile(self._progress)
            told = json.loads(file.metadata["gpmetric"])
            sums = {name: tensor_sum(file.pieces(name)) for name in file}
            if file.metadata["checksum"] != _checksum(file.metadata["gpmetric"], sums):
                _LOG.warning("%r is damaged: what it holds is begun anew", str(self._folder))
            elif told["digest"] == digest and (self.files.is_dir() or self._holds(told["record"]["manifest"])):
                self.record = Record(**told["record"])
        if not self.placed:
            self.files.mkdir(exist_ok=True)

    @property
    def placed(self) -> bool:
        """Whether the checkpoint was moved to its place already, where it still is."""
        return not self.files.exists() and self._holds(self.record.manifest)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was saved that would have to be computed again."""
        return self.record == Record() and not any(self.statistics.glob("*.safetensors"))

    @property
    def due(self) -> bool:
        """Whether the last save is long enough ago for another one."""
        return time.monotonic() >= self._due

    def save(self, record: Record, state: Mapping[str, Tensor] | None = None) -> None:
        """Makes sure that a kill, or the end of the machine's power, loses nothing of what was done so far.

        Args:
            record: how far it has come.
            state: what is needed to go on there, by name; asked for one by one.
        """
        started, state = time.monotonic(), state or {}
        _sync(self.files)
        partial = self._progress.with_suffix(".partial")
        kinds = {name: (value.dtype, value.shape) for name, value in state.items()}
        text = json.dumps({"digest": self._digest, "record": asdict(record)})
        sums: dict[str, str] = {}

        def read(name: str) -> Tensor:
            value = state[name].detach().cpu().contiguous()
            sums[name] = tensor_sum([value])
            return value

        write_tensors(partial, kinds, read, {"gpmetric": text, "checksum": _checksum("", {})})
        write_header(partial, kinds, {"gpmetric": text, "checksum": _checksum(text, sums)})
        os.replace(partial, self._progress)
        self.record = record
        ended = time.monotonic()
        self._due = ended + max(_SECONDS, _SHARE * (ended - started))

    def state(self) -> Mapping[str, Tensor]:
        """What was saved with the record, on the CPU; each is read when it is asked for."""
        return TensorFile(self._progress)

    def forget(self) -> None:
        """Begins anew."""
        self._progress.unlink(missing_ok=True)
        for folder in (self.files, self.statistics):
            shutil.rmtree(folder, ignore_errors=True)
        self.files.mkdir()
        self.record = Record()

    def place(self, force: bool) -> None:
        """Moves the checkpoint to its place, and what was there aside.

        Raises:
            InputError: something is in the way.
            OSError: it cannot be moved; what was there before is there still.
        """
        check_folder(self.output, force)  # it may have come to be meanwhile
        _sync(self.files)
        shutil.rmtree(self._old, ignore_errors=True)
        exchange(self.output, self.files, self._old)
        _sync_one(self.output.parent)

    def remove(self) -> None:
        """Removes the folder; a kill on the way leaves one that is begun anew, or is seen to be placed."""
        if not self.placed:
            self._progress.unlink(missing_ok=True)
        for folder in (self._old, self.statistics, self.files, self._folder):
            shutil.rmtree(folder, ignore_errors=True)

    def _holds(self, manifest: str | None) -> bool:
        """Whether the output has this manifest, of this sha256."""
        with suppress(OSError):
            return manifest is not None and file_digest(self.output / MANIFEST) == manifest
        return False


def _checksum(text: str, sums: Mapping[str, str]) -> str:
    """Of what a record says, and of the tensors saved with it."""
    return checksum(json.dumps([text, sums], sort_keys=True).encode())


@contextmanager
def unfinished(output: Path, identity: Mapping[str, Any], *, resume: bool) -> Iterator[Unfinished]:
    """The checkpoint that is on its way to a place, locked; its folder is gone when the block ends well.

    It stays where the block fails but going on is possible: on an interrupt, the end of the time, a full disk or
    memory, an output that came to be meanwhile. It does not where the same would happen again, or nothing was saved.

    Args:
        output: where it goes.
        identity: all that determines the result, as JSON values.
        resume: go on with what is there, or begin anew.

    Raises:
        InputError: another process is writing it.
        GpmetricError: something cannot be written.
    """
    output = output.absolute()
    digest = hashlib.sha256(json.dumps([output.name, identity], sort_keys=True).encode()).hexdigest()
    folder = output.with_name(f".{output.name[:40]}.{digest[:12]}.partial")
    with _explained(output), _locked(folder, output):
        found = Unfinished(output, folder, digest)
        if not resume:
            found.forget()
        for other in _beside(output):
            if other != folder:
                _LOG.warning("%r is of other settings, unfinished, and left alone", str(other))
        try:
            yield found
        except BaseException as error:
            if found.is_empty or _would_happen_again(error):
                found.remove()
            else:
                _LOG.warning("kept in %r: the same command goes on from block %d", str(folder), found.record.block)
            raise
        found.remove()


def is_begun(output: Path) -> bool:
    """Whether a checkpoint is on its way to a place, whatever its settings."""
    return bool(_beside(output.absolute()))


def _beside(output: Path) -> list[Path]:
    """The folders of checkpoints on their way to a place."""
    head = f".{output.name[:40]}."
    with suppress(OSError):
        return sorted(one for one in output.parent.iterdir() if one.name.startswith(head) and one.suffix == ".partial")
    return []


def _would_happen_again(error: BaseException) -> bool:
    """Whether an error is of what was computed: not of a disk, of memory or time, nor of what a user put in the way."""
    deliberate = isinstance(error, GpmetricError)
    deliberate = deliberate and not isinstance(error, InputError | OutOfMemoryError | TimeOverError)
    return deliberate and not isinstance(error.__cause__, OSError)


@contextmanager
def _explained(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise unwritable(output, error) from error


@contextmanager
def _locked(folder: Path, output: Path) -> Iterator[None]:
    """Holds the lock of a folder that is made if it is not there."""
    while True:
        with suppress(FileExistsError):
            folder.mkdir()
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # who held it has just removed it
            continue
        try:
            if not locked(lock):
                raise InputError(f"--output {str(output)!r} is being written by another process")
            if _is_at(lock, folder):
                yield
                return
        finally:
            os.close(lock)


def _is_at(descriptor: int, folder: Path) -> bool:
    """Whether a folder that was opened is still the one of this path."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(folder))
    return False


def _sync(folder: Path) -> None:
    """Waits until the files of a folder are on the disk."""
    for path in sorted(folder.rglob("*")):
        _sync_one(path)
    _sync_one(folder)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
