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
    layers, names = result["layers"], ", ".join(result["operands"])
    example = f"{layers[0]['name']}.{result['operands'][0]}"
    told = (
        f"{result['output']}: {names} of {len(layers)} layers, {result['bytes'] / 1e6:,.1f} MB; {example} for instance"
    )
    console.print(Text(told), soft_wrap=True)
