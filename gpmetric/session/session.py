"""A session: one loaded model with its windows by split, and what is measured of it while it is dense."""

from __future__ import annotations

import gc
import inspect
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpmetric.blockwise.replay import BlockCalls, record_calls
from gpmetric.blockwise.shelf import Shelf
from gpmetric.calibration.accumulators import LayerStatistics
from gpmetric.calibration.cache import (
    Sample,
    cache_key,
    cached_statistics,
    estimate_bytes,
    load_statistics,
    stored_dtype,
)
from gpmetric.calibration.collect import Statistics, collect_blocks, count_tokens, needs_pairs, token_batches
from gpmetric.calibration.siblings import borrowing
from gpmetric.data import Windows, leading_bos, left_out
from gpmetric.errors import GpmetricError
from gpmetric.experts import expert_family
from gpmetric.files import cache_folder
from gpmetric.loading import open_model, prepare_model
from gpmetric.metrics import Metric, resolve_metric
from gpmetric.models import Model
from gpmetric.plugins import in_use
from gpmetric.provenance import versions
from gpmetric.session.inputs import Inputs
from gpmetric.session.listeners import Listener, Progress, silent
from gpmetric.session.memory import free_disk
from gpmetric.session.plan import Plan, make_plan
from gpmetric.session.splits import Sources, open_sources, read_splits
from gpmetric.session.work import Work

__all__ = ["Session", "check_disk", "open_session", "opened_model", "plan_command", "plan_session"]

_LOG = logging.getLogger(__name__)
_OPENING = "opening the model"


@dataclass
class Session:
    """A model as it was loaded, what it reads, and what was measured of it.

    Attributes:
        inputs: what was asked for.
        model: dense whenever statistics or calls are asked for that are not at hand.
        windows: by split.
        evaluated: windows of the texts that perplexity is measured on.
        dense: statistics of the dense model that are at hand.
        plan: where weights and statistics are.
        told: of opening the model, and of what is written on the way.
        starved: layers of experts that read too little, so that a statistic of theirs is their siblings'.
        starved_pruned: such layers in models that were pruned, whose routers choose others.
    """

    inputs: Inputs
    model: Model
    windows: Mapping[str, Windows] = field(default_factory=dict)
    evaluated: list[Windows] = field(default_factory=list)
    dense: Statistics | None = None
    plan: Plan = field(default_factory=Plan)
    told: Listener = field(default_factory=Listener)
    starved: set[str] = field(default_factory=set)
    starved_pruned: set[str] = field(default_factory=set)

    def start(self) -> None:
        """Brings the model to where the plan wants it, and checks that it gives figures with a meaning."""
        self.model = prepare_model(self.model, resident=self.plan.resident, progress=self.told.progress)
        if self.model.placement is not None:
            self.model.placement.room = self.plan.room

    def release(self) -> None:
        """Lets go of the model's weights: only its shapes and names are left."""
        self.model.module.to("meta")
        gc.collect()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def tokens(self) -> Tensor:
        """[samples, length], int64: the calibration windows."""
        return self.windows["calibration"].tokens

    def metric(self, text: str) -> Metric:
        """The metric behind a text, of as many sequences and tokens as the calibration has."""
        return resolve_metric(text, *self.tokens.shape)

    def statistics(self, names: Collection[str], progress: Progress = silent) -> Statistics:
        """Statistics of the dense model by name; what is at hand already is not collected again."""
        held = frozenset[str]() if self.dense is None else self.dense.names
        missing = held.union(names) - held
        if self.dense is None or missing:
            store = _Store(self.model, self.plan, self.inputs.kept_dtype)
            for block in self.blocks(missing, progress):
                for name in list(block):
                    before = {} if self.dense is None else self.dense.layers[name].values
                    store.put(name, {**block.pop(name).values, **before})
            self.dense = Statistics(store, *self.tokens.shape)
            self._note_starved(missing)
        return self.dense

    def blocks(self, names: Collection[str], progress: Progress = silent) -> Iterator[dict[str, LayerStatistics]]:
        """Statistics of the model as it is, block by block, of which nothing is kept."""
        told, plan = partial(progress, "calibration"), self.plan
        return collect_blocks(self.model, self.tokens, names, progress=told, at_once=plan.kept, room=plan.room)

    def stored_statistics(self, names: Collection[str], folder: Path | None, progress: Progress = silent) -> Path:
        """The file of the statistics cache that holds statistics of the dense model, written if it is not there.

        Args:
            names: of the statistics.
            folder: of the cache; the user's by default.
            progress: told of the collecting.

        Raises:
            GpmetricError: the disk has no room for them, or the folder cannot be written.
        """
        folder = folder or cache_folder()
        names = frozenset({"X", *names})
        dtype = self.inputs.kept_dtype
        size = estimate_bytes(self.model.layers, names, dtype)
        check_disk("--cache", folder, size)
        key = cache_key(self.model, self.tokens, names, dtype)
        sample = Sample.of(self.model, self.tokens, names, dtype)

        def blocks() -> Iterator[dict[str, LayerStatistics]]:
            self.told.stores("statistics", folder, size)
            return self.blocks(names, progress)

        path = cached_statistics(folder, key, sample, blocks, partial(self.told.progress, "checking statistics"))
        self.dense = load_statistics(path, str(self.model.device), kept=self.plan.kept)
        self._note_starved(names)
        return path

    @cached_property
    def expert_tokens(self) -> dict[str, int]:
        """By layer of a mixture's experts, how many calibration tokens the dense model has it read."""
        progress = partial(self.told.progress, "counting experts' tokens")
        return count_tokens(self.model, self.tokens, self.plan.room, progress)

    def experts(self, *, pruned: bool = True) -> dict[str, Any]:
        """What a result says of a mixture's experts: tokens by layer, and who lived on siblings; of others nothing.

        Args:
            pruned: whether those count that read too little in pruned models.
        """
        if not self._has_experts:
            return {}
        named = self.starved | (self.starved_pruned if pruned else set())
        starved = [layer.name for layer in self.model.layers if layer.name in named]
        return {"experts": {"tokens": self.expert_tokens, "starved": starved}}

    @property
    def _has_experts(self) -> bool:
        return any(expert_family(layer.name) for layer in self.model.layers)

    def note_borrowed(self, statistics: Mapping[str, LayerStatistics]) -> None:
        """Of statistics by layer of a block of a pruned model, who has a sibling's."""
        self.starved_pruned |= {name for name, one in statistics.items() if one.borrowed}

    def _note_starved(self, names: Collection[str]) -> None:
        """Of statistics of the dense model, that may come from a file."""
        if self._has_experts:
            layers = [layer for layer in self.model.layers if layer.name in self.expert_tokens]
            self.starved |= set(borrowing(layers, self.expert_tokens, pairs=needs_pairs(names)))

    @cached_property
    def calls(self) -> BlockCalls:
        """How the dense model calls its blocks on the calibration windows."""
        return record_calls(self.model, token_batches(self.tokens, self.model.batch_tokens), self.shelf)

    @cached_property
    def shelf(self) -> Shelf:
        """Where hidden states are on their way through the blocks."""
        return Shelf() if self.plan.states else self.plan.shelf()

    @cached_property
    def left_out(self) -> list[str]:
        """What the model may have been trained with and windows are without, in words."""
        accepted = frozenset(inspect.signature(self.model.module.forward).parameters)
        return left_out(self.model.tokenizer, accepted, leading_bos(self.model.tokenizer, self.inputs.bos))

    def forget(self) -> None:
        """Lets go of what was measured of the dense model."""
        self.dense = None
        self.forget_calls()

    def forget_calls(self) -> None:
        """Lets go of how the model calls its blocks, as batches are other ones now."""
        vars(self).pop("calls", None)

    def calibrated_on(self, windows: Windows) -> Session:
        """The same model calibrated on other windows; nothing measured is shared."""
        return replace(
            self, windows={**self.windows, "calibration": windows}, dense=None, starved=set(), starved_pruned=set()
        )

    def describe(self) -> dict[str, Any]:
        """What every result says of where it came from."""
        unused = self.inputs.unused
        return {
            "model": self.model.name,
            "dtype": self.model.dtype,
            "device": str(self.model.device),
            "seed": self.inputs.seed,
            "shuffle": self.inputs.shuffle,
            "bos": self.inputs.bos,
            "text_column": self.inputs.text_column,
            "left_out": self.left_out,
            "versions": versions(),
            **in_use("plugins"),
        } | {name: getattr(self.inputs, name) for name in ("sampling", "statistics_dtype") if name not in unused}


def open_session(
    inputs: Inputs,
    name: str | None = None,
    sources: Sources | None = None,
    *,
    work: Callable[[Session], Work] | None = None,
    listener: Listener | None = None,
) -> Session:
    """Opens what a request names: the texts first, which fail soonest, then the model, then its windows.

    Args:
        inputs: the request.
        name: which of its models; the first by default.
        sources: its texts, where they are open already.
        work: what is going to be done, which decides where weights and statistics are; everything is on the device
            where it is not told.
        listener: told of opening, and of the plan.

    Raises:
        InputError: for anything that cannot be used, or that takes more memory than there is.
    """
    session = plan_session(inputs, name, sources, work=work, listener=listener)
    session.start()
    return session


def plan_session(
    inputs: Inputs,
    name: str | None = None,
    sources: Sources | None = None,
    *,
    work: Callable[[Session], Work] | None = None,
    listener: Listener | None = None,
) -> Session:
    """The same session before the model's weights are read, with its plan; `start` makes it ready."""
    told = listener or Listener()
    sources = sources or open_sources(inputs)
    model = opened_model(inputs, name, told.progress)
    session = Session(inputs, model, *read_splits(model, inputs, sources, told.progress), told=told)
    if session.left_out:
        _LOG.warning("%s: windows are without %s", model.name, ", ".join(session.left_out))
    if work is not None:
        plan = make_plan(model, work(session), inputs.memory_limit)
        session.plan = replace(plan, seconds=min(plan.seconds, 60 * (inputs.minutes or math.inf)))
        told.needs(session.plan)
    return session


def opened_model(inputs: Inputs, name: str | None, progress: Progress) -> Model:
    """A model of a request, the first by default, opened as it asks for; its weights are not read."""
    chosen = inputs.models[0] if name is None else name
    progress(_OPENING, 0, 1)
    model = open_model(chosen, device=inputs.device, dtype=inputs.dtype, include=inputs.include, exclude=inputs.exclude)
    progress(_OPENING, 1, 1)
    return replace(model, hashing=partial(progress, "hashing weights"))


def plan_command(request: Inputs, *, work: Callable[[Session], Work]) -> dict[str, Any]:
    """What a command would take; nothing is run.

    Returns:
        `memory_bytes`, `host_bytes`, `disk_bytes`, `seconds` and how the model would be held; of several models, the
        most of each, or what all take that are held at the same time, and the seconds of all.

    Raises:
        InputError: as of `open_session`.
    """
    sources = open_sources(request)
    sessions = [plan_session(request, name, sources, work=work) for name in request.models]
    plans = [session.plan.describe() for session in sessions]
    joined = sum if work(sessions[0]).models > 1 else max
    taken = {name: joined(plan[name] for plan in plans) for name in ("memory_bytes", "host_bytes", "disk_bytes")}
    return plans[0] | taken | {"seconds": sum(plan["seconds"] for plan in plans)}


class _Store(Mapping[str, LayerStatistics]):
    """Statistics by layer: on the device, or where the plan puts them; what is not kept is read when asked for."""

    def __init__(self, model: Model, plan: Plan, dtype: torch.dtype | None) -> None:
        self._dtype = dtype
        self._names = [layer.name for layer in model.layers]
        self._device = model.device
        self._kept: dict[str, LayerStatistics] = {}
        self._shelf = None if plan.kept else plan.shelf()

    def put(self, name: str, values: Mapping[str, Tensor]) -> None:
        kept = {key: value.to(stored_dtype(key, self._dtype)) for key, value in values.items()}
        if self._shelf is None:
            self._kept[name] = LayerStatistics(**kept)
        else:
            self._shelf.put(name, kept)

    def __getitem__(self, name: str) -> LayerStatistics:
        if self._shelf is None:
            return self._kept[name]
        return LayerStatistics(**{key: one.to(self._device) for key, one in self._shelf.get(name).items()})

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def check_disk(option: str, folder: Path, size: int) -> None:
    """Refuses to start what the disk of a folder that an option names cannot hold.

    Raises:
        GpmetricError: naming what is needed and what is free, in GiB.
    """
    free = free_disk(folder)
    if size > free:
        raise GpmetricError(
            f"the statistics need {size / 2**30:.1f} GiB, but {str(folder)!r} has {free / 2**30:.1f} GiB free: "
            f"choose another {option}, fewer --operands, or --include fewer layers"
        )
