"""What structured pruning tells while it runs, and what trackers keep of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpmetric.session.listeners import Listener
from gpmetric.tracking.recorder import Trackers

__all__ = ["SlimListener", "TrackedSlim"]


class SlimListener(Listener):
    """What structured pruning tells while it runs; every method may be overridden."""

    def report(self, report: Mapping[str, Any], share: float) -> None:
        """A line of the ledger, and the share of the search that is over."""


class TrackedSlim(SlimListener):
    """What trackers are told: the numbers of every report, with those of JSON's null left out."""

    def __init__(self, trackers: Trackers) -> None:
        self._trackers = trackers

    def report(self, report: Mapping[str, Any], share: float) -> None:
        numbers = {name: value for name, value in report.items() if isinstance(value, (int, float)) and name != "step"}
        self._trackers.log(report["step"], numbers | {"share_of_search": share})
