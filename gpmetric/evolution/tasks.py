"""What workers are asked about metrics and what they answer: plain records, which go through a pipe as they are."""

from __future__ import annotations

from dataclasses import dataclass

from gpmetric.metrics import Metric

__all__ = [
    "DenseTask",
    "ExcessTask",
    "Figures",
    "MaskFingerprint",
    "NoMasks",
    "ProbeTask",
    "SequentialLoss",
    "SequentialTask",
    "Task",
]

Figures = dict[str, dict[str, float]]  # by objective and target


@dataclass(frozen=True)
class ProbeTask:
    """What several metrics do to a few layers; the answer is a MaskFingerprint or NoMasks for each."""

    metrics: tuple[Metric, ...]


@dataclass(frozen=True)
class ExcessTask:
    """What the model loses, pruned in one shot, on the search windows from `first` up to `last`; Figures."""

    metric: Metric
    first: int = 0
    last: int | None = None


@dataclass(frozen=True)
class SequentialTask:
    """What a model loses on a split at one target, pruned block after pruned block; a SequentialLoss."""

    metric: Metric
    target: str
    split: str
    calibration: str  # the windows that statistics come from
    update: str
    model: str = ""  # which of several is pruned


@dataclass(frozen=True)
class DenseTask:
    """Mean loss of the dense model on a split, in nats per token; by model's name."""

    split: str


@dataclass(frozen=True)
class MaskFingerprint:
    """What a metric does to the probe layers.

    Attributes:
        fingerprint: equal exactly where all probe layers are masked alike at every target.
        sketch: keep bits at the same positions for every metric, in hexadecimal.
        reconstruction: by target the relative error |X (W - P)^T|^2 / |X W^T|^2 with P the pruned weight, the mean over
            probe layers; {} without Gram matrices.
    """

    fingerprint: str
    sketch: str
    reconstruction: dict[str, float]


@dataclass(frozen=True)
class NoMasks:
    """Why a metric chooses no masks."""

    error: str


@dataclass(frozen=True)
class SequentialLoss:
    """Mean loss, and what it is above the dense model's, in nats per token."""

    excess: float
    loss: float


Task = ProbeTask | ExcessTask | SequentialTask | DenseTask
