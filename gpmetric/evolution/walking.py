"""Candidates that pass through a model's blocks together, in this process: each block is read once for all of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from gpmetric.errors import GpmetricError
from gpmetric.evolution.executors import Executor, Outcome
from gpmetric.evolution.task_clock import OutOfTime

__all__ = ["Together"]

_SAFETY = 3.0  # of the time that is left, so much is kept for a group


class Together(Executor):
    """Evaluates candidates in groups of neighbours that are alike.

    Args:
        evaluate: the values of a group, or the GpmetricErrors in their places.
        alike: whether two candidates may be in one group.
        size: candidates of a group at most.
    """

    def __init__(
        self, evaluate: Callable[[Sequence[Any]], list[Any]], alike: Callable[[Any, Any], bool], size: int
    ) -> None:
        self._evaluate, self._alike, self._size = evaluate, alike, size

    def map_ordered(self, candidates: Iterable[Any]) -> Iterator[Outcome]:
        """Outcomes in order; a group is taken only when the outcome of its first candidate is asked for."""
        for group in self._groups(candidates):
            if not self.clock.admits(group[0]):
                raise OutOfTime
            start = self.clock.now()
            found = self._evaluate(group)
            seconds = (self.clock.now() - start) / len(group)
            for candidate, one in zip(group, found, strict=True):
                self.clock.note(candidate, seconds)
                failed = isinstance(one, GpmetricError)
                yield Outcome(None if failed else one, str(one) if failed else None, seconds, os.getpid(), 1)

    def _groups(self, candidates: Iterable[Any]) -> Iterator[list[Any]]:
        group: list[Any] = []
        for candidate in candidates:
            full = len(group) >= self._size or self.clock.left < _SAFETY * sum(map(self.clock.expected, group))
            if group and (full or not self._alike(group[-1], candidate)):
                yield group
                group = []
            group.append(candidate)
        if group:
            yield group
