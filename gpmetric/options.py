"""Options that several commands share, checked where that needs no torch, and where commands print."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TextIO

import typer

from gpmetric.config import load_config
from gpmetric.errors import one_of
from gpmetric.evolution.request import Request
from gpmetric.provenance import STDOUT
from gpmetric.pruning.metrics import UPDATES

__all__ = [
    "CalibrationOption",
    "ConfigOption",
    "DeviceOption",
    "DtypeOption",
    "ExcludeOption",
    "IncludeOption",
    "JsonOption",
    "LengthOption",
    "ModelsOption",
    "SamplesOption",
    "SearchTargetOption",
    "SeedOption",
    "ShuffleOption",
    "TargetOption",
    "TextOption",
    "UpdateOption",
    "WindowsOption",
    "resume_command",
    "tables",
]


def _one_of(option: str, *accepted: str) -> Callable[[str | None], str | None]:
    """A check of an option's value that needs no torch."""

    def check(value: str | None) -> str | None:
        return None if value is None else one_of(option, value, accepted)

    return check


ModelsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--model", help="Hugging Face directory or name; may be repeated. The embedded demo model by default."
    ),
]
CalibrationOption = Annotated[
    str | None, typer.Option(help="Text the statistics are measured on: a file, JSONL, Parquet or hf:dataset:split.")
]
TextOption = Annotated[list[str] | None, typer.Option(help="Text to evaluate; may be repeated.")]
_TARGETS = "0.5 (within rows), layer:0.5, block:0.5 (128 columns) or 2:4; may be repeated."
TargetOption = Annotated[list[str] | None, typer.Option(help=f"{_TARGETS} 0.5 by default.")]
SearchTargetOption = Annotated[
    list[str] | None,
    typer.Option(help=f"{_TARGETS} By default {', '.join(Request.target[:-1])} and {Request.target[-1]}."),
]
UpdateOption = Annotated[str, typer.Option(help=f"Kept weights: {', '.join(UPDATES)}.")]
SamplesOption = Annotated[int, typer.Option(min=1, help="Calibration windows.")]
LengthOption = Annotated[int | None, typer.Option(help="Tokens per window; the model's context, at most 2048.")]
WindowsOption = Annotated[int | None, typer.Option(min=1, help="Windows of each text evaluated; all by default.")]
ShuffleOption = Annotated[bool, typer.Option("--shuffle", help="Draw windows with --seed instead of the first ones.")]
SeedOption = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of everything random.")]
DeviceOption = Annotated[
    str, typer.Option(help="auto, cpu or cuda.", callback=_one_of("--device", "auto", "cpu", "cuda"))
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16 or float16; float32 on a CPU, as stored on CUDA.",
        callback=_one_of("--dtype", "float32", "bfloat16", "float16"),
    ),
]
IncludeOption = Annotated[str | None, typer.Option(metavar="REGEX", help="Prune only layers whose name matches.")]
ExcludeOption = Annotated[str | None, typer.Option(metavar="REGEX", help="Leave layers whose name matches dense.")]
JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the full result as JSON; - for standard output.")
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE.toml", is_eager=True, callback=load_config, help="Option values by long name."
    ),
]


def tables(json: Path | None) -> TextIO:
    """Where tables go: standard output, unless the JSON has it for itself."""
    return sys.stderr if json == STDOUT else sys.stdout


def resume_command(ledger: Path) -> str:
    """The present command line with the ledger named and --resume, quoted for a shell."""
    words = ["gpmetric", *sys.argv[1:]]
    if "--ledger" not in words and not any(word.startswith("--ledger=") for word in words):
        words += ["--ledger", str(ledger)]
    return shlex.join(words if "--resume" in words else [*words, "--resume"])
