"""What a command writes: nowhere that it reads, and over nothing that gpmetric did not write, unless it is told to."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpmetric.errors import InputError
from gpmetric.files import STDOUT, check_output

__all__ = ["MANIFEST", "OURS", "check_outputs", "hub_folders"]

MANIFEST = "gpmetric_manifest.json"  # in a checkpoint that gpmetric wrote: what it is, and a digest of each file

_SIDECARS = ("-wal", "-shm", "-journal")  # of a SQLite file, without which it is not whole
# a model of the Hugging Face Hub by its name, or a text of it
_OF_HUB = re.compile(r"(?P<text>hf:)?(?P<owner>[\w.-]{1,96})(/(?P<name>[\w.-]{1,96}))?(?(text)(/[^:]*)?:.*)")
_LOOKED_AT = 2**16  # bytes of a file's beginning, and of its end, that say whose it is


def check_outputs(written: Mapping[str, tuple[Path, str]], read: Collection[tuple[str, Path]], *, force: bool) -> None:
    """Refuses a place that cannot be written, that is read, or that holds what gpmetric did not write.

    Args:
        written: by option, where it writes, and what: a key of `OURS`, or "ledger", "cache" or "folder", whose writers
            look at what is there themselves.
        read: each file or folder that is read, by the name that it has on the command line.
        force: replace what gpmetric did not write. What is read is never replaced.

    Raises:
        InputError: naming the option, the place, and what is in the way.
    """
    seen: dict[Any, str] = {}
    for option, (path, kind) in sorted(written.items(), key=lambda one: one[1][1] == "folder"):
        where = f"{option} {str(path)!r}"
        if path == STDOUT and (option == "--json" or kind == "candidates"):
            if seen.setdefault(STDOUT, option) != option:
                raise InputError(f"{seen[STDOUT]} and {option} are both standard output")
            continue
        if path == STDOUT and (kind in OURS or kind == "ledger"):
            raise InputError(f"{option} -: only --json goes to standard output")
        if kind in OURS or kind == "ledger":
            check_output(option, path)
        if "\0" in str(path):
            raise InputError(f"{where} holds a null character")
        _check_apart(where, path, read)
        other = seen.setdefault(_identity(path), option)
        if other != option:
            raise InputError(f"{other} and {option} are the same file {str(path)!r}")
        if kind in OURS and not force and not _is_ours(path, kind):
            raise InputError(f"{where} exists, and gpmetric did not write it: name another, or --force replaces it")
    for option, (path, kind) in written.items():
        for folder_option, (folder, other_kind) in written.items():
            if kind != "folder" and other_kind == "folder" and _lies_in(path, folder):
                raise InputError(f"{option} {str(path)!r} lies in {folder_option} {str(folder)!r}: name another place")


def hub_folders(name: str) -> Iterator[Path]:
    """Where what a name of the Hugging Face Hub stands for is kept, or would be, and its versions that are there."""
    from huggingface_hub import constants  # a millisecond, which most commands need not spend

    if found := _OF_HUB.fullmatch(name):
        kind = "datasets" if found["text"] else "models"
        folder = Path(constants.HF_HUB_CACHE, "--".join([kind, *filter(None, (found["owner"], found["name"]))]))
        yield folder
        with suppress(OSError):
            yield from (folder / "snapshots").iterdir()


def _check_apart(where: str, path: Path, read: Collection[tuple[str, Path]]) -> None:
    """Refuses what is read, by whatever name: the same path, a link, another name of the same file, a file in it."""
    identity = _identity(path)
    for name, place in read:
        if identity == _identity(place) or any(identity == _identity(one) for one in _parts(place)):
            raise InputError(f"{where} is also read")
        if _lies_in(path, place):
            raise InputError(f"{where} lies in {name!r}, which is read")


def _parts(place: Path) -> Iterator[Path]:
    """What belongs to something that is read: the files of a folder, links followed, and those beside a SQLite file."""
    if place.is_dir():
        with suppress(OSError):
            yield from place.iterdir()
    else:
        real = Path(os.path.realpath(place))
        yield from (real.with_name(real.name + suffix) for suffix in _SIDECARS)


def _identity(path: Path) -> Any:
    """What is the same of all names of a file: its inode; of one that is not there, where it would be."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return os.path.realpath(path)
    return found.st_dev, found.st_ino


def _lies_in(path: Path, folder: Path) -> bool:
    real, above = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    return real != above and real.is_relative_to(above)


def _is_ours(path: Path, kind: str) -> bool:
    """Whether nothing is lost that gpmetric did not write: no file, an empty one, or one of what the option writes."""
    try:
        if not path.exists() or not path.stat().st_size:
            return True
        return OURS[kind](path)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


def _ends(path: Path) -> bytes:
    """The beginning and the end of a file."""
    with path.open("rb") as file:
        begin = file.read(_LOOKED_AT)
        file.seek(max(len(begin), os.fstat(file.fileno()).st_size - _LOOKED_AT))
        return begin + file.read(_LOOKED_AT)


def _document(path: Path) -> dict[str, Any]:
    """A file's JSON object; ValueError or TypeError where it holds none."""
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _is_result(path: Path) -> bool:
    document = _document(path)
    return "gpmetric" in document or "gpmetric" in document.get("versions", {})


def _is_allocation(path: Path) -> bool:
    return {"version", "granularity", "sparsity"} <= _document(path).keys()


def _is_formula(path: Path) -> bool:
    """A file of `export`: each names gpmetric, but for the JSON record, and sympy's line, which may have a comment."""
    text = _ends(path).decode()
    if text.lstrip().startswith("{"):
        return {"formula", "canonical", "latex"} <= _document(path).keys()
    if re.search(r'^(%|Triton|""").*gpmetric|Made by gpmetric ', text, re.MULTILINE):
        return True
    lines = [line for line in text.splitlines() if not line.startswith("# Scores compete ")]
    return len(lines) == 1 and re.fullmatch(r"[\w\s+\-*/().,]*\bW\b[\w\s+\-*/().,]*", lines[0]) is not None


def _is_picture(path: Path) -> bool:
    ends = _ends(path)
    return ends.startswith((b"\x89PNG", b"%PDF")) and b"gpmetric" in ends


def _header(path: Path) -> dict[str, Any]:
    """That of a safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return dict(json.loads(file.read(min(length, os.fstat(file.fileno()).st_size))))


def _is_masks(path: Path) -> bool:
    """A safetensors file of boolean matrices and nothing else."""
    header = _header(path)
    header.pop("__metadata__", None)
    return bool(header) and all(one["dtype"] == "BOOL" and len(one["shape"]) == 2 for one in header.values())


def _is_statistics(path: Path) -> bool:
    """A safetensors file of `gpmetric calibrate`."""
    return "operands" in json.loads(_header(path)["__metadata__"]["gpmetric"])


def _is_candidates(path: Path) -> bool:
    """What `gpmetric ledger export` writes, in each of its formats."""
    begin = _ends(path)
    if begin.startswith(b"PAR1"):
        return b"gpmetric ledger export" in begin
    return begin.startswith((b"generation,position,formula,status,", b'{"generation": '))


def _is_page(path: Path) -> bool:
    """What `gpmetric report` writes."""
    begin = _ends(path)
    return begin.startswith(b"<!doctype html>") and b'<meta name="generator" content="gpmetric report ' in begin


OURS: dict[str, Callable[[Path], bool]] = {  # what an option writes -> whether a file is one of those
    "json": _is_result,
    "allocation": _is_allocation,
    "formula": _is_formula,
    "table": lambda path: _ends(path).startswith(b"method,sparsity,"),
    "picture": _is_picture,
    "masks": _is_masks,
    "statistics": _is_statistics,
    "candidates": _is_candidates,
    "archive": lambda path: _ends(path).startswith(b"PK") and _ends(path).endswith(b"gpmetric pack"),
    "page": _is_page,
    "recipe": lambda path: _ends(path).startswith(b"# How a model is pruned: `gpmetric prune"),
}
