"""What `gpmetric evaluate` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from gpmetric.options import Option
from gpmetric.session.inputs import Inputs, Texts

__all__ = ["EvaluateRequest"]


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest(Inputs):
    """Everything `gpmetric evaluate` can be asked for."""

    unused: ClassVar[frozenset[str]] = frozenset(
        {"calibration", "samples", "sampling", "include", "exclude", "statistics_dtype"}
    )

    text: Annotated[tuple[str, ...], Option("Text to evaluate; may be repeated.", reads=True)] = ()

    @property
    def texts(self) -> Texts:
        return Texts(evaluated=self.text or (None,))
