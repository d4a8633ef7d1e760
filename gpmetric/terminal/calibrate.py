"""What `gpmetric calibrate` shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from gpmetric.options import Request
from gpmetric.terminal.text import Text

__all__ = ["print_calibrate"]


def print_calibrate(console: Console, result: Mapping[str, Any], request: Request) -> None:
    """What is in the file, and what its tensors are called."""
    layers, names = result["layers"], result["operands"]
    told = f"{result['output']}: {', '.join(names)} of {len(layers)} layers, {result['bytes'] / 1e6:,.1f} MB"
    console.print(Text(f"{told}; tensors are called {layers[0]['name']}.{names[0]}"), soft_wrap=True)
