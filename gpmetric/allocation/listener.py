"""What an allocation tells while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gpmetric.session.listeners import Listener

if TYPE_CHECKING:
    from gpmetric.allocation.evaluation_log import Measured

__all__ = ["AllocateListener"]


class AllocateListener(Listener):
    """What an allocation tells while it runs; every method may be overridden."""

    def generation(self, number: int, population: Sequence[Measured], batches: int, spent: float) -> None:
        """A generation is finished: its population, measured on so many batches, and the share of the budget spent."""
