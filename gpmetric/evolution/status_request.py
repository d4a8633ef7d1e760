"""What `gpmetric status` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from gpmetric.extensible import Extensible
from gpmetric.options import Common, Option

__all__ = ["StatusRequest"]


@dataclass(frozen=True, kw_only=True)
class StatusRequest(Extensible, Common):
    """Everything `gpmetric status` can be asked for."""

    ledger: Annotated[Path, Option("A campaign's ledger, in use or not.", metavar="LEDGER", argument=True, reads=True)]
    watch: Annotated[
        float | None, Option("Look again every so many seconds, while a driver runs.", metavar="SECONDS", above=0)
    ] = None
