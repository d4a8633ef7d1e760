"""What a page is made of, before it is HTML: text as it came, escaped only where the page is rendered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any, ClassVar

from markupsafe import Markup

from gpmetric.extensible import Extensible
from gpmetric.options import command_line
from gpmetric.plugins import places
from gpmetric.reporting.formula import FormulaView

__all__ = [
    "Block",
    "Candidates",
    "Copies",
    "Figure",
    "Page",
    "Panel",
    "Panels",
    "Section",
    "Table",
    "Winner",
    "copied",
    "file_names",
    "told",
]

_NOTHING = "\N{EN DASH}"


def told(value: Any, digits: int = 4) -> str:
    """A figure as a cell shows it; a dash where there is none."""
    if value is None:
        return _NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.{digits}f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def copied(command: str, request: Extensible) -> str:
    """What asks a shell for a request, with the plug-ins of this process, which its formula may need."""
    return command_line(command, replace(request, plugin=places()))


def file_names(paths: Sequence[str]) -> list[str]:
    """The last parts of paths, or all of them as they are where two would be called alike."""
    names = [PurePath(one).name or one for one in paths]
    return names if len(set(names)) == len(names) else list(paths)


@dataclass(frozen=True)
class Block:
    """A part of a section; `kind` is the macro of the template that shows it."""

    kind: ClassVar[str]


@dataclass(frozen=True)
class Table(Block):
    """A table of texts.

    Attributes:
        caption: what it is of.
        columns: their headings.
        rows: as many cells each.
        words: how many of the first columns are of words; the others are of numbers, aligned at their end.
        strong: indices of the rows that stand out.
        quiet: indices of those that are no rivals of the others.
        code: columns of formulas, digests and the like, which are broken anywhere.
    """

    kind: ClassVar[str] = "table"
    shown: ClassVar[int] = 500  # rows
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    strong: frozenset[int] = frozenset()
    quiet: frozenset[int] = frozenset()
    code: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Figure(Block):
    """A drawing, with what stands below it; `key` is a legend, of class and words."""

    kind: ClassVar[str] = "figure"
    svg: Markup
    caption: str = ""
    key: Sequence[tuple[str, str]] = ()
    wide: bool = False


@dataclass(frozen=True)
class Copies(Block):
    """Lines to copy, each with what it is."""

    kind: ClassVar[str] = "copies"
    lines: Mapping[str, str]


@dataclass(frozen=True)
class Panel:
    """What is shown of a point that is selected."""

    id: str
    name: str
    formula: FormulaView
    figures: Table
    copies: Copies


@dataclass(frozen=True)
class Panels(Block):
    """Drawings whose points can be selected, and a panel for each of them."""

    kind: ClassVar[str] = "panels"
    figures: Sequence[Figure]
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Winner(Block):
    """A formula in every form."""

    kind: ClassVar[str] = "winner"
    formula: FormulaView
    operands: Table
    copies: Copies


@dataclass(frozen=True)
class Candidates(Block):
    """Rows that a script searches and sorts.

    Attributes:
        columns: headings, with whether they are of numbers.
        rows: JSON values, as many each.
        total: how many there are, of which the page may hold a part.
        what: they are.
        sorted: the column that they are sorted by, rising.
        first: how many of them stand in the page itself.
    """

    kind: ClassVar[str] = "candidates"
    columns: Sequence[tuple[str, bool]]
    rows: Sequence[Sequence[Any]]
    total: int
    what: str = "candidates"
    sorted: int = 4
    first: int = 20


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading."""

    id: str
    title: str
    blocks: Sequence[Block]
    note: str = ""


@dataclass(frozen=True)
class Page:
    """A page: title, the verdict in one sentence, a few figures with what they are, and sections.

    Attributes:
        title: of the page.
        verdict: one sentence.
        tiles: the first figures to look at: words, figure.
        warnings: what must be known, a line each.
        sections: those that there is something to show in.
    """

    title: str
    verdict: str
    tiles: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    warnings: Sequence[str] = ()
