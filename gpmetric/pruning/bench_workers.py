"""Rows of a bench measured by workers, each with a session of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from gpmetric.executors import Executor, OutOfTime, TaskClock
from gpmetric.pruning.bench_log import BenchRow
from gpmetric.pruning.protocol import Protocol, Rule
from gpmetric.pruning.requests import BenchRequest
from gpmetric.session.deadline import Deadline
from gpmetric.session.reopening import Reopening
from gpmetric.session.session import Session
from gpmetric.session.workers import make_executor

__all__ = ["RuleTask", "bench_executor", "shared_rows"]

Measure = Callable[[Protocol, Rule], BenchRow]


@dataclass(frozen=True)
class RuleTask:
    """One rule of a bench; what it takes is told from others of its updater."""

    rule: Rule

    @property
    def effort(self) -> tuple[str, float]:
        return self.rule.metric.update or self.rule.update, 1.0


@dataclass(frozen=True)
class _Measured:
    """A row, and the layers of experts that read too little for it, in the dense model and in the pruned one."""

    row: BenchRow
    starved: frozenset[str]
    starved_pruned: frozenset[str]


def bench_executor(session: Session, name: str | None, measure: Measure) -> Executor:
    """Who measures the rows of the model that was opened by a name; `measure` is a module-level function."""
    request, arguments = session.inputs, (Reopening.of(session, name), measure)
    assert isinstance(request, BenchRequest)
    here = partial(_here, session, measure)
    return make_executor(request, [session.model], session.plan.workers, _opened, arguments, here)


def shared_rows(
    executor: Executor,
    session: Session,
    rules: Sequence[Rule],
    deadline: Deadline,
    failed: Callable[[Rule, str], BenchRow],
) -> Iterator[BenchRow]:
    """One row for each rule, in their order; `failed` makes that of one which was lost, or which time is over for."""
    executor.clock = TaskClock(deadline.now, deadline.end)
    rest = iter(rules)
    try:
        for outcome in executor.map_ordered(map(RuleTask, rules)):
            rule = next(rest)
            if outcome.error is not None:
                yield failed(rule, outcome.error)
                continue
            session.starved |= outcome.value.starved
            session.starved_pruned |= outcome.value.starved_pruned
            yield outcome.value.row
    except OutOfTime:
        yield from (failed(rule, deadline.refusal) for rule in rest)


def _opened(place: Reopening, measure: Measure, threads: int) -> Callable[[RuleTask], _Measured]:
    torch.set_num_threads(threads)
    return _measuring(place.open(), measure)


def _here(session: Session, measure: Measure, threads: int) -> Callable[[RuleTask], _Measured]:
    torch.set_num_threads(threads)
    return _measuring(session, measure)


def _measuring(session: Session, measure: Measure) -> Callable[[RuleTask], _Measured]:
    assert isinstance(session.inputs, BenchRequest)
    protocol = Protocol(session, one_shot=session.inputs.one_shot)

    def answer(task: RuleTask) -> _Measured:
        row = measure(protocol, task.rule)
        return _Measured(row, frozenset(session.starved), frozenset(session.starved_pruned))

    return answer
