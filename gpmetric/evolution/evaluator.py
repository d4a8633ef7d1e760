"""Evaluates candidate metrics: masks and fingerprint on probe layers, then the loss of the pruned model.

Model, statistics and token windows are loaded once per process; a task after that reloads, re-tokenises and calibrates
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from gpmetric.data import Windows
from gpmetric.evaluation.objectives import OBJECTIVES, Reference
from gpmetric.evaluation.perplexity import Teacher, mean_loss
from gpmetric.evaluation.references import References
from gpmetric.evolution.mask_fingerprint import ProbeLayers
from gpmetric.evolution.tasks import DenseTask, ExcessTask, Figures, ProbeTask, SequentialLoss, SequentialTask, Task
from gpmetric.metrics import Metric
from gpmetric.models import Model
from gpmetric.pruning.bench import measure
from gpmetric.pruning.mask import compile_ahead
from gpmetric.pruning.protocol import Protocol, Rule
from gpmetric.pruning.updaters import UPDATERS, prune_weights, resolve_target
from gpmetric.session.session import Session
from gpmetric.targets import Target, parse_target

__all__ = ["Evaluator"]

_PRUNED_ENTRIES = 2**28  # of pruned weights held at once, 1 GiB in fp32, unless those of one target are more
_TEACHER_BYTES = 2**30  # of the dense model's predictions that are kept; beyond, they are made again for every metric
_COMPARED = ("loss", "kl")  # what one pass of a Teacher tells


class Evaluator:
    """Answers tasks about metrics.

    Args:
        session: a dense model, dense again after every task, with its statistics; its windows are those of calibration,
            search, validation, test, and of the draws of calibration windows.
        targets: in the user's spelling.
        update: what happens to kept weights.
        objective: what candidates are compared by.
    """

    def __init__(self, session: Session, targets: Sequence[str], update: str, objective: str = "kl") -> None:
        assert session.dense is not None
        self._session = session
        self._model = session.model
        self._statistics = session.dense
        self._targets = [parse_target(target) for target in targets]
        self._update = update
        self._objectives = tuple(dict.fromkeys((*_COMPARED, objective)))
        self._dense_losses: dict[tuple[str, int], float] = {}  # by split and part
        others = self._objectives[len(_COMPARED) :]
        self._references = References(self._model, partial(_DenseBatch, others=others), _TEACHER_BYTES)
        self._protocols: dict[tuple[str, int], Protocol] = {}  # one at a time: each holds its statistics

    def __call__(self, task: Task) -> Any:
        """The answer to a task, as its class says.

        Raises:
            MaskError, SolverError: the formula's scores are not finite, or the update fails.
        """
        with torch.no_grad():
            match task:
                case ProbeTask():
                    self._compile(task.metrics)
                    return self._probe_layers.measure(task.metrics)
                case ExcessTask():
                    return self._excess(task)
                case SequentialTask():
                    return self._sequential(task)
                case DenseTask():
                    return {self._model.name: self._dense_loss(task.split, task.part)}

    def _compile(self, metrics: Sequence[Metric]) -> None:
        """Starts to compile the kernel that prunes by those of the metrics that climb on."""
        updater = UPDATERS[self._update]
        settled = (resolve_target(target, metric, self._update) for metric in metrics for target in self._targets)
        targets = list(dict.fromkeys(settled))
        if not updater.rescores:
            layers = {(layer.weight.shape[1], layer.weight.dtype): layer for layer in self._model.layers}.values()
            found = [(layer.weight, self._statistics.layers[layer.name]) for layer in layers]
            compile_ahead(metrics, found, targets, bits=updater.solves)

    @cached_property
    def _probe_layers(self) -> ProbeLayers:
        return ProbeLayers(self._model.layers, self._statistics, self._targets, self._update)

    def _excess(self, task: ExcessTask) -> Figures:
        """What the model loses, pruned in one shot, by objective and target, in nats per token; `loss` and `kl` always.

        What is not finite is infinite.
        """
        found: dict[str, list[float]] = {}  # by target, in the order of the objectives
        weights = [layer.weight for layer in self._model.layers]
        statistics = [self._statistics.layers[layer.name] for layer in self._model.layers]
        for targets in self._together:
            by_target = prune_weights(weights, task.metric, targets, statistics, self._update)
            totals = torch.zeros(len(targets), len(self._objectives), dtype=torch.float64)
            count = 0
            windows = self._session.windows["search"].tokens[task.first : task.last]
            for dense in self._references.of((task.first, task.last), windows):
                for total, pruned in zip(totals, by_target, strict=True):
                    with self._model.holding(pruned):
                        total += dense.compare(self._model)
                count += dense.predictions
            means = (totals / count).where(totals.isfinite(), math.inf)
            found |= zip((target.text for target in targets), means.tolist(), strict=True)
        return {name: {text: row[at] for text, row in found.items()} for at, name in enumerate(self._objectives)}

    @cached_property
    def _together(self) -> list[Sequence[Target]]:
        """The targets whose pruned weights are in memory at once: what they share is computed once, if they fit."""
        entries = sum(layer.weight.numel() for layer in self._model.layers)
        if entries * len(self._targets) <= _PRUNED_ENTRIES:
            return [self._targets]
        return [[target] for target in self._targets]

    def _windows(self, split: str, part: int) -> Windows:
        """1/part of the windows of a split, at least one."""
        whole = self._session.windows[split]
        return whole if part == 1 else Windows(whole.text, whole.tokens[: max(1, len(whole.tokens) // part)])

    def _dense_loss(self, split: str, part: int) -> float:
        if (split, part) not in self._dense_losses:
            self._dense_losses[split, part] = mean_loss(self._model, self._windows(split, part).tokens)
        return self._dense_losses[split, part]

    def _sequential(self, task: SequentialTask) -> SequentialLoss:
        protocol = self._protocol(task.calibration, task.part)
        protocol.prepare([task.metric], task.update)
        rule = Rule(task.metric, parse_target(task.target), task.update)
        (loss,) = measure(protocol, rule, [self._windows(task.split, task.part).tokens]).losses
        return SequentialLoss(loss - self._dense_loss(task.split, task.part), loss)

    def _protocol(self, calibration: str, part: int) -> Protocol:
        """That of some calibration windows; what the one before it held is let go."""
        if (calibration, part) not in self._protocols:
            self._protocols.clear()
            session = self._session.calibrated_on(self._windows(calibration, part))
            session.dense = self._statistics if calibration == "calibration" else None
            self._protocols[calibration, part] = Protocol(session, one_shot=False)
        return self._protocols[calibration, part]


class _DenseBatch:
    """What the dense model says of a batch of windows [windows, length]: a Teacher, and references of `others`."""

    def __init__(self, model: Model, batch: Tensor, others: Sequence[str]) -> None:
        self._teacher = Teacher(model, batch)
        self._others: list[Reference] = [OBJECTIVES[name].reference(model, batch) for name in others]
        self.predictions = self._teacher.predictions
        self.bytes = self._teacher.bytes + sum(other.bytes for other in self._others)

    def compare(self, model: Model) -> Tensor:
        """[objectives]: loss, divergence and the others, summed over predictions, in nats, fp64."""
        told = self._teacher.compare(model)
        return torch.cat([told, *(other.excess(model).double().reshape(1) for other in self._others)])
