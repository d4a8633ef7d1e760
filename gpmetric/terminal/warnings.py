"""What must be known of a result, whatever command made it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from gpmetric.terminal.figures import experts_of
from gpmetric.terminal.text import Text

__all__ = ["print_warnings"]


def print_warnings(console: Console, result: Mapping[str, Any]) -> None:
    """What must be known of a result, a line each; of a mixture, also what its experts read."""
    if "tokens" in result.get("experts", ()):
        console.print(Text(experts_of(result["experts"])), soft_wrap=True)
    for line in result.get("warnings", ()):  # a ledger of an older version has none
        console.print(Text(f"warning: {line}"), soft_wrap=True)
