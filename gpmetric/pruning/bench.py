"""Pruning metrics under one protocol, on one model or several: `gpmetric bench --metric wanda --metric "abs(W)*G"`."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from gpmetric.calibration.collect import Statistics, collect_statistics, token_batches
from gpmetric.calibration.replay import BlockCalls, record_calls
from gpmetric.data import Text, Windows
from gpmetric.errors import GpmetricError, InputError, MaskError, SolverError
from gpmetric.evaluation.perplexity import mean_loss, perplexity
from gpmetric.evaluation.windows import check_length, default_text, open_text, read_windows
from gpmetric.models import Model, check_path, load_model
from gpmetric.provenance import versions
from gpmetric.pruning.allocation import Allocation
from gpmetric.pruning.metrics import BASELINES, Metric, Update, check_update, resolve_metric
from gpmetric.pruning.prune import prune_one_shot, prune_sequential, sparsity
from gpmetric.pruning.target import Target, parse_target
from gpmetric.pruning.transfer import transfer

__all__ = ["Bench", "BenchListener", "BenchRow", "bench", "bench_failures", "check_targets", "unique_pairs"]


@dataclass(frozen=True)
class BenchRow:
    """One pruned model: perplexity by text name, the sparsity reached, and the seconds pruning took.

    `error` says why a metric could not be applied at this target; its perplexities are infinite then.
    """

    metric: str
    target: str
    update: Update
    formula: str
    ppl: dict[str, float]
    seconds: float
    sparsity: float
    error: str | None = None


class BenchListener:
    """What a bench tells while it runs; every method may be overridden."""

    def model(self, name: str) -> None:
        """The next of several models is begun; not called for one alone."""

    def progress(self, what: str, done: int, total: int) -> None:
        """Calibration has come so far."""

    def dense(self, ppl: Mapping[str, float]) -> None:
        """The dense model's perplexity by text, before anything is pruned."""

    def row(self, row: BenchRow) -> None:
        """One metric at one target is measured."""


class Bench:
    """Prunes one model again and again under one protocol and measures it; the model is dense between two measurements.

    What all metrics share (the dense model's block calls, or its statistics) is computed once, when first needed.

    Args:
        model: the dense model.
        calibration: [samples, length], the windows statistics are measured on.
        one_shot: use dense statistics everywhere instead of the sequential protocol.
        progress: called with (what, done, total) during calibration.
        dense: statistics of the dense model, when the caller has them already.
    """

    def __init__(
        self,
        model: Model,
        calibration: Tensor,
        *,
        one_shot: bool = False,
        progress: Callable[[str, int, int], None] = lambda what, done, total: None,
        dense: Statistics | None = None,
    ) -> None:
        self.model = model
        self.calibration = calibration
        self.one_shot = one_shot
        self._progress = progress
        self._dense = dense
        self._calls: BlockCalls | None = None

    def prepare(self, metrics: Sequence[Metric], update: Update) -> None:
        """Collects what the metrics will share, so that the seconds of a row are its own; call it before measuring."""
        gradients = any(metric.needs_gradients for metric in metrics)
        fisher = any(metric.needs_fisher for metric in metrics)
        gram = self.one_shot and any(metric.needs_gram or _update_of(metric, update) != "none" for metric in metrics)
        held = next(iter(self._dense.layers.values())) if self._dense else None
        if held is None:
            missing = self.one_shot or gradients
        else:
            wanted = ((gradients, held.G), (fisher, held.F), (gram, held.gram))
            missing = any(needed and found is None for needed, found in wanted)
            gradients, fisher, gram = (needed or found is not None for needed, found in wanted)
        if missing:
            self._dense = collect_statistics(
                self.model,
                self.calibration,
                gradients=gradients,
                fisher=fisher,
                gram=gram,
                progress=lambda done, total: self._progress("calibration", done, total),
            )
        if not self.one_shot and self._calls is None:
            self._calls = record_calls(self.model, token_batches(self.calibration))

    def losses(
        self, metric: Metric, target: Target | Allocation, update: Update, texts: Sequence[Tensor]
    ) -> list[float]:
        """Mean loss on each text [windows, length] of the model pruned by one metric to one target or allocation.

        An allocation is one that `check_allocation` lets pass; `prepare` has been called for this metric.

        Raises:
            MaskError, SolverError: naming metric, target and layer.
        """
        return self._measure(metric, target, update, texts)[0]

    def rows(
        self, metrics: Sequence[Metric], targets: Sequence[Target], update: Update, texts: Sequence[Windows]
    ) -> Iterator[BenchRow]:
        """One row for each distinct (metric, target), target by target; one that fails costs the others nothing."""
        check_targets(self.model, targets)
        self.prepare(metrics, update)
        for target, metric in unique_pairs(targets, metrics):
            error, losses, seconds, reached = None, [math.inf] * len(texts), math.nan, math.nan
            try:
                losses, seconds, reached = self._measure(metric, target, update, [text.tokens for text in texts])
            except (MaskError, SolverError) as failure:
                error = str(failure)
            ppl = {text.text.name: perplexity(loss) for text, loss in zip(texts, losses, strict=True)}
            formula, used = str(metric.expression), _update_of(metric, update)
            yield BenchRow(metric.name, target.text, used, formula, ppl, seconds, reached, error)

    def _measure(
        self, metric: Metric, target: Target | Allocation, update: Update, texts: Sequence[Tensor]
    ) -> tuple[list[float], float, float]:
        """Losses by text, seconds of pruning, sparsity reached; `prepare` has been called for this metric."""
        with self.model.restored():
            start = time.perf_counter()
            self.prune(metric, target, update)
            seconds = time.perf_counter() - start
            return [mean_loss(self.model, tokens) for tokens in texts], seconds, sparsity(self.model)

    def prune(self, metric: Metric, target: Target | Allocation, update: Update) -> None:
        """Prunes the model for good, to one target or by an allocation; `prepare` has been called for this metric.

        Raises:
            MaskError, SolverError: naming metric, target and layer; layers before it are already pruned.
        """
        update = _update_of(metric, update)
        if self.one_shot:
            assert self._dense is not None
            prune_one_shot(self.model, metric, target, self._dense.layers, update)
        else:
            assert self._calls is not None
            prune_sequential(self.model, metric, target, self._calls, self._dense, update)


def unique_pairs(targets: Sequence[Target], metrics: Sequence[Metric]) -> list[tuple[Target, Metric]]:
    """Every (target, metric) once, in the order asked for."""
    pairs = {(target.text, metric.name): (target, metric) for target in targets for metric in metrics}
    return list(pairs.values())


def check_targets(model: Model, targets: Sequence[Target]) -> None:
    """Refuses an N:M target that some layer's input does not allow, before any work.

    Raises:
        InputError: naming target, layer and its width.
    """
    for target in targets:
        for layer in model.layers:
            width = layer.weight.shape[1]
            if target.group and width % target.group:
                raise InputError(
                    f"--target {target.text}: in = {width} of layer {layer.name} is not divisible by {target.group}"
                )


def _update_of(metric: Metric, update: Update) -> Update:
    return metric.update or update


@dataclass(frozen=True)
class _Plan:
    """What is measured on each model: the arguments of `bench`, checked and read as far as that needs no model."""

    calibration: Text
    texts: list[Text]
    metrics: list[str]
    targets: list[Target]
    update: Update
    one_shot: bool
    samples: int
    sequence_length: int | None
    windows: int | None
    shuffle: bool
    seed: int
    loading: dict[str, Any]  # options of load_model

    def measure(self, model: str | None, told: BenchListener, document: dict[str, Any]) -> None:
        """Fills the document of one model; its `results` grow row by row, so that what stops it leaves them there."""
        loaded = load_model(model, **self.loading)
        check_targets(loaded, self.targets)
        length = check_length(loaded, self.sequence_length)
        shuffle_seed = self.seed if self.shuffle else None
        sample = read_windows(loaded, self.calibration, length, self.samples, shuffle_seed)
        texts = [read_windows(loaded, one, length, self.windows, shuffle_seed) for one in self.texts]
        metrics = [resolve_metric(name, *sample.tokens.shape) for name in self.metrics]

        runner = Bench(loaded, sample.tokens, one_shot=self.one_shot, progress=told.progress)
        dense = {part.text.name: perplexity(mean_loss(loaded, part.tokens)) for part in texts}
        told.dense(dense)
        document |= {
            "model": loaded.name,
            "dtype": loaded.dtype,
            "device": str(loaded.device),
            "protocol": "one-shot" if self.one_shot else "sequential",
            "sequence_length": length,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "calibration": sample.describe(),
            "texts": [part.describe() for part in texts],
            "layers": len(loaded.layers),
            "dense": dense,
            "results": [],
            "versions": versions(),
        }
        for row in runner.rows(metrics, self.targets, self.update, texts):
            told.row(row)
            document["results"].append(asdict(row))


def bench(
    model: str | Sequence[str] | None = None,
    *,
    calibration: str | None = None,
    text: Sequence[str] = (),
    metric: Sequence[str] = (),
    target: Sequence[str] = ("0.5",),
    update: str = "none",
    one_shot: bool = False,
    samples: int = 128,
    sequence_length: int | None = None,
    windows: int | None = None,
    shuffle: bool = False,
    seed: int = 0,
    device: str = "auto",
    dtype: str | None = None,
    include: str | None = None,
    exclude: str | None = None,
    listener: BenchListener | None = None,
) -> dict[str, Any]:
    """Every metric at every target under one protocol, the dense model first.

    Args:
        model: a directory or Hub name, or several; None is the demo model.
        calibration: text the statistics are measured on, `samples` windows of it.
        text: texts to evaluate, `windows` windows of each (all by default).
        metric: names of BASELINES or formulas; all baselines when empty.
        target: sparsities, `layer:` sparsities or N:M.
        update: none, obs or obs-blockwise, for metrics that do not bring their own.
        one_shot: dense statistics everywhere instead of the sequential protocol.
        sequence_length: tokens per window; the model's context, at most 2,048, by default.
        shuffle, seed: draw the windows instead of taking the first ones.
        include, exclude: regular expressions on layer names.
        listener: told of progress and of every row.

    Returns:
        The JSON document of `gpmetric bench`. A metric that cannot be applied at a target, its scores not being finite
        for instance, has a row with the reason as `error`. For two models or more: `models`, such a document for each,
        and `transfer`, what `gpmetric.pruning.transfer` makes of them. There, a model that fails has the reason as
        `error` in its document, beside whatever was measured before; the others are measured all the same.

    Raises:
        InputError: for anything that cannot be used, before the model runs; with several models, for what is wrong
            without loading any, or when all of them fail: then the first one's error.
    """
    told = listener or BenchListener()
    names = _distinct(model)
    targets = [parse_target(name) for name in target]
    chosen_update = check_update(update)
    metrics = list(dict.fromkeys(metric)) or list(BASELINES)
    for name in metrics:
        resolve_metric(name)
    plan = _Plan(
        calibration=open_text(default_text(names[0], calibration, "--calibration", "calibration")),
        texts=[open_text(one) for one in dict.fromkeys(text) or [default_text(names[0], None, "--text", "test")]],
        metrics=metrics,
        targets=targets,
        update=chosen_update,
        one_shot=one_shot,
        samples=samples,
        sequence_length=sequence_length,
        windows=windows,
        shuffle=shuffle,
        seed=seed,
        loading={"device": device, "dtype": dtype, "include": include, "exclude": exclude},
    )
    if len(names) > 1:
        return _bench_several(plan, [name for name in names if name is not None], told)
    document: dict[str, Any] = {}
    plan.measure(names[0], told, document)
    return document


def bench_failures(result: Mapping[str, Any]) -> list[str]:
    """Why metrics or models failed in what `bench` returned, one line each; with the model where there are several."""
    if "models" in result:
        return [f"{one['model']}: {failure}" for one in result["models"] for failure in bench_failures(one)]
    rows = [*result.get("results", ()), result]
    return [row["error"] for row in rows if row.get("error")]


def _distinct(model: str | Sequence[str] | None) -> list[str | None]:
    """The models asked for, each once; [None] is the demo model."""
    if isinstance(model, Sequence) and not isinstance(model, str):
        return [*dict.fromkeys(model)] or [None]
    return [model]


def _bench_several(plan: _Plan, models: Sequence[str], told: BenchListener) -> dict[str, Any]:
    for name in models:
        check_path(name)
    documents: list[dict[str, Any]] = []
    failures = []
    for name in models:
        told.model(name)
        documents.append({"model": name})
        try:
            plan.measure(name, told, documents[-1])
        except (GpmetricError, RuntimeError) as failure:  # RuntimeError: torch's, out of memory for one
            documents[-1]["error"] = str(failure)
            failures.append(failure.with_traceback(None))  # whose frames hold the model
        gc.collect()  # models are in reference cycles: the next one would be loaded beside this one
    if not any(document.get("results") for document in documents):
        raise failures[0]
    return {"models": documents, "transfer": transfer(documents)}
