"""Where a campaign's metrics are evaluated: its sessions, and what a worker process needs to open them again."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpmetric.calibration.cache import load_statistics
from gpmetric.errors import GpmetricError
from gpmetric.evolution.evaluator import TEACHER_BYTES, Evaluator, alike
from gpmetric.evolution.mask_fingerprint import probe_layers
from gpmetric.evolution.multi_model import MultiModel, OneModel
from gpmetric.evolution.request import DiscoverRequest
from gpmetric.executors import Executor, Together, Unusable
from gpmetric.models import Model
from gpmetric.operands import GRAM, is_regional, needs_gradients
from gpmetric.pruning.block_fit import PASSES
from gpmetric.pruning.protocol import check_targets
from gpmetric.pruning.updaters import UPDATERS
from gpmetric.session.listeners import Listener, Progress, silent
from gpmetric.session.reopening import Reopening
from gpmetric.session.session import Session, plan_session
from gpmetric.session.splits import open_sources
from gpmetric.session.work import Work
from gpmetric.session.workers import cores, devices, is_small, share, torch_threads, wanted
from gpmetric.session.workers import make_executor as staffed
from gpmetric.targets import parse_target

__all__ = [
    "Evaluators",
    "Workplace",
    "campaign_work",
    "collect_statistics",
    "make_executor",
    "open_sessions",
    "open_workplaces",
    "released",
]

_EVALUATIONS = 300  # of a campaign whose length is told in minutes, or not at all


@dataclass(frozen=True)
class Workplace:
    """What a process opens the evaluator of one of the campaign's models with."""

    session: Reopening
    statistics: Path  # a file of the statistics cache

    def open(self, model: Model | None = None, progress: Progress = silent) -> Evaluator:
        """The evaluator of this place; `model` where this process has it already."""
        session = self.session.open(model)
        request = session.inputs
        assert isinstance(request, DiscoverRequest)
        session.dense = load_statistics(self.statistics, str(session.model.device), kept=session.plan.kept)
        return Evaluator(session, request.target, request.update, request.objective, request.fit, progress)


class Evaluators:
    """The evaluators that a process has at once; one of several models is opened when a task asks for it.

    Args:
        places: by name of the model.
        held: evaluators at once; of more, the one that was asked for longest ago goes.
        models: those that this process has already.
    """

    def __init__(self, places: Mapping[str, Workplace], held: int, models: Mapping[str, Model] = {}) -> None:
        self._places, self._held, self._models = places, held, models
        self._open: dict[str, Evaluator] = {}  # the last asked for at the end

    def __call__(self, task: OneModel) -> Any:
        """The answer to a task.

        Raises:
            GpmetricError: as of `Evaluator`.
            Unusable: a model or its statistics cannot be opened.
        """
        evaluator = self._open.pop(task.place, None)
        if evaluator is None:
            while len(self._open) >= self._held:
                del self._open[next(iter(self._open))]
                gc.collect()  # models are in reference cycles
            evaluator = self._opened(task.place)
        self._open[task.place] = evaluator
        return evaluator(task.task)

    def smaller(self) -> None:
        """Has all take less memory."""
        for evaluator in self._open.values():
            evaluator.smaller()

    def _opened(self, name: str) -> Evaluator:
        try:
            return self._places[name].open(self._models.get(name))
        except GpmetricError as error:
            raise Unusable(str(error)) from error


def open_workplaces(
    places: Mapping[str, Workplace],
    held: int,
    threads: int,
    models: Mapping[str, Model] = {},
    progress: Progress = silent,
) -> Callable[[Any], Any]:
    """What a process does tasks with, with so many torch threads from now on; arguments as of `Evaluators`.

    `progress` is told of the steps of a task, where there is one place.
    """
    torch.set_num_threads(threads)
    if len(places) > 1:
        return Evaluators(places, held, models)
    ((name, place),) = places.items()
    return place.open(models.get(name), progress)


def open_sessions(request: DiscoverRequest, told: Listener | None = None) -> dict[str, Session]:
    """The models by short name, or by full name where two share a short one, in the order given, with their texts.

    They are planned, and not started.

    Raises:
        InputError: for anything that cannot be used.
    """
    sources = open_sources(request)
    sessions: dict[str, Session] = {}
    for name in request.models:
        session = plan_session(request, name, sources, work=campaign_work, listener=told)
        check_targets(session.model, [parse_target(text) for text in request.target])
        sessions[session.model.name] = session
    short = {name: Path(name).name for name in sessions}
    if len(set(short.values())) < len(sessions):
        return sessions
    return {short[name]: session for name, session in sessions.items()}


def campaign_work(session: Session) -> Work:
    """What a campaign does with one of its models, as far as its length can be told beforehand."""
    request, windows = session.inputs, session.windows
    assert isinstance(request, DiscoverRequest)
    names, targets = _statistics(request, session.model), len(request.target)
    tokens = {split: part.tokens.numel() for split, part in windows.items()}
    baselines = len(request.baselines) * targets
    fits = UPDATERS[request.update].fits_blocks
    per_baseline = (2 + PASSES * fits) * tokens["calibration"] + tokens["validation"]
    candidates = request.evaluations or _EVALUATIONS
    probes = 4 * sum(layer.weight.numel() for layer in probe_layers(session.model))
    return Work(
        dense=names,
        block=frozenset({"X", "D", GRAM} | {name for name in request.operands if is_regional([name])}),
        length=session.tokens.shape[1],
        calibration=tokens["calibration"],
        texts=max(tokens["validation"], tokens.get("test", 0)),
        rules=request.population * targets,
        rule_tokens=targets * _rule_tokens(request, tokens),
        copies=targets,
        solves=True,  # SparseGPT is among the baselines
        fits_blocks=fits,
        kept=min(TEACHER_BYTES, 2 * tokens["search"] * session.model.vocabulary),
        fixed=probes,
        cached=True,
        forward=3 * baselines * per_baseline + 2 * candidates * targets * tokens["search"],
        backward=tokens["calibration"] if needs_gradients(names) else 0,
        dtype=request.kept_dtype,
        workers=(workers := wanted(request, session.model)),
        models=math.ceil(len(request.models) / (request.workers or workers)),
        devices=max(1, len(devices(session.model.device))),
        share=share(request, session.model),
    )


def _rule_tokens(request: DiscoverRequest, tokens: Mapping[str, int]) -> int:
    """Tokens whose hidden states a pruned model has of its own, on the last rung or on held-out text."""
    searched = tokens["search"] + (tokens["calibration"] if request.fit == "dense" else 0)
    return max(searched, tokens["calibration"] + tokens["validation"])


def _statistics(request: DiscoverRequest, model: Model) -> frozenset[str]:
    """Names of the statistics that a campaign reads."""
    names = {"X", *request.operands} - {"W"}
    read = (name for baseline in request.baselines for name in baseline.operands)
    names |= {name for name in read if needs_gradients([name])}
    if "D" in names or UPDATERS[request.update].solves or is_small(model):
        names.add(GRAM)
    return frozenset(names)


def collect_statistics(request: DiscoverRequest, session: Session, progress: Progress) -> Path:
    """The file of the dense model's statistics, computed if the cache does not have it.

    Gradients are those that formulas and baselines use. The Gram matrices are for D, for a solver, and where they cost
    little for the reconstruction error of the probe layers.
    """
    names = _statistics(request, session.model)
    # One thread where a model is small: D differs in its last bits between thread counts
    with torch_threads(1 if is_small(session.model) else cores()):
        file = session.stored_statistics(names, request.cache, progress)
    session.forget()  # whoever evaluates reads the file
    return file


def make_executor(
    request: DiscoverRequest, sessions: Mapping[str, Session], statistics: Mapping[str, Path]
) -> Executor:
    """Where candidates are evaluated.

    Candidates that walk together do so in this process; what is done here is told to who listens to the session.
    """
    progress = next(iter(sessions.values())).told.progress
    places = {}
    for number, (name, session) in enumerate(sessions.items()):
        draws = _resampled(session.tokens, request.calibration_draws, request.seed)
        place = Reopening.of(session, request.models[number], draws)
        places[name] = Workplace(place, statistics[name].absolute())
    models = {name: session.model for name, session in sessions.items()}
    if len(sessions) == 1 and (size := next(iter(sessions.values())).plan.together) > 1 and request.ray is None:
        torch.set_num_threads(1 if all(map(is_small, models.values())) else cores())
        evaluator = next(iter(places.values())).open(next(iter(models.values())), progress)
        return Together(evaluator.together, alike, size)
    workers = min(session.plan.workers for session in sessions.values())
    held = min(session.plan.held_models for session in sessions.values())
    present = {} if released(request, sessions) else models
    here = partial(open_workplaces, places, held, models=present, progress=progress)
    executor = staffed(request, list(models.values()), workers, open_workplaces, (places, held), here, held)
    return MultiModel(executor, models) if len(models) > 1 else executor


def released(request: DiscoverRequest, sessions: Mapping[str, Session]) -> bool:
    """Whether the models of this process are let go of once they are calibrated: whoever works opens them again."""
    plans = [session.plan for session in sessions.values()]
    elsewhere = request.ray is not None or min(plan.workers for plan in plans) > 1
    return elsewhere or min(plan.held_models for plan in plans) < len(sessions)


def _resampled(windows: Tensor, draws: Sequence[str], seed: int) -> dict[str, Tensor]:
    """Bootstrap draws of calibration windows, as many with replacement, by name."""
    generator = torch.Generator().manual_seed(seed)
    return {name: windows[torch.randint(len(windows), (len(windows),), generator=generator)] for name in draws}
