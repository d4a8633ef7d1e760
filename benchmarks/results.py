"""What the benchmarks share: rows of results.csv, ways to be timed in turn, the processor's name."""

from __future__ import annotations

import csv
import math
import platform
import resource
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results.csv"
COLUMNS = ["benchmark", "case", "unit", "median", "p20", "p80", "baseline", "ratio"]
COLUMNS += ["device", "threads", "torch", "numpy", "date"]


def row(
    benchmark: str, case: str, values: np.ndarray, baseline: float | None = None, unit: str = "s", device: str = ""
) -> dict[str, str]:
    """A row of results.csv: median and percentiles of the values, and the median over the baseline's."""
    low, median, high = np.percentile(values, [20, 50, 80])
    against = ("", "") if not baseline or math.isnan(baseline) else (f"{baseline:.3g}", f"{median / baseline:.3g}")
    where = (device or cpu_name(), str(torch.get_num_threads()), torch.__version__, np.__version__)
    figures = (*(f"{x:.3g}" for x in (median, low, high)), *against)
    return dict(zip(COLUMNS, (benchmark, case, unit, *figures, *where, date.today().isoformat()), strict=True))


def append(rows: Iterable[dict[str, str]], path: Path = RESULTS) -> None:
    """Adds rows to a CSV file, which gets the names of the columns when it is made."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def in_turn(runs: Sequence[Callable[[], object]], repeats: int, clock: Callable[[], float]) -> np.ndarray:
    """Seconds [runs, repeats]; each repeat times all of them, so that a busy machine slows all."""
    times = np.empty((len(runs), repeats))
    for repeat in range(repeats):
        for i, run in enumerate(runs):
            start = clock()
            run()
            times[i, repeat] = clock() - start
    return times


def peak_memory() -> float:
    """MiB that this process held at most; getrusage's figure is, where that is more, the process's that started it."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def cpu_name() -> str:
    """As Linux names the processor, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
