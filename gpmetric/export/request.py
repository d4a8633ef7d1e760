"""What `gpmetric export` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from gpmetric.errors import InputError
from gpmetric.export import FORMATS
from gpmetric.extensible import Extensible
from gpmetric.options import FORCE_FILES, Common, Option

__all__ = ["ExportRequest"]


@dataclass(frozen=True, kw_only=True)
class ExportRequest(Extensible, Common):
    """Everything `gpmetric export` can be asked for."""

    formula: Annotated[
        str, Option("A formula, a metric's name, or a ledger.", metavar="FORMULA|LEDGER", argument=True, reads=True)
    ]
    format: Annotated[str, Option("{choices}.", choices=FORMATS)] = "python"
    output: Annotated[
        Path | None, Option("File to write.", metavar="FILE", names=("--output", "-o"), writes="formula")
    ] = None
    force: Annotated[bool, FORCE_FILES] = False

    def check(self) -> None:
        super().check()
        if self.output is None:
            raise InputError("--output (-o) FILE is needed")
