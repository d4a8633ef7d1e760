"""What a campaign tells while it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gpmetric.session.listeners import Listener

if TYPE_CHECKING:
    from gpmetric.evolution.selection import Individual
    from gpmetric.evolution.time_budget import CampaignPlan

__all__ = ["STEPS", "DiscoverListener"]

# In order: statistics, baselines on validation, the generation loop, finalists on validation, the winner and baselines
# on the test text, then on other draws of the calibration.
STEPS = ("calibration", "baselines", "search", "finalists", "test", "draws")


class DiscoverListener(Listener):
    """What a campaign tells while it runs; every method may be overridden."""

    def step(self, name: str) -> None:
        """One of STEPS is begun."""

    def baselines(self, excess: Mapping[str, Mapping[str, float]]) -> None:
        """The baselines' excess on validation by name and target."""

    def plan(self, plan: CampaignPlan, cut: Sequence[str]) -> None:
        """How the time is shared, and what was left out so far, before the search; not called without a limit."""

    def serving(self, address: str) -> None:
        """The campaign's page is at this address while the campaign runs."""

    def rivals(self, found: Mapping[str, Individual]) -> None:
        """Baselines among the first formulas by name, as the search has measured them; before the first generation."""

    def generation(self, number: int, front: Sequence[Individual], counts: Mapping[str, int]) -> None:
        """A generation is finished: the front, the best first, and what `Ledger.counts` gives."""

    def finished(self, result: Mapping[str, Any]) -> None:
        """The campaign is finished, and its result is in the ledger."""
