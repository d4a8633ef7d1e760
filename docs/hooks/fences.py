"""Fenced blocks of the documentation, and the marks of those that the test suite reads but does not run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["MARKS", "Block", "fences", "titled"]

# mark, written behind the language as in ```sh {.needs-gpu} -> why the block is not run, as the page shows it
MARKS = {
    "needs-gpu": "needs a GPU",
    "needs-hub": "reads from the Hugging Face Hub",
    "needs-hours": "takes long: minutes to hours",
    "needs-cluster": "needs several machines",
    "needs-package": "needs another package",
}

_FENCE = re.compile(
    r"^```(?P<language>[a-z]+)(?: \{\.(?P<mark>[a-z-]+)\})?(?: title=\"(?P<title>[^\"\n]+)\")?[ ]*\n"
    r"(?P<text>.*?)^```[ ]*$",
    flags=re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: `sh`, `python` and so on.
        text: between the fences.
        line: of the page where it begins, from 1.
        mark: a key of MARKS, or None where it is run.
        title: the file that it is the content of, where the page says one.
    """

    language: str
    text: str
    line: int
    mark: str | None = None
    title: str | None = None


def fences(page: str) -> Iterator[Block]:
    """The fenced blocks of a page that name a language, in order."""
    for found in _FENCE.finditer(page):
        line = page.count("\n", 0, found.start()) + 1
        yield Block(found["language"], found["text"], line, found["mark"], found["title"])


def titled(page: str) -> str:
    """The page with every mark as a title above its block, which is what readers see."""

    def shown(found: re.Match[str]) -> str:
        if found["mark"] is None:
            return found[0]
        return f'```{found["language"]} title="{MARKS[found["mark"]]}"\n{found["text"]}```'

    return _FENCE.sub(shown, page)
