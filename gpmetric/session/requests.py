"""What `gpmetric evaluate` and `gpmetric layers` are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from gpmetric.options import Option
from gpmetric.session.inputs import Inputs, Texts

__all__ = ["EvaluateRequest", "LayersRequest"]


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest(Inputs):
    """Everything `gpmetric evaluate` can be asked for."""

    unused: ClassVar[frozenset[str]] = frozenset({"calibration", "samples", "include", "exclude", "statistics_dtype"})

    text: Annotated[tuple[str, ...], Option("Text to evaluate; may be repeated.", reads=True)] = ()

    @property
    def texts(self) -> Texts:
        return Texts(evaluated=self.text or (None,))


@dataclass(frozen=True, kw_only=True)
class LayersRequest(Inputs):
    """Everything `gpmetric layers` can be asked for."""

    unused: ClassVar[frozenset[str]] = frozenset(
        {"calibration", "samples", "sequence_length", "windows", "shuffle", "statistics_dtype", "minutes", "memory"}
    )
