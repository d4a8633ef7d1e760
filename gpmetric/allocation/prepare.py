"""What a search begins with: the model, its texts, the levels, and the level at which each weight goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from gpmetric.allocation.allocators import outlier_shares
from gpmetric.allocation.deaths import PrunedModel, death_levels
from gpmetric.allocation.levels import Ladder, mix_ladder, quantum_ladder
from gpmetric.allocation.meter import check_memory
from gpmetric.allocation.request import Request
from gpmetric.calibration.accumulators import LayerStatistics
from gpmetric.calibration.collect import collect_chunks
from gpmetric.data import Windows
from gpmetric.errors import MaskError, one_of
from gpmetric.evaluation.windows import check_length, read_splits
from gpmetric.models import Model, load_model
from gpmetric.pruning.allocation import Allocation
from gpmetric.pruning.mask import select_mask
from gpmetric.pruning.metrics import Metric, resolve_metric
from gpmetric.pruning.prune import score_weight
from gpmetric.pruning.target import GRANULARITIES

__all__ = ["Prepared", "prepare"]


@dataclass(frozen=True)
class Prepared:
    """A model whose layers can be pruned to any level, and what came of its calibration.

    Attributes:
        blocks: by gene, the block it is in.
        outliers: by block, OWL's share of outliers in per cent.
        chunks: collects the statistics of the dense model, chunk of layers by chunk.
    """

    model: Model
    metric: Metric
    splits: Mapping[str, Windows]
    ladder: Ladder
    pruned: PrunedModel
    blocks: list[int]
    outliers: list[float]
    chunks: Callable[[], Iterator[dict[str, LayerStatistics]]]

    @contextmanager
    def exactly(self, allocation: Allocation) -> Iterator[None]:
        """The model pruned by an allocation that lies between levels; calibrated again, as only levels are kept."""
        self.pruned.dense()
        layers = {layer.name: layer for layer in self.model.layers}
        weights: dict[str, Tensor] = {}
        for chunk in self.chunks():
            for name, statistics in chunk.items():
                score = score_weight(layers[name].weight, self.metric, statistics)
                weights[name] = layers[name].weight.masked_fill(~select_mask(score, allocation.targets[name]), 0)
            chunk.clear()
        with self.model.holding([weights[name] for name in layers]):
            yield

    def identity(self, request: Request) -> dict[str, Any]:
        """All that a search depends on but its budget and the sparsity that nsga2 pays attention to."""
        names = ("genes", "allocator", "objective", "lowest", "highest", "population", "seed")
        return {name: getattr(request, name) for name in names} | {
            "model": self.model.digest,
            "dtype": self.model.dtype,
            "device": self.model.device.type,
            "metric": str(self.metric.expression),
            "granularity": self.ladder.granularity,
            "patterns": list(request.patterns) if self.ladder.granularity == "n:m" else None,
            "searched": request.sparsity if request.allocator == "evopress" else None,
            "layers": list(self.ladder.layers),
            "calibration": self.splits["calibration"].tokens_digest,
            "search": self.splits["search"].tokens_digest,
        }


def prepare(request: Request, progress: Callable[[str, int, int], None]) -> Prepared:
    """Loads and calibrates.

    Raises:
        InputError: model, texts or patterns cannot be used, or the dense predictions would not fit into memory.
        MaskError: the metric's scores are not finite.
    """
    model = load_model(
        request.model, device=request.device, dtype=request.dtype, include=request.include, exclude=request.exclude
    )
    splits = read_splits(
        model,
        request.model,
        {"calibration": request.calibration, "search": request.search, "validation": request.validation},
        check_length(model, request.sequence_length),
        {"calibration": request.samples, "search": request.search_windows, "validation": request.windows},
        request.seed if request.shuffle else None,
    )
    check_memory(model, splits["search"].tokens, request.objective)
    metric = resolve_metric(request.metric, *splits["calibration"].tokens.shape)
    granularity = one_of("--granularity", request.granularity or metric.granularity, GRANULARITIES)
    if granularity == "n:m":
        ladder = mix_ladder(model, request.patterns, request.genes)
    else:
        ladder = quantum_ladder(model, granularity, request.genes)
    _ = model.digest  # taken while dense
    deaths: list[Tensor] = []
    norms: dict[str, Tensor] = {}
    layers = {layer.name: layer for layer in model.layers}
    chunks = partial(
        collect_chunks,
        model,
        splits["calibration"].tokens,
        gradients=metric.needs_gradients,
        fisher=metric.needs_fisher,
        gram=metric.needs_gram,
        chunk_layers=request.chunk_layers,
        progress=partial(progress, "calibration"),
    )
    for chunk in chunks():
        for name, statistics in chunk.items():
            norms[name] = statistics.X
            deaths.append(_deaths(name, layers[name].weight, metric, statistics, ladder, len(deaths)))
        chunk.clear()  # before the next one is collected
        del statistics
    of_layer = [index for index, block in enumerate(model.blocks) for _ in block.layers]
    blocks = [of_layer[members[0]] for members in ladder.genes]
    outliers = outlier_shares(model, norms)
    pruned = PrunedModel(model, ladder, deaths)
    return Prepared(model, metric, splits, ladder, pruned, blocks, outliers, chunks)


def _deaths(
    name: str, weight: Tensor, metric: Metric, statistics: LayerStatistics, ladder: Ladder, index: int
) -> Tensor:
    try:
        return death_levels(score_weight(weight, metric, statistics), ladder.targets[index], nested=ladder.nested)
    except MaskError as error:
        raise MaskError(f"metric {metric.name}: {error} (layer {name})") from error
