"""What `gpmetric pack` and `unpack` show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from gpmetric.options import Request
from gpmetric.terminal.text import Text

__all__ = ["print_pack", "print_unpack"]


def print_pack(console: Console, result: Mapping[str, Any], request: Request) -> None:
    """Sizes."""
    before, after, share = result["bytes_before"], result["bytes_after"], result["prunable_share"]
    told = "" if share is None else f"; tensors that hold zeros {share:.3f} of theirs"
    sizes = f"{before / 1e6:,.1f} MB are {after / 1e6:,.1f} MB, {after / max(1, before):.3f} of their size{told}"
    console.print(Text(sizes), soft_wrap=True)


def print_unpack(console: Console, result: Mapping[str, Any], request: Request) -> None:
    """What is there."""
    told = f"{result['output']}: {result['files']} files, {result['bytes'] / 1e6:,.1f} MB, as they were packed"
    console.print(Text(told), soft_wrap=True)
