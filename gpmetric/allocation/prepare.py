"""What a search begins with: a session's model calibrated, its levels, and what each of its layers is at each level."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpmetric.allocation.candidate_objective import check_memory, output_bytes
from gpmetric.allocation.evidence import Evidence, block_scores, saliency_counts
from gpmetric.allocation.level_masks import PrunedModel, level_codes
from gpmetric.allocation.level_weights import SolvedModel, database_bytes, solved_levels, solved_together
from gpmetric.allocation.levels import LevelTable, Numbers, level_table, within_reach
from gpmetric.allocation.request import ALLOCATORS, MOST_LEVELS, AllocateRequest
from gpmetric.blockwise.shelf import Shelf
from gpmetric.calibration.accumulators import LayerStatistics
from gpmetric.errors import METRIC_ERRORS
from gpmetric.evaluation.perplexity import AtHand
from gpmetric.evaluation.references import reference_bytes
from gpmetric.metrics import Metric
from gpmetric.models import Layer, Model
from gpmetric.operands import needs_gradients
from gpmetric.pruning.allocation import Allocation
from gpmetric.pruning.mask import select_mask
from gpmetric.pruning.protocol import Protocol
from gpmetric.pruning.updaters import needed_statistics, prune_weights, updater_of
from gpmetric.session.listeners import Listener, Progress
from gpmetric.session.reopening import Reopening
from gpmetric.session.session import Session, open_session
from gpmetric.session.work import Work
from gpmetric.session.workers import shared

__all__ = ["CalibratedModel", "allocate_work", "calibrate", "levels_of", "open_pruned"]

_EVALUATIONS = 800  # of a search whose length is told in minutes or tokens
_VALIDATED = 60  # candidates on validation, baselines among them
_IN_USE = 8  # allocations that are measured with the update in use


@dataclass(frozen=True)
class CalibratedModel:
    """A session's model whose layers can be pruned to any level."""

    request: AllocateRequest
    session: Session
    metric: Metric
    table: LevelTable
    pruned: PrunedModel
    blocks: list[int]  # by gene, the block it is in
    evidence: Evidence
    progress: Progress  # told of calibrating again

    @contextmanager
    def exactly(self, allocation: Allocation) -> Iterator[AtHand]:
        """Blocks pruned by an allocation that lies between levels; calibrated again, as only levels are kept."""
        self.pruned.dense()
        model, solves = self.session.model, self.request.solves
        with _solved_shelf(self.session) if solves else _shelf(model) as exact:
            for layer, statistics in _measured(self.session, _needed(self.request, self.metric), self.progress):
                target = allocation.targets[layer.name]
                if not solves:
                    score = self.metric(layer.weight, **statistics.operands)
                    exact.put(layer.name, {"mask": select_mask(score, target)})
                elif target.sparsity:
                    ((solved,),) = prune_weights(
                        [layer.weight], self.metric, [target], [statistics], self.request.update
                    )
                    exact.put(layer.name, {"weight": solved.to(layer.weight.dtype)})

            @contextmanager
            def at_hand(index: int) -> Iterator[None]:
                layers = model.blocks[index].layers
                with model.at_hand(index), model.holding([_exact(layer, exact) for layer in layers], layers):
                    yield

            yield at_hand

    def identity(self, request: AllocateRequest) -> dict[str, Any]:
        """All that a search depends on but its budget and the sparsity that nsga2 pays attention to.

        What older ledgers say nothing of is named only where it is not what they did.
        """
        names = ("genes", "allocator", "objective", "lowest", "highest", "population", "seed")
        model, windows = self.session.model, self.session.windows
        used = {"update": request.update, "fit": request.fit} if request.changes else {}
        steps = {"levels": request.steps} if request.steps != MOST_LEVELS else {}
        return (
            {name: getattr(request, name) for name in names}
            | used
            | steps
            | {
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
        )


def levels_of(model: Model, request: AllocateRequest, metric: Metric, *, finest: bool = False) -> LevelTable:
    """The levels that a request asks for; or the finest, which no weights are solved at.

    Raises:
        InputError: as `level_table`.
    """
    granularity = request.granularity or updater_of(metric, request.update).granularity or metric.granularity
    table = partial(level_table, model, granularity, request.genes, request.patterns)
    if finest or not request.solves:
        return table(steps=MOST_LEVELS if finest else request.steps)
    return table(steps=request.steps, within=within_reach(request.lowest, request.highest))


def allocate_work(session: Session) -> Work:
    """What `allocate` does with a session's model."""
    request, windows, model = session.inputs, session.windows, session.model
    assert isinstance(request, AllocateRequest)
    metric, search = session.metric(request.metric), windows["search"].tokens
    gradients = needs_gradients(_needed(request, metric))
    validated, asked = windows["validation"].tokens.numel(), request.budget.evaluations or _EVALUATIONS
    spent, scored, used = (0, 1, 2) if request.by_rule else (asked, _VALIDATED, _IN_USE)
    work = Work(
        block=_needed(request, metric),
        length=session.tokens.shape[1],
        calibration=session.tokens.numel(),
        texts=max(search.numel(), validated),
        rules=request.population,
        copied=True,
        differentiated=ALLOCATORS[request.allocator].search is not None,
        kept=0 if request.by_rule else output_bytes(model, search),
        fixed=0 if request.by_rule else reference_bytes(request.objective, model, search),
        per_weight=int(not request.by_rule),
        forward=session.tokens.numel() + spent * search.numel() + scored * validated,
        backward=session.tokens.numel() if gradients else 0,
    )
    work = shared(work, request, model)
    if not request.changes:
        return work
    protocol = Protocol(session, one_shot=False)
    use = protocol.work([metric], request.update, fit=request.fit, rules=used, texts=validated)
    work = replace(
        work,
        dense=use.dense,
        block=work.block | use.block,
        fits_blocks=use.fits_blocks,
        forward=work.forward + use.forward,
        backward=work.backward + use.backward,
    )
    if not request.solves:
        return work
    table = levels_of(model, request, metric)
    database = database_bytes(table, getattr(torch, model.dtype).itemsize)
    return replace(work, solves=True, solved=solved_together(table), per_weight=0, database=database)


def calibrate(request: AllocateRequest, progress: Progress, listener: Listener | None = None) -> CalibratedModel:
    """Opens and calibrates.

    Args:
        request: of which model, on what.
        progress: told of calibrating.
        listener: told of what it takes.

    Raises:
        InputError: model, texts or patterns cannot be used, or there is not enough memory for what would be kept.
        MaskError: the metric's scores are not finite.
        SolverError: the updater fails.
    """
    session = open_session(request, work=allocate_work, listener=listener)
    model = session.model
    if not request.by_rule:
        check_memory(model, session.windows["search"].tokens, request.objective)
    metric = session.metric(request.metric)
    table = levels_of(model, request, metric)
    _ = model.digest  # taken while dense
    shelf = _solved_shelf(session) if request.solves else _shelf(model)
    put = _put_solved if request.solves else _put_codes
    norms: dict[str, Tensor] = {}
    saliency: dict[str, Numbers] = {}
    for layer, statistics in _measured(session, _needed(request, metric), progress):
        norms[layer.name] = statistics["X"]
        if "F" in statistics.values:
            saliency[layer.name] = saliency_counts(layer.weight, statistics["F"])
        if request.by_rule:
            continue  # only the evidence is needed
        try:
            put(shelf, table, layer, metric, statistics, request.update)
        except METRIC_ERRORS as error:
            raise type(error)(f"metric {metric.name}: {error} (layer {layer.name})") from error
        del statistics  # before the next block is collected
    of_layer = [index for index, block in enumerate(model.blocks) for _ in block.layers]
    blocks = [of_layer[members[0]] for members in table.genes]
    counts = np.stack([saliency[name] for name in table.layers]) if saliency else None
    evidence = Evidence(*block_scores(model, norms), counts)
    pruned = _pruned_model(session, table, shelf)
    return CalibratedModel(request, session, metric, table, pruned, blocks, evidence, progress)


def open_pruned(place: Reopening, files: Mapping[Hashable, Path]) -> tuple[Session, PrunedModel]:
    """What `calibrate` opened and calibrated in another process, whose `PrunedModel` has these files."""
    session = place.open()
    request = session.inputs
    assert isinstance(request, AllocateRequest)
    table = levels_of(session.model, request, session.metric(request.metric))
    return session, _pruned_model(session, table, Shelf.of_files(files))


def _pruned_model(session: Session, table: LevelTable, shelf: Shelf) -> PrunedModel:
    request = session.inputs
    assert isinstance(request, AllocateRequest)
    return (SolvedModel if request.solves else PrunedModel)(session.model, table, shelf, session.plan.room)


def _needed(request: AllocateRequest, metric: Metric) -> frozenset[str]:
    """Statistics of the dense model that a request is calibrated with: without an update, those of scores alone."""
    if request.by_rule:
        return request.evidence | {"X"}
    names = needed_statistics([metric], request.update) if request.solves else frozenset(metric.operands)
    return names | request.evidence | {"X"}


def _put_codes(
    shelf: Shelf, table: LevelTable, layer: Layer, metric: Metric, statistics: LayerStatistics, update: str
) -> None:
    """What `PrunedModel` reads of a layer."""
    index = table.layers.index(layer.name)
    score = metric(layer.weight, **statistics.operands)
    shelf.put(index, {"codes": level_codes(score, table.targets[index], nested=table.nested)})


def _put_solved(
    shelf: Shelf, table: LevelTable, layer: Layer, metric: Metric, statistics: LayerStatistics, update: str
) -> None:
    """What `SolvedModel` reads of a layer."""
    index = table.layers.index(layer.name)
    for level, solved in solved_levels(layer.weight, metric, table.targets[index], statistics, update):
        shelf.put((index, level), {"weight": solved})


def _solved_shelf(session: Session) -> Shelf:
    """For pruned weights: in memory or in files, as the plan has it."""
    return Shelf(0 if session.plan.aside else None, torch.device("cpu"))


def _shelf(model: Model) -> Shelf:
    """For a byte per weight: in memory, or in files, mapped, where even the weights are."""
    return Shelf(None if model.resident else 0)


def _exact(layer: Layer, exact: Shelf) -> Tensor:
    """The pruned weight of a layer, of a shelf that has its mask, or the weight itself; or neither: nothing goes."""
    found = exact.get(layer.name) if layer.name in exact else {}
    if "mask" in found:
        return layer.weight.masked_fill(~found["mask"].to(layer.weight.device), 0)
    return found["weight"].to(layer.weight.device) if found else layer.weight


def _measured(session: Session, names: Collection[str], progress: Progress) -> Iterator[tuple[Layer, LayerStatistics]]:
    """Every layer, at hand, with its statistics; block by block, maybe from the last; those of one block are held."""
    model = session.model
    block_of = {layer.name: index for index, block in enumerate(model.blocks) for layer in block.layers}
    for found in session.blocks(names, progress):
        for index in {block_of[name] for name in found}:
            with model.at_hand(index):
                for layer in model.blocks[index].layers:
                    yield layer, found.pop(layer.name)
