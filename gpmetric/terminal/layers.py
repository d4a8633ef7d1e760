"""What `gpmetric layers` shows: parameters of the same name in several blocks are one row."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from gpmetric.options import Request
from gpmetric.terminal.narrow import fitted
from gpmetric.terminal.text import Text

__all__ = ["print_layers"]


def print_layers(console: Console, result: Mapping[str, Any], request: Request) -> None:
    """What is pruned, and what stays dense and why."""
    prunable = [one for one in result["layers"] if one["prunable"]]
    rows = _rows(prunable, "pruned") + _rows([one for one in result["layers"] if not one["prunable"]])
    table = Table("parameters", box=None, pad_edge=False)
    for heading in ("shape", "number"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for name, shape, number, why in rows:
        table.add_row(Text(name), shape, str(number), why)
    console.print(fitted(table, console.width))
    told = f"{len(prunable)} layers in {result['blocks']} blocks: {result['weights']:,} of"
    console.print(Text(f"{told} {result['parameters']:,} parameters, {result['share']:.1%}"), soft_wrap=True)


def _rows(parameters: Sequence[Mapping[str, Any]], why: str | None = None) -> list[tuple[str, str, int, str]]:
    """Names with `*` for numbers that differ, shapes, how many there are, and what becomes of them; largest first."""
    found: dict[tuple[str, str, str], int] = {}
    sizes: dict[tuple[str, str, str], int] = {}
    for one in parameters:
        shape = " x ".join(map(str, one["shape"]))
        key = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", one["name"]), shape, why or f"dense: {one['reason']}"
        found[key] = found.get(key, 0) + 1
        sizes[key] = sizes.get(key, 0) + math.prod(one["shape"])
    return [(*key[:2], found[key], key[2]) for key in sorted(found, key=lambda key: -sizes[key])]
