"""One table of pruning metrics under one protocol: `gpmetric bench --metric wanda --metric "abs(W)*X**0.5"`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from gpmetric.calibration.collect import Statistics, collect_statistics, token_batches
from gpmetric.calibration.replay import BlockCalls, record_calls
from gpmetric.data import Windows
from gpmetric.errors import InputError, MaskError, SolverError
from gpmetric.evaluation.perplexity import mean_loss, perplexity
from gpmetric.evaluation.windows import check_length, default_text, open_text, read_windows
from gpmetric.models import Model, load_model
from gpmetric.provenance import versions
from gpmetric.pruning.metrics import BASELINES, Metric, Update, check_update, resolve_metric
from gpmetric.pruning.prune import prune_one_shot, prune_sequential, sparsity
from gpmetric.pruning.target import Target, parse_target

__all__ = ["Bench", "BenchListener", "BenchRow", "bench", "check_targets", "unique_pairs"]


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
        gram = self.one_shot and any(metric.needs_gram or _update_of(metric, update) != "none" for metric in metrics)
        held = next(iter(self._dense.layers.values())) if self._dense else None
        if held is None:
            missing = self.one_shot or gradients
        else:
            missing = (gradients and held.G is None) or (gram and held.gram is None)
            gradients, gram = gradients or held.G is not None, gram or held.gram is not None
        if missing:
            self._dense = collect_statistics(
                self.model,
                self.calibration,
                gradients=gradients,
                gram=gram,
                progress=lambda done, total: self._progress("calibration", done, total),
            )
        if not self.one_shot and self._calls is None:
            self._calls = record_calls(self.model, token_batches(self.calibration))

    def losses(self, metric: Metric, target: Target, update: Update, texts: Sequence[Tensor]) -> list[float]:
        """Mean loss on each text [windows, length] of the model pruned by one metric to one target.

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
        self, metric: Metric, target: Target, update: Update, texts: Sequence[Tensor]
    ) -> tuple[list[float], float, float]:
        """Losses by text, seconds of pruning, sparsity reached; `prepare` has been called for this metric."""
        with self.model.restored():
            start = time.perf_counter()
            self._prune(metric, target, _update_of(metric, update))
            seconds = time.perf_counter() - start
            return [mean_loss(self.model, tokens) for tokens in texts], seconds, sparsity(self.model)

    def _prune(self, metric: Metric, target: Target, update: Update) -> None:
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


def bench(
    model: str | None = None,
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
        model: a directory or Hub name; None is the demo model.
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
        for instance, has a row with the reason as `error`.

    Raises:
        InputError: for anything that cannot be used, before the model runs.
    """
    told = listener or BenchListener()
    targets = [parse_target(name) for name in target]
    chosen_update = check_update(update)
    names = list(dict.fromkeys(metric)) or list(BASELINES)
    for name in names:
        resolve_metric(name)
    source = open_text(default_text(model, calibration, "--calibration", "calibration"))
    sources = [open_text(name) for name in dict.fromkeys(text)] or [
        open_text(default_text(model, None, "--text", "test"))
    ]

    loaded = load_model(model, device=device, dtype=dtype, include=include, exclude=exclude)
    check_targets(loaded, targets)
    length = check_length(loaded, sequence_length)
    shuffle_seed = seed if shuffle else None
    sample = read_windows(loaded, source, length, samples, shuffle_seed)
    texts = [read_windows(loaded, one, length, windows, shuffle_seed) for one in sources]
    metrics = [resolve_metric(name, *sample.tokens.shape) for name in names]

    runner = Bench(loaded, sample.tokens, one_shot=one_shot, progress=told.progress)
    dense = {part.text.name: perplexity(mean_loss(loaded, part.tokens)) for part in texts}
    told.dense(dense)
    rows = []
    for row in runner.rows(metrics, targets, chosen_update, texts):
        told.row(row)
        rows.append(row)
    return {
        "model": loaded.name,
        "dtype": loaded.dtype,
        "device": str(loaded.device),
        "protocol": "one-shot" if one_shot else "sequential",
        "sequence_length": length,
        "seed": seed,
        "shuffle": shuffle,
        "calibration": sample.describe(),
        "texts": [part.describe() for part in texts],
        "layers": len(loaded.layers),
        "dense": dense,
        "results": [asdict(row) for row in rows],
        "versions": versions(),
    }
