"""Formulas as files: one writer per format, `FORMATS[name](expression, path, version, group)`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpmetric.errors import InputError
from gpmetric.export.latex import to_latex
from gpmetric.export.python import write_python
from gpmetric.export.text import COMPARISON, to_json, to_sympy_text
from gpmetric.export.triton_file import write_triton
from gpmetric.expression import Expression
from gpmetric.provenance import write_text

__all__ = ["FORMATS", "export_expression"]


def _write_latex(expression: Expression, path: str | Path, version: str, group: str = "row") -> None:
    """A comment with the plain formula, then displayed mathematics."""
    made = f"% gpmetric {ascii(version)[1:-1]}: {expression}"
    notes = "% Element by element over the weight, [out, in]; needs amsmath."
    notes += f"\n% {COMPARISON[group]}" if group != "row" else ""
    write_text(Path(path), f"{made}\n{notes}\n\\[\n  {to_latex(expression)}\n\\]\n")


def _write_sympy(expression: Expression, path: str | Path, version: str, group: str = "row") -> None:
    """One line, the formula without guards; before it a comment where scores do not compete within rows."""
    notes = f"# {COMPARISON[group]}\n" if group != "row" else ""
    write_text(Path(path), f"{notes}{to_sympy_text(expression)}\n")


def _write_json(expression: Expression, path: str | Path, version: str, group: str = "row") -> None:
    """The record of `to_json` with the version."""
    record = {"version": version, **to_json(expression, group)}
    write_text(Path(path), json.dumps(record, indent=2, allow_nan=False) + "\n")


FORMATS: dict[str, Callable[[Expression, str | Path, str, str], None]] = {
    "python": write_python,
    "triton": write_triton,
    "latex": _write_latex,
    "sympy": _write_sympy,
    "json": _write_json,
}


def export_expression(
    expression: Expression, format: str, output: str | Path, version: str, group: str = "row"
) -> dict[str, Any]:
    """Writes the formula in one of `FORMATS` and returns its record with the format and the place.

    `group` is where scores compete: row, layer or block.

    Raises:
        InputError: an unknown format.
        GpmetricError: the place cannot be written.
    """
    if format not in FORMATS:
        raise InputError(f"format must be one of {' '.join(FORMATS)}, but got {ascii(format)[:60]}")
    FORMATS[format](expression, output, version, group)
    return {"format": format, "output": str(output), **to_json(expression, group)}
