"""Digests of models that are taken once, not by every command: remembered in the user's cache by the files' stamps."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpmetric.errors import GpmetricError
from gpmetric.files import cache_folder, checksum, write_text

__all__ = ["remembered_digest", "weight_stamps"]

_SETTLED = 2.0  # seconds: a file that has just changed may change again within the clock of its file system
_KEPT = 8  # settings remembered of a folder: dtypes, versions
_DIGEST = re.compile("[0-9a-f]{64}")


def weight_stamps(folder: Path) -> list[list[Any]]:
    """What changes with the files of a model's weights: path, bytes, times of change in ns, and inode of each.

    Raises:
        OSError: they cannot be looked at.
    """
    paths = sorted([*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")])
    stats = [(str(path.resolve()), os.stat(path)) for path in paths]
    return [[path, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino] for path, found in stats]


def remembered_digest(folder: Path, settings: Any, compute: Callable[[], str]) -> str:
    """A sha256 that depends on the weights of a folder and on settings, computed where it is not remembered.

    What is remembered is of no use once a file of weights has changed in any way; a damaged entry is written anew. A
    user without a cache has it computed every time.

    Args:
        folder: of the model.
        settings: JSON, all else that the digest depends on.
        compute: gives it, in hexadecimal.
    """
    try:
        stamps = weight_stamps(folder)
        path = cache_folder() / "digests" / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]}.json"
    except (GpmetricError, OSError):
        return compute()
    key = hashlib.sha256(json.dumps([stamps, settings], sort_keys=True, default=str).encode()).hexdigest()
    entries = _read(path)
    if key in entries:
        return entries[key]
    digest = compute()
    if time.time_ns() - max((max(stamp[2:4]) for stamp in stamps), default=0) > _SETTLED * 1e9:
        with suppress(GpmetricError, OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = dict([*entries.items(), (key, digest)][-_KEPT:])
            told = {"folder": str(folder.resolve()), "digests": kept, "checksum": _checksum(kept)}
            write_text(path, json.dumps(told, indent=1) + "\n")
    return digest


def _checksum(digests: dict[str, str]) -> str:
    return checksum(json.dumps(digests, sort_keys=True).encode())


def _read(path: Path) -> dict[str, str]:
    """The digests of a file by key; none where it is not there, not ours, or not as it was written."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        found = dict(told["digests"])
        whole = told["checksum"] == _checksum(found)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}
    return found if whole and all(_DIGEST.fullmatch(str(text)) for pair in found.items() for text in pair) else {}
