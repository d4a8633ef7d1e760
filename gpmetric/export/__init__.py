"""Formulas as files: one writer per format, `FORMATS[name](expression, path, version)`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpmetric.errors import InputError
from gpmetric.export.latex import to_latex
from gpmetric.export.python import write_python
from gpmetric.export.text import to_json, to_sympy_text
from gpmetric.expression import Expression
from gpmetric.provenance import write_text

__all__ = ["FORMATS", "export_expression"]


def _write_latex(expression: Expression, path: str | Path, version: str) -> None:
    """A comment with the plain formula, then displayed mathematics."""
    made = f"% gpmetric {ascii(version)[1:-1]}: {expression}"
    notes = "% Element by element over the weight, [out, in]; needs amsmath."
    write_text(Path(path), f"{made}\n{notes}\n\\[\n  {to_latex(expression)}\n\\]\n")


def _write_sympy(expression: Expression, path: str | Path, version: str) -> None:
    """One line, the formula without guards."""
    write_text(Path(path), to_sympy_text(expression) + "\n")


def _write_json(expression: Expression, path: str | Path, version: str) -> None:
    """The record of `to_json` with the version."""
    record = {"version": version, **to_json(expression)}
    write_text(Path(path), json.dumps(record, indent=2, allow_nan=False) + "\n")


FORMATS: dict[str, Callable[[Expression, str | Path, str], None]] = {
    "python": write_python,
    "latex": _write_latex,
    "sympy": _write_sympy,
    "json": _write_json,
}


def export_expression(expression: Expression, format: str, output: str | Path, version: str) -> dict[str, Any]:
    """Writes the formula in one of `FORMATS` and returns its record with the format and the place.

    Raises:
        InputError: an unknown format.
        GpmetricError: the place cannot be written.
    """
    if format not in FORMATS:
        raise InputError(f"format must be one of {' '.join(FORMATS)}, but got {ascii(format)[:60]}")
    FORMATS[format](expression, output, version)
    return {"format": format, "output": str(output), **to_json(expression)}
