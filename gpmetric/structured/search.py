"""The search for what stays: step by step until the steps or the minutes are over, with reports on the way."""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpmetric.errors import GpmetricError
from gpmetric.executors import Executor, OutOfTime, Serial
from gpmetric.session.listeners import Progress, silent
from gpmetric.structured.draw_objective import DrawObjective
from gpmetric.structured.draws import Draw, Measurer
from gpmetric.structured.policy import Policy, draw, entropy
from gpmetric.structured.repair import Repairer
from gpmetric.structured.request import ESTIMATORS
from gpmetric.structured.search_log import SearchLog, State
from gpmetric.structured.shrink import Shrinker

__all__ = ["OnReport", "PolicySearch", "Schedule", "Search"]

_LOG = logging.getLogger(__name__)
_SEARCH = "search, % of its length"
_REPORT = 25  # steps between two reports
_STATE = 4  # reports between two that a search can go on from,
_SECONDS = 30.0  # or so long

OnReport = Callable[[Mapping[str, Any], float], None]  # a report, and the share of the search that is over


@dataclass(frozen=True)
class Schedule:
    """How long to search, by how many draws a step and how far a step goes; fields as of `SlimRequest`.

    Draws and rate are a policy's.
    """

    steps: int | None
    minutes: float | None
    draws: int
    rate: float
    seed: int

    def late(self, seconds: float) -> bool:
        """Whether the minutes are over after so many seconds of the search."""
        return self.minutes is not None and seconds > 60 * self.minutes

    def over(self, state: State) -> float:
        """How much of the search is over; all of it, where its last step ended late."""
        used = ((state.step, self.steps), (state.seconds / 60, self.minutes))
        shares = (amount / limit if limit else 1.0 for amount, limit in used if limit is not None)
        return min(1.0, max(shares, default=0.0))


class Search(ABC):
    """Steps from state to state; no gradient of the model is computed.

    Attributes:
        repairer: mends the outputs of models that are measured as those of the written one will be.
        log: of which the search goes on if it holds a state.
        executor: of `Draw` tasks; this process if none.
    """

    shrinker: Shrinker
    repairer: Repairer
    objective: DrawObjective
    schedule: Schedule
    log: SearchLog
    executor: Executor | None

    def _begin(self, probabilities: Tensor) -> None:
        self.executor = self.executor or Serial(Measurer(self.shrinker, self.repairer, self.objective))
        self.state = self._saved = self.log.state or State(0, probabilities)
        self._losses: list[float] = []  # since the last report
        self._finite = self.state.step > 0

    def _measured(self, draws: Sequence[Draw]) -> list[float]:
        """The objective of drawn models; one that is lost with its workers costs infinitely much.

        Raises:
            GpmetricError: an output cannot be mended.
        """
        assert self.executor is not None
        found = []
        for outcome in self.executor.map_ordered(draws):
            if outcome.error is not None and not outcome.lost:
                raise GpmetricError(outcome.error)
            if outcome.lost:
                _LOG.warning("a model that was drawn %s: it is given up", outcome.error)
            found.append(math.inf if outcome.lost else float(outcome.value))
        self._finite = self._finite or any(map(math.isfinite, found))
        return found

    @abstractmethod
    def _step(self, done: float, start: float) -> None:
        """Moves the state by a step that began `start`; `done` is the share of the search before it."""

    @abstractmethod
    def _told(self) -> dict[str, Any]:
        """What a report tells of the state."""

    def run(self, on_report: OnReport = lambda *told: None, progress: Progress = silent) -> State:
        """Searches to the end; told of each report, and of how far it has come.

        Raises:
            GpmetricError: no drawn model has a finite loss.
        """
        assert not any(parameter.requires_grad for parameter in self.shrinker.model.module.parameters())
        start = time.monotonic() - self.state.seconds
        try:
            while (done := self.schedule.over(self.state)) < 1:
                progress(_SEARCH, int(100 * done), 100)
                try:
                    self._step(done, start)
                except OutOfTime:  # of a worker that did not answer
                    break
                over = self.schedule.over(self.state)
                if self.state.step % _REPORT == 0 or over >= 1:
                    if not self._finite:
                        raise GpmetricError("no model that was drawn has a finite loss (--sparsity, --dtype)")
                    due = self.state.step % (_REPORT * _STATE) == 0
                    due = due or self.state.seconds - self._saved.seconds >= _SECONDS
                    on_report(self._report(saves=due or over >= 1), over)
            progress(_SEARCH, 100, 100)
        except KeyboardInterrupt:
            if self._saved.step < self.state.step:
                self._report(saves=True)
            raise
        return self.state

    def _report(self, *, saves: bool) -> dict[str, Any]:
        """Adds a report to the log; its `loss` is the mean objective that steps told since the last one."""
        self._saved = self.state if saves else self._saved
        loss = sum(self._losses) / len(self._losses) if self._losses else math.nan
        line = {
            "step": self.state.step,
            "objective": self.objective.objective,
            "loss": loss if math.isfinite(loss) else None,
            **self._told(),
            "seconds": round(self.state.seconds, 3),
            "tokens": self.state.tokens,
        }
        self.log.add(line, self.state if saves else None)
        self._losses = []
        return line


@dataclass
class PolicySearch(Search):
    """Moves a policy's probabilities by the losses of drawn models.

    Args:
        policy: where to begin; at the end it holds what was found.
    """

    policy: Policy
    shrinker: Shrinker
    repairer: Repairer
    objective: DrawObjective
    schedule: Schedule
    log: SearchLog
    executor: Executor | None = None

    def __post_init__(self) -> None:
        self._begin(self.policy.probabilities)
        self.policy.probabilities, self.policy.average = self.state.probabilities, self.state.average

    @torch.no_grad()
    def _step(self, done: float, start: float) -> None:
        """Draws, measures and updates once; a report's loss is that of the models drawn."""
        policy, schedule, step = self.policy, self.schedule, self.state.step
        antithetic = ESTIMATORS[policy.estimator].pairs
        drawn = draw(policy.probabilities, schedule.draws, schedule.seed, step, antithetic=antithetic)
        losses = self._measured([Draw(step, policy.space.kept(policy.space.stays(one))) for one in drawn])
        self._losses.append(sum(losses) / len(losses))
        policy.update(drawn, losses, schedule.rate * (1 + math.cos(math.pi * done)) / 2)
        tokens = self.state.tokens + len(drawn) * self.objective.tokens(step)
        self.state = State(step + 1, policy.probabilities, policy.average, time.monotonic() - start, tokens)

    def _told(self) -> dict[str, Any]:
        space, probabilities = self.policy.space, self.state.probabilities
        kept = float((space.cost * space.stays(probabilities)).sum() / space.cost.sum())
        return {"entropy": entropy(probabilities), "kept": kept}
