"""What `gpmetric evaluate`, `layers` and `calibrate` are asked for, and `gpmetric.statistics`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from gpmetric.errors import InputError
from gpmetric.operands import OPERANDS
from gpmetric.options import FORCE_FILES, Option
from gpmetric.session.inputs import Inputs, Texts

__all__ = ["CalibrateRequest", "EvaluateRequest", "LayersRequest", "StatisticsRequest"]


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest(Inputs):
    """Everything `gpmetric evaluate` can be asked for."""

    unused: ClassVar[frozenset[str]] = frozenset(
        {"calibration", "samples", "sampling", "include", "exclude", "statistics_dtype", "plugin"}
    )

    text: Annotated[tuple[str, ...], Option("Text to evaluate; may be repeated.", reads=True)] = ()
    tasks: Annotated[tuple[str, ...], Option("Tasks of lm-eval, arc_easy,hellaswag for instance.", listed=True)] = ()
    task_folder: Annotated[Path | None, Option("More tasks, in YAML without code.", metavar="DIR", reads=True)] = None
    shots: Annotated[int | None, Option("Examples before each question; the task's own by default.", least=0)] = None
    limit: Annotated[int | None, Option("Questions of each task; all by default.", least=1)] = None

    def check(self) -> None:
        super().check()
        given = {"--task-folder": self.task_folder, "--shots": self.shots, "--limit": self.limit}
        for option, value in given.items():
            if value is not None and not self.tasks:
                raise InputError(f"{option} is of --tasks, and none are asked for")

    @property
    def texts(self) -> Texts:
        return Texts(evaluated=self.text or (() if self.tasks else (None,)))


@dataclass(frozen=True, kw_only=True)
class LayersRequest(Inputs):
    """Everything `gpmetric layers` can be asked for."""

    unused: ClassVar[frozenset[str]] = frozenset(
        {
            "calibration",
            "samples",
            "sequence_length",
            "windows",
            "shuffle",
            "statistics_dtype",
            "minutes",
            "memory",
            "bos",
            "sampling",
            "preset",
            "text_column",
            "plugin",
        }
    )


@dataclass(frozen=True, kw_only=True)
class StatisticsRequest(Inputs):
    """Everything `gpmetric.statistics` can be asked for."""

    unused: ClassVar[frozenset[str]] = frozenset({"windows"})

    operands: Annotated[
        tuple[str, ...],
        Option("What formulas read besides W, of {choices}.", choices=OPERANDS, metavar="X,G", listed=True),
    ] = ("X",)

    def check(self) -> None:
        super().check()
        if not self.operands:
            raise InputError("--operands names nothing: X, for instance")
        if "W" in self.operands:
            raise InputError("--operands W is the weight itself, which the model's own files hold")

    @property
    def texts(self) -> Texts:
        return Texts({"calibration": self.calibration}, {"calibration": self.samples})


@dataclass(frozen=True, kw_only=True)
class CalibrateRequest(StatisticsRequest):
    """Everything `gpmetric calibrate` can be asked for."""

    output: Annotated[
        Path | None,
        Option(
            "Safetensors file to write, a tensor LAYER.OPERAND each.", metavar="FILE", names=("--output", "-o"),
            writes="statistics",
        ),
    ] = None  # fmt: skip
    force: Annotated[bool, FORCE_FILES] = False

    def check(self) -> None:
        super().check()
        if self.output is None:
            raise InputError("--output (-o) FILE is needed")
