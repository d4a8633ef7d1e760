"""What a metric does to a few probe layers: the fingerprint of its masks, and the error it makes in their outputs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from gpmetric.calibration.accumulators import LayerStatistics
from gpmetric.calibration.collect import Statistics
from gpmetric.errors import METRIC_ERRORS, MaskError
from gpmetric.evolution.tasks import MaskFingerprint, NoMasks
from gpmetric.expression.shared_program import SharedProgram
from gpmetric.metrics import Metric
from gpmetric.models import Layer, Model
from gpmetric.pruning.updaters import UPDATERS, prune_weights, resolve_target
from gpmetric.targets import Target

__all__ = ["ProbeLayers", "probe_layers", "reconstruction_error"]

_LAYERS = 8  # evenly spread over the model; on 35 layers, four times cheaper than all
_SKETCH = 512  # mask entries per target that are kept in the ledger
_TIED = 0.5  # share of a row that may have one score; beyond, the order of columns chooses the mask


def probe_layers(model: Model) -> list[Layer]:
    """The layers that metrics are probed on, evenly spread over the model."""
    places = np.linspace(0, len(model.layers) - 1, min(_LAYERS, len(model.layers))).round().astype(int)
    return [model.layers[place] for place in places]


class ProbeLayers:
    """Measures metrics on the same few layers.

    Args:
        model: dense; the weights of some layers are kept, in fp32.
        statistics: of the dense model; without Gram matrices there is no reconstruction error.
        update: the campaign's. Where weights are scored anew inside a solver, the masks are those that it ends with;
            those of any other update need no solving.
        fit: the campaign's. One to the dense model's outputs is not told by these layers alone: nothing is solved then,
            and there is no reconstruction error; the masks are those of the dense weights.
    """

    def __init__(
        self, model: Model, statistics: Statistics, targets: Sequence[Target], update: str, fit: str = "own"
    ) -> None:
        self._names = [layer.name for layer in probe_layers(model)]
        self._weights: list[Tensor] = []
        for index, block in enumerate(model.blocks):
            chosen = [layer for layer in block.layers if layer.name in self._names]
            with model.at_hand(index) if chosen else nullcontext():
                self._weights += [layer.weight.float() for layer in chosen]
        self._statistics = statistics.layers
        self._targets = targets
        self._update, self._alone = update, fit == "own"

    def measure(self, metrics: Sequence[Metric]) -> list[MaskFingerprint | NoMasks]:
        """The fingerprint of each metric, or the error that it makes."""
        found = [_Findings() for _ in metrics]
        if UPDATERS[self._update].rescores and self._alone:
            every = [self._statistics[name] for name in self._names]
            for metric, findings in zip(metrics, found, strict=True):
                self._solve(metric, every, findings)
        else:
            program = SharedProgram([metric.expression for metric in metrics])
            for name, weight in zip(self._names, self._weights, strict=True):
                statistics = self._statistics[name]  # which may be read from a file
                for index, score in program.scores(statistics.operands | {"W": weight}):
                    self._mask(metrics[index], score, (name, weight, statistics), found[index])
        return [findings.summary(self._targets) for findings in found]

    def _solve(self, metric: Metric, statistics: Sequence[LayerStatistics], findings: _Findings) -> None:
        try:
            pruned = prune_weights(self._weights, metric, self._targets, statistics, self._update)
        except METRIC_ERRORS as error:
            findings.error = str(error)
            return
        by_weight = zip(*pruned, strict=True)
        for weight, one, by_target in zip(self._weights, statistics, by_weight, strict=True):
            findings.add(weight, by_target, one.gram)

    def _mask(
        self, metric: Metric, score: Tensor, layer: tuple[str, Tensor, LayerStatistics], findings: _Findings
    ) -> None:
        if findings.error is not None:
            return
        name, weight, statistics = layer
        targets = [resolve_target(target, metric, self._update) for target in self._targets]
        try:
            if _is_tied(score):
                raise MaskError("more than half of the scores of most rows are equal")
            pruned = UPDATERS["none"].prune([weight], metric, targets, [statistics], [score])
        except MaskError as error:
            findings.error = f"{error} (layer {name})"
        else:
            findings.add(weight, [weights[0] for weights in pruned], statistics.gram if self._alone else None)


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

    def summary(self, targets: Sequence[Target]) -> MaskFingerprint | NoMasks:
        if self.error is not None:
            return NoMasks(self.error)
        by_target = [np.concatenate(masks) for masks in zip(*self._masks, strict=True)]
        digest = hashlib.sha256(b"".join(np.packbits(mask).tobytes() for mask in by_target)).hexdigest()
        places = np.linspace(0, len(by_target[0]) - 1, min(_SKETCH, len(by_target[0]))).astype(int)
        sketch = "".join(np.packbits(mask[places]).tobytes().hex() for mask in by_target)
        errors = zip(targets, np.mean(self._errors, axis=0), strict=True) if self._errors else ()
        return MaskFingerprint(digest, sketch, {target.text: float(error) for target, error in errors})


def reconstruction_error(weight: Tensor, pruned: Tensor, gram: Tensor) -> float:
    """Relative squared error of a layer's output on the calibration tokens; 0 where the output is always 0.

    Args:
        weight, pruned: [out, in].
        gram: [in, in], X^T X / n.

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
