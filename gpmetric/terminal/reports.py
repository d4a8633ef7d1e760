"""What commands show while they run: bars, and a line for whatever is found; none of it needs torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gpmetric.allocation.listener import AllocateListener
from gpmetric.evolution.fitness import mean_excess
from gpmetric.files import number
from gpmetric.pruning.listeners import BenchListener, PruneListener
from gpmetric.session.listeners import EvaluateListener, Listener
from gpmetric.structured.listener import SlimListener
from gpmetric.terminal.bars import Bars
from gpmetric.terminal.figures import figures_of, needs_of, shortened
from gpmetric.terminal.text import Text
from gpmetric.tuning.listener import TuneListener
from gpmetric.tuning.recipe_name import recipe_name

if TYPE_CHECKING:
    from gpmetric.allocation.evaluation_log import Measured
    from gpmetric.evolution.selection import Individual
    from gpmetric.pruning.bench_log import BenchRow
    from gpmetric.session.plan import Plan
    from gpmetric.tuning.trial_log import Measurement

__all__ = [
    "AllocateReport",
    "BenchReport",
    "EvaluateReport",
    "PlainReport",
    "PruneReport",
    "Report",
    "SlimReport",
    "TuneReport",
    "told_best",
    "without_gradients",
]

_SEARCHED = {"kl": "divergence"}  # what an objective is called, where that is not its name
_SLIM_SECONDS = 10  # between two lines of a structured search
_LONG, _LARGE = 5, 2 * 10**9  # seconds and bytes from which on a plan is told


class Report(Bars):
    """Bars, and what every command tells besides."""

    def needs(self, plan: Plan) -> None:
        if plan.seconds > _LONG or plan.memory_bytes > _LARGE:
            self._console.print(Text(needs_of(plan.describe())), soft_wrap=True)

    def dense(self, ppl: Mapping[str, float]) -> None:
        self._console.print(Text("dense: " + figures_of(ppl)))


class BenchReport(Report, BenchListener):
    """Prints the dense model and every row as soon as it is measured."""

    def model(self, name: str) -> None:
        self._forget()
        self._console.print(Text(f"model {name}"), soft_wrap=True)

    def row(self, row: BenchRow) -> None:
        outcome = "failed" if row.error else f"{figures_of(row.ppl)} ({row.seconds:.1f} s)"
        self._console.print(Text(f"{row.target} {row.metric}: {outcome}"))


class EvaluateReport(Report, EvaluateListener):
    """Prints every text's perplexity as soon as it is measured."""

    def text(self, name: str, ppl: float) -> None:
        self._console.print(Text(f"{name}: perplexity {ppl:.4f}"), soft_wrap=True)

    def tasks(self, figures: Mapping[str, Mapping[str, float]]) -> None:
        for name, row in figures.items():
            told = (f"{key} {value:.4f}" for key, value in row.items())
            self._console.print(Text(f"{name}: {', '.join(told)}"), soft_wrap=True)


class PlainReport(Report, Listener):
    """Bars alone."""


class AllocateReport(Report, AllocateListener):
    """A line per generation."""

    def generation(self, number: int, population: Sequence[Measured], batches: int, spent: float) -> None:
        ends = sorted(population, key=lambda one: one.sparsity)
        shown = [ends[0], ends[len(ends) // 2], ends[-1]]
        figures = ", ".join(f"{one.value(batches):.3f} at {one.sparsity:.2f}" for one in shown)
        self._console.print(Text(f"generation {number} ({spent:.0%} of the budget): {figures}"), soft_wrap=True)


class PruneReport(Report, PruneListener):
    """Says where a command that was killed goes on."""

    def resumed(self, block: int, blocks: int) -> None:
        place = f"at block {block} of {blocks}" if block < blocks else f"behind the last of {blocks} blocks"
        self._console.print(Text(f"going on {place}; --restart begins anew"), soft_wrap=True)

    def other_use(self, made_for: Mapping[str, str], used: Mapping[str, str]) -> None:
        there, here = (", ".join(f"{name} {value}" for name, value in one.items()) for one in (made_for, used))
        self._console.print(Text(f"the allocation was made for {there}; here it is used with {here}"), soft_wrap=True)


class SlimReport(Report, SlimListener):
    """A line now and then: objective, entropy of the policy or exchanges that were kept, budget."""

    _next = 0.0

    def report(self, report: Mapping[str, Any], share: float) -> None:
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
        line = f"  generation {number}: {evaluations} evaluated{told_best(front)}"
        self._console.print(Text(line), soft_wrap=True)

    def cut(self, what: str) -> None:
        self._console.print(Text(f"cut: {what}"), soft_wrap=True)


def without_gradients(front: Sequence[Individual]) -> Individual | None:
    """The best that needs no gradients of a front with the best first."""
    return next((one for one in front if not one.metric.needs_gradients), None)


def told_best(front: Sequence[Individual]) -> str:
    """The best of a front and, where that is another, the best without gradients, to be put after a line."""
    if not front:
        return ""
    told = f", mean excess of the best {mean_excess(front[0].excess):.4f}: {shortened(front[0].text)}"
    free = without_gradients(front)
    if free is None or free is front[0]:
        return told
    return f"{told}; without gradients {mean_excess(free.excess):.4f}: {shortened(free.text)}"
