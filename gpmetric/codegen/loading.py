"""Importing module files that gpmetric has written."""

from __future__ import annotations

import atexit
import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType

from gpmetric.codegen.functions import remaining_score, triton_functions
from gpmetric.errors import GpmetricError
from gpmetric.expression.tree import Expression, Tokens
from gpmetric.files import cache_folder, write_text
from gpmetric.modules import load_module

__all__ = ["load_functions", "load_remaining_score"]

_IMPORTS = '''"""Triton functions of pruning metrics, written by gpmetric."""

import triton
import triton.language as tl

from gpmetric.kernels.launch import Layout, from_column, from_matrix, from_number, from_row
from gpmetric.kernels.ops import *


'''


def load_functions(expressions: Sequence[Expression], folder: Path | None = None) -> ModuleType:
    """The module of `triton_functions`, for the launchers of `gpmetric.kernels`, from a file named after its content.

    Args:
        expressions: the formulas.
        folder: where modules are kept; gpmetric's folder of the user's cache by default, or where that cannot be
            written a temporary one.

    Raises:
        ImportError: Triton is not installed.
        GpmetricError: the folder cannot be written.
    """
    return _loaded(triton_functions(expressions), folder)


def load_remaining_score(tokens: Tokens, fields: Mapping[str, str]) -> ModuleType:
    """The module of `remaining_score`, kept in the same place.

    Raises:
        ImportError: Triton is not installed.
    """
    return _loaded(remaining_score(tokens, fields))


def _loaded(functions: str, folder: Path | None = None) -> ModuleType:
    text = _IMPORTS + functions
    name = f"metric_{hashlib.sha256(text.encode()).hexdigest()[:32]}.py"
    if folder is not None:
        return load_module(_kept(folder / name, text))
    try:
        return load_module(_kept(cache_folder() / "kernels" / name, text))
    except GpmetricError:
        return load_module(_kept(_temporary_folder() / name, text))


def _kept(path: Path, text: str) -> Path:
    """The file, written unless it holds that text already."""
    try:
        written = path.read_bytes()
    except OSError:
        written = b""
    if written != text.encode():
        with suppress(OSError):  # told by the next line, with the path
            path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    return path


@cache
def _temporary_folder() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="gpmetric-")
    atexit.register(folder.cleanup)
    return Path(folder.name)
