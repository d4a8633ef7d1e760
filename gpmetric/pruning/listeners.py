"""What benchmarks and pruning tell while they run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from gpmetric.session.listeners import Listener

if TYPE_CHECKING:
    from gpmetric.pruning.bench_log import BenchRow

__all__ = ["BenchListener", "PruneListener"]


class BenchListener(Listener):
    """What a bench tells while it runs; every method may be overridden."""

    def model(self, name: str) -> None:
        """The next of several models is begun; not called for one alone."""

    def row(self, row: BenchRow) -> None:
        """One metric at one target is measured."""


class PruneListener(Listener):
    """What pruning tells while it runs; every method may be overridden."""

    def resumed(self, block: int, blocks: int) -> None:
        """A command that was killed is gone on with at a block, counted from 0."""

    def other_use(self, made_for: Mapping[str, str], used: Mapping[str, str]) -> None:
        """The allocation was made for another formula, update or fit than it is used with."""
