"""What `gpmetric analyse` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from gpmetric.extensible import Extensible
from gpmetric.options import FORCE_FILES, Common, Option

__all__ = ["AnalyseRequest"]


@dataclass(frozen=True, kw_only=True)
class AnalyseRequest(Extensible, Common):
    """Everything `gpmetric analyse` can be asked for."""

    ledger: Annotated[
        Path, Option("A campaign's ledger, finished or not.", metavar="LEDGER", argument=True, reads=True)
    ]
    output: Annotated[
        Path | None,
        Option("Page of plots to write: .png or .pdf.", metavar="FILE", names=("--output", "-o"), writes="picture"),
    ] = None
    force: Annotated[bool, FORCE_FILES] = False
    seed: Annotated[int, Option("Seed of everything random.", least=0, below=2**63)] = 0
