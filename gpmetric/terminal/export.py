"""What `gpmetric export` shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from gpmetric.options import Request
from gpmetric.terminal.text import Text

__all__ = ["print_export"]


def print_export(console: Console, result: Mapping[str, Any], request: Request) -> None:
    """The text, where no file was asked for."""
    for line in result.get("text", "").splitlines():
        console.print(Text(line), soft_wrap=True)
