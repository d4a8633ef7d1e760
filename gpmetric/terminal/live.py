"""What commands show while they run: bars, lines, a live table; formulas are plain text, never markup."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from gpmetric.allocation.allocate import AllocateListener
from gpmetric.allocation.evaluation_log import Measured
from gpmetric.evolution.fitness import mean_excess
from gpmetric.evolution.listener import DiscoverListener
from gpmetric.evolution.selection import Individual
from gpmetric.evolution.time_budget import CampaignPlan
from gpmetric.plain import plain
from gpmetric.pruning.bench import BenchListener, BenchRow
from gpmetric.pruning.prune import PruneListener
from gpmetric.session.evaluate import EvaluateListener
from gpmetric.session.plan import Plan
from gpmetric.session.session import Listener
from gpmetric.structured.listener import SlimListener
from gpmetric.terminal.figures import duration, figures_of, needs_of, number
from gpmetric.terminal.narrow import fitted
from gpmetric.terminal.text import Text
from gpmetric.tuning.recipe_name import recipe_name
from gpmetric.tuning.steps import TuneListener
from gpmetric.tuning.trial_log import Measurement

__all__ = [
    "AllocateReport",
    "BenchReport",
    "DiscoverReport",
    "EvaluateReport",
    "PlainReport",
    "PruneReport",
    "SlimReport",
    "TuneReport",
]  # fmt: skip

_SEARCHED = {"kl": "divergence"}  # what an objective is called, where that is not its name
_SLIM_SECONDS = 10  # between two lines of a structured search
_LONG, _LARGE = 20, 2 * 10**9  # seconds and bytes from which on a plan is told
_QUIET = 60  # seconds without a line, where there are no bars
_SHOWN = 12  # rows of the live table
_STEPS = {  # of a campaign that say nothing themselves for long
    "baselines": "baselines on validation",
    "finalists": "finalists on validation",
    "test": "winner and baselines on test",
    "draws": "winner and best baseline on draws of the calibration",
}


class _Bars:
    """Progress bars with the time left, each there until it is done; a line now and then where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), console=console, transient=True,
            disable=not console.is_terminal,
        )  # fmt: skip
        self._tasks: dict[str, Any] = {}
        self._began: dict[str, float] = {}
        self._latest: dict[str, int] = {}
        self._told = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def progress(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(plain(what), total=total)
        now = time.monotonic()
        if done <= self._latest.get(what, done):  # it begins, maybe again
            self._began[what] = now
            self._bar.reset(self._tasks[what])
        self._bar.update(self._tasks[what], completed=done, total=total, visible=done < total)
        self._latest[what] = done
        began = self._began[what]
        if not self._console.is_terminal and now - self._told > _QUIET and began < now:
            self._told = now
            left = duration((now - began) * (total - done) / max(1, done))
            self._console.print(Text(f"{what}: {done} of {total}, about {left} left"), soft_wrap=True)

    def needs(self, plan: Plan) -> None:
        if plan.seconds > _LONG or plan.memory_bytes > _LARGE:
            self._console.print(Text(needs_of(plan.describe())), soft_wrap=True)

    def dense(self, ppl: Mapping[str, float]) -> None:
        self._console.print(Text("dense: " + figures_of(ppl)))


class BenchReport(_Bars, BenchListener):
    """Prints the dense model and every row as soon as it is measured."""

    def model(self, name: str) -> None:
        for task in self._tasks.values():  # of the model before
            self._bar.remove_task(task)
        self._tasks.clear()
        self._console.print(Text(f"model {name}"), soft_wrap=True)

    def row(self, row: BenchRow) -> None:
        outcome = "failed" if row.error else f"{figures_of(row.ppl)} ({row.seconds:.1f} s)"
        self._console.print(Text(f"{row.target} {row.metric}: {outcome}"))


class EvaluateReport(_Bars, EvaluateListener):
    """Prints every text's perplexity as soon as it is measured."""

    def text(self, name: str, ppl: float) -> None:
        self._console.print(Text(f"{name}: perplexity {ppl:.4f}"), soft_wrap=True)

    def tasks(self, figures: Mapping[str, Mapping[str, float]]) -> None:
        for name, row in figures.items():
            told = (f"{key} {value:.4f}" for key, value in row.items())
            self._console.print(Text(f"{name}: {', '.join(told)}"), soft_wrap=True)


class PlainReport(_Bars, Listener):
    """Bars alone."""


class AllocateReport(_Bars, AllocateListener):
    """A line per generation."""

    def generation(self, number: int, population: Sequence[Measured], batches: int, spent: float) -> None:
        ends = sorted(population, key=lambda one: one.sparsity)
        shown = [ends[0], ends[len(ends) // 2], ends[-1]]
        figures = ", ".join(f"{one.value(batches):.3f} at {one.sparsity:.2f}" for one in shown)
        self._console.print(Text(f"generation {number} ({spent:.0%} of the budget): {figures}"), soft_wrap=True)


class PruneReport(_Bars, PruneListener):
    """Says where a command that was killed goes on."""

    def resumed(self, block: int, blocks: int) -> None:
        place = f"at block {block} of {blocks}" if block < blocks else f"behind the last of {blocks} blocks"
        self._console.print(Text(f"going on {place}; --restart begins anew"), soft_wrap=True)

    def other_use(self, made_for: Mapping[str, str], used: Mapping[str, str]) -> None:
        there, here = (", ".join(f"{name} {value}" for name, value in one.items()) for one in (made_for, used))
        self._console.print(Text(f"the allocation was made for {there}; here it is used with {here}"), soft_wrap=True)


class SlimReport(_Bars, SlimListener):
    """A line now and then: objective, entropy of the policy or exchanges that were kept, budget."""

    _next = 0.0

    def report(self, report: Mapping[str, Any], share: float) -> None:
        self.progress("search, % of its length", int(100 * share), 100)
        if report["seconds"] >= self._next or share >= 1:
            self._next = report["seconds"] + _SLIM_SECONDS
            loss = f"{_SEARCHED.get(report['objective'], report['objective'])} {number(report['loss']):.4f}"
            found = f"entropy {report['entropy']:.3f} bits" if "entropy" in report else f"{report['changes']} kept"
            kept = f"{found}, {report['kept']:.4f} of the units' cost stays"
            line = f"step {report['step']} ({share:.0%}): {loss}, {kept}"
            self._console.print(Text(line), soft_wrap=True)


class TuneReport(PruneReport, SlimReport, TuneListener):
    """A line per trial, a line per generation, a line of a structured search now and then."""

    def step(self, name: str) -> None:
        self._console.print(Text(f"{name}:"), soft_wrap=True)

    def trial(self, trial: Measurement[Any], excess: float) -> None:
        share = "" if trial.share == 1 else f" on 1/{1 / trial.share:g} of the windows"
        outcome = f"excess {excess:.4f} ({trial.seconds:.1f} s)" if trial.error is None else f"failed: {trial.error}"
        self._console.print(Text(f"  {recipe_name(trial.recipe.document())}{share}: {outcome}"), soft_wrap=True)

    def generation(self, number: int, front: Sequence[Individual], evaluations: int) -> None:
        line = f"  generation {number}: {evaluations} evaluated{_best(front)}"
        self._console.print(Text(line), soft_wrap=True)

    def cut(self, what: str) -> None:
        self._console.print(Text(f"cut: {what}"), soft_wrap=True)


class DiscoverReport(_Bars, DiscoverListener):
    """A live Pareto table on a terminal; elsewhere a line per step and generation, and now and then one between."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._live = Live(console=console, auto_refresh=False)
        self._start = time.monotonic()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._live.stop()

    def baselines(self, excess: Mapping[str, Mapping[str, float]]) -> None:
        best = min(excess, key=lambda name: mean_excess(excess[name]))
        self._console.print(Text(f"best baseline on validation: {best}, mean excess {mean_excess(excess[best]):.4f}"))

    def serving(self, address: str) -> None:
        self._console.print(Text(f"live page: {address}"), soft_wrap=True)

    def step(self, name: str) -> None:
        if name == "search":  # its table takes the place of the bars
            self._bar.stop()
        elif name == "finalists":
            self._live.stop()
            self._bar.start()
        if name in _STEPS and not self._console.is_terminal:
            self._console.print(Text(f"{_STEPS[name]}{self._elapsed()}"), soft_wrap=True)

    def _elapsed(self) -> str:
        """How long it has been at it, once that is worth a word."""
        seconds = time.monotonic() - self._start
        return f", after {duration(seconds)}" if seconds > _QUIET else ""

    def plan(self, plan: CampaignPlan, cut: Sequence[str]) -> None:
        for line in (str(plan), *(f"cut: {one}" for one in cut)):
            self._console.print(Text(line), soft_wrap=True)

    def generation(self, number: int, front: Sequence[Individual], counts: Mapping[str, int]) -> None:
        line = (
            f"generation {number}: {counts['drawn']} drawn, {counts['unique_masks']} masks, {counts['paid']} evaluated"
        )
        if not self._console.is_terminal:
            self._told = time.monotonic()
            self._console.print(Text(line + self._elapsed() + _best(front)), soft_wrap=True)
            return
        self._live.start()
        self._live.update(self._table(line, front), refresh=True)

    def _table(self, title: str, front: Sequence[Individual]) -> RenderableType:
        table = Table(title=Text(title + "; excess log-loss on the search text"), title_justify="left")
        for heading in ("mean", *(front[0].excess if front else ()), "nodes"):
            table.add_column(Text(heading), justify="right")
        table.add_column("formula (bold: the best without gradients)")
        free = _without_gradients(front)
        shown = list(front[:_SHOWN])
        if free is not None and free not in shown:
            shown[-1] = free
        for one in shown:
            figures = (f"{value:.4f}" for value in (mean_excess(one.excess), *one.excess.values()))
            style = "bold" if one is free else ""
            table.add_row(*figures, str(len(one.expression)), Text(one.text, style))
        return fitted(table, self._console.width)


def _without_gradients(front: Sequence[Individual]) -> Individual | None:
    """The best that needs no gradients of a front with the best first."""
    return next((one for one in front if not one.metric.needs_gradients), None)


def _best(front: Sequence[Individual]) -> str:
    """The best of a front and, where that is another, the best without gradients, to be put after a line."""
    if not front:
        return ""
    told = f", mean excess of the best {mean_excess(front[0].excess):.4f}: {front[0].text}"
    free = _without_gradients(front)
    if free is None or free is front[0]:
        return told
    return f"{told}; without gradients {mean_excess(free.excess):.4f}: {free.text}"
