"""Files that results are written to: whole or not at all, at places that are checked before any work is done."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import secrets
import stat
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from gpmetric.errors import GpmetricError, InputError

__all__ = [
    "STDOUT", "cache_folder", "check_output", "check_picture", "checksum", "finite", "locked", "number",
    "read_object",    "scratch_folder", "write_json", "write_picture", "write_text",
]  # fmt: skip

STDOUT = Path("-")  # what --json writes to standard output for

_PICTURES = (".png", ".pdf")
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system


def checksum(content: bytes) -> str:
    """Of a stored record, 16 hexadecimal digits; one of 2^64 damages would pass."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def locked(descriptor: int) -> bool:
    """Whether this process alone has an open file or folder from now on, until it closes it or ends, however it ends.

    It holds on one host across containers. True on file systems without locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def cache_folder() -> Path:
    """gpmetric's folder of the user's caches; on Linux `$XDG_CACHE_HOME/gpmetric` or `~/.cache/gpmetric`.

    Raises:
        GpmetricError: the user has no home.
    """
    with suppress(RuntimeError):  # of some versions of platformdirs; others leave ~ as it is
        if (folder := user_cache_path("gpmetric")).is_absolute():
            return folder
    raise GpmetricError("there is no home folder for caches; XDG_CACHE_HOME can name one")


def scratch_folder() -> Path:
    """Where large files go that a command needs while it runs; often, what is temporary elsewhere is in memory.

    Raises:
        GpmetricError: there is no home for caches, or it cannot be written.
    """
    folder = cache_folder() / "scratch"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GpmetricError(
            f"{str(folder)!r} cannot be made: {error.strerror}; XDG_CACHE_HOME can name another"
        ) from error
    return folder


def check_output(option: str, path: Path | None) -> None:
    """Refuses an output path that could not be written at the end, before any work is done.

    Raises:
        InputError: no such folder, not a file, or not writable; a link is followed.
    """
    if path is None or (path == STDOUT and option == "--json"):
        return
    where = f"{option} {str(path)!r}"
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(f"{where} cannot be written: {_reason(error)}") from error
    if os.path.islink(path) and path.absolute().is_relative_to("/dev"):  # /dev/stdout, were it a file
        raise InputError(f"{where} is a device; a file is wanted")
    if mode is not None and not stat.S_ISREG(mode):  # a device would be replaced by a file
        raise InputError(
            f"{where} is {'a directory' if stat.S_ISDIR(mode) else 'not a regular file'}; a file is wanted"
        )
    folder = _followed(path).parent
    if not folder.is_dir():
        raise InputError(f"{where}: the directory {str(folder)!r} does not exist")
    for needed in [folder] if mode is None else [folder, path]:  # a new file is moved into its place
        if not os.access(needed, os.W_OK):
            raise InputError(f"{where}: {str(needed)!r} is not writable")


def check_picture(option: str, path: Path) -> None:
    """Refuses a file name whose suffix is no format that plots are written in.

    Raises:
        InputError: neither .png nor .pdf.
    """
    if path.suffix.lower() not in _PICTURES:
        raise InputError(f"{option} {str(path)!r} must end in {' or '.join(_PICTURES)}")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file that others wrote.

    Raises:
        OSError: it cannot be read.
        GpmetricError: it holds something else.
    """
    try:
        found = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise GpmetricError(f"{str(path)!r} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise GpmetricError(f"{str(path)!r} holds no JSON object")
    return found


def write_text(path: Path, content: str, check: Callable[[Path], None] | None = None) -> None:
    """Writes a whole file or nothing: beside it first, then, when `check` has read it, in one rename.

    Raises:
        GpmetricError: the file cannot be written; also whatever `check` raises. `path` is then as it was before.
    """
    place = _followed(path)
    partial = place.with_name(f".{place.stem[:40]}.{secrets.token_hex(6)}.partial{path.suffix}")
    try:
        partial.write_text(content, encoding="utf-8", newline="\n")
        if check:
            check(partial)
        os.replace(partial, place)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise GpmetricError(f"{str(path)!r} cannot be written: {_reason(error)}") from error
    finally:
        with suppress(OSError, ValueError):
            partial.unlink(missing_ok=True)


def write_picture(path: Path, figure: Any, dpi: int = 150) -> None:
    """Writes a figure of matplotlib in the format of the path's suffix, .png or .pdf, as made by gpmetric.

    Raises:
        GpmetricError: the file cannot be written.
    """
    made = {"Creator" if path.suffix.lower() == ".pdf" else "Software": "gpmetric"}
    # write_text moves the file into its place once `check` is through; here the check fills it
    write_text(path, "", lambda partial: figure.savefig(partial, dpi=dpi, metadata=made))


def write_json(path: Path | None, result: Mapping[str, Any]) -> None:
    """Writes a result as JSON, to standard output for `-`, nowhere for None; what is not finite becomes null."""
    if path is None:
        return
    content = json.dumps(finite(result), indent=1, allow_nan=False) + "\n"
    if path == STDOUT:
        sys.stdout.write(content)
    else:
        write_text(path, content)


def finite(value: Any) -> Any:
    """The same document with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def number(value: float | None) -> float:
    """A figure of such a document: what was not finite is null there, and counts as infinite."""
    return math.inf if value is None else value


def _followed(path: Path) -> Path:
    """What a link leads to; any other path as it is."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else path


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
