"""The screening ladder: cheap measurements first, and only the better part of the candidates climbs to the next rung.

After the grammar, finiteness, ties and mask fingerprint come the layer reconstruction error from cached Gram matrices,
the loss on few search windows, and the loss on all of them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, cast

from scipy.stats import spearmanr

from gpmetric.evolution.executors import Executor, Outcome
from gpmetric.evolution.ledger import Ledger, Measurement
from gpmetric.evolution.objectives import mean_excess

__all__ = ["PROBE", "Ladder", "OutOfTime", "Rung", "cumulative", "describe_ladder", "ladder", "promote"]

_KEEP = 0.4  # share of the candidates that a loss on few windows sends on
_PROBE_KEEPS = 0.8  # share of the candidates that the reconstruction error sends on
_BATCH = 8  # metrics probed in one task: they share sub-expressions, and a few tasks keep several workers busy

PROBE = "reconstruction"  # the first rung, measured on probe layers together with the mask fingerprint


@dataclass(frozen=True)
class Rung:
    """One step: the loss on the search windows from `first` up to `last`, which the steps before did not read.

    `keep` is the share of the candidates measured here that is measured on the next rung.
    """

    name: str
    first: int
    last: int
    keep: float


def ladder(windows: int) -> tuple[Rung, ...]:
    """The rungs over that many search windows: an eighth, half, and all, as successive halving has them.

    Source: Jamieson and Talwalkar 2016, with windows of text as the resource.
    """
    bounds = sorted({max(1, windows // 8), max(1, windows // 2), windows})
    keeps = [_KEEP] * (len(bounds) - 1) + [1.0]
    return tuple(
        Rung(f"{last} windows", first, last, keep)
        for first, last, keep in zip([0, *bounds[:-1]], bounds, keeps, strict=True)
    )


class OutOfTime(Exception):
    """The time for searching is over; what was measured is in the ledger."""


class Ladder:
    """Measures the candidates of one generation rung by rung; what the ledger has already is not measured again.

    Args:
        rungs: steps of the loss, after the probe.
        objective: "kl" or "loss", the figure that decides who climbs.
        ledger: takes every measurement as soon as it is there.
        executor: applies an Evaluator to tasks.
        generation: number of the generation.
        out_of_time: asked after every measurement.
    """

    def __init__(
        self,
        rungs: Sequence[Rung],
        objective: str,
        ledger: Ledger,
        executor: Executor,
        generation: int,
        out_of_time: Callable[[], bool],
    ) -> None:
        self._rungs = rungs
        self._objective = objective
        self._ledger = ledger
        self._executor = executor
        self._generation = generation
        self._out_of_time = out_of_time
        self._known = {(row.position, row.rung): row for row in ledger.measurements(generation)}

    def probe(self, metrics: Mapping[int, str]) -> dict[int, Measurement]:
        """Masks and reconstruction errors of the metrics at these positions.

        Raises:
            OutOfTime: before all are measured.
        """
        missing = [position for position in metrics if (position, PROBE) not in self._known]
        batches = [missing[start : start + _BATCH] for start in range(0, len(missing), _BATCH)]
        lost = self._probe_batches(metrics, batches)
        self._probe_batches(metrics, [[position] for position in lost])  # which of a batch kills workers?
        return {position: self._known[position, PROBE] for position in metrics}

    def _probe_batches(self, metrics: Mapping[int, str], batches: Sequence[Sequence[int]]) -> list[int]:
        """Measures batches; the positions of those of several metrics that came to nothing are returned."""
        lost: list[int] = []
        tasks = [{"kind": "probe", "metrics": [metrics[position] for position in batch]} for batch in batches]
        for batch, outcome in zip(batches, self._outcomes(tasks), strict=True):
            if outcome.error is not None and len(batch) > 1:
                lost += batch
                continue
            values = outcome.value or [{"error": outcome.error}]
            self._take(
                Measurement(
                    self._generation,
                    position,
                    PROBE,
                    None if value["error"] else value,
                    value["error"],
                    outcome.seconds / len(batch),
                    outcome.process,
                    outcome.attempt,
                )
                for position, value in zip(batch, values, strict=True)
            )
        return lost

    def screen(self, metrics: Mapping[int, str], always: frozenset[int]) -> list[int]:
        """Positions of the probed metrics that are worth the last rung.

        Args:
            metrics: by position, all of them probed.
            always: positions that climb whatever they are measured at, as long as it is finite.

        Raises:
            OutOfTime: before the last but one rung is finished.
        """
        errors = {position: self._known[position, PROBE].value["reconstruction"] for position in metrics}
        figures = {position: mean_excess(error) if error else 0.0 for position, error in errors.items()}
        keep = _PROBE_KEEPS if any(errors.values()) else 1.0  # without Gram matrices there is nothing to go by
        alive = promote(figures, keep, always)
        for rung in self._rungs[:-1]:
            self._climb({position: metrics[position] for position in alive}, rung)
            figures = {position: self._figure(position, rung) for position in alive}
            alive = promote(figures, rung.keep, always)
        return alive

    def finish(self, metrics: Mapping[int, str]) -> None:
        """Measures what was found worth it on all windows.

        Raises:
            OutOfTime: before all are measured.
        """
        self._climb(metrics, self._rungs[-1])

    def measurement(self, position: int, rung: str) -> Measurement | None:
        """What a rung gave for a candidate; None when it was not measured there."""
        return self._known.get((position, rung))

    def figures(self, position: int, kind: str) -> dict[str, float]:
        """Figures by target over all windows, "loss" for the excess log-loss or "kl"; the last rung was climbed."""
        parts = [(step, self._known[position, step.name]) for step in self._rungs]
        return cumulative([(step.last - step.first, measured.value[kind]) for step, measured in parts])

    def _figure(self, position: int, rung: Rung) -> float:
        """Mean over targets up to a rung; infinite where the candidate failed there."""
        climbed = self._rungs[: self._rungs.index(rung) + 1]
        parts = [(step.last - step.first, self._known[position, step.name].value) for step in climbed]
        if parts[-1][1] is None:
            return math.inf
        return mean_excess(cumulative([(windows, value[self._objective]) for windows, value in parts]))

    def _climb(self, metrics: Mapping[int, str], rung: Rung) -> None:
        missing = [position for position in metrics if (position, rung.name) not in self._known]
        tasks = [
            {"kind": "excess", "metric": metrics[position], "first": rung.first, "last": rung.last}
            for position in missing
        ]
        for position, outcome in zip(missing, self._outcomes(tasks), strict=True):
            value, error = outcome.value, outcome.error
            figures = [item for kind in value.values() for item in kind.items()] if value else []
            collapsed = dict.fromkeys(target for target, figure in figures if not math.isfinite(figure))
            if collapsed:
                value, error = None, f"loss or divergence is not finite at {', '.join(collapsed)}"
            self._take(
                [
                    Measurement(
                        self._generation,
                        position,
                        rung.name,
                        value,
                        error,
                        outcome.seconds,
                        outcome.process,
                        outcome.attempt,
                    )
                ]
            )

    def _outcomes(self, tasks: Sequence[Any]) -> Iterator[Outcome]:
        # closing: workers still busy when time is out are given up
        with closing(cast(Generator[Outcome], self._executor.map_ordered(tasks))) as outcomes:
            for number, outcome in enumerate(outcomes, start=1):
                yield outcome
                if number < len(tasks) and self._out_of_time():
                    raise OutOfTime

    def _take(self, measurements: Iterable[Measurement]) -> None:
        rows = list(measurements)
        self._ledger.measure(rows)
        self._known |= {(row.position, row.rung): row for row in rows}


def promote(figures: Mapping[int, float], keep: float, always: frozenset[int] = frozenset()) -> list[int]:
    """Positions that go on, ascending: the lowest `keep` share of the figures, at least one, and those of `always`.

    A figure that is not finite never goes on; of equal ones the earlier position does.
    """
    finite = sorted((figure, position) for position, figure in figures.items() if math.isfinite(figure))
    better = {position for _, position in finite[: math.ceil(keep * len(figures))]}
    return sorted(better | {position for _, position in finite if position in always})


def cumulative(parts: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """Excess by target over all windows read so far, from (windows, excess) of each rung climbed."""
    total = sum(windows for windows, _ in parts)
    return {target: sum(windows * part[target] for windows, part in parts) / total for target in parts[0][1]}


def describe_ladder(measurements: Sequence[Measurement], rungs: Sequence[Rung], objective: str) -> list[dict[str, Any]]:
    """What each rung saw and was worth: candidates measured, and rank correlation with the last rung.

    Args:
        measurements: of the ledger.
        rungs, objective: those of the campaign.

    Returns:
        One row per rung with `rung`, `measured` and `spearman` against the figure on all windows over the `compared`
        candidates that reached it, None below three of them. Screening sends up the better part only,
        which makes the correlation lower than it is over all candidates.
    """
    found: dict[str, dict[tuple[int, int], float]] = defaultdict(dict)
    parts: dict[tuple[int, int], list[tuple[int, Mapping[str, float]]]] = defaultdict(list)
    measured: dict[str, int] = defaultdict(int)
    windows = {rung.name: rung.last - rung.first for rung in rungs}
    for name in (PROBE, *windows):
        for row in measurements:
            if row.rung != name or row.error is not None:
                continue
            place = row.generation, row.position
            if name == PROBE:
                errors = row.value["reconstruction"]
                figure = mean_excess(errors) if errors else math.nan
            else:
                parts[place].append((windows[name], row.value[objective]))
                figure = mean_excess(cumulative(parts[place]))
            measured[name] += 1
            if math.isfinite(figure):
                found[name][place] = figure
    last = found[rungs[-1].name]
    return [
        {
            "rung": name,
            "measured": measured[name],
            "compared": len(both),
            "spearman": _spearman([found[name][place] for place in both], [last[place] for place in both]),
        }
        for name in (PROBE, *windows)
        for both in [sorted(found[name].keys() & last.keys())]
    ]


def _spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    if len(first) < 3 or len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(spearmanr(first, second).statistic)
