"""What the commands of `gpmetric ledger` are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from gpmetric.errors import InputError
from gpmetric.files import STDOUT
from gpmetric.options import FORCE_FILES, Common, Option

__all__ = ["FORMATS", "LedgerExportRequest", "LedgerMergeRequest", "LedgerRepairRequest", "LedgerRequest"]

FORMATS = (".csv", ".jsonl", ".parquet")
_NEW = Option("Ledger to write; none may be there.", metavar="NEW.sqlite", names=("--output", "-o"), writes="ledger")


@dataclass(frozen=True, kw_only=True)
class LedgerRequest(Common):
    """What `gpmetric ledger check` and `free` can be asked for."""

    ledger: Annotated[Path, Option("A campaign's ledger.", metavar="LEDGER", argument=True, reads=True)]


@dataclass(frozen=True, kw_only=True)
class LedgerRepairRequest(LedgerRequest):
    """Everything `gpmetric ledger repair` can be asked for."""

    output: Annotated[Path | None, _NEW] = None

    def check(self) -> None:
        super().check()
        _check_new(self.output)


@dataclass(frozen=True, kw_only=True)
class LedgerExportRequest(LedgerRequest):
    """Everything `gpmetric ledger export` can be asked for."""

    output: Annotated[
        Path,
        Option(
            f"File to write, its suffix one of {', '.join(FORMATS)}; - (the default) is CSV on standard output.",
            metavar="FILE", names=("--output", "-o"), writes="candidates",
        ),
    ] = STDOUT  # fmt: skip
    force: Annotated[bool, FORCE_FILES] = False

    def check(self) -> None:
        super().check()
        if self.output != STDOUT and self.output.suffix.lower() not in FORMATS:
            raise InputError(f"--output {str(self.output)!r} must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")


@dataclass(frozen=True, kw_only=True)
class LedgerMergeRequest(Common):
    """Everything `gpmetric ledger merge` can be asked for."""

    ledgers: Annotated[
        tuple[str, ...],
        Option(
            "Ledgers of campaigns of one model, its texts and options.", metavar="LEDGER...", argument=True, reads=True
        ),
    ] = ()
    output: Annotated[Path | None, _NEW] = None

    def check(self) -> None:
        super().check()
        if len(self.ledgers) < 2:
            raise InputError(f"at least two ledgers are needed, but got {len(self.ledgers)}")
        _check_new(self.output)


def _check_new(output: Path | None) -> None:
    if output is None:
        raise InputError("--output (-o) NEW.sqlite is needed")
    if output.exists() and (not output.is_file() or output.stat().st_size):
        raise InputError(f"--output {str(output)!r} exists: name another")
