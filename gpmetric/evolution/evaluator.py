"""Evaluates one candidate formula: score, masks and fingerprint, then the loss of the pruned model.

Model, statistics and token windows are loaded once per process; a task after that reloads, re-tokenises and calibrates
nothing.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from gpmetric.calibration.cache import load_statistics
from gpmetric.calibration.collect import Statistics
from gpmetric.evaluation.perplexity import mean_loss
from gpmetric.evolution.objectives import mean_excess
from gpmetric.models import Model, load_model
from gpmetric.pruning.bench import Bench
from gpmetric.pruning.metrics import Update, resolve_metric
from gpmetric.pruning.prune import prune_weight, score_weight
from gpmetric.pruning.target import parse_target

__all__ = ["Evaluator", "Workplace", "open_workplace"]

# Above the best so far by this share of its excess: hopeless. On the demo, Wanda is 8 % above the best baseline.
_HOPELESS = 0.2
_NOISE = 0.02  # nats, at least: where pruning costs next to nothing, a share of it is less than chance


@dataclass(frozen=True)
class Workplace:
    """Where a worker process finds what it evaluates with; plain data, so that it can be sent to one.

    `tokens` is a safetensors file of token windows by split, `statistics` a file of the statistics cache.
    """

    model: str | None
    device: str
    dtype: str | None
    include: str | None
    exclude: str | None
    statistics: str
    tokens: str
    targets: tuple[str, ...]
    update: Update

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def open_workplace(place: dict[str, Any], model: Model | None = None) -> Evaluator:
    """The evaluator a worker process runs, with one torch thread: the same figures whatever the number of workers.

    Args:
        place: a Workplace as plain data.
        model: the model of that place, where this process has it already.
    """
    torch.set_num_threads(1)
    model = model or load_model(
        place["model"],
        device=place["device"],
        dtype=place["dtype"],
        include=place["include"],
        exclude=place["exclude"],
    )
    statistics = load_statistics(Path(place["statistics"]), str(model.device))
    return Evaluator(model, statistics, load_file(place["tokens"]), place["targets"], place["update"])


class Evaluator:
    """Answers tasks about formulas: `{"kind": "masks" | "losses" | "sequential" | "dense", "formula": ..., ...}`.

    Args:
        model: the dense model; dense again after every task.
        statistics: of the dense model on the calibration windows.
        tokens: windows [n, length] by split: calibration, search, validation, test.
        targets: in the user's spelling.
        update: what happens to kept weights.
    """

    def __init__(
        self, model: Model, statistics: Statistics, tokens: Mapping[str, Tensor], targets: Sequence[str], update: Update
    ) -> None:
        self._model = model
        self._statistics = statistics
        self._windows = tokens
        self._targets = [parse_target(target) for target in targets]
        self._update = update
        self._reference = ("", math.inf)
        self._bench = Bench(model, self._windows["calibration"], dense=statistics)

    def __call__(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """Runs one task.

        Raises:
            MaskError, SolverError: the formula's scores are not finite, or the update fails.
        """
        kinds = {"masks": self._masks, "losses": self._losses, "sequential": self._sequential, "dense": self._dense}
        with torch.no_grad():
            return kinds[task["kind"]](task)

    def _masks(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """Hash of every layer's mask at every target: equal for two formulas exactly when they prune alike."""
        start = time.perf_counter()
        digest = hashlib.sha256()
        update: Update = "none" if self._update == "obs" else self._update  # the same mask, without solving
        for pruned in self._pruned(task["formula"], update):
            for weight in pruned:
                digest.update(np.packbits((weight != 0).cpu().numpy()).tobytes())
        return {"fingerprint": digest.hexdigest(), "seconds_score": time.perf_counter() - start}

    def _losses(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """Mean loss of the model, pruned in one shot, on the search windows, by target.

        The first quarter of the windows comes first: where the formula is much worse there than `reference`, the best
        so far, no more is computed and `screened` tells its mean excess.
        """
        start = time.perf_counter()
        few, many = self._search_parts
        pruned = list(self._pruned(task["formula"]))
        losses = self._mean_losses(pruned, few)
        screened = task["reference"] is not None and mean_excess(losses) > self._limit(task["reference"])
        if not screened and len(many):
            share = len(few) / (len(few) + len(many))
            rest = self._mean_losses(pruned, many)
            losses = {target: share * losses[target] + (1 - share) * rest[target] for target in losses}
        return {
            "losses": losses,
            "screened": mean_excess(losses) - self._dense_few if screened else None,
            "seconds_loss": time.perf_counter() - start,
        }

    def _mean_losses(self, pruned: Sequence[Sequence[Tensor]], tokens: Tensor) -> dict[str, float]:
        losses: dict[str, float] = {}
        with self._model.restored():
            for target, weights in zip(self._targets, pruned, strict=True):
                for layer, weight in zip(self._model.layers, weights, strict=True):
                    layer.weight.copy_(weight)
                losses[target.text] = mean_loss(self._model, tokens)
        return losses

    @cached_property
    def _search_parts(self) -> tuple[Tensor, Tensor]:
        """The search windows as a first quarter, at least one, and the rest."""
        windows = self._windows["search"]
        few = max(1, len(windows) // 4)
        return windows[:few], windows[few:]

    def _limit(self, reference: str) -> float:
        """Mean loss on the first windows beyond which a candidate is hopeless; the last reference's is remembered."""
        if self._reference[0] != reference:
            loss = mean_excess(self._mean_losses(list(self._pruned(reference)), self._search_parts[0]))
            self._reference = (reference, loss + max(_HOPELESS * (loss - self._dense_few), _NOISE))
        return self._reference[1]

    @cached_property
    def _dense_few(self) -> float:
        return mean_loss(self._model, self._search_parts[0])

    def _pruned(self, formula: str, update: Update | None = None) -> Iterator[list[Tensor]]:
        """The pruned weights of all layers, for one target after the other; the model itself is read as dense."""
        update = update or self._update
        metric = resolve_metric(formula, self._statistics.sequences, self._statistics.length)
        dense = [layer.weight.clone() for layer in self._model.layers]
        found = [self._statistics.layers[layer.name] for layer in self._model.layers]
        scores = (
            [None] * len(dense)
            if update == "obs-blockwise"
            else [score_weight(weight, metric, statistics) for weight, statistics in zip(dense, found, strict=True)]
        )
        for target in self._targets:
            yield [
                prune_weight(weight, metric, target, statistics, update, score)
                for weight, statistics, score in zip(dense, found, scores, strict=True)
            ]

    def _sequential(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """Mean loss on one split at one target under the sequential protocol."""
        calibration = self._windows["calibration"]
        metric = resolve_metric(task["formula"], *calibration.shape)
        self._bench.prepare([metric], task["update"])
        loss = self._bench.losses(metric, parse_target(task["target"]), task["update"], [self._windows[task["split"]]])
        return {"loss": loss[0]}

    def _dense(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """Mean loss of the dense model on one split."""
        return {"loss": mean_loss(self._model, self._windows[task["split"]])}
