"""Where a campaign works: its models with their texts and statistics, and the executor that evaluates on them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from gpmetric.calibration.cache import cache_key, cached_statistics, default_cache, estimate_bytes
from gpmetric.calibration.collect import Statistics, collect_statistics
from gpmetric.data import Windows
from gpmetric.errors import GpmetricError
from gpmetric.evaluation.windows import check_length
from gpmetric.evolution.ensemble import label, open_workplaces
from gpmetric.evolution.evaluator import Workplace
from gpmetric.evolution.executors import Executor, LocalProcesses, Serial
from gpmetric.evolution.request import Request
from gpmetric.evolution.splits import SPLITS, name_sources, read_splits
from gpmetric.models import Model, load_model
from gpmetric.operands import OPERANDS
from gpmetric.pruning.bench import check_targets
from gpmetric.pruning.metrics import Update
from gpmetric.pruning.target import parse_target

__all__ = ["Site", "calibration_draw", "collect", "labels", "make_executor", "needs_gradients", "open_sites", "threads"]

_HUNG = 3600.0  # seconds of one task after which its worker is taken for hung and replaced
_SMALL = 50_000_000  # parameters up to which every core gets a copy of the model


@dataclass
class Site:
    """One model of the campaign, the token windows of its splits, and the file of its statistics once it is there."""

    model: Model
    splits: dict[str, Windows]
    statistics: Path | None = None


def open_sites(request: Request) -> dict[str, Site]:
    """The models by short name, or by full name where two share a short one, in the order given, with their texts.

    Raises:
        InputError: for anything that cannot be used.
    """
    counts = {
        "calibration": request.samples,
        "search": request.search_windows,
        "validation": request.windows,
        "test": request.windows,
    }
    named = {split: getattr(request, split) for split in SPLITS}
    sources = name_sources(request.models[0], request.text, named)
    sites: dict[str, Site] = {}
    for name in request.models:
        model = load_model(
            name, device=request.device, dtype=request.dtype, include=request.include, exclude=request.exclude
        )
        check_targets(model, [parse_target(text) for text in request.target])
        length = check_length(model, request.sequence_length)
        seed = request.seed if request.shuffle else None
        splits = read_splits(model, request.text or sources, length, counts, seed)
        sites[model.name] = Site(model, splits)
    short = {name: Path(name).name for name in sites}
    return {short[name]: site for name, site in sites.items()} if len(set(short.values())) == len(sites) else sites


def collect(request: Request, site: Site, update: Update, progress: Callable[[int, int], None]) -> Path:
    """The file of the dense model's statistics, computed if the cache does not have it."""
    model, tokens = site.model, site.splits["calibration"].tokens
    gradients, fisher = needs_gradients(request), "F" in request.operands
    gram = "D" in request.operands or update != "none" or _is_small(model)  # the probe's reconstruction error
    folder = request.cache or default_cache()
    _check_room(folder, estimate_bytes(model, gradients=gradients, fisher=fisher, gram=gram))
    key = cache_key(model, tokens, {"gradients": gradients, "fisher": fisher, "gram": gram})

    def compute() -> Statistics:
        # One thread where a model is small: D differs in its last bits between thread counts
        with threads(1 if _is_small(model) else torch.get_num_threads()):
            return collect_statistics(
                model,
                tokens,
                gradients=gradients,
                fisher=fisher,
                gram=gram,
                chunk_layers=request.chunk_layers,
                progress=progress,
            )

    return cached_statistics(folder, key, compute)[1]


def _check_room(folder: Path, size: int) -> None:
    """Refuses to start what the disk cannot hold."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if size > free:
        raise GpmetricError(
            f"the statistics need {size / 2**30:.1f} GiB, but {str(folder)!r} has {free / 2**30:.1f} GiB free: "
            "choose another --cache, fewer --operands, or --include fewer layers"
        )


def make_executor(request: Request, sites: Mapping[str, Site], folder: Path, update: Update) -> Executor:
    """Where candidates are evaluated: a process per worker, or this one."""
    places = {}
    for number, (name, site) in enumerate(sites.items()):
        tokens = folder / f"tokens-{number}.safetensors"
        windows = {split: part.tokens for split, part in site.splits.items()}
        save_file(windows | _resampled(windows["calibration"], request.calibration_seeds, request.seed), tokens)
        assert site.statistics is not None
        places[name] = Workplace(
            request.models[number], request.device, request.dtype, request.include, request.exclude,
            str(site.statistics), str(tokens), request.target, update,
        ).to_json()  # fmt: skip
    models = {name: site.model for name, site in sites.items()}
    workers = request.workers or (_cores() if all(map(_is_small, models.values())) else 1)
    if workers > 1:
        return LocalProcesses(open_workplaces, (places,), workers, timeout=_HUNG)
    return Serial(open_workplaces(places, models))


def _resampled(windows: Tensor, draws: int, seed: int) -> dict[str, Tensor]:
    """Bootstrap draws of calibration windows, as many with replacement, by the name the judge asks for them by."""
    generator = torch.Generator().manual_seed(seed)
    places = (torch.randint(len(windows), (len(windows),), generator=generator) for _ in range(draws))
    return {calibration_draw(number): windows[place] for number, place in enumerate(places)}


def _is_small(model: Model) -> bool:
    return bool(model.module.num_parameters() <= _SMALL) and model.device.type == "cpu"


def _cores() -> int:
    """Cores this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch threads inside the context; the caller's number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def needs_gradients(request: Request) -> bool:
    """Whether the dense model's gradients must be collected."""
    return any(OPERANDS[name].cost == "gradients" for name in request.operands)


def labels(request: Request, sites: Mapping[str, Site]) -> tuple[str, ...]:
    """What figures are keyed by: the targets, for each of several models."""
    if len(sites) == 1:
        return request.target
    return tuple(label(name, target) for name in sites for target in request.target)


def calibration_draw(number: int) -> str:
    """The name of a bootstrap draw of the calibration windows."""
    return f"calibration-{number}"
