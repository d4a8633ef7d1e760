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
    "UseTask",
]

# A task's effort, its kind and an amount, tells how long it takes from what others took. With a solver it is more until
# the first is measured: SmolLM2-135M, H100, SparseGPT 27 to 36 s, masks alone a quarter.
_SOLVED = 4.0

Figures = dict[str, dict[str, float]]  # by objective and target


@dataclass(frozen=True)
class ProbeTask:
    """What several metrics do to a few layers; the answer is a MaskFingerprint or NoMasks for each."""

    metrics: tuple[Metric, ...]

    @property
    def effort(self) -> tuple[str, float]:
        return "probe", len(self.metrics)


@dataclass(frozen=True)
class ExcessTask:
    """What the model loses, pruned in one shot, on the search windows from `first` up to `last`; Figures.

    Attributes:
        hardest: at the target of the highest sparsity only.
    """

    metric: Metric
    first: int = 0
    last: int | None = None
    hardest: bool = False

    @property
    def effort(self) -> tuple[str, float]:
        return "excess", 1.0 if self.last is None else self.last - self.first


@dataclass(frozen=True)
class UseTask:
    """What the model loses on all search windows, pruned as it is going to be, block after pruned block; Figures.

    Update and fit are the campaign's.
    """

    metric: Metric

    @property
    def effort(self) -> tuple[str, float]:
        return "use", 1.0


@dataclass(frozen=True)
class SequentialTask:
    """What a model loses on a split at one target, pruned block after pruned block; a SequentialLoss.

    Attributes:
        calibration: the windows that statistics come from.
        model: which of several is pruned.
        part: only 1/part of the windows of either is read.
    """

    metric: Metric
    target: str
    split: str
    calibration: str
    update: str
    model: str = ""
    part: int = 1
    fit: str = "own"

    @property
    def effort(self) -> tuple[str, float]:
        """Draws of the calibration take gradients anew."""
        solves = (self.metric.update or self.update) != "none"
        kind = "sequential" if self.calibration == "calibration" else "drawn"
        return kind, (_SOLVED if solves else 1.0) / self.part


@dataclass(frozen=True)
class DenseTask:
    """Mean loss of the dense model on 1/part of a split's windows, in nats per token; by model's name."""

    split: str
    part: int = 1

    @property
    def effort(self) -> tuple[str, float]:
        return "dense", 1 / self.part


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


Task = ProbeTask | ExcessTask | UseTask | SequentialTask | DenseTask
