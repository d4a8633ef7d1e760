"""`gpmetric pack DIR -o FILE`: a checkpoint's folder as one smaller file, without the loss of a bit.

The archive is a ZIP file that stores one member for each file of the folder, its pieces one after the other as
`pieces.encode` makes them, and `index.json`: names, lengths, sha256 and spans of the files.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import struct
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from gpmetric.errors import GpmetricError, InputError
from gpmetric.functions import as_function
from gpmetric.packing.pieces import decode, encode, is_masked
from gpmetric.packing.requests import PackRequest
from gpmetric.packing.spans import Span, lengths, spans_of
from gpmetric.session.listeners import Listener

__all__ = ["FRAME", "INDEX", "VERSION", "pack", "run_pack"]

INDEX, VERSION = "index.json", 1
FRAME = struct.Struct("<I")  # before each piece, its coded bytes


@dataclass
class _Masked:
    """Bytes of pieces whose zeros take a bit each."""

    before: int = 0
    after: int = 0


def run_pack(request: PackRequest, listener: Listener | None = None) -> dict[str, Any]:
    """Packs every file of a folder and of its folders; each piece is decoded again and compared before the next.

    Returns:
        The JSON document of `gpmetric pack`: `bytes_before` and `bytes_after` of the whole, and `prunable_share`, what
        pieces of tensors that hold zeros take of their bytes (None without any).

    Raises:
        InputError: something in the folder is neither a file nor a folder, or there is nothing.
        GpmetricError: a file cannot be read, changes meanwhile, or the archive cannot be written.
    """
    told = listener or Listener()
    assert request.output is not None
    files = _files(request.folder)
    total, masked = sum(path.stat().st_size for _, path in files), _Masked()
    target = request.output
    partial = target.with_name(f".{target.name[:40]}.{secrets.token_hex(6)}.partial")
    try:
        with zipfile.ZipFile(partial, "x") as archive:
            index, done = [], 0
            told.progress("megabytes", 0, total // 10**6)
            for number, (name, path) in enumerate(files):
                spans, digest = spans_of(path), hashlib.sha256()
                with archive.open(str(number), "w", force_zip64=True) as member:
                    for content, span in _pieces(path, spans):
                        coded = _coded(content, span, masked)
                        member.write(FRAME.pack(len(coded)) + coded)
                        digest.update(content)
                        done += len(content)
                        told.progress("megabytes", done // 10**6, total // 10**6)
                described = {"name": name, "bytes": sum(span.bytes for span in spans), "sha256": digest.hexdigest()}
                index.append(described | {"spans": [astuple(span) for span in spans]})
            listing = json.dumps({"format": "gpmetric pack", "version": VERSION, "files": index})
            archive.writestr(INDEX, listing, zipfile.ZIP_DEFLATED)
            archive.comment = b"gpmetric pack"  # by which `outputs` knows that it is ours
        os.replace(partial, target)
    except OSError as error:
        raise GpmetricError(f"{str(error.filename or target)!r}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return {
        "folder": str(request.folder),
        "output": str(target),
        "files": len(files),
        "bytes_before": total,
        "bytes_after": target.stat().st_size,
        "prunable_share": masked.after / masked.before if masked.before else None,
    }


def _files(folder: Path) -> list[tuple[str, Path]]:
    """(path within the folder, path) of every file, links to files followed."""
    found = []
    for place, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        for name in sorted((*names, *links)):
            path = Path(place, name)
            if not path.is_file():
                raise InputError(f"{str(path)!r} is neither a file nor a folder; pack takes nothing else")
            found.append((path.relative_to(folder).as_posix(), path))
    if not found:
        raise InputError(f"{str(folder)!r} holds no file")
    return sorted(found)


def _pieces(path: Path, spans: list[Span]) -> Iterator[tuple[bytes, Span]]:
    """The contents of a file's pieces, in order, with the span of each."""
    with path.open("rb") as file:
        for span in spans:
            for length in lengths(span):
                content = file.read(length)
                if len(content) != length:
                    raise GpmetricError(f"{str(path)!r} became shorter while it was read")
                yield content, span


def _coded(content: bytes, span: Span, masked: _Masked) -> bytes:
    coded = encode(content, span.size, span.rotated)
    assert decode(coded, len(content), span.size, span.rotated) == content, "a piece would not come back as it was"
    if is_masked(coded):
        masked.before += len(content)
        masked.after += len(coded)
    return coded


pack = as_function("pack", PackRequest, run_pack, "folder")
