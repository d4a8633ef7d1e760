"""What `gpmetric pack` and `unpack` are asked for."""

from __future__ import annotations

import os.path
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from gpmetric.errors import InputError
from gpmetric.options import Common, Option

__all__ = ["PackRequest", "UnpackRequest"]


@dataclass(frozen=True, kw_only=True)
class PackRequest(Common):
    """Everything `gpmetric pack` can be asked for."""

    folder: Annotated[Path, Option("A checkpoint, or any folder.", metavar="DIR", argument=True, reads=True)]
    output: Annotated[
        Path | None, Option("Archive to write.", metavar="FILE", names=("--output", "-o"), writes="archive")
    ] = None

    def check(self) -> None:
        super().check()
        if self.output is None:
            raise InputError("--output (-o) FILE is needed")
        if not os.path.isdir(self.folder):
            raise InputError(f"{str(self.folder)!r} is no folder; pack takes a checkpoint's")


@dataclass(frozen=True, kw_only=True)
class UnpackRequest(Common):
    """Everything `gpmetric unpack` can be asked for."""

    archive: Annotated[Path, Option("What `gpmetric pack` wrote.", metavar="FILE", argument=True, reads=True)]
    output: Annotated[
        Path | None, Option("Folder to write.", metavar="DIR", names=("--output", "-o"), writes="folder")
    ] = None

    def check(self) -> None:
        super().check()
        if self.output is None:
            raise InputError("--output (-o) DIR is needed")
        if not os.path.isfile(self.archive):
            raise InputError(f"{str(self.archive)!r} is no file; unpack takes what gpmetric pack wrote")
