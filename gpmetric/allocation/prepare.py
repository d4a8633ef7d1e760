"""What a search begins with: a session's model calibrated, its levels, and the level at which each weight goes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpmetric.allocation.candidate_objective import check_memory, output_bytes
from gpmetric.allocation.level_masks import PrunedModel, level_codes
from gpmetric.allocation.levels import LevelTable, level_table
from gpmetric.allocation.request import ALLOCATORS, AllocateRequest
from gpmetric.blockwise.shelf import Shelf
from gpmetric.errors import MaskError
from gpmetric.evaluation.perplexity import AtHand
from gpmetric.evaluation.references import reference_bytes
from gpmetric.metrics import Metric
from gpmetric.models import Layer, Model
from gpmetric.operands import needs_gradients
from gpmetric.pruning.allocation import Allocation
from gpmetric.pruning.mask import select_mask
from gpmetric.session.plan import Work
from gpmetric.session.session import Listener, Progress, Session, open_session

__all__ = ["CalibratedModel", "allocate_work", "calibrate"]

_EVALUATIONS = 800  # of a search whose length is told in minutes or tokens
_VALIDATED = 60  # candidates on validation, baselines among them
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
    def exactly(self, allocation: Allocation) -> Iterator[AtHand]:
        """Blocks pruned by an allocation that lies between levels; calibrated again, as only levels are kept."""
        self.pruned.dense()
        model = self.session.model
        with _shelf(model) as masks:
            for layer, score, _ in _scores(self.session, self.metric, self.progress):
                masks.put(layer.name, {"mask": select_mask(score, allocation.targets[layer.name])})

            @contextmanager
            def at_hand(index: int) -> Iterator[None]:
                layers = model.blocks[index].layers
                with model.at_hand(index), model.holding([_masked(layer, masks) for layer in layers], layers):
                    yield

            yield at_hand

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


def allocate_work(session: Session) -> Work:
    """What `allocate` does with a session's model."""
    request, windows, model = session.inputs, session.windows, session.model
    assert isinstance(request, AllocateRequest)
    metric, search = session.metric(request.metric), windows["search"].tokens
    gradients = needs_gradients(metric.operands)
    spent, validated = request.budget.evaluations or _EVALUATIONS, windows["validation"].tokens.numel()
    return Work(
        block=frozenset({"X", *metric.operands}),
        length=session.tokens.shape[1],
        calibration=session.tokens.numel(),
        texts=max(search.numel(), validated),
        rules=request.population,
        copied=True,
        differentiated=ALLOCATORS[request.allocator].search is not None,
        kept=output_bytes(model, search),
        fixed=reference_bytes(request.objective, model, search),
        per_weight=1,
        forward=session.tokens.numel() + spent * search.numel() + _VALIDATED * validated,
        backward=session.tokens.numel() if gradients else 0,
    )


def calibrate(request: AllocateRequest, progress: Progress, listener: Listener | None = None) -> CalibratedModel:
    """Opens and calibrates.

    Args:
        request: of which model, on what.
        progress: told of calibrating.
        listener: told of what it takes.

    Raises:
        InputError: model, texts or patterns cannot be used, or there is not enough memory for what would be kept.
        MaskError: the metric's scores are not finite.
    """
    session = open_session(request, work=allocate_work, listener=listener)
    model = session.model
    check_memory(model, session.windows["search"].tokens, request.objective)
    metric = session.metric(request.metric)
    table = level_table(model, request.granularity or metric.granularity, request.genes, request.patterns)
    _ = model.digest  # taken while dense
    codes = _shelf(model)
    norms: dict[str, Tensor] = {}
    for layer, score, norm in _scores(session, metric, progress):
        norms[layer.name] = norm
        index = table.layers.index(layer.name)
        try:
            codes.put(index, {"codes": level_codes(score, table.targets[index], nested=table.nested)})
        except MaskError as error:
            raise MaskError(f"metric {metric.name}: {error} (layer {layer.name})") from error
    of_layer = [index for index, block in enumerate(model.blocks) for _ in block.layers]
    blocks = [of_layer[members[0]] for members in table.genes]
    pruned = PrunedModel(model, table, codes, session.plan.room)
    return CalibratedModel(session, metric, table, pruned, blocks, _outlier_shares(model, norms), progress)


def _shelf(model: Model) -> Shelf:
    """For a byte per weight: in memory, or in files, mapped, where even the weights are."""
    return Shelf(None if model.resident else 0)


def _masked(layer: Layer, masks: Shelf) -> Tensor:
    mask = masks.get(layer.name)["mask"].to(layer.weight.device)
    return layer.weight.masked_fill(~mask, 0)


def _scores(session: Session, metric: Metric, progress: Progress) -> Iterator[tuple[Layer, Tensor, Tensor]]:
    """Of every layer: scores [out, in], X [in]; block by block, maybe from the last; statistics of one are held."""
    model = session.model
    block_of = {layer.name: index for index, block in enumerate(model.blocks) for layer in block.layers}
    for found in session.blocks(metric.operands, progress):  # what scores need; an updater's statistics are of no use
        for index in {block_of[name] for name in found}:
            with model.at_hand(index):
                for layer in model.blocks[index].layers:
                    statistics = found.pop(layer.name)
                    yield layer, metric(layer.weight, **statistics.operands), statistics["X"]
                    del statistics  # before the next block is collected


@torch.no_grad()
def _outlier_shares(model: Model, norms: Mapping[str, Tensor]) -> list[float]:
    """By block, OWL's share of scores abs(W)*X that are outliers, in per cent; `norms` is X [in] by layer name."""
    shares = []
    for index, block in enumerate(model.blocks):
        entries = sum(layer.weight.numel() for layer in block.layers)
        if not entries:
            shares.append(0.0)
            continue
        with model.at_hand(index):
            scores = [layer.weight.abs().float() * norms[layer.name] for layer in block.layers]
        mean = sum(score.sum(dtype=torch.float64).item() for score in scores) / entries
        shares.append(100 * sum(int((score > _OUTLIER * mean).sum()) for score in scores) / entries)
    return shares
