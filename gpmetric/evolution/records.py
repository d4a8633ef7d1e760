"""The rows of a ledger, one class for each table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from gpmetric.evolution.tasks import Figures

__all__ = ["Candidate", "Evaluation", "Generation", "HeldOutMeasurement", "Measurement"]


@dataclass(frozen=True)
class Candidate:
    """One drawn formula: its place in the campaign and what became of it."""

    generation: int
    position: int
    formula: str
    canonical: str | None
    status: Literal["evaluated", "duplicate", "screened", "failed"]
    evaluation: int | None = None
    reason: str | None = None
    opposites: str | None = None  # the formula after each layer of simplification; `canonical` lies between
    ranked: str | None = None
    fingerprint: str | None = None
    id: int | None = None


@dataclass(frozen=True)
class Measurement:
    """What one rung of the screening gave for one candidate: a value of JSON, or the error that ended it there."""

    generation: int
    position: int
    rung: str
    value: Any
    error: str | None
    duration: float
    process: int | None = None
    attempt: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """One measurement paid for; the ledger fills in `id`, and `host` and `finished` when they are absent."""

    formula: str
    canonical: str | None
    generation: int
    status: Literal["done", "failed"]
    fingerprint: str | None = None
    reason: str | None = None
    figures: Figures = field(default_factory=dict)
    nodes: int | None = None
    operands: str | None = None
    sketch: str | None = None  # keep bits of the masks at fixed positions, in hexadecimal
    seconds_score: float | None = None
    seconds_loss: float | None = None
    host: str | None = None
    process: int | None = None
    attempt: int | None = None
    finished: float | None = None
    id: int | None = None

    @property
    def losses(self) -> dict[str, float]:
        """Excess log-loss by target; empty where it failed."""
        return self.figures.get("loss", {})


@dataclass(frozen=True)
class Generation:
    """One finished generation: what the next one is bred from."""

    number: int
    population: Any
    rng: Any
    evaluations: int
    finished: float

    @property
    def rng_state(self) -> tuple[int, tuple[int, ...], float | None]:
        """`rng` as `random.Random.setstate` wants it."""
        return self.rng[0], tuple(self.rng[1]), self.rng[2]


@dataclass(frozen=True)
class HeldOutMeasurement:
    """What a finalist or baseline costs at one target under the sequential protocol, or the error that it makes.

    `calibration` names the windows that statistics came from; excess and loss are None where they are not finite.
    """

    metric: str
    target: str
    split: str
    calibration: str
    excess: float | None
    loss: float | None
    error: str | None = None
