"""Candidates measured by workers, each with the model and its levels; slopes are taken in this process."""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from functools import partial
from pathlib import Path

import torch

from gpmetric.allocation.candidate_objective import Asked, CandidateObjective, Slopes
from gpmetric.allocation.levels import Levels
from gpmetric.allocation.prepare import CalibratedModel, open_pruned
from gpmetric.allocation.request import AllocateRequest
from gpmetric.errors import GpmetricError, TimeOverError
from gpmetric.executors import OutOfTime, TaskClock
from gpmetric.session.deadline import Deadline
from gpmetric.session.memory import retried
from gpmetric.session.reopening import Reopening
from gpmetric.session.workers import is_small, make_executor, torch_threads

__all__ = ["SharedObjective"]

_LOG = logging.getLogger(__name__)


class SharedObjective(AbstractContextManager["SharedObjective"]):
    """What a `CandidateObjective` tells, by as many workers as are asked for.

    A candidate that is lost with its workers costs infinitely much.
    """

    def __init__(self, calibrated: CalibratedModel, objective: CandidateObjective, deadline: Deadline) -> None:
        request, session = calibrated.request, calibrated.session
        self._objective, self.windows, self.tokens = objective, objective.windows, objective.tokens
        self.seconds = objective.seconds
        self._threads = torch_threads(1 if is_small(session.model) else None)  # slopes are the same by any workers
        self._threads.__enter__()
        here = partial(_here, objective)
        arguments = (Reopening.of(session, request.models[0]), calibrated.pruned.files())
        self._executor = make_executor(request, [session.model], session.plan.workers, _opened, arguments, here)
        self._executor.clock, self._late = TaskClock(deadline.now, deadline.end), deadline.refusal

    def __len__(self) -> int:
        return len(self._objective)

    def __exit__(self, *raised: object) -> None:
        self._executor.close()
        self._threads.__exit__(None, None, None)

    def measure_all(self, asked: Sequence[Asked]) -> Iterator[list[float]]:
        """As of `CandidateObjective`."""
        with closing(self._executor.map_ordered(asked)) as outcomes:
            for _, first, last in asked:
                try:
                    outcome = next(outcomes)
                except OutOfTime:  # which only a worker that does not answer brings about
                    raise TimeOverError(self._late) from None
                if outcome.error is None:
                    yield outcome.value
                elif outcome.lost:
                    _LOG.warning("a candidate %s: it is given up", outcome.error)
                    yield [math.inf] * (last - first)
                else:
                    raise GpmetricError(outcome.error)

    def slopes(self, levels: Levels, last: int) -> Slopes:
        """As of `CandidateObjective`."""
        return self._objective.slopes(levels, last)


class _Measuring:
    """Measures candidates in a worker."""

    def __init__(self, objective: CandidateObjective) -> None:
        self._objective = objective

    def __call__(self, asked: Asked) -> list[float]:
        return self._objective.measure(*asked)


def _here(objective: CandidateObjective, threads: int) -> _Measuring:
    torch.set_num_threads(threads)
    return _Measuring(objective)


def _opened(place: Reopening, files: Mapping[Hashable, Path], threads: int) -> _Measuring:
    torch.set_num_threads(threads)
    session, pruned = open_pruned(place, files)
    request = session.inputs
    assert isinstance(request, AllocateRequest)
    made = partial(CandidateObjective, pruned, session.windows["search"].tokens, request.objective)
    return _Measuring(retried(session.model, made))
