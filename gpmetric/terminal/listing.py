"""What `gpmetric list` shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from gpmetric.options import Request
from gpmetric.terminal.text import Text

__all__ = ["print_list"]


def print_list(console: Console, result: Mapping[str, Any], request: Request) -> None:
    """The names of every kind, each with what it means."""
    kinds = {kind: names for kind, names in result.items() if isinstance(names, Mapping)}
    for kind, names in kinds.items():
        if len(kinds) > 1:
            console.print(Text(kind, "bold"))
        table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 2 if len(kinds) > 1 else 0))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, meaning in names.items():
            table.add_row(Text(name), Text(meaning))
        console.print(table)
