"""A session: one loaded model with its windows by split, and what is measured of it while it is dense."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from gpmetric.blockwise.replay import BlockCalls, record_calls
from gpmetric.blockwise.shelf import Shelf
from gpmetric.calibration.accumulators import LayerStatistics
from gpmetric.calibration.cache import cache_key, cached_statistics, estimate_bytes
from gpmetric.calibration.collect import Statistics, collect_blocks, token_batches
from gpmetric.data import Windows
from gpmetric.errors import GpmetricError, InputError
from gpmetric.files import cache_folder
from gpmetric.loading import load_model
from gpmetric.metrics import Metric, resolve_metric
from gpmetric.models import Model
from gpmetric.provenance import versions
from gpmetric.session.inputs import Inputs, parse_size
from gpmetric.session.splits import Sources, open_sources, read_splits

__all__ = ["Listener", "Progress", "Session", "open_model", "open_session"]

Progress = Callable[[str, int, int], None]  # what, done, in all


def _silent(what: str, done: int, total: int) -> None:
    """Tells nobody."""


class Listener:
    """What every command tells while it runs; each adds its own, and every method may be overridden."""

    def progress(self, what: str, done: int, total: int) -> None:
        """A step has come so far."""

    def dense(self, ppl: Mapping[str, float]) -> None:
        """Perplexity of the dense model by text or split, before anything is pruned."""


@dataclass
class Session:
    """A model as it was loaded, what it reads, and what was measured of it.

    Attributes:
        inputs: what was asked for.
        model: dense whenever statistics or calls are asked for that are not at hand.
        windows: by split.
        evaluated: windows of the texts that perplexity is measured on.
        dense: statistics of the dense model that are at hand.
    """

    inputs: Inputs
    model: Model
    windows: Mapping[str, Windows] = field(default_factory=dict)
    evaluated: list[Windows] = field(default_factory=list)
    dense: Statistics | None = None

    @property
    def tokens(self) -> Tensor:
        """[samples, length], int64: the calibration windows."""
        return self.windows["calibration"].tokens

    def metric(self, text: str) -> Metric:
        """The metric behind a text, of as many sequences and tokens as the calibration has."""
        return resolve_metric(text, *self.tokens.shape)

    def statistics(self, names: Collection[str], progress: Progress = _silent) -> Statistics:
        """Statistics of the dense model by name; what is at hand already is not collected again."""
        held = frozenset[str]() if self.dense is None else self.dense.names
        missing = held.union(names) - held
        if self.dense is None or missing:
            self.require(held | missing)
            found = {name: one for block in self.blocks(missing, progress) for name, one in block.items()}
            if self.dense is not None:
                before = self.dense.layers
                found = {name: LayerStatistics(**{**one.values, **before[name].values}) for name, one in found.items()}
            self.dense = Statistics({layer.name: found[layer.name] for layer in self.model.layers}, *self.tokens.shape)
        return self.dense

    def blocks(self, names: Collection[str], progress: Progress = _silent) -> Iterator[dict[str, LayerStatistics]]:
        """Statistics of the model as it is, block by block, of which nothing is kept."""
        return collect_blocks(self.model, self.tokens, names, progress=partial(progress, "calibration"))

    def stored_statistics(self, names: Collection[str], folder: Path | None, progress: Progress = _silent) -> Path:
        """The file of the statistics cache that holds statistics of the dense model, written if it is not there.

        Args:
            names: of the statistics.
            folder: of the cache; the user's by default.
            progress: told of the collecting.

        Raises:
            GpmetricError: the disk has no room for them, or the folder cannot be written.
        """
        self.require(names)
        folder = folder or cache_folder()
        _check_room(folder, estimate_bytes(self.model, names))
        key = cache_key(self.model, self.tokens, names)
        self.dense, path = cached_statistics(folder, key, lambda: self.statistics(names, progress))
        return path

    @cached_property
    def calls(self) -> BlockCalls:
        """How the dense model calls its blocks on the calibration windows."""
        return record_calls(self.model, token_batches(self.tokens))

    @cached_property
    def shelf(self) -> Shelf:
        """Where hidden states are on their way through the blocks."""
        return Shelf()

    def forget(self) -> None:
        """Lets go of what was measured of the dense model."""
        self.dense = None
        vars(self).pop("calls", None)

    def calibrated_on(self, windows: Windows) -> Session:
        """The same model calibrated on other windows; nothing measured is shared."""
        return replace(self, windows={**self.windows, "calibration": windows}, dense=None)

    def require(self, names: Collection[str]) -> None:
        """Refuses statistics that with the model would need more memory than the request allows.

        Raises:
            InputError: naming both sizes, and what takes less.
        """
        limit = self.inputs.memory and parse_size(self.inputs.memory)
        needed = self.bytes(names)
        if limit and needed > limit:
            raise InputError(
                f"--memory {self.inputs.memory}: model and statistics need about {needed / 1e9:.3g} GB; allow more, "
                "take metrics of fewer operands, --include fewer layers, or --dtype bfloat16"
            )

    def bytes(self, names: Collection[str]) -> int:
        """Memory that the model, a copy of its prunable weights, and statistics take, in bytes."""
        weights: int = sum(one.nbytes for one in self.model.module.parameters())
        copies = sum(layer.parameter.nbytes for layer in self.model.layers)
        return weights + copies + estimate_bytes(self.model, names)

    def describe(self) -> dict[str, Any]:
        """What every result says of where it came from."""
        return {
            "model": self.model.name,
            "dtype": self.model.dtype,
            "device": str(self.model.device),
            "seed": self.inputs.seed,
            "shuffle": self.inputs.shuffle,
            "versions": versions(),
        }


def open_model(inputs: Inputs, name: str | None, *, resident: bool = False) -> Model:
    """One model of a request, on its device, in its dtype, with its choice of layers.

    Args:
        inputs: the request.
        name: of the model.
        resident: whether all its weights have to be on the device, whatever memory there is.
    """
    resident = resident or not os.environ.get("STREAM")
    chosen = {option: getattr(inputs, option) for option in ("device", "dtype", "include", "exclude")}
    return load_model(name, resident=resident, **chosen)


def open_session(
    inputs: Inputs, name: str | None = None, sources: Sources | None = None, *, resident: bool = False
) -> Session:
    """Opens what a request names: the texts first, which fail soonest, then the model, then its windows.

    Args:
        inputs: the request.
        name: which of its models; the first by default.
        sources: its texts, where they are open already.
        resident: as of `open_model`.

    Raises:
        InputError: for anything that cannot be used.
    """
    sources = sources or open_sources(inputs)
    model = open_model(inputs, inputs.models[0] if name is None else name, resident=resident)
    return Session(inputs, model, *read_splits(model, inputs, sources))


def _check_room(folder: Path, size: int) -> None:
    """Refuses to start what the disk cannot hold."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if size > free:
        raise GpmetricError(
            f"the statistics need {size / 2**30:.1f} GiB, but {str(folder)!r} has {free / 2**30:.1f} GiB free: "
            "choose another --cache, fewer --operands, or --include fewer layers"
        )
