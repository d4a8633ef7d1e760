"""What trackers are told of a campaign."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpmetric.evolution.fitness import mean_excess
from gpmetric.evolution.listener import DiscoverListener
from gpmetric.evolution.selection import Individual
from gpmetric.tracking.recorder import Trackers

__all__ = ["TrackedCampaign"]


class TrackedCampaign(DiscoverListener):
    """Figures of each generation: the best of the front, what it is to be below, and how much was tried.

    Excess is in nats per token, on the search text; of the result, on the test text.
    """

    def __init__(self, trackers: Trackers) -> None:
        self._trackers = trackers

    def generation(self, number: int, front: Sequence[Individual], counts: Mapping[str, int]) -> None:
        figures: dict[str, float] = {"evaluations": counts["paid"], "drawn": counts["drawn"], "front": len(front)}
        figures["unique_masks"] = counts["unique_masks"]
        if front:
            best = front[0]
            figures |= {"mean_excess": mean_excess(best.excess), "nodes": len(best.expression)}
            figures |= {f"excess/{target}": value for target, value in best.excess.items()}
            figures |= {f"best_baseline/{target}": value for target, value in best.bar.items()}
        self._trackers.log(number, figures)

    def finished(self, result: Mapping[str, Any]) -> None:
        winner = result["winner"]
        told = {"winner": winner["formula"], "mean_excess": winner["mean_excess"], "better": result["better"]}
        self._trackers.finish(told | {"because": result["because"], "evaluations": result["evaluations"]})
