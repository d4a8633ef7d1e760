"""The folder that a checkpoint is written to: what may be there before, and how it comes to its place."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from gpmetric.errors import GpmetricError, InputError
from gpmetric.outputs import MANIFEST
from gpmetric.session.memory import free_disk

__all__ = [
    "check_folder", "check_room", "exchange", "file_digest", "files_of", "replacing", "unwritable",
]  # fmt: skip


def check_folder(folder: Path, force: bool, needed: Sequence[Path] = ()) -> None:
    """Refuses a folder that a checkpoint cannot be written to, or that `force` must not replace.

    Args:
        folder: to be written.
        force: whether a checkpoint there may be replaced.
        needed: what is read or written otherwise, which must not be in it where it exists.

    Raises:
        InputError: naming the folder, and what is in the way.
    """
    where = f"--output {str(folder)!r}"
    whole = folder.absolute()
    places = [path.resolve() for path in (Path.cwd(), *needed) if os.path.exists(path)]
    if any(whole.resolve() in (place, *place.parents) for place in places):
        raise InputError(f"{where} holds what is needed, or the working directory")
    if os.path.lexists(folder):
        if not force:
            raise InputError(f"{where} exists already; --force replaces a checkpoint")
        if folder.is_symlink() or not folder.is_dir():
            raise InputError(f"{where} is no folder; --force replaces a checkpoint only")
        if foreign := _foreign(folder):
            raise InputError(f"{where} holds {foreign!r}, which gpmetric did not write; --force replaces its own only")
    if not os.path.isdir(whole.parent):
        raise InputError(f"{where}: the directory {str(folder.parent)!r} does not exist")
    if not os.access(whole.parent, os.W_OK):
        raise InputError(f"{where}: {str(folder.parent)!r} is not writable")
    if len(os.fsencode(whole.name)) > 255:
        raise InputError(f"{where}: the name is too long")


def check_room(folder: Path, needed: int) -> None:
    """Refuses a checkpoint of so many bytes that the disk of its folder has no room for.

    Raises:
        GpmetricError: saying what it needs, and what is free where.
    """
    where = folder.absolute().parent
    free = free_disk(where)
    if needed > free:
        raise GpmetricError(f"the checkpoint needs {needed / 1e9:.3g} GB, {str(where)!r} has {free / 1e9:.3g} GB free")


@contextmanager
def replacing(folder: Path, force: bool) -> Iterator[Path]:
    """A folder beside it to write to, which takes its place when the block ends well and is removed otherwise.

    Raises:
        GpmetricError: something cannot be written; what was there before is there still.
    """
    folder = folder.absolute()
    aside = [folder.with_name(f".{folder.name[:40]}.{secrets.token_hex(6)}.{kind}") for kind in ("partial", "old")]
    partial, old = aside
    try:
        partial.mkdir()
        yield partial
        check_folder(folder, force)  # it may have come to be meanwhile
        exchange(folder, partial, old)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise unwritable(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def exchange(folder: Path, new: Path, old: Path) -> None:
    """Moves a new folder into its place, and what was there before to `old`; on an error all is as it was."""
    if folder.exists():
        os.rename(folder, old)
        try:
            os.rename(new, folder)
        except BaseException:
            os.rename(old, folder)
            raise
    else:
        os.rename(new, folder)


def unwritable(path: Path, error: Exception) -> GpmetricError:
    """What is told of a file or folder that cannot be written."""
    return GpmetricError(f"{str(path)!r} cannot be written: {getattr(error, 'strerror', None) or error}")


def files_of(folder: Path) -> list[str]:
    """Every file, and every link, in a folder and its folders, as paths within it."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in found)


def file_digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _foreign(folder: Path) -> str | None:
    """The first file of a folder that its manifest does not list; None where all are its own, or there are none."""
    found = files_of(folder)
    try:
        listed = set(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]) | {MANIFEST}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        listed = set()
    return next((name for name in found if name not in listed), None)
