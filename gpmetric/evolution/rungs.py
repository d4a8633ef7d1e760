"""The steps of successive halving: few search windows for all candidates, more for the better ones, all for the best.

Source: Jamieson and Talwalkar 2016, with windows of text as the resource.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scipy.stats import spearmanr

from gpmetric.evolution.fitness import mean_excess
from gpmetric.evolution.records import Measurement
from gpmetric.evolution.tasks import ExcessTask, Figures, ProbeTask, Task, UseTask
from gpmetric.metrics import Metric

__all__ = ["PROBE", "Rung", "cumulative", "describe_rungs", "figures_at", "halving_rungs", "mean_at", "promote"]

_KEEP = 0.4  # share of the candidates that a loss on few windows sends on,
_KEEP_IN_USE = 0.2  # and that one pruning in one shot sends on to where the model is pruned as it is going to be

_Known = Mapping[tuple[Any, str], Measurement]  # by place and rung; a place is a position, generation or not


@dataclass(frozen=True)
class Rung:
    """One step: the loss on the search windows from `first` up to `last`, which the steps before did not read.

    Attributes:
        keep: share of the candidates measured here that is measured on the next rung.
        together: metrics measured in one task.
        in_use: whether the model is pruned as it is going to be, instead of in one shot; what the steps before read is
            read again then.
        hardest: whether only the target of the highest sparsity is measured.
    """

    name: str
    first: int
    last: int
    keep: float
    together: int = 1
    in_use: bool = False
    hardest: bool = False

    def task(self, metrics: Sequence[Metric]) -> Task:
        """What measures so many metrics on this rung."""
        if self.in_use:
            return UseTask(metrics[0])
        if self.name == PROBE.name:
            return ProbeTask(tuple(metrics))
        return ExcessTask(metrics[0], self.first, self.last, self.hardest)


# The first step reads no window: masks and reconstruction errors of a few layers. Eight metrics at once share what is
# alike in them, and still make a few tasks for several workers.
PROBE = Rung("reconstruction", 0, 0, 0.8, together=8)


def halving_rungs(windows: int, *, in_use: bool = False) -> tuple[Rung, ...]:
    """The rungs over that many search windows: an eighth, half and all, or an eighth at one target and all in use.

    A solver that prunes in one shot takes as long for an eighth of the windows as for half of them, which predicts use
    no better: of 45, 32 and 18 formulas of campaigns on llama-05m and gpt2-05m, by admm with the dense fit, rank
    correlations are 0.79, 0.94 and 0.87 for 3 of 24 windows and 0.82, 0.94 and 0.86 for 12. Nor do four targets predict
    their mean better than the highest of them, 0.7, alone: 0.80, 0.93 and 0.88; 0.88 where four have 0.94 on gpt2-3m.
    """
    bounds = sorted({max(1, windows // 8), windows} | (set() if in_use else {max(1, windows // 2)}))
    keeps = [_KEEP_IN_USE if in_use else _KEEP] * (len(bounds) - 1) + [1.0]
    steps = zip([0, *bounds[:-1]], bounds, keeps, strict=True)
    rungs = [Rung(f"{last} windows", first, last, keep) for first, last, keep in steps]
    if in_use:
        rungs = [replace(rung, hardest=True) for rung in rungs]
        rungs[-1] = Rung(f"{windows} windows in use", 0, windows, 1.0, in_use=True)
    return tuple(rungs)


def promote(figures: Mapping[int, float], keep: float, always: frozenset[int] = frozenset()) -> list[int]:
    """Positions that go on, ascending: the lowest `keep` share of the figures, at least one, and those of `always`.

    A figure that is not finite never goes on; of equal ones the earlier position does.
    """
    finite = sorted((figure, position) for position, figure in figures.items() if math.isfinite(figure))
    better = {position for _, position in finite[: math.ceil(keep * len(figures))]}
    return sorted(better | {position for _, position in finite if position in always})


def cumulative(parts: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """Figures by target over all windows read so far, from (windows, figures) of each rung climbed."""
    total = sum(windows for windows, _ in parts)
    return {target: sum(windows * part[target] for windows, part in parts) / total for target in parts[0][1]}


def figures_at(known: _Known, place: Any, climbed: Sequence[Rung]) -> Figures:
    """What is known of a candidate over the windows of all rungs that it climbed; in use, if the last of them tells."""
    if climbed[-1].in_use:
        return dict(known[place, climbed[-1].name].value)
    parts = [(rung.last - rung.first, known[place, rung.name].value) for rung in climbed]
    return {name: cumulative([(windows, value[name]) for windows, value in parts]) for name in parts[-1][1]}


def mean_at(known: _Known, place: Any, climbed: Sequence[Rung], objective: str) -> float:
    """Mean over targets of a candidate's objective, of the reconstruction error where it was only probed.

    Infinite where it failed, NaN where it has no reconstruction error.
    """
    row = known[place, climbed[-1].name if climbed else PROBE.name]
    if row.error is not None:
        return math.inf
    figures = figures_at(known, place, climbed)[objective] if climbed else row.value["reconstruction"]
    return mean_excess(figures) if figures else math.nan


def describe_rungs(measurements: Sequence[Measurement], rungs: Sequence[Rung], objective: str) -> list[dict[str, Any]]:
    """What each rung saw and was worth: candidates measured, and rank correlation with the last rung.

    Returns:
        One row per rung with `rung`, `measured` and `spearman` against the figure on all windows over the `compared`
        candidates that reached it, None below three of them. Screening sends up the better part only,
        which makes the correlation lower than it is over all candidates.
    """
    known = {((row.generation, row.position), row.rung): row for row in measurements}
    found: dict[str, dict[tuple[int, int], float]] = {}
    measured: dict[str, int] = {}
    for count, rung in enumerate((PROBE, *rungs)):
        places = [place for (place, name), row in known.items() if name == rung.name and row.error is None]
        means = {place: mean_at(known, place, rungs[:count], objective) for place in places}
        found[rung.name] = {place: mean for place, mean in means.items() if math.isfinite(mean)}
        measured[rung.name] = len(places)
    last = found[rungs[-1].name]
    rows = []
    for name, figures in found.items():
        both = sorted(figures.keys() & last.keys())
        spearman = _spearman([figures[place] for place in both], [last[place] for place in both])
        rows.append({"rung": name, "measured": measured[name], "compared": len(both), "spearman": spearman})
    return rows


def _spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    if len(first) < 3 or len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(spearmanr(first, second).statistic)
