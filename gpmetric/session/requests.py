"""What `gpmetric evaluate` and `gpmetric layers` are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from gpmetric.errors import InputError
from gpmetric.options import Option
from gpmetric.session.inputs import Inputs, Texts

__all__ = ["EvaluateRequest", "LayersRequest"]


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
