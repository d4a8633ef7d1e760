"""What commands show while they run and when they are done; formulas are printed as plain text, never as markup."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from gpmetric.evolution.discover import DiscoverListener
from gpmetric.evolution.objectives import mean_excess
from gpmetric.evolution.selection import Individual
from gpmetric.pruning.bench import BenchListener, BenchRow

__all__ = ["BenchReport", "DiscoverReport", "print_bench", "print_discover"]

_SHOWN = 12  # rows of the live table


class _Bars:
    """Progress bars that vanish when done; none where the output is not a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console,
            transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def progress(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total)
        self._bar.update(self._tasks[what], completed=done)

    def dense(self, ppl: Mapping[str, float]) -> None:
        self._console.print(Text("dense: " + _figures(ppl)))


class BenchReport(_Bars, BenchListener):
    """Prints the dense model and every row as soon as it is measured."""

    def row(self, row: BenchRow) -> None:
        outcome = "failed" if row.error else f"{_figures(row.ppl)} ({row.seconds:.1f} s)"
        self._console.print(Text(f"{row.target} {row.metric}: {outcome}"))


class DiscoverReport(_Bars, DiscoverListener):
    """A live Pareto table on a terminal, a line per generation elsewhere."""

    def __init__(self, console: Console, targets: Sequence[str]) -> None:
        super().__init__(console)
        self._targets = targets
        self._live = Live(console=console, auto_refresh=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._live.stop()

    def baselines(self, excess: Mapping[str, Mapping[str, float]]) -> None:
        best = min(excess, key=lambda name: mean_excess(excess[name]))
        self._console.print(Text(f"best baseline on validation: {best}, mean excess {mean_excess(excess[best]):.4f}"))
        self._bar.stop()

    def generation(self, number: int, front: Sequence[Individual], counts: Mapping[str, int]) -> None:
        line = f"generation {number}: {counts['drawn']} drawn, {counts['paid']} evaluated"
        if not self._console.is_terminal:
            best = f", best mean excess {front[0].mean:.4f}: {front[0].expression}" if front else ""
            self._console.print(Text(line + best), soft_wrap=True)
            return
        self._live.start()
        self._live.update(self._table(line, front), refresh=True)

    def _table(self, title: str, front: Sequence[Individual]) -> Table:
        table = Table(title=Text(title + "; excess log-loss on the search text"), title_justify="left")
        for heading in ("mean", *self._targets, "nodes"):
            table.add_column(Text(heading), justify="right")
        table.add_column("formula", overflow="fold")
        for one in front[:_SHOWN]:
            figures = (one.mean, *(one.excess[target] for target in self._targets))
            table.add_row(*(f"{value:.4f}" for value in figures), str(len(one.expression)), Text(str(one.expression)))
        return table


def print_discover(console: Console, result: Mapping[str, Any], ledger: Path) -> None:
    """The winner beside every baseline on the test text: perplexity by target and mean excess log-loss."""
    dense = result["dense"]["test"]
    table = Table(title=Text(f"perplexity on test, {result['model']}, dense {dense:.3f}"), title_justify="left")
    table.add_column("metric", overflow="fold")
    for heading in (*result["targets"], "mean excess"):
        table.add_column(Text(heading), justify="right")
    rows = {"winner": result["winner"], **result["baselines"]}
    for name, row in sorted(rows.items(), key=lambda item: _number(item[1]["mean_excess"])):
        figures = [f"{_number(row['ppl'][target]):.3f}" for target in result["targets"]]
        style = "bold" if name == "winner" else ""
        table.add_row(Text(name), *figures, f"{_number(row['mean_excess']):.4f}", style=style)
    console.print(table)
    console.print(Text(f"winner: {result['winner']['formula']}"), soft_wrap=True)
    seconds = result["seconds"]["per_evaluation"]
    console.print(
        Text(
            f"{result['evaluations']} evaluations, {seconds['score_and_mask']:.3f} s of scores and masks and "
            f"{seconds['prune_and_loss']:.3f} s of losses each; ledger {ledger}"
        ),
        soft_wrap=True,
    )


def _number(value: float | None) -> float:
    """JSON holds null where a figure was not finite."""
    return math.inf if value is None else value


def print_bench(console: Console, result: dict[str, Any]) -> None:
    """The table of `gpmetric bench`: a row per metric and target, a column per text, the best of a target in bold."""
    texts = list(result["dense"])
    table = Table(title=Text(f"perplexity, {result['model']}, {result['protocol']}"), title_justify="left")
    for heading in ("target", "metric", "update"):
        table.add_column(heading, overflow="fold")
    for heading in (*texts, "sparsity", "seconds"):
        table.add_column(Text(heading), justify="right")
    table.add_row("dense", "", "", *(f"{value:.3f}" for value in result["dense"].values()), "", "")
    for row in result["results"]:
        rivals = [other for other in result["results"] if other["target"] == row["target"] and not other["error"]]
        best = {text: min((other["ppl"][text] for other in rivals), default=math.nan) for text in texts}
        figures = [Text(f"{row['ppl'][text]:.3f}", "bold" if row["ppl"][text] == best[text] else "") for text in texts]
        table.add_row(
            *(Text(row[key]) for key in ("target", "metric", "update")),
            *figures,
            f"{row['sparsity']:.4f}",
            f"{row['seconds']:.1f}",
        )
    console.print(table)


def _figures(ppl: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in ppl.items())
