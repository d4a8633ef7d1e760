"""What `gpmetric export` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from gpmetric.extensible import Extensible
from gpmetric.formats import FORMATS
from gpmetric.options import FORCE_FILES, Common, Option

__all__ = ["ExportRequest"]


@dataclass(frozen=True, kw_only=True)
class ExportRequest(Extensible, Common):
    """Everything `gpmetric export` can be asked for."""

    formula: Annotated[
        str,
        Option(
            "A formula, a metric's name, a ledger, or another export of one.",
            metavar="METRIC", argument=True, reads=True, formula=True,
        ),
    ]  # fmt: skip
    format: Annotated[str, Option("What is written: {choices}.", metavar="FORMAT", choices=FORMATS)] = "python"
    output: Annotated[
        Path | None,
        Option("File to write; printed without it.", metavar="FILE", names=("--output", "-o"), writes="formula"),
    ] = None
    force: Annotated[bool, FORCE_FILES] = False
