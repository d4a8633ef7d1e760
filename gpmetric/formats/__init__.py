"""Formulas as files: what every file says of one, each thing computed once, and a row of FORMATS for each kind of file.

Neither torch nor sympy is imported before there is a file to write.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from gpmetric.errors import ExpressionError, InputError
from gpmetric.expression import Expression, parse
from gpmetric.files import write_text
from gpmetric.formats.latex import to_latex
from gpmetric.lazy import lazy
from gpmetric.operands import OPERANDS
from gpmetric.plugins import open_table
from gpmetric.targets import GRANULARITIES, Granularity, plain_granularities

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["FORMATS", "Format", "Formula", "export_expression", "formula_text"]


@dataclass(frozen=True)
class Formula:
    """A formula to export.

    Attributes:
        expression: its structure as written.
        version: of gpmetric, for the file to bear.
        group: where scores compete, a key of GRANULARITIES that a target written as a number can have.
    """

    expression: Expression
    version: str
    group: str = "row"

    @cached_property
    def canonical(self) -> str:
        """The canonical form as text."""
        from gpmetric.expression.canonical import canonical

        return str(canonical(self.expression))

    @cached_property
    def sympy(self) -> str:
        """One line that sympy prints for the formula without guards; reductions are undefined functions.

        Raises:
            ExpressionError: powers so large that sympy would not end.
        """
        from gpmetric.expression.canonical import to_sympy

        return str(to_sympy(self.expression))

    @property
    def granularity(self) -> Granularity:
        """How a weight is cut into groups within which scores compete."""
        return GRANULARITIES[self.group]

    def record(self) -> dict[str, Any]:
        """Plain JSON values; `sympy` is None where the formula has no sympy form."""
        try:
            sympy: str | None = self.sympy
        except ExpressionError:
            sympy = None
        return {
            "formula": str(self.expression),
            "group": self.group,
            "canonical": self.canonical,
            "latex": to_latex(self.expression),
            "sympy": sympy,
            "operands": list(self.expression.operands),
            "nodes": len(self.expression),
            "depth": self.expression.depth,
            "tokens": list(self.expression.tokens),
        }

    def fill(self, template: str, **values: Any) -> str:
        """A file of `templates/`, filled with these values and with what every file says of the formula."""
        rows = [OPERANDS[name] for name in self.expression.operands]
        group = self.granularity
        where = f"every {group.columns} columns" if group.columns else ""
        where = where or ("the matrix" if group.across_rows else "every row")
        said = {
            "formula": _quoted(str(self.expression)),
            "version": _quoted(self.version),
            "digest": hashlib.sha256(self.canonical.encode()).hexdigest(),
            "operands": [f"{row.name} [{row.axes.replace(',', ', ')}]: {_quoted(row.meaning)}" for row in rows],
            "comparison": group.sentence,
            "arguments": "".join(f", {row.name}={row.name}" for row in rows if row.name != "W"),
            "place": f"{where} of every row" if group.columns and not group.across_rows else where,
            "columns": group.columns,
            "across_rows": group.across_rows,
        }
        return _templates().get_template(template).render(said | values)


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        text: the content of a formula's file.
        ready: refuses a path before anything is written.
        check: refuses a file that is written, but not yet in its place.
        meaning: what it is, for the help.
    """

    text: Callable[[Formula], str]
    ready: Callable[[Path], None] | None = None
    check: Callable[[Formula, Path], None] | None = None
    meaning: str = ""


def export_expression(
    expression: Expression, format: str, output: str | Path | None, version: str, group: str = "row"
) -> dict[str, Any]:
    """Writes the formula in one of `FORMATS` and returns its record with the format and the place.

    `group` is where scores compete, by the name of a granularity. Without a place, the record has the file's `text`.

    Raises:
        InputError: an unknown format or group.
        GpmetricError: the place cannot be written, or the written file fails its check; nothing is then left there.
    """
    row, formula = _chosen(expression, format, version, group)
    check = row.check
    checked = (lambda written: check(formula, written)) if check else None
    if row.ready:
        row.ready(Path(output or "metric.py"))
    text = row.text(formula)
    if output is not None:
        write_text(Path(output), text, checked)
        return {"format": format, "output": str(output), **formula.record()}
    with TemporaryDirectory() as folder:
        write_text(Path(folder) / "metric.py", text, checked)
    return {"format": format, "output": None, **formula.record(), "text": text}


def formula_text(expression: Expression, format: str, version: str, group: str = "row") -> str:
    """What `export_expression` writes, unchecked; arguments and errors as of it."""
    row, formula = _chosen(expression, format, version, group)
    return row.text(formula)


def _chosen(expression: Expression, format: str, version: str, group: str) -> tuple[Format, Formula]:
    if format not in FORMATS:
        raise InputError(f"format must be one of {' '.join(FORMATS)}, but got {ascii(format)[:60]}")
    if group not in plain_granularities():
        raise InputError(f"group must be one of {' '.join(plain_granularities())}, but got {ascii(group)[:60]}")
    return FORMATS[format], Formula(expression, version, group)


def _latex_text(formula: Formula) -> str:
    """A comment with the plain formula, then displayed mathematics."""
    made = f"% gpmetric {ascii(formula.version)[1:-1]}: {formula.expression}"
    notes = "% Element by element over the weight, [out, in]; needs amsmath."
    notes += f"\n% {formula.granularity.sentence}" if formula.granularity.sentence else ""
    return f"{made}\n{notes}\n\\[\n  {to_latex(formula.expression)}\n\\]\n"


def _sympy_text(formula: Formula) -> str:
    """One line, the formula without guards; before it a comment where scores do not compete within rows."""
    notes = f"# {formula.granularity.sentence}\n" if formula.granularity.sentence else ""
    return f"{notes}{formula.sympy}\n"


def _json_text(formula: Formula) -> str:
    """The record with the version."""
    return json.dumps({"version": formula.version, **formula.record()}, indent=2, allow_nan=False) + "\n"


@cache
def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("gpmetric.formats"),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _quoted(text: str) -> str:
    """ASCII that neither ends nor escapes out of a docstring."""
    return text.encode("unicode_escape").decode("ascii").replace("\\", "\\\\").replace('"', "'")


FORMATS: dict[str, Format] = {
    "python": Format(
        lazy("gpmetric.formats.python:python_text"),
        check=lazy("gpmetric.formats.python:check_python"),
        meaning="a module with score(W, X=...), which needs torch only",
    ),
    "triton": Format(
        lazy("gpmetric.formats.triton:triton_text"),
        lazy("gpmetric.formats.triton:ready_for_triton"),
        lazy("gpmetric.formats.triton:check_triton"),
        "fused kernels, prune(W, sparsity, X=...) and prune_nm(W, n, m, X=...)",
    ),
    "latex": Format(_latex_text, meaning="displayed mathematics for amsmath"),
    "sympy": Format(_sympy_text, meaning="one line that sympy prints"),
    "json": Format(_json_text, meaning="formula, group, canonical form, LaTeX, operands and tokens"),
}


def _check(name: str, row: Format, fellows: Mapping[str, Any]) -> None:
    """Refuses the row of a plug-in that does not make a text of a formula."""
    if re.fullmatch(r"[a-z][a-z0-9_-]*", name) is None:
        raise InputError(f"an exporter is called in small letters, but by {name!r}")
    text = row.text(Formula(parse("abs(W)*X"), "0"))
    if not isinstance(text, str):
        raise InputError(f"text of abs(W)*X must be a str, but is {text!r:.60}")


open_table("exporter", FORMATS, Format, _check)
