"""What `gpmetric report` is asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Self

from gpmetric.extensible import Extensible
from gpmetric.options import FORCE_FILES, Common, Option

__all__ = ["ReportRequest"]


@dataclass(frozen=True, kw_only=True)
class ReportRequest(Extensible, Common):
    """Everything `gpmetric report` can be asked for."""

    source: Annotated[
        Path,
        Option(
            "A ledger of discover, bench, slim or tune, in use or not, or the --json of these, of allocate or prune.",
            metavar="LEDGER|JSON", argument=True, reads=True,
        ),
    ]  # fmt: skip
    output: Annotated[
        Path | None,
        Option("Page to write; beside the source by default.", metavar="FILE.html", names=("--output", "-o"),
               writes="page"),
    ] = None  # fmt: skip
    force: Annotated[bool, FORCE_FILES] = False

    def completed(self) -> Self:
        if self.output or not self.source.name:  # "." and "/", which are refused as folders
            return self
        return replace(self, output=Path(f"{self.source.with_suffix('')}.html"))
