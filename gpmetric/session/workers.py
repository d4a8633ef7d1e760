"""Who does the work: this process, supervised ones of this machine, or actors of a Ray cluster."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from gpmetric.executors import Executor, Function, LocalProcesses, Serial
from gpmetric.models import Model
from gpmetric.plugins import Source, adopt, sources
from gpmetric.session.inputs import Staff
from gpmetric.session.work import Work

__all__ = ["cores", "devices", "is_small", "make_executor", "meet", "share", "shared", "torch_threads", "wanted"]

_LOG = logging.getLogger(__name__)
# seconds of one task, or of opening a model, after which its worker is taken for hung and replaced; of a task at least
# so many times what others like it took, or while none is known
_HUNG, _PATIENCE = 3600.0, 24.0
_SMALL = 50_000_000  # parameters up to which every core gets a copy of the model


def meet(request: Staff, progress: Callable[[str, int, int], None]) -> None:
    """Joins the cluster that is asked for, before anything else is done; told of it.

    Raises:
        InputError: it is not there, or Ray is not installed.
    """
    if request.ray is not None:
        from gpmetric.executors.ray_actors import connect

        progress("joining the cluster", 0, 1)
        connect(request.ray)
        progress("joining the cluster", 1, 1)


def wanted(request: Staff, model: Model, *, unless: int | None = None) -> int:
    """Worker processes of this machine: as many as asked for, else `unless`, else one per core or GPU.

    Those of a cluster are elsewhere: one is planned with.
    """
    if request.ray is not None:
        return 1
    default = cores() if is_small(model) else max(1, len(devices(model.device)))
    return request.workers or unless or default


def make_executor(
    request: Staff,
    models: Sequence[Model],
    workers: int,
    factory: Callable[..., Function],
    arguments: tuple[Any, ...],
    here: Callable[[int], Function],
    held: int = 1,
) -> Executor:
    """Where a function is applied to candidates.

    With small models a worker has one thread, so that figures do not depend on the number of workers; with others, all
    workers of a machine together have its cores.

    Args:
        request: who is asked for.
        models: of which every worker has some.
        workers: of this machine that there is memory for.
        factory: makes the function in a worker from the `arguments` and its number of torch threads.
        here: makes the function in this process, which is the worker where there is one alone, from that number, too.
        held: models that a worker has at once.

    Raises:
        InputError: the cluster cannot be used.
    """
    if carried := sources():
        factory, arguments = _equipped, (carried, factory, *arguments)
    small = all(map(is_small, models))
    more = {"timeout": _HUNG, "patience": _PATIENCE, "start_timeout": _HUNG, "held": held, "spread": len(models)}
    if request.ray is not None:
        from gpmetric.executors.ray_actors import RayActors  # which only those have who ask for it

        gpus = request.worker_gpus if models[0].device.type == "cuda" else 0.0
        cpus = 1 if small or gpus else cores()
        return RayActors(request.ray, factory, (*arguments, cpus), request.workers, cpus, gpus, **more)
    if workers < (request.workers or 1):
        _LOG.warning("there is memory for %d of %d workers", workers, request.workers)
    threads = 1 if small else max(1, cores() // workers)
    if workers > 1 or held < len(models):  # one that changes models does what belongs to one after the other
        seen = devices(models[0].device)
        return LocalProcesses(factory, (*arguments, threads), workers, devices=seen, **more)
    return Serial(here(threads))


def _equipped(carried: Sequence[Source], factory: Callable[..., Function], *arguments: Any) -> Function:
    """What the factory makes in a worker, where the driver's plug-ins are loaded."""
    adopt(carried)
    return factory(*arguments)


def shared(work: Work, request: Staff, model: Model) -> Work:
    """The work where it is done by as many workers as are asked for: one, unless there are more."""
    workers = wanted(request, model, unless=1)
    return replace(work, workers=workers, devices=max(1, len(devices(model.device))), share=share(request, model))


def share(request: Staff, model: Model) -> float:
    """The part of a machine's memory that one process may take, where a cluster puts several on one."""
    if request.ray is None:
        return 1.0
    return min(1.0, request.worker_gpus) if model.device.type == "cuda" else 1 / cores() if is_small(model) else 1.0


def devices(device: torch.device) -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` may be for processes with a GPU each; none where there is no choice."""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        return []
    visible = [one.strip() for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one.strip()]
    return visible[: torch.cuda.device_count()] or [str(index) for index in range(torch.cuda.device_count())]


def is_small(model: Model) -> bool:
    """Whether every core may have a copy of a model."""
    return bool(model.module.num_parameters() <= _SMALL) and model.device.type == "cpu"


def cores() -> int:
    """Cores this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def torch_threads(count: int | None = None) -> Iterator[None]:
    """Torch threads inside the context, the caller's number if none; the caller's afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
