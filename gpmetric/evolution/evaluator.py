"""Evaluates candidate metrics: masks and fingerprint on probe layers, then the loss of the pruned model.

Model, statistics and token windows are loaded once per process; a task after that reloads, re-tokenises and calibrates
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gpmetric.calibration.cache import load_statistics
from gpmetric.calibration.collect import Statistics
from gpmetric.evaluation.perplexity import Teacher, batches, mean_loss
from gpmetric.evolution.probe import Probe
from gpmetric.models import Model, load_model
from gpmetric.pruning import fused
from gpmetric.pruning.bench import Bench
from gpmetric.pruning.metrics import Metric, Update, resolve_metric
from gpmetric.pruning.prune import measured, prune_weights, rules_of
from gpmetric.pruning.target import Target, parse_target

__all__ = ["Evaluator", "Workplace", "open_workplace"]

_PRUNED_ENTRIES = 2**28  # of pruned weights held at once, 1 GiB in fp32, unless those of one target are more
_TEACHER_BYTES = 2**30  # of the dense model's predictions that are kept; beyond, they are made again for every metric


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
    tokens = load_file(place["tokens"])
    return Evaluator(model, statistics, tokens, place["targets"], place["update"])


class Evaluator:
    """Answers tasks about metrics: `{"kind": "probe" | "excess" | "sequential" | "dense", ...}`.

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
        self._dense_losses: dict[str, float] = {}
        self._teachers: dict[tuple[int, int], list[Teacher]] = {}
        self._benches = {"calibration": Bench(model, tokens["calibration"], dense=statistics)}

    def __call__(self, task: Mapping[str, Any]) -> Any:
        """Runs one task.

        Raises:
            MaskError, SolverError: the formula's scores are not finite, or the update fails.
        """
        kinds = {"probe": self._probe, "excess": self._excess, "sequential": self._sequential, "dense": self._dense}
        with torch.no_grad():
            return kinds[task["kind"]](task)

    def _probe(self, task: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Fingerprint, sketch and reconstruction error of several metrics; `error` for one that gives no masks."""
        metrics = [self._metric(text) for text in task["metrics"]]
        self._compile(metrics)
        return self._prober.measure(metrics)

    def _compile(self, metrics: Sequence[Metric]) -> None:
        """Starts to compile the kernel that prunes by those of the metrics that climb on."""
        rules = list(dict.fromkeys(rule for metric in metrics for rule in rules_of(metric, self._targets)))
        if self._update != "obs-blockwise" and fused.usable(self._model.layers[0].weight, rules):
            layers = {(layer.weight.shape[1], layer.weight.dtype): layer for layer in self._model.layers}.values()
            found = [(layer.weight, measured(self._statistics.layers[layer.name])) for layer in layers]
            expressions = [metric.expression for metric in metrics]
            fused.compile_together(expressions, found, rules, bits=self._update == "obs")

    @cached_property
    def _prober(self) -> Probe:
        return Probe(self._model.layers, self._statistics, self._targets, self._update)

    def _excess(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """Excess log-loss and divergence from the dense model by target, as `loss` and `kl`, in nats per token.

        The model is pruned in one shot and reads the search windows from `first` up to `last`.
        """
        metric = self._metric(task["metric"])
        found: dict[str, Tensor] = {}
        for targets in self._together:
            found |= zip((target.text for target in targets), self._compared(metric, targets, task), strict=True)
        return {
            kind: {text: float(means[column]) for text, means in found.items()}
            for column, kind in enumerate(("loss", "kl"))
        }

    @cached_property
    def _together(self) -> list[Sequence[Target]]:
        """The targets whose pruned weights are in memory at once: what they share is computed once, if they fit."""
        entries = sum(layer.weight.numel() for layer in self._model.layers)
        if entries * len(self._targets) <= _PRUNED_ENTRIES:
            return [self._targets]
        return [[target] for target in self._targets]

    def _compared(self, metric: Metric, targets: Sequence[Target], task: Mapping[str, Any]) -> Tensor:
        """[targets, 2]: excess log-loss and divergence per token; infinite where they are not finite."""
        weights = [layer.weight for layer in self._model.layers]
        statistics = [self._statistics.layers[layer.name] for layer in self._model.layers]
        by_target = prune_weights(weights, metric, targets, statistics, self._update)
        totals = torch.zeros(len(targets), 2, dtype=torch.float64)
        count = 0
        for teacher in self._taught(task["first"], task["last"]):
            for total, pruned in zip(totals, by_target, strict=True):
                with self._model.holding(pruned):
                    total += teacher.compare(self._model)
            count += teacher.predictions
        return (totals / count).where(totals.isfinite(), math.inf)

    def _taught(self, first: int, last: int) -> Iterator[Teacher]:
        """The dense model's predictions on some search windows, batch by batch."""
        if (first, last) in self._teachers:
            yield from self._teachers[first, last]
            return
        kept: list[Teacher] = []
        size = sum(teacher.bytes for held in self._teachers.values() for teacher in held)
        for batch in batches(self._model, self._windows["search"][first:last]):
            teacher = Teacher(self._model, batch)
            size += teacher.bytes
            if size <= _TEACHER_BYTES:
                kept.append(teacher)
            yield teacher
        if size <= _TEACHER_BYTES:
            self._teachers[first, last] = kept

    def _metric(self, text: str) -> Metric:
        return resolve_metric(text, self._statistics.sequences, self._statistics.length)

    def _dense_loss(self, split: str) -> float:
        if split not in self._dense_losses:
            self._dense_losses[split] = mean_loss(self._model, self._windows[split])
        return self._dense_losses[split]

    def _sequential(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """Excess and mean loss on one split at one target under the sequential protocol.

        `calibration` names the windows that statistics come from.
        """
        name = task["calibration"]
        if name not in self._benches:
            self._benches = {name: Bench(self._model, self._windows[name])}  # one at a time: each holds its statistics
        bench = self._benches[name]
        metric = resolve_metric(task["metric"], *bench.calibration.shape)
        bench.prepare([metric], task["update"])
        target = parse_target(task["target"])
        (loss,) = bench.losses(metric, target, task["update"], [self._windows[task["split"]]])
        return {"excess": loss - self._dense_loss(task["split"]), "loss": loss}

    def _dense(self, task: Mapping[str, Any]) -> dict[str, Any]:
        """Mean loss of the dense model on one split, by model."""
        return {self._model.name: self._dense_loss(task["split"])}
