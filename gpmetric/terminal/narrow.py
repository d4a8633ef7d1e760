"""Tables on narrow terminals: words fold, numbers are never cut; where there is no room for columns, rows are lines."""

from __future__ import annotations

from rich import text
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Column, Table

from gpmetric.terminal.text import Text

__all__ = ["fitted", "numbered"]

_WORD = 8  # characters of a column of words at least, unless all of its words are shorter
_HEADING = 10  # characters of a word of a heading that is not broken
_BETWEEN = 3  # characters that a column takes beside its content, and one more at the end of a row


def numbered(title: object, *words: str) -> Table:
    """The table that all results have: rows are numbered, then come columns of words; figures are to be added.

    Args:
        title: above it.
        words: headings of the columns of words.
    """
    table = Table(title=Text(title), title_justify="left")
    table.add_column("#", justify="right")
    for heading in words:
        table.add_column(heading)
    return table


def fitted(table: Table, width: int) -> RenderableType:
    """A table as it can be shown in so many characters: as it is, with narrower columns, or a line for each row.

    Args:
        table: its columns of numbers are justified to the right; their headings are words.
        width: of the terminal.
    """
    columns = table.columns
    room = width - _BETWEEN * len(columns) - 1
    wanted = [max(map(_length, (column.header, *column.cells))) for column in columns]
    if sum(wanted) <= room:
        return table
    sizes = [_least(column) for column in columns]
    if sum(sizes) > room:
        return Group(_text(table.title or ""), *_lines(table))
    while (growing := [place for place, size in enumerate(sizes) if size < wanted[place]]) and sum(sizes) < room:
        sizes[min(growing, key=lambda place: sizes[place])] += 1
    for column, size in zip(columns, sizes, strict=True):
        column.width, column.min_width, column.no_wrap, column.overflow = size, None, False, "fold"
    return table


def _length(cell: RenderableType) -> int:
    return cell_len(str(cell))


def _text(cell: RenderableType) -> text.Text:
    return cell if isinstance(cell, text.Text) else Text(cell)


def _least(column: Column) -> int:
    """Characters that a column cannot do without: whole numbers, a part of a word, and the words of its heading."""
    longest = max(map(_length, column.cells), default=0)
    heading = max(map(cell_len, str(column.header).split()), default=0)
    return max(1, longest if column.justify == "right" else min(longest, _WORD), min(heading, _HEADING))


def _lines(table: Table) -> list[text.Text]:
    """`metric wanda, update none, a.txt 12.345` for each row, without its empty cells."""
    lines: list[text.Text] = []
    for row, cells in zip(table.rows, zip(*(column.cells for column in table.columns), strict=True), strict=True):
        line = Text(style=str(row.style or ""))
        for column, cell in zip(table.columns, cells, strict=True):
            if _length(cell):
                line.append(f"{', ' if line else ''}{column.header} ")
                told = _text(cell).copy()
                told.rstrip()  # room for a mark
                line.append_text(told)
        lines.append(line)
    return lines
