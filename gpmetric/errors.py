"""Everything gpmetric raises on purpose.

GpmetricError
├── InputError           bad input or usage: exit status 2
│   ├── ExpressionError  a formula that cannot be read or used
│   ├── ModelError       a model that cannot be loaded or pruned
│   ├── DataError        a text that cannot be read or is too short
│   └── LedgerError      a ledger that cannot be used
├── OutOfMemoryError     a device or the host has no memory left
├── TimeOverError        --minutes are over, and what was done is kept
├── PluginError          what a plug-in's function raised
├── MaskError            a score or target that gives no valid mask
└── SolverError          a Gram matrix that cannot be factorised
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from gpmetric.plain import one_line

__all__ = [
    "METRIC_ERRORS",
    "NO_MEMORY",
    "Choice",
    "DataError",
    "ExpressionError",
    "GpmetricError",
    "InputError",
    "LedgerError",
    "MaskError",
    "ModelError",
    "OutOfMemoryError",
    "PluginError",
    "SolverError",
    "TimeOverError",
    "one_of",
]

NO_MEMORY = ("not enough memory", "out of memory", "Cannot allocate memory")  # what a RuntimeError says then


class GpmetricError(Exception):
    """Base of all deliberate errors; the message is one line meant for the user, whatever it quotes.

    Attributes:
        details: what the message announces, a line each.
    """

    def __init__(self, message: object = "", details: Iterable[str] = ()) -> None:
        super().__init__(one_line(str(message)))
        self.details = tuple(map(one_line, details))

    def __str__(self) -> str:
        return "\n  ".join((str(self.args[0]), *self.details))


class InputError(GpmetricError):
    """Bad input or usage; the command line exits with status 2."""


class ExpressionError(InputError):
    """A formula that cannot be parsed, exceeds a cap, or lacks the weight."""


class ModelError(InputError):
    """A model directory, architecture or tokenizer that cannot be used."""


class DataError(InputError):
    """A text that is missing, unreadable, too short, or shared by two splits."""


class LedgerError(InputError):
    """A ledger that is damaged, foreign, or belongs to another campaign."""


class OutOfMemoryError(GpmetricError):
    """A device or the host has no memory left for what was asked."""


class TimeOverError(GpmetricError):
    """The time that a command was given is over; the same command goes on with what it did."""


class PluginError(GpmetricError):
    """What a function of a plug-in raised; names both."""


class MaskError(GpmetricError):
    """A score that is not finite, or a target the layer's shape does not allow."""


class SolverError(GpmetricError):
    """A Gram matrix that is not positive definite even after stronger damping."""


METRIC_ERRORS = (MaskError, SolverError, PluginError)  # what fails one metric, and costs no other

Choice = TypeVar("Choice", bound=str)


def one_of(option: str, text: str, accepted: Iterable[Choice]) -> Choice:
    """The accepted value that a text spells.

    Raises:
        InputError: naming option, text and what is accepted.
    """
    names = list(accepted)
    for name in names:
        if name == text:
            return name
    raise InputError(f"{option} must be one of {', '.join(names)}, but got {text!r}")
