"""What every result says of where it came from, and how it is written down."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpmetric.errors import GpmetricError, InputError

__all__ = ["check_output", "finite", "gpmetric_version", "versions", "write_json", "write_text"]


def gpmetric_version() -> str:
    """The installed version, or `unknown` when run from a copy that was never installed."""
    try:
        return version("gpmetric")
    except PackageNotFoundError:
        return "unknown"


def versions() -> dict[str, str]:
    """Versions of everything that can change a figure."""
    found = {"gpmetric": gpmetric_version(), "python": platform.python_version()}
    return found | {name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy", "deap")}


def check_output(option: str, path: Path | None) -> None:
    """Refuses an output path that could not be written at the end, before any work is done.

    Raises:
        InputError: no such folder, a folder itself, or not writable.
    """
    if path is None:
        return
    if path.is_dir():
        raise InputError(f"{option} {str(path)!r} is a directory; a file is wanted")
    if not path.parent.is_dir():
        raise InputError(f"{option} {str(path)!r}: the directory {str(path.parent)!r} does not exist")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"{option} {str(path)!r} is not writable")


def write_text(path: Path, content: str, check: Callable[[Path], None] | None = None) -> None:
    """Writes a whole file or nothing: beside it first, read there by `check`, then in one rename.

    Raises:
        GpmetricError: the file cannot be written; also whatever `check` raises.
    """
    partial = path.with_name(f".{path.stem[:40]}-{os.getpid()}{path.suffix}")
    try:
        partial.write_text(content, encoding="utf-8", newline="\n")
        if check is not None:
            check(partial)
        os.replace(partial, path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise GpmetricError(f"{str(path)!r} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        with suppress(OSError, ValueError):
            partial.unlink(missing_ok=True)


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Writes a result as JSON; a loss or perplexity beyond every number becomes null."""
    write_text(path, json.dumps(finite(result), indent=1, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """The same document with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
