"""What the benchmark of allocators says: means over seeds and texts against uniform's, rows, tables and a plot."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot
from results import row

Run = Mapping[str, Any]

CASE = ("model", "metric", "protocol", "update", "sparsity")
SIZES = ("uniform", "nsga2")  # whose perplexities are told against size


@dataclass(frozen=True)
class Summary:
    """One allocator in one case: by seed, mean excess over the texts and its ratio to uniform's; means of its costs."""

    case: tuple[Any, ...]  # values of CASE
    allocator: str
    excess: list[float]
    ratio: list[float]
    tokens: float
    seconds: float
    bought: int
    gap: int  # weights that it removes beyond the budget, the largest by absolute value

    @property
    def label(self) -> str:
        """As in the table and in results.csv."""
        model, metric, protocol, update, sparsity = self.case
        return f"{short(model)} {metric} {sparsity:g} {protocol}{'' if update == 'none' else f' {update}'}"


def short(model: str) -> str:
    """The last part of a model's path or name."""
    return Path(model).name or model


def summarise(runs: Iterable[Run]) -> list[Summary]:
    """One per case and allocator, cases in order of model, metric, protocol, update and sparsity."""
    cases: dict[tuple[Any, ...], dict[str, dict[int, list[Run]]]] = {}
    for run in runs:
        by_allocator = cases.setdefault(tuple(run[name] for name in CASE), {})
        by_allocator.setdefault(run["allocator"], {}).setdefault(run["seed"], []).append(run)
    found = []
    for case in sorted(cases):
        by_allocator = cases[case]
        excess = {
            allocator: {seed: float(np.mean([run["excess"] for run in texts])) for seed, texts in sorted(seeds.items())}
            for allocator, seeds in by_allocator.items()
        }
        uniform = excess.get("uniform", {})
        for allocator, by_seed in excess.items():
            all_runs = [run for texts in by_allocator[allocator].values() for run in texts]
            found.append(
                Summary(
                    case,
                    allocator,
                    list(by_seed.values()),
                    [value / uniform[seed] for seed, value in by_seed.items() if uniform.get(seed, 0) > 0],
                    float(np.mean([run["tokens"] for run in all_runs])),
                    float(np.mean([run["seconds"] for run in all_runs])),
                    all_runs[0]["bought"],
                    max((run["removed"] - run["budget"] for run in all_runs), key=abs),
                )
            )
    return found


def report(summaries: Sequence[Summary]) -> None:
    """Prints the table."""
    head = f"{'excess':>9s} {'of uniform':>11s}   {'seeds':16s} {'M tokens':>8s} {'seconds':>8s}  allocations"
    for index, one in enumerate(summaries):
        if index == 0 or one.case != summaries[index - 1].case:
            print(f"\n{one.label}: mean excess over seeds and texts, nats\n  {'':12s}{head}")
        low, high = (min(one.ratio), max(one.ratio)) if one.ratio else (math.nan, math.nan)
        ratio = float(np.mean(one.ratio)) if one.ratio else math.nan
        print(
            f"  {one.allocator:12s}{np.mean(one.excess):9.4f} {ratio:11.3f}   {f'[{low:.3f}, {high:.3f}]':16s} "
            f"{one.tokens / 1e6:8.2f} {one.seconds:8.1f}  {one.bought:6d}"
            + (f"   removes {one.gap:+d} weights beyond the budget" if one.gap else "")
        )


def report_sizes(runs: Sequence[Run]) -> None:
    """Prints perplexity against the weights kept, of those that may be pruned and in all, as the thesis's tables."""
    tables: dict[tuple[Any, ...], dict[tuple[float, int], list[Run]]] = {}
    for run in runs:
        if run["allocator"] in SIZES:
            table = tables.setdefault((*(run[name] for name in CASE[:-1]), run["text"]), {})
            table.setdefault((run["sparsity"], SIZES.index(run["allocator"])), []).append(run)
    for (model, metric, protocol, update, text), table in sorted(tables.items()):
        dense = next(iter(table.values()))[0]["dense_perplexity"]
        print(f"\n{short(model)} {metric}, {protocol}, update {update}, {short(text)}: dense perplexity {dense:.2f}")
        print(f"  {'sparsity':10s}{'':8s}{'kept prunable':>15s}{'kept in all':>15s}{'perplexity':>12s}")
        for (sparsity, which), one in sorted(table.items()):
            prunable, total, ppl = (
                float(np.mean([run[name] for run in one])) for name in ("kept_prunable", "kept_total", "perplexity")
            )
            print(f"  {sparsity:<10g}{SIZES[which]:8s}{prunable:15,.0f}{total:15,.0f}{ppl:12.2f}")


def rows(summaries: Sequence[Summary], device: str) -> list[dict[str, str]]:
    """Rows of results.csv: values are seeds, the baseline is uniform's mean."""
    uniform = {one.case: float(np.mean(one.excess)) for one in summaries if one.allocator == "uniform"}
    return [
        row("allocation", f"{one.label}: {one.allocator}", np.array(one.excess), uniform.get(one.case), "nats", device)
        for one in summaries
    ]


def draw(summaries: Sequence[Summary], path: Path) -> None:
    """Ratio to uniform along the sparsity with the range of the seeds: a panel for each model, metric and protocol."""
    matplotlib.use("agg")
    panels = list(dict.fromkeys(one.case[:-1] for one in summaries))
    allocators = list(dict.fromkeys(one.allocator for one in summaries if one.allocator != "uniform"))
    sparsities = sorted({one.case[-1] for one in summaries})
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    figure, axes = pyplot.subplots(
        down, across, figsize=(1.5 + 3.6 * across, 0.6 + 2.9 * down), sharex=True, sharey=True, layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes.flat, panels, strict=False):
        model, metric, protocol, update = panel
        for number, allocator in enumerate(allocators):
            shown = [one for one in summaries if (one.case[:-1], one.allocator) == (panel, allocator) and one.ratio]
            places = [one.case[-1] for one in shown]
            style: dict[str, Any] = {"color": f"C{number}", "marker": "o", "ms": 4}
            axis.plot(places, [np.mean(one.ratio) for one in shown], label=allocator, **style)
            low, high = ([bound(one.ratio) for one in shown] for bound in (min, max))
            axis.fill_between(places, low, high, color=f"C{number}", alpha=0.15, lw=0)
        axis.axhline(1, color="black", lw=0.8, zorder=1)
        axis.set_title(f"{short(model)} {metric}\n{protocol}, update {update}", fontsize=9)
        axis.grid(axis="y", lw=0.4)
        axis.set_xticks(sparsities, [f"{sparsity:g}" for sparsity in sparsities])
    figure.supxlabel("mean sparsity", fontsize=10)
    figure.supylabel("excess log-loss / uniform's", fontsize=10)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
