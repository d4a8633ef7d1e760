"""What a campaign shows while it runs: a live table of the best formulas beside the baselines, with the bars below."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType

from gpmetric.evolution.fitness import mean_excess
from gpmetric.evolution.listener import DiscoverListener
from gpmetric.terminal.bars import QUIET
from gpmetric.terminal.figures import duration, shortened
from gpmetric.terminal.narrow import fitted, numbered
from gpmetric.terminal.reports import Report, told_best, without_gradients
from gpmetric.terminal.text import Text

if TYPE_CHECKING:
    from gpmetric.evolution.selection import Individual
    from gpmetric.evolution.time_budget import CampaignPlan

__all__ = ["DiscoverReport"]

_SHOWN, _RIVALS = 12, 3  # rows of the live table: formulas, and baselines beside them
_BELOW = 6  # lines of a terminal that are left to the bars
_STEPS = {  # of a campaign that say nothing themselves for long
    "baselines": "baselines on validation",
    "finalists": "finalists on validation",
    "test": "winner and baselines on test",
    "draws": "winner and best baseline on draws of the calibration",
}
_LEGEND = "* the best without gradients; constants to two digits: --json and export have them whole"


class DiscoverReport(Report, DiscoverListener):
    """A live Pareto table on a terminal; elsewhere a line per step and generation, and now and then one between."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._start = time.monotonic()
        self._rivals: Mapping[str, Individual] = {}

    def baselines(self, excess: Mapping[str, Mapping[str, float]]) -> None:
        best = min(excess, key=lambda name: mean_excess(excess[name]))
        self._console.print(Text(f"best baseline on validation: {best}, mean excess {mean_excess(excess[best]):.4f}"))

    def serving(self, address: str) -> None:
        self._console.print(Text(f"live page: {address}"), soft_wrap=True)

    def step(self, name: str) -> None:
        self._forget()
        if self._bar.above is not None and name != "search":  # the table stays where it is
            self._console.print(self._bar.above)
            self._bar.above = None
        if name in _STEPS and not self._moving:
            self._console.print(Text(f"{_STEPS[name]}{self._elapsed()}"), soft_wrap=True)

    def _elapsed(self) -> str:
        """How long it has been at it, once that is worth a word."""
        seconds = time.monotonic() - self._start
        return f", after {duration(seconds)}" if seconds > QUIET else ""

    def plan(self, plan: CampaignPlan, cut: Sequence[str]) -> None:
        for line in (str(plan), *(f"cut: {one}" for one in cut)):
            self._console.print(Text(line), soft_wrap=True)

    def rivals(self, found: Mapping[str, Individual]) -> None:
        self._rivals = dict(sorted(found.items(), key=lambda item: mean_excess(item[1].excess))[:_RIVALS])

    def generation(self, number: int, front: Sequence[Individual], counts: Mapping[str, int]) -> None:
        line = (
            f"generation {number}: {counts['drawn']} drawn, {counts['unique_masks']} masks, {counts['paid']} evaluated"
        )
        self._forget()
        if not self._moving:
            self._told = time.monotonic()
            self._console.print(Text(line + self._elapsed() + told_best(front)), soft_wrap=True)
            return
        for count in range(_SHOWN, 0, -1):  # as many rows as there is room for
            self._bar.above = self._table(line, front, count)
            lines = self._console.render_lines(self._bar.above, self._console.options, pad=False)
            if len(lines) <= self._console.height - _BELOW:
                break
        self._bar.refresh()

    def _table(self, title: str, front: Sequence[Individual], count: int) -> RenderableType:
        """So many of the front, the best first and the best without gradients among them, then a third of baselines."""
        table = numbered(title + "; excess log-loss on the search text", "formula")
        for heading in ("mean", *(front[0].excess if front else ()), "nodes"):
            table.add_column(Text(heading), justify="right")
        free = without_gradients(front)
        shown = list(front[:count])
        if free is not None and free not in shown:
            shown[-1] = free
        for one in shown:
            mark, style = ("*", "bold") if one is free else ("", "")
            place = f"{mark}{front.index(one) + 1}"
            table.add_row(place, Text(shortened(one.text), style), *_figures(one))
        table.add_section()
        for name, one in list(self._rivals.items())[: max(1, count // 3)]:
            table.add_row("", Text(f"{name}: {shortened(one.text)}"), *_figures(one))
        return Group(fitted(table, self._console.width), Text(_LEGEND))


def _figures(one: Individual) -> list[str]:
    excess = (f"{value:.4f}" for value in (mean_excess(one.excess), *one.excess.values()))
    return [*excess, str(len(one.expression))]
