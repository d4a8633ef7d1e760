"""Tensors that are put aside: in memory up to a limit, beyond it in files of a scratch folder."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import weakref
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gpmetric.errors import GpmetricError
from gpmetric.files import scratch_folder

__all__ = ["Shelf"]


class Shelf:
    """Takes groups of tensors, keyed by whatever names them; its files go with it.

    Args:
        limit: bytes that are kept in memory; None is no limit.
        device: where they are kept; None leaves them where they are.
    """

    def __init__(self, limit: int | None = None, device: torch.device | None = None) -> None:
        self._room, self._device = limit, device
        self._kept: dict[Hashable, Mapping[str, Tensor]] = {}
        self._files: dict[Hashable, Path] = {}
        self._folder: Path | None = None
        self._written = 0

    @classmethod
    def of_files(cls, files: Mapping[Hashable, Path]) -> Self:
        """What another process's shelf has in files, to be read while that one is open."""
        found = cls(limit=0)
        found._files = dict(files)
        return found

    def files(self) -> dict[Hashable, Path]:
        """All groups in files, those that were in memory, too.

        Raises:
            GpmetricError: as of `put`.
        """
        for key, tensors in list(self._kept.items()):
            self.drop(key)
            self._write(key, tensors)
        return dict(self._files)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of everything."""
        for key in [*self._kept, *self._files]:
            self.drop(key)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept or key in self._files

    def put(self, key: Hashable, tensors: Mapping[str, Tensor]) -> None:
        """Keeps tensors under a key, in place of what was there.

        Raises:
            GpmetricError: the disk is full, or the folder cannot be written.
        """
        self.drop(key)
        size = sum(one.nbytes for one in tensors.values())
        if self._room is None or size <= self._room:
            self._room = None if self._room is None else self._room - size
            self._kept[key] = {name: one.to(self._device or one.device) for name, one in tensors.items()}
        else:
            self._write(key, tensors)

    def _write(self, key: Hashable, tensors: Mapping[str, Tensor]) -> None:
        if self._folder is None:
            self._folder = _new_folder()
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._written += 1
        path = self._folder / f"{self._written:08d}.safetensors"
        try:
            save_file({name: one.detach().cpu().contiguous() for name, one in tensors.items()}, path)
        except (OSError, SafetensorError) as error:
            path.unlink(missing_ok=True)
            raise GpmetricError(f"scratch file {str(path)!r} cannot be written: {error}") from error
        self._files[key] = path

    def get(self, key: Hashable) -> dict[str, Tensor]:
        """The tensors under a key, on the device they were on, or mapped from their file."""
        if key in self._kept:
            return dict(self._kept[key])
        with safe_open(self._files[key], framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping

    def drop(self, key: Hashable) -> None:
        """Lets go of what is under a key, if anything is."""
        kept = self._kept.pop(key, None)
        if kept is not None and self._room is not None:
            self._room += sum(one.nbytes for one in kept.values())
        path = self._files.pop(key, None)
        if path is not None:
            path.unlink(missing_ok=True)  # at the end of the process, the folder may have gone before


def _new_folder() -> Path:
    """A folder of this process; those that killed ones of this machine left are removed.

    Raises:
        GpmetricError: it cannot be made.
    """
    scratch, here = scratch_folder(), f"-{platform.node()}-"
    try:
        for left in scratch.iterdir():
            owner, found, _ = left.name.partition(here)
            if found and owner.isdecimal() and not _is_alive(int(owner)):
                shutil.rmtree(left, ignore_errors=True)
        return Path(tempfile.mkdtemp(prefix=f"{os.getpid()}{here}", dir=scratch))
    except OSError as error:
        raise GpmetricError(f"scratch folder {str(scratch)!r} cannot be written: {error.strerror}") from error


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True
