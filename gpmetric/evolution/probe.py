"""What a metric does to a few probe layers: the fingerprint of its masks, and the error it makes in their outputs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpmetric.calibration.collect import Statistics
from gpmetric.errors import MaskError, SolverError
from gpmetric.expression.tape import Tape
from gpmetric.models import Layer
from gpmetric.pruning.metrics import Metric, Update
from gpmetric.pruning.prune import layer_operands, prune_weights
from gpmetric.pruning.target import Target

__all__ = ["Probe", "reconstruction_error"]

_LAYERS = 8  # evenly spread over the model; on 35 layers, four times cheaper than all
_SKETCH = 512  # mask entries per target that are kept in the ledger
_TIED = 0.5  # share of a row that may have one score; beyond, the order of columns chooses the mask


class Probe:
    """Measures metrics on the same few layers.

    Args:
        layers: of the dense model; the probe layers are taken from them, evenly spread.
        statistics: of the dense model; without Gram matrices there is no reconstruction error.
        targets: sparsities.
        update: the campaign's. Masks of obs-blockwise are those its solver ends with; those of obs need no solving.
    """

    def __init__(
        self, layers: Sequence[Layer], statistics: Statistics, targets: Sequence[Target], update: Update
    ) -> None:
        places = np.linspace(0, len(layers) - 1, min(_LAYERS, len(layers))).round().astype(int)
        self._names = [layers[place].name for place in places]
        self._weights = [layers[place].weight.float() for place in places]
        self._statistics = [statistics.layers[layers[place].name] for place in places]
        self._targets = targets
        self._update = update

    def measure(self, metrics: Sequence[Metric]) -> list[dict[str, Any]]:
        """For each metric `fingerprint`, `sketch` and `reconstruction` by target, or the `error` that it makes.

        Fingerprints are equal exactly when all probe layers are masked alike at every target. A sketch holds, in
        hexadecimal, the keep bits at the same positions for every metric. A reconstruction error is relative,
        |X (W - P)^T|^2 / |X W^T|^2 with P the pruned weight, the mean over probe layers; {} without Gram matrices.
        """
        found = [_Findings() for _ in metrics]
        if self._update == "obs-blockwise":
            for metric, findings in zip(metrics, found, strict=True):
                self._solve(metric, findings)
        else:
            tape = Tape([metric.expression for metric in metrics])
            for place, weight in enumerate(self._weights):
                for index, score in tape.scores(layer_operands(weight, self._statistics[place])):
                    self._mask(metrics[index], score, place, found[index])
        return [findings.summary(self._targets) for findings in found]

    def _solve(self, metric: Metric, findings: _Findings) -> None:
        try:
            pruned = prune_weights(self._weights, metric, self._targets, self._statistics, self._update)
        except (MaskError, SolverError) as error:
            findings.error = str(error)
            return
        for weight, statistics, by_target in zip(
            self._weights, self._statistics, zip(*pruned, strict=True), strict=True
        ):
            findings.add(weight, by_target, statistics.gram)

    def _mask(self, metric: Metric, score: Tensor, place: int, findings: _Findings) -> None:
        if findings.error is not None:
            return
        weight, statistics = self._weights[place], self._statistics[place]
        try:
            if _is_tied(score):
                raise MaskError("more than half of the scores of most rows are equal")
            pruned = prune_weights([weight], metric, self._targets, [statistics], "none", [score])
        except MaskError as error:
            findings.error = f"{error} (layer {self._names[place]})"
        else:
            findings.add(weight, [weights[0] for weights in pruned], statistics.gram)


class _Findings:
    """What has been seen of one metric, layer by layer."""

    def __init__(self) -> None:
        self.error: str | None = None
        self._masks: list[list[np.ndarray]] = []  # by layer, by target
        self._errors: list[list[float]] = []

    def add(self, weight: Tensor, pruned: Sequence[Tensor], gram: Tensor | None) -> None:
        self._masks.append([(one != 0).flatten().cpu().numpy() for one in pruned])
        if gram is not None:
            self._errors.append([reconstruction_error(weight, one, gram) for one in pruned])

    def summary(self, targets: Sequence[Target]) -> dict[str, Any]:
        if self.error is not None:
            return {"error": self.error}
        by_target = [np.concatenate(masks) for masks in zip(*self._masks, strict=True)]
        digest = hashlib.sha256(b"".join(np.packbits(mask).tobytes() for mask in by_target)).hexdigest()
        places = np.linspace(0, len(by_target[0]) - 1, min(_SKETCH, len(by_target[0]))).astype(int)
        sketch = "".join(np.packbits(mask[places]).tobytes().hex() for mask in by_target)
        errors = zip(targets, np.mean(self._errors, axis=0), strict=True) if self._errors else ()
        reconstruction = {target.text: float(error) for target, error in errors}
        return {"error": None, "fingerprint": digest, "sketch": sketch, "reconstruction": reconstruction}


def reconstruction_error(weight: Tensor, pruned: Tensor, gram: Tensor) -> float:
    """Relative squared error of a layer's output on the calibration tokens.

    Args:
        weight, pruned: [out, in].
        gram: [in, in], X^T X / n.

    Returns:
        The error, 0 for a layer whose output is always 0.

    Source: Frantar and Alistarh 2023 (SparseGPT), equation 1.
    """
    change = weight - pruned
    whole = float(((weight @ gram) * weight).sum())
    return float(((change @ gram) * change).sum()) / whole if whole else 0.0


def _is_tied(score: Tensor) -> bool:
    """Whether in most rows [out, in] more than half of the scores are one value."""
    # 1024x4096 on one AMD EPYC thread: torch 250 to 530 ms, np.sort 1 to 60. np.partition takes 30 ms where scores
    # differ, but up to 290 ms where they are tied
    on_cpu = score.device.type == "cpu"
    ordered = torch.from_numpy(np.sort(score.numpy(), axis=1)) if on_cpu else score.sort(dim=1).values
    half = int(score.shape[1] * _TIED)
    same = ordered[:, : score.shape[1] - half] == ordered[:, half:]  # [out, in - half]
    return bool(torch.count_nonzero(same.any(dim=1)) * 2 > len(score))
