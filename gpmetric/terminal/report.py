"""What `gpmetric report` shows when it is done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from gpmetric.options import Request
from gpmetric.terminal.text import Text

__all__ = ["print_report"]


def print_report(console: Console, result: Mapping[str, Any], request: Request) -> None:
    """The verdict, and where the page is."""
    console.print(Text(result["verdict"]), soft_wrap=True)
    console.print(Text(f"page of {result['bytes'] / 1e3:,.0f} kB: {result['output']}"), soft_wrap=True)
