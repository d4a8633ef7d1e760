"""What a command reads that searches: statistics on one text, candidates on a second, the outcome on a third."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from gpmetric.errors import InputError
from gpmetric.journal import check_ledger
from gpmetric.options import Option
from gpmetric.session.inputs import Inputs, Texts

__all__ = ["SearchInputs"]


@dataclass(frozen=True, kw_only=True)
class SearchInputs(Inputs):
    """The options of a search that a ledger keeps, on three texts that share no window, or on one that is cut."""

    calibration: Annotated[
        str | None, Option("Text of the statistics; cut into three where --search is not named.", reads=True)
    ] = None
    search: Annotated[str | None, Option("Text that candidates are measured on.", reads=True)] = None
    validation: Annotated[str | None, Option("Text that the outcome is reported on.", reads=True)] = None
    search_windows: Annotated[int, Option("Windows of the search text.", least=1)] = 32
    windows: Annotated[int, Option("Windows of the validation text.", least=1)] = 64
    ledger: Annotated[
        Path | None, Option("JSON Lines file of the search's progress.", metavar="FILE", writes="ledger")
    ] = None
    resume: Annotated[bool, Option("Go on with the ledger if it is there.", names=("--resume",))] = False

    def check(self) -> None:
        super().check()
        if (self.search is None) != (self.validation is None):
            raise InputError("--search and --validation belong together; without both, --calibration is cut into three")
        check_ledger(self.ledger, self.resume)

    @property
    def texts(self) -> Texts:
        splits = {"calibration": self.calibration, "search": self.search, "validation": self.validation}
        windows = {"calibration": self.samples, "search": self.search_windows, "validation": self.windows}
        return Texts(splits, windows, cut=self.calibration if self.search is None else None, disjoint=True)
