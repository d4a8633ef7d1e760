"""What tuning tells while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gpmetric.pruning.listeners import PruneListener
from gpmetric.structured.listener import SlimListener

if TYPE_CHECKING:
    from gpmetric.evolution.selection import Individual
    from gpmetric.tuning.trial_log import Measurement

__all__ = ["TuneListener"]


class TuneListener(PruneListener, SlimListener):
    """What tuning tells while it runs; every method may be overridden."""

    def step(self, name: str) -> None:
        """The next step is begun."""

    def trial(self, trial: Measurement[Any], excess: float) -> None:
        """A recipe is measured; excess log-loss in nats per token."""

    def generation(self, number: int, front: Sequence[Individual], evaluations: int) -> None:
        """A generation of formulas is finished."""

    def cut(self, what: str) -> None:
        """Something is left out for want of time."""
