"""What `gpmetric reproduce` shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from gpmetric.options import Request
from gpmetric.terminal.narrow import fitted, numbered
from gpmetric.terminal.text import Text

__all__ = ["print_reproduce"]


def print_reproduce(console: Console, result: Mapping[str, Any], request: Request) -> None:
    """A table for each study: theirs, ours, and whether they agree."""
    for study in result["studies"]:
        told = f"{study['name']}: {study['model']}, {study['samples']} x {study['sequence_length']} ({study['source']})"
        console.print(Text(told), soft_wrap=True)
        if "error" in study:
            console.print(Text(f"failed: {study['error']}"), soft_wrap=True)
            continue
        table = numbered("", "metric", "target")
        for column in ("published", "within", "ours", ""):
            table.add_column(column, justify="right")
        for place, row in enumerate(study["rows"], start=1):
            ours = row.get("ours")
            shown = "" if ours is None else f"{ours:.3f}"
            verdict = "" if ours is None else "agrees" if row["within"] else "differs"
            figures = (f"{row['published']:.2f}", f"+-{row['tolerance']:.2f}", shown, verdict)
            table.add_row(str(place), Text(row["metric"]), Text(row["target"] or ""), *figures)
        console.print(fitted(table, console.width))
