"""What a written checkpoint takes over from its dense model besides numbers: licence, code, and what its card says."""

from __future__ import annotations

import html
import json
import os.path
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpmetric.models import Model

__all__ = ["copy_code", "copy_licence", "front_matter", "lacking_code", "measured", "printable", "titled"]

_LICENCE = re.compile(r"(licen[sc]e|notice|copying|use[_-]policy)([._-].*)?", re.IGNORECASE)
_TOLD = re.compile(r"^(license(?:_name|_link)?): *(\S.*)$", re.MULTILINE)  # lines of a card's front matter


def copy_licence(source: Path, folder: Path) -> None:
    """Copies the files of a model's licence."""
    for path in source.iterdir():
        if path.is_file() and _LICENCE.fullmatch(path.name):
            shutil.copyfile(path, folder / path.name)


def copy_code(source: Path, folder: Path) -> None:
    """Copies the code that configurations of a folder name, `auto_map`; where some is missing, none is named.

    Args:
        source: of the dense model. Its code is not run.
        folder: that has its configurations already.
    """
    if not any(_files_named(folder)):
        return
    if all(os.path.isfile(source / name) for name in _files_named(folder)):
        for path in source.glob("*.py"):  # those that are named, and those that these import
            shutil.copyfile(path, folder / path.name)
        return
    for path in folder.glob("*.json"):
        config = _config(path)
        if config.pop("auto_map", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def lacking_code(folder: Path) -> list[str]:
    """Files of code that configurations of a folder name, and that are not there."""
    return sorted({name for name in _files_named(folder) if not os.path.isfile(folder / name)})


def _files_named(folder: Path) -> Iterator[str]:
    """The files of an `auto_map`, {"AutoModel": "file.Class"}, in any configuration; none of another repository."""
    for path in folder.glob("*.json"):
        named = _config(path).get("auto_map")
        for value in named.values() if isinstance(named, dict) else ():
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, str) and "--" not in one:
                    yield f"{one.partition('.')[0]}.py"


def _config(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def front_matter(model: Model, tags: Sequence[str]) -> str:
    """The head of a card: tags, the base model where it is one of the Hub's, and the licence that its card names."""
    assert model.folder is not None
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", f"tags: [{', '.join(tags)}]"]
    if "/" in model.name and not Path(model.name).exists():
        lines.append(f"base_model: {json.dumps(model.name)}")
    with suppress(OSError, UnicodeDecodeError):
        _, _, card = (model.folder / "README.md").read_text(encoding="utf-8").partition("---\n")
        lines += [f"{key}: {printable(told)}" for key, told in _TOLD.findall(card.partition("\n---")[0])]
    return "\n".join([*lines, "---"])


def measured(model: Model, manifest: Mapping[str, Any]) -> str:
    """A table of the perplexity before and after, as the manifest says them, and from what the model was made."""
    text = manifest["text"]
    rows = [("dense", manifest.get("dense")), ("this model", manifest.get("perplexity"))]
    table = [f"| {row} | {figure:.4g} |" for row, figure in rows if figure is not None]
    name = printable(Path(text["text"]).name).replace("|", r"\|")
    on = f"{text['windows']} windows of {text['sequence_length']} tokens of `{name}`"
    made = f"Base model: `{printable(Path(model.name).name if Path(model.name).exists() else model.name)}`."
    return "\n".join([made, "", f"| | perplexity on {on} |", "|---|---|", *table])


def printable(text: str) -> str:
    """Without what would end a line or a code span of the card."""
    return "".join(letter for letter in text if letter.isprintable() and letter != "`")


def titled(name: str) -> str:
    """The name of a model or folder, for a heading of the card: Markdown takes HTML, and links, where it stands."""
    return re.sub(r"([\\\[\]*])", r"\\\1", html.escape(printable(name), quote=False))
