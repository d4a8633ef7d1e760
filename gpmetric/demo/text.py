"""The demo's text: the running interpreter's own standard library, split by module.

Sources (with their docstrings), the docstrings of built-in modules and the pydoc topics are read at run time, so no
text is stored in the project. `python -m gpmetric.demo.text` prints each split's size and hash.
"""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

__all__ = ["SPLITS", "demo_text"]

# Share of the modules in each split, in percent.
SPLITS = {"train": 76, "calibration": 6, "search": 6, "validation": 6, "test": 6}

# Not installed everywhere (test, idlelib, tkinter, ...), removed from later releases, or tables rather than text.
_EXCLUDED = {
    *("test", "idlelib", "tkinter", "turtledemo", "turtle", "lib2to3", "distutils", "ensurepip", "encodings"),
    *("pydoc_data", "this", "antigravity", "__phello__"),
}

_INTERACTIVE = {"ps1", "ps2", "last_exc", "last_type", "last_value", "last_traceback"}  # of sys, at a prompt only

_PIECE = 2000  # characters: a few windows of the demo model
_REPEATABLE = 80  # characters: what is shorter, a line or two of code, may stand twice


@cache
def demo_text(split: str) -> str:
    """The text of one split, the same for every call under one Python release.

    Every module belongs to exactly one split, by a hash of its name. Modules are cut at blank lines into pieces of
    about 2,000 characters, and the pieces are put in the order of their hashes, so that the first N windows of a split
    already come from many modules. Outside the training split, paragraphs do not repeat.

    Raises:
        KeyError: `split` is not one of SPLITS.
    """
    if split not in SPLITS:
        raise KeyError(split)
    documents = sorted((name, text) for name, text in _documents() if _split_of(name) == split)
    if split != "train":
        documents = list(_without_repeats(documents))
    pieces = [
        (_digest(f"{name}:{number}"), piece) for name, text in documents for number, piece in enumerate(_cut(text))
    ]
    return "\n".join(piece for _, piece in sorted(pieces))


def _without_repeats(documents: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Each longer paragraph only once.

    Every integer constant of a built-in module repeats the docstring of `int`, which a model learns by heart: 14 % of
    the search text would measure nothing.
    """
    seen: set[str] = set()
    for name, text in documents:
        paragraphs = []
        for paragraph in text.split("\n\n"):
            if len(paragraph) < _REPEATABLE or paragraph not in seen:
                paragraphs.append(paragraph)
            seen.add(paragraph)
        yield name, "\n\n".join(paragraphs)


def _documents() -> Iterator[tuple[str, str]]:
    """(module name, text) for sources, built-in docstrings and pydoc topics, in no particular order."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] in sys.stdlib_module_names and parts[0] not in _EXCLUDED:
            yield ".".join(parts), path.read_text(encoding="utf-8", errors="replace")
    for name in sys.builtin_module_names:
        yield name, _docstrings(name)
    for topic, text in import_module("pydoc_data.topics").topics.items():
        yield f"topic:{topic}", text


def _docstrings(name: str) -> str:
    """The docstrings of a compiled module, which has no source to read.

    Test runners and notebooks replace the hooks and streams of `sys`; the originals stay there as `__excepthook__`,
    `__stdout__` and so on.
    """
    module = import_module(name)
    members = [member for member in dir(module) if not member.startswith("_") and member not in _INTERACTIVE]
    docs = ((member, _original(module, member).__doc__) for member in members)
    return "\n\n".join(f"{name}.{member}\n{doc}" for member, doc in docs if isinstance(doc, str))


def _original(module: ModuleType, member: str) -> object:
    return getattr(module, f"__{member}__" if module is sys else member, getattr(module, member))


def _cut(text: str) -> Iterator[str]:
    piece = ""
    for paragraph in text.split("\n\n"):
        piece += paragraph + "\n\n"
        if len(piece) >= _PIECE:
            yield piece
            piece = ""
    if piece.strip():
        yield piece


def _split_of(name: str) -> str:
    place = int(_digest(name)[:8], 16) % 100
    for split, share in SPLITS.items():
        if place < share:
            return split
        place -= share
    raise AssertionError("the shares of SPLITS add up to 100")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    for _split in SPLITS:
        _text = demo_text(_split)
        print(f"{_split:12} {len(_text):9,} characters  sha256 {_digest(_text)[:16]}")
