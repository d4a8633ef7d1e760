"""Evaluates candidate metrics: masks and fingerprint on probe layers, then the loss of the pruned model.

Model, statistics and token windows are loaded once per process; a task after that reloads, re-tokenises and calibrates
nothing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor

from gpmetric.blockwise.ends import ends
from gpmetric.blockwise.hidden import Hidden
from gpmetric.blockwise.replay import BlockCalls, record_calls
from gpmetric.calibration.accumulators import LayerStatistics
from gpmetric.data import Windows
from gpmetric.errors import METRIC_ERRORS, GpmetricError, OutOfMemoryError
from gpmetric.evaluation.objectives import OBJECTIVES, Reference
from gpmetric.evaluation.perplexity import Teacher, batches, mean_loss
from gpmetric.evaluation.references import References
from gpmetric.evolution.mask_fingerprint import ProbeLayers
from gpmetric.evolution.tasks import (
    DenseTask,
    ExcessTask,
    Figures,
    ProbeTask,
    SequentialLoss,
    SequentialTask,
    Task,
    UseTask,
)
from gpmetric.metrics import Metric
from gpmetric.models import Layer
from gpmetric.placement import HEAD
from gpmetric.pruning.mask import compile_ahead
from gpmetric.pruning.protocol import Protocol, Rule
from gpmetric.pruning.sparsegpt import compile_solver
from gpmetric.pruning.updaters import UPDATERS, prune_weights, resolve_target
from gpmetric.session.listeners import Progress, silent
from gpmetric.session.memory import retried
from gpmetric.session.session import Session
from gpmetric.targets import Target, parse_target

__all__ = ["TEACHER_BYTES", "Evaluator", "alike"]

_PRUNED_ENTRIES = 2**28  # of pruned weights held at once, 1 GiB in fp32, unless those of one target are more
TEACHER_BYTES = 2**30  # of the dense model's predictions that are kept; beyond, they are made again for every metric
_COMPARED = ("loss", "kl")  # what one pass of a Teacher tells


class Evaluator:
    """Answers tasks about metrics.

    Args:
        session: a dense model, dense again after every task, with its statistics; its windows are those of calibration,
            search, validation, test, and of the draws of calibration windows.
        targets: in the user's spelling.
        update, fit: what happens to kept weights.
        objective: what candidates are compared by.
        progress: told of the steps of a task that takes long.
    """

    def __init__(
        self,
        session: Session,
        targets: Sequence[str],
        update: str,
        objective: str = "kl",
        fit: str = "own",
        progress: Progress = silent,
    ) -> None:
        assert session.dense is not None
        self._session = session
        self._model = session.model
        self._statistics = session.dense
        self._targets = [parse_target(target) for target in targets]
        self._update, self._fit, self._progress = update, fit, progress
        self._objectives = tuple(dict.fromkeys((*_COMPARED, objective)))
        self._dense_losses: dict[tuple[str, int], float] = {}  # by split and part
        others = self._objectives[len(_COMPARED) :]
        limit = TEACHER_BYTES if session.plan.kept else 0
        self._references = References(partial(_DenseBatch, others=others), limit)
        self._recorded: dict[tuple[int, int | None], BlockCalls] = {}
        self._protocols: dict[tuple[str, int], Protocol] = {}  # one at a time: each holds its statistics

    def __call__(self, task: Task) -> Any:
        """The answer to a task, as its class says.

        Raises:
            MaskError, SolverError: the formula's scores are not finite, or the update fails.
        """
        (answer,) = self.together([task])
        if isinstance(answer, GpmetricError):
            raise answer
        return answer

    def together(self, tasks: Sequence[Task]) -> list[Any]:
        """The answers to tasks that may share a walk through the blocks, see `alike`, or the errors in their places."""
        try:
            return retried(self._model, partial(self._answers, tasks), self._forget)
        except OutOfMemoryError as error:
            return [error] * len(tasks)

    def smaller(self) -> None:
        """Takes less memory from now on, where it can: after a process that did this work had none."""
        self._forget()
        if self._model.placement is not None:
            self._model.placement.batch_tokens //= 2

    def _forget(self) -> None:
        """Lets go of what was made for larger batches."""
        self._recorded.clear()
        self._references.clear()
        self._protocols.clear()

    @torch.no_grad()
    def _answers(self, tasks: Sequence[Task]) -> list[Any]:
        match tasks[0]:
            case ExcessTask():
                return self._excess(cast(Sequence[ExcessTask], tasks))
            case UseTask():
                return self._in_use(cast(Sequence[UseTask], tasks))
            case SequentialTask():
                return self._sequential(cast(Sequence[SequentialTask], tasks))
            case ProbeTask(metrics):
                self._compile(metrics)
                return [self._probe_layers.measure(metrics)]
            case DenseTask(split, part):
                return [{self._model.name: self._dense_loss(split, part)}]

    def _compile(self, metrics: Sequence[Metric]) -> None:
        """Starts to compile the kernel that prunes by those of the metrics that climb on."""
        updater = UPDATERS[self._update]
        settled = (resolve_target(target, metric, self._update) for metric in metrics for target in self._targets)
        targets = list(dict.fromkeys(settled))
        if self._model.resident and updater.granularity == "block":  # the solver's own choice
            first = self._model.layers[0]
            layer = self._statistics.layers[first.name].operands | {"W": first.weight}
            compile_solver([metric.expression for metric in metrics], layer, targets)
        elif self._model.resident and not updater.rescores:
            layers = {(layer.weight.shape[1], layer.weight.dtype): layer for layer in self._model.layers}.values()
            found = [(layer.weight, self._statistics.layers[layer.name]) for layer in layers]
            compile_ahead(metrics, found, targets, bits=updater.solves)

    @cached_property
    def _probe_layers(self) -> ProbeLayers:
        return ProbeLayers(self._model, self._statistics, self._targets, self._update, self._fit)

    def _excess(self, tasks: Sequence[ExcessTask]) -> list[Figures | GpmetricError]:
        """By task, what the model loses, pruned in one shot, by objective and target, in nats per token.

        `loss` and `kl` are always among the objectives; what is not finite is infinite. All tasks are on the same
        windows and targets, and pass through the blocks together.
        """
        windows = tasks[0].first, tasks[0].last
        calls, shelf = self._calls(*windows), self._session.shelf
        hardest = max(self._targets, key=lambda target: target.sparsity)
        targets = [hardest] if tasks[0].hardest else self._targets
        pruned = [_Pruned(task.metric, {one.text: Hidden(calls, shelf) for one in targets}) for task in tasks]
        dense = None if windows in self._references else Hidden(calls, shelf)
        for span in self._spans:
            self._advance(span, pruned, dense)
        ways = {(place, text): way for place, one in enumerate(pruned) for text, way in one.ways.items()}
        means = self._compared(windows, calls, ways, dense)
        for way in (*ways.values(), *([] if dense is None else [dense])):
            way.close()
        return [
            one.error or self._figures({target.text: means[place, target.text] for target in targets})
            for place, one in enumerate(pruned)
        ]

    def _advance(self, span: Sequence[int], pruned: Sequence[_Pruned], dense: Hidden | None) -> None:
        """Moves all windows through some blocks; these and their statistics are read once for all metrics."""
        layers = [layer for index in span for layer in self._model.blocks[index].layers]
        with ExitStack() as stack:
            for index in span:
                stack.enter_context(self._model.at_hand(index))
            statistics = [self._statistics.layers[layer.name] for layer in layers]
            for one in pruned:
                try:
                    self._through(one, span, layers, statistics)
                except METRIC_ERRORS as error:
                    one.fail(error)
            if dense is not None:
                for index in span:
                    dense.advance(index)

    def _through(
        self, one: _Pruned, span: Sequence[int], layers: Sequence[Layer], statistics: Sequence[LayerStatistics]
    ) -> None:
        """Prunes some blocks, which are at hand, by a metric, and moves the windows of each target through them."""
        weights = [layer.weight for layer in layers]
        for targets in self._together(weights, [target for target in self._targets if target.text in one.ways]):
            by_target: Sequence[Sequence[Tensor]] = [()] * len(targets)  # of a block without layers
            if weights:
                by_target = prune_weights(weights, one.metric, targets, statistics, self._update)
            for target, found in zip(targets, by_target, strict=True):
                with self._model.holding(found, layers):
                    for index in span:
                        one.ways[target.text].advance(index)

    def _compared(
        self, key: tuple[int, int | None], calls: BlockCalls, ways: Mapping[Any, Hidden], dense: Hidden | None
    ) -> dict[Any, list[float]]:
        """By way, its figures in the order of the objectives: means over the predictions of the windows."""
        totals = {one: torch.zeros(len(self._objectives), dtype=torch.float64) for one in ways}
        count = 0
        with self._model.at_hand(HEAD):
            references = self._references.of(key, lambda: _all_ends(calls, dense))
            parts = {one: _all_ends(calls, hidden) for one, hidden in ways.items()}
            for reference in references:
                count += reference.predictions
                for one, total in totals.items():
                    logits, _ = next(parts[one])
                    total += reference.compare(logits)
        return {one: (total / count).where(total.isfinite(), math.inf).tolist() for one, total in totals.items()}

    def _calls(self, first: int, last: int | None) -> BlockCalls:
        """How the model calls its blocks on some of the search windows."""
        if (first, last) not in self._recorded:
            windows = self._session.windows["search"].tokens[first:last]
            found = list(batches(self._model, windows))
            self._recorded[first, last] = record_calls(self._model, found, self._session.shelf)
        return self._recorded[first, last]

    @cached_property
    def _spans(self) -> list[Sequence[int]]:
        """Blocks that are pruned at once: all of them where they fit, for what small weights share, else each alone."""
        entries = sum(layer.weight.numel() for layer in self._model.layers)
        every = range(len(self._model.blocks))
        return [every] if self._model.resident and entries <= _PRUNED_ENTRIES else [[index] for index in every]

    def _together(self, weights: Sequence[Tensor], targets: Sequence[Target]) -> list[Sequence[Target]]:
        """The targets whose pruned weights are in memory at once: what they share is computed once, if they fit."""
        if targets and sum(weight.numel() for weight in weights) * len(targets) <= _PRUNED_ENTRIES:
            return [targets]
        return [[target] for target in targets]

    def _windows(self, split: str, part: int) -> Windows:
        """1/part of the windows of a split, at least one."""
        whole = self._session.windows[split]
        return whole if part == 1 else Windows(whole.text, whole.tokens[: max(1, len(whole.tokens) // part)])

    def _dense_loss(self, split: str, part: int) -> float:
        if (split, part) not in self._dense_losses:
            self._dense_losses[split, part] = mean_loss(
                self._model, self._windows(split, part).tokens, told=partial(self._progress, "perplexity")
            )
        return self._dense_losses[split, part]

    def _in_use(self, tasks: Sequence[UseTask]) -> list[Figures | GpmetricError]:
        """By task, what `_excess` tells, of models pruned block after pruned block; they pass the blocks together."""
        key = 0, None
        calls, protocol = self._calls(*key), self._protocol("calibration", 1)
        for task in tasks:
            protocol.prepare([task.metric], self._update)
        places = [(place, target) for place in range(len(tasks)) for target in self._targets]
        rules = [Rule(tasks[place].metric, target, self._update, self._fit) for place, target in places]
        walk = protocol.walk(rules, [self._session.windows["search"].tokens])
        deque(walk, maxlen=0)
        ended = {(place, target.text): one for (place, target), one in zip(places, walk.ended(), strict=True)}
        errors = {place: one for (place, _), one in ended.items() if isinstance(one, GpmetricError)}
        ways = {at: one[0] for at, one in ended.items() if not isinstance(one, GpmetricError)}
        dense = None if key in self._references else Hidden(calls, self._session.shelf)
        if dense is not None:
            for index in range(len(self._model.blocks)):
                with self._model.at_hand(index):
                    dense.advance(index)
        means = self._compared(key, calls, ways, dense)
        return [
            errors.get(place) or self._figures({target.text: means[place, target.text] for target in self._targets})
            for place in range(len(tasks))
        ]

    def _figures(self, means: Mapping[str, Sequence[float]]) -> Figures:
        """Of means by target, in the order of the objectives."""
        return {name: {target: mean[at] for target, mean in means.items()} for at, name in enumerate(self._objectives)}

    def _sequential(self, tasks: Sequence[SequentialTask]) -> list[SequentialLoss | GpmetricError]:
        """By task, of those on one split with one calibration, what is lost; their models pass the blocks together."""
        protocol, split = self._protocol(tasks[0].calibration, tasks[0].part), tasks[0].split
        for task in tasks:
            protocol.prepare([task.metric], task.update)
        rules = [Rule(task.metric, parse_target(task.target), task.update, task.fit) for task in tasks]
        part = tasks[0].part
        dense = self._dense_loss(split, part)
        found = protocol.measure(rules, [self._windows(split, part).tokens])
        return [one.error or SequentialLoss(one.losses[0] - dense, one.losses[0]) for one in found]

    def _protocol(self, calibration: str, part: int) -> Protocol:
        """That of some calibration windows; what the one before it held is let go."""
        if (calibration, part) not in self._protocols:
            self._protocols.clear()
            session = self._session.calibrated_on(self._windows(calibration, part))
            session.dense = self._statistics if calibration == "calibration" else None
            self._protocols[calibration, part] = Protocol(
                session, one_shot=False, progress=self._progress, passed=self._progress
            )
        return self._protocols[calibration, part]


def alike(first: Task, second: Task) -> bool:
    """Whether two tasks may share a walk through the blocks."""
    match first, second:
        case ExcessTask(), ExcessTask():
            return (first.first, first.last, first.hardest) == (second.first, second.last, second.hardest)
        case UseTask(), UseTask():
            return True
        case SequentialTask(), SequentialTask():
            return (first.split, first.calibration, first.part) == (second.split, second.calibration, second.part)
    return False


def _all_ends(calls: BlockCalls, hidden: Hidden | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and labels of all batches, part by part."""
    assert hidden is not None
    for number, states in enumerate(hidden):
        yield from ends(calls, number, states)


@dataclass
class _Pruned:
    """A model pruned by one metric: by target, the windows on their way through it, or why there are none."""

    metric: Metric
    ways: dict[str, Hidden]
    error: GpmetricError | None = None

    def fail(self, error: GpmetricError) -> None:
        """Lets go of the windows."""
        self.error = error
        for way in self.ways.values():
            way.close()
        self.ways = {}


class _DenseBatch:
    """What the dense model says of some predictions: a Teacher, and references of `others`."""

    def __init__(self, logits: Tensor, labels: Tensor, others: Sequence[str]) -> None:
        self._teacher = Teacher(logits, labels)
        self._others: list[Reference] = [OBJECTIVES[name].reference(logits, labels) for name in others]
        self.predictions = self._teacher.predictions
        self.bytes = self._teacher.bytes + sum(other.bytes for other in self._others)

    def compare(self, logits: Tensor) -> Tensor:
        """[objectives]: loss, divergence and the others, summed over predictions, in nats, fp64."""
        told = self._teacher.compare(logits)
        return torch.cat([told, *(other.excess(logits).double().reshape(1) for other in self._others)])
