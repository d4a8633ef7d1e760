"""How a campaign scales: what the driver takes for a candidate, and how long a generation is with 1 to 1,000 workers.

    python benchmarks/bench_scaling.py                       # measures a campaign on the demo model, then simulates
    python benchmarks/bench_scaling.py --ledger LEDGER       # the task times of a campaign that was run
    python benchmarks/bench_scaling.py --tokens-per-second 30000 --overhead 0.2   # a model that is not at hand

Simulated is what `SuccessiveHalving` does: rung after rung, tasks in order to whoever is free, and between two rungs a
wait for the last task, since who climbs is known then. The driver's own seconds come on top; that workers probe what it
has drawn while it draws is left out.
"""

from __future__ import annotations

import argparse
import heapq
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import numpy as np
from results import append, row

from gpmetric.evolution import discover
from gpmetric.evolution.campaign import Campaign
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.request import DiscoverRequest
from gpmetric.evolution.rungs import PROBE

WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)
POPULATIONS = (1, 4, 16)  # times the measured one
LOW, HIGH = 0.5, 0.8  # efficiencies told of


@dataclass(frozen=True)
class Profile:
    """What a generation is made of.

    Attributes:
        rungs: seconds of the tasks that were measured, by rung in order.
        counts: tasks of each rung in a generation.
        driver: seconds of the driver for each drawn candidate.
        drawn: candidates of a generation.
    """

    rungs: Sequence[Sequence[float]]
    counts: Sequence[float]
    driver: float
    drawn: float

    def generation(self, workers: int, times: float, rng: np.random.Generator) -> float:
        """Seconds of a generation `times` as large, its tasks drawn from those that were measured."""
        seconds = self.driver * self.drawn * times
        for measured, count in zip(self.rungs, self.counts, strict=True):
            seconds += makespan(rng.choice(measured, max(1, round(count * times))), workers)
        return seconds


def makespan(tasks: Sequence[float], workers: int) -> float:
    """Seconds until the last task is done, each taken in order by whoever is free first."""
    free = [0.0] * workers
    for seconds in tasks:
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)


def read_profile(path: Path, driver: float) -> Profile:
    """Of a campaign's ledger; probes are tasks of several candidates."""
    with Ledger.read(path) as ledger:
        rows, generations = ledger.measurements(), len(ledger.generations())
        drawn = ledger.counts()["drawn"]
    by_rung: dict[str, list[float]] = {}
    for one in rows:
        by_rung.setdefault(one.rung, []).append(one.duration)
    joined = [
        [one * PROBE.together for one in seconds] if name == PROBE.name else seconds
        for name, seconds in by_rung.items()
    ]
    counts = [
        len(seconds) / generations / (PROBE.together if name == PROBE.name else 1) for name, seconds in by_rung.items()
    ]
    return Profile(joined, counts, driver, drawn / generations)


def modelled(tokens_per_second: float, overhead: float, driver: float, windows: int, targets: int) -> Profile:
    """Of a model that is not at hand: passes over windows of 2,048 tokens, and what a task takes besides."""
    shares = (1 / 8, 3 / 8, 1 / 2)  # of the search windows, as `halving_rungs` cuts them
    tasks = [overhead + targets * windows * share * 2048 / tokens_per_second for share in shares]
    return Profile([[PROBE.together * overhead / 4], *([one] for one in tasks)], [8, 50, 20, 8], driver, 70)


def measured(folder: Path, workers: int, evaluations: int) -> tuple[Path, float, float]:
    """(ledger, seconds of the search, driver's seconds for each drawn candidate) of a campaign on the demo model.

    The driver's are of its processor; with one worker, which is the driver, they are not known.
    """
    ledger, spent, original = folder / f"{workers}.sqlite", [0.0], discover._search

    def timed(*arguments: Any) -> Campaign:
        start = time.process_time()
        found = original(*arguments)
        spent[0] = time.process_time() - start
        return found

    with patch.object(discover, "_search", timed):
        request = DiscoverRequest(
            ledger=ledger, evaluations=evaluations, samples=16, search_windows=16, windows=4, workers=workers,
            calibration_seeds=0, operands=("W", "X", "G"), target=("0.5", "2:4"),
        )  # fmt: skip
        found = discover.run_campaign(request)
    with Ledger.read(ledger) as opened:
        drawn = opened.counts()["drawn"]
    return ledger, found["seconds"]["search"], spent[0] / drawn if workers > 1 else 0.0


def curve(profile: Profile, times: float, seed: int = 0) -> Iterator[tuple[int, float, float]]:
    """(workers, seconds of a generation, efficiency) for every number of workers."""
    alone = fmean(profile.generation(1, times, np.random.default_rng([seed, one])) for one in range(5))
    for workers in WORKERS:
        taken = fmean(profile.generation(workers, times, np.random.default_rng([seed, one])) for one in range(5))
        yield workers, taken, alone / workers / taken


def show(profile: Profile, case: str, device: str) -> list[dict[str, str]]:
    """Prints the curves, and where they bend; rows of results.csv."""
    rows = []
    for times in POPULATIONS:
        found = list(curve(profile, times))
        print(f"\n{case}, generations {times:g} times as large: {profile.drawn * times:.0f} drawn")
        print("workers    s a generation    speed-up    efficiency")
        for workers, seconds, efficiency in found:
            print(f"{workers:7d} {seconds:17.3g} {found[0][1] / seconds:11.1f} {efficiency:13.0%}")
        reach = {bar: max((w for w, _, efficiency in found if efficiency >= bar), default=1) for bar in (LOW, HIGH)}
        print(f"at least {HIGH:.0%} of the workers' time is used up to {reach[HIGH]}, {LOW:.0%} up to {reach[LOW]}")
        for workers, seconds, _ in found:
            told = f"{case}, simulated, generations {times:g} times as large, {workers} workers"
            rows.append(row("scaling", told, np.array([seconds]), found[0][1], device=device))
    print(f"the driver alone: {1e3 * profile.driver:.2f} ms for each drawn candidate")
    return rows


def main(write: Callable[[list[dict[str, str]]], None] = append) -> None:
    """Measures and simulates, as asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ledger", type=Path, help="of a campaign whose task times are taken")
    parser.add_argument("--driver-ms", type=float, help="of the driver for each candidate; measured by default")
    parser.add_argument("--tokens-per-second", type=float, help="that one worker passes through a model")
    parser.add_argument("--overhead", type=float, default=0.1, help="seconds that masks take for each task")
    parser.add_argument("--windows", type=int, default=32, help="of the search text, for --tokens-per-second")
    parser.add_argument("--targets", type=int, default=4, help="for --tokens-per-second")
    parser.add_argument("--measure", default="1,2,4", help="numbers of workers that a campaign is run with")
    parser.add_argument("--evaluations", type=int, default=40)
    parser.add_argument("--name", default="demo", help="what the figures are of, in results.csv")
    parser.add_argument("--record", action="store_true", help="add rows to results.csv")
    options = parser.parse_args()
    rows: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        ledger, driver = options.ledger, (options.driver_ms or 0.0) / 1e3
        if ledger is None or options.driver_ms is None:
            first = 0.0
            for workers in map(int, options.measure.split(",")):
                made, search, own = measured(Path(folder), workers, options.evaluations)
                ledger, driver, first = ledger or made, driver or own, first or search
                per = search / options.evaluations
                told = f"; driver {1e3 * own:.2f} ms for each drawn" if own else ""
                print(f"{workers} workers: search {search:.1f} s, {per:.3f} s for each candidate paid for, "
                      f"{first / search:.2f} times one worker{told}")  # fmt: skip
                told = f"demo, campaign of {options.evaluations} evaluations, seconds for each, {workers} workers"
                rows.append(row("scaling", told, np.array([per]), first / options.evaluations))
        if options.tokens_per_second:
            profile = modelled(options.tokens_per_second, options.overhead, driver, options.windows, options.targets)
            rows += show(profile, options.name, "simulated")
        else:
            rows += show(read_profile(ledger, driver), options.name, "")
    if options.record:
        write(rows)


if __name__ == "__main__":
    main()
