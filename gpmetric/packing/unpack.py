"""`gpmetric unpack FILE -o DIR`: the folder that `gpmetric pack` packed, bit by bit."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from gpmetric.errors import GpmetricError, InputError
from gpmetric.functions import as_function
from gpmetric.packing.pack import FRAME, INDEX, VERSION
from gpmetric.packing.pieces import PIECE, decode
from gpmetric.packing.requests import UnpackRequest
from gpmetric.packing.spans import Span, lengths
from gpmetric.pruning.output_folder import check_folder, replacing
from gpmetric.session.listeners import Listener

__all__ = ["run_unpack", "unpack"]

_LONGEST = 10**8  # bytes of an index
_SIZES = (1, 2, 4, 8)


def run_unpack(request: UnpackRequest, listener: Listener | None = None) -> dict[str, Any]:
    """Writes the folder whole, each file checked against its sha256, or nothing.

    Returns:
        The JSON document of `gpmetric unpack`: `files` and `bytes` written.

    Raises:
        InputError: the folder is there already, or has no room.
        GpmetricError: the archive is damaged, or no archive of gpmetric.
    """
    told, folder = listener or Listener(), request.output
    assert folder is not None
    check_folder(folder, False, [request.archive])
    try:
        with zipfile.ZipFile(request.archive) as archive:
            files = _index(archive)
            total = sum(int(one["bytes"]) for one in files)
            free = shutil.disk_usage(folder.absolute().parent).free
            if total > free:
                raise InputError(f"{str(folder)!r} takes {total:,} bytes, and {free:,} are free there")
            done = 0
            told.progress("megabytes", 0, total // 10**6)
            with replacing(folder, False) as partial:
                for number, one in enumerate(files):
                    place = partial / one["name"]
                    place.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(str(number)) as member, place.open("xb") as file:
                        for restored in _restored(member, file, one):
                            done += restored
                            told.progress("megabytes", done // 10**6, total // 10**6)
    except (
        zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, KeyError, EOFError, NotImplementedError, RuntimeError,
    ) as error:  # fmt: skip
        raise GpmetricError(f"{str(request.archive)!r} is damaged, or no archive of gpmetric pack: {error}") from error
    except OSError as error:
        raise GpmetricError(f"{str(request.archive)!r} cannot be read: {error.strerror or error}") from error
    return {"archive": str(request.archive), "output": str(folder), "files": len(files), "bytes": total}


def _restored(member: IO[bytes], file: IO[bytes], one: dict[str, Any]) -> Iterator[int]:
    """Writes a file of its pieces; the bytes of each."""
    digest = hashlib.sha256()
    for span in (Span(*span) for span in one["spans"]):
        for length in lengths(span):
            (count,) = FRAME.unpack(_exactly(member, FRAME.size))
            if count > 2 * PIECE:
                raise GpmetricError(f"{one['name']!r} is damaged in the archive: a piece of {count} bytes")
            content = decode(_exactly(member, count), length, span.size, span.rotated)
            digest.update(content)
            file.write(content)
            yield length
    if member.read(1) or digest.hexdigest() != one["sha256"]:
        raise GpmetricError(f"{one['name']!r} is damaged in the archive: it is not what was packed")


def _exactly(member: IO[bytes], count: int) -> bytes:
    content = member.read(count)
    if len(content) != count:
        raise EOFError("it was cut short")
    return content


def _index(archive: zipfile.ZipFile) -> list[dict[str, Any]]:
    """What the archive says of its files, checked: names stay inside the folder, spans make up the file."""
    if archive.getinfo(INDEX).file_size > _LONGEST:
        raise zipfile.BadZipFile(f"an index of {archive.getinfo(INDEX).file_size} bytes")
    try:
        document = json.loads(archive.read(INDEX))
        if document["format"] != "gpmetric pack":
            raise ValueError("another format")
        if document["version"] != VERSION:
            raise GpmetricError(f"the archive is of version {document['version']!r:.20}, and {VERSION} is known here")
        files: list[dict[str, Any]] = document["files"]
        for one in files:
            if not _inside(one["name"]):
                raise ValueError(f"the name {one['name']!r:.60}")
            for length, size, rotated in one["spans"]:
                if type(length) is not int or length < 1 or size not in _SIZES or length % size:
                    raise ValueError(f"a span of {one['name']!r:.60}")
                if type(rotated) is not bool:
                    raise ValueError(f"a span of {one['name']!r:.60}")
            if one["bytes"] != sum(length for length, _, _ in one["spans"]) or not isinstance(one["sha256"], str):
                raise ValueError(f"the length of {one['name']!r:.60}")
        if len({one["name"] for one in files}) < len(files):
            raise ValueError("a name twice")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise zipfile.BadZipFile(f"the index: {error}") from error
    return files


def _inside(name: Any) -> bool:
    """Whether a name is a path within a folder, spelled plainly."""
    if not isinstance(name, str) or not name or "\\" in name or not name.isprintable():
        return False
    parts = name.split("/")
    return not any(part in ("", ".", "..") or ":" in part for part in parts) and not Path(name).is_absolute()


unpack = as_function("unpack", UnpackRequest, run_unpack, "archive")
