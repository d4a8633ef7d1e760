"""Candidates evaluated in this process: one by one, or those that are alike together."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

from gpmetric.errors import GpmetricError
from gpmetric.executors.contract import Executor, Function, Outcome, call
from gpmetric.executors.task_clock import OutOfTime

__all__ = ["Serial", "Together"]

_SAFETY = 3.0  # times what a group takes must be left for another candidate to join it, which may be as long again


class Serial(Executor):
    """Calls the function in this process."""

    def __init__(self, function: Function) -> None:
        self._function = function

    def map_ordered(self, candidates: Iterable[Any]) -> Generator[Outcome]:
        """Outcomes in order; a candidate is taken only when its outcome is asked for."""
        for candidate in candidates:
            if not self.clock.admits(candidate):
                raise OutOfTime
            started = self.clock.now()
            value, error, seconds = call(self._function, candidate)
            self.clock.note(candidate, self.clock.now() - started)
            yield Outcome(value, error, seconds, os.getpid(), 1)


class Together(Executor):
    """Evaluates candidates in groups of neighbours that are alike: each block of a model is read once for all of them.

    Args:
        evaluate: the values of a group, or the GpmetricErrors in their places.
        alike: whether two candidates may be in one group.
        size: candidates of a group at most.
    """

    def __init__(
        self, evaluate: Callable[[Sequence[Any]], list[Any]], alike: Callable[[Any, Any], bool], size: int
    ) -> None:
        self._evaluate, self._alike, self._size = evaluate, alike, size

    def map_ordered(self, candidates: Iterable[Any]) -> Generator[Outcome]:
        """Outcomes in order; a group is taken only when the outcome of its first candidate is asked for."""
        for group in self._groups(candidates):
            if not self.clock.admits(group[0]):
                raise OutOfTime
            start = self.clock.now()
            found = self._answers(group)
            seconds = (self.clock.now() - start) / len(group)
            for candidate, one in zip(group, found, strict=True):
                self.clock.note(candidate, seconds)
                failed = isinstance(one, GpmetricError)
                yield Outcome(None if failed else one, str(one) if failed else None, seconds, os.getpid(), 1)

    def _answers(self, group: Sequence[Any]) -> list[Any]:
        """Values or errors of a group; where it fails as a whole, of each candidate alone."""
        try:
            return self._evaluate(group)
        except GpmetricError as error:
            return [error] if len(group) == 1 else [self._answers([one])[0] for one in group]

    def _groups(self, candidates: Iterable[Any]) -> Iterator[list[Any]]:
        group: list[Any] = []
        for candidate in candidates:
            if group and (self._is_full(group) or not self._alike(group[-1], candidate)):
                yield group
                group = []
            group.append(candidate)
        if group:
            yield group

    def _is_full(self, group: Sequence[Any]) -> bool:
        """Whether no other candidate may join: with one more, the group might end late."""
        if len(group) >= self._size or not self.clock.limited:
            return len(group) >= self._size
        seconds = [self.clock.expected(one) for one in group]
        return 0 in seconds or self.clock.left < _SAFETY * sum(seconds)
