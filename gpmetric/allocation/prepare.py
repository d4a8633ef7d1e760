"""What a search begins with: a session's model calibrated, its levels, and the level at which each weight goes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpmetric.allocation.candidate_objective import check_memory
from gpmetric.allocation.level_masks import PrunedModel, level_codes
from gpmetric.allocation.levels import LevelTable, level_table
from gpmetric.allocation.request import ALLOCATORS, AllocateRequest
from gpmetric.errors import MaskError
from gpmetric.metrics import Metric
from gpmetric.models import Model
from gpmetric.pruning.allocation import Allocation
from gpmetric.pruning.mask import select_mask
from gpmetric.session.session import Progress, Session, open_session

__all__ = ["CalibratedModel", "calibrate"]

_OUTLIER = 5.0  # times the mean score; OWL's M


@dataclass(frozen=True)
class CalibratedModel:
    """A session's model whose layers can be pruned to any level."""

    session: Session
    metric: Metric
    table: LevelTable
    pruned: PrunedModel
    blocks: list[int]  # by gene, the block it is in
    outliers: list[float]  # by block, OWL's share of outliers in per cent
    progress: Progress  # told of calibrating again

    @contextmanager
    def exactly(self, allocation: Allocation) -> Iterator[None]:
        """The model pruned by an allocation that lies between levels; calibrated again, as only levels are kept."""
        self.pruned.dense()
        model = self.session.model
        weights: list[Tensor] = []
        scores = _scores(self.session, self.metric, self.progress)
        for layer, (name, score, _) in zip(model.layers, scores, strict=True):
            weights.append(layer.weight.masked_fill(~select_mask(score, allocation.targets[name]), 0))
        with model.holding(weights):
            yield

    def identity(self, request: AllocateRequest) -> dict[str, Any]:
        """All that a search depends on but its budget and the sparsity that nsga2 pays attention to."""
        names = ("genes", "allocator", "objective", "lowest", "highest", "population", "seed")
        model, windows = self.session.model, self.session.windows
        return {name: getattr(request, name) for name in names} | {
            "model": model.digest,
            "dtype": model.dtype,
            "device": model.device.type,
            "metric": str(self.metric.expression),
            "granularity": self.table.granularity,
            "patterns": None if self.table.nested else list(request.patterns),
            "searched": request.sparsity if ALLOCATORS[request.allocator].one_sparsity else None,
            "layers": list(self.table.layers),
            "calibration": windows["calibration"].tokens_digest,
            "search": windows["search"].tokens_digest,
        }


def calibrate(request: AllocateRequest, progress: Progress) -> CalibratedModel:
    """Opens and calibrates.

    Raises:
        InputError: model, texts or patterns cannot be used, or there is not enough memory for what would be kept.
        MaskError: the metric's scores are not finite.
    """
    session = open_session(request)
    model = session.model
    check_memory(model, session.windows["search"].tokens, request.objective)
    metric = session.metric(request.metric)
    session.require(metric.operands if request.chunk_layers is None else ())
    table = level_table(model, request.granularity or metric.granularity, request.genes, request.patterns)
    _ = model.digest  # taken while dense
    codes: list[Tensor] = []
    norms: dict[str, Tensor] = {}
    for name, score, norm in _scores(session, metric, progress):
        norms[name] = norm
        try:
            codes.append(level_codes(score, table.targets[len(codes)], nested=table.nested))
        except MaskError as error:
            raise MaskError(f"metric {metric.name}: {error} (layer {name})") from error
    of_layer = [index for index, block in enumerate(model.blocks) for _ in block.layers]
    blocks = [of_layer[members[0]] for members in table.genes]
    pruned = PrunedModel(model, table, codes)
    return CalibratedModel(session, metric, table, pruned, blocks, _outlier_shares(model, norms), progress)


def _scores(session: Session, metric: Metric, progress: Progress) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of every layer in order: name, scores [out, in], X [in]; statistics of one chunk of layers are held at a time."""
    weights = {layer.name: layer.weight for layer in session.model.layers}
    for chunk in session.chunks(metric.operands, progress):  # what scores need; an updater's statistics are of no use
        for name in list(chunk):
            statistics = chunk.pop(name)
            yield name, metric(weights[name], **statistics.operands), statistics["X"]
            del statistics  # before the next chunk is collected


@torch.no_grad()
def _outlier_shares(model: Model, norms: Mapping[str, Tensor]) -> list[float]:
    """By block, OWL's share of scores abs(W)*X that are outliers, in per cent; `norms` is X [in] by layer name."""
    shares = []
    for block in model.blocks:
        scores = [layer.weight.abs().float() * norms[layer.name] for layer in block.layers]
        entries = sum(score.numel() for score in scores)
        if not entries:
            shares.append(0.0)
            continue
        mean = sum(score.sum(dtype=torch.float64).item() for score in scores) / entries
        shares.append(100 * sum(int((score > _OUTLIER * mean).sum()) for score in scores) / entries)
    return shares
