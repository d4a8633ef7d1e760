"""Seconds that selecting a mask takes on one CPU thread; `python benchmarks/bench_mask.py` appends to results.csv.

`select_mask` against the sort and scatter of the published codes, and the partition it uses against a stable sort for
groups from 4 to 4096 columns wide, with distinct and with equal scores: the evidence for `_PARTITION_FROM`.
"""

from __future__ import annotations

import csv
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpmetric.pruning.mask import _lowest_by_partition, _lowest_by_sort, select_mask
from gpmetric.pruning.target import parse_target

RESULTS = Path(__file__).parent / "results.csv"
COLUMNS = ["benchmark", "case", "unit", "median", "p20", "p80", "baseline", "ratio"]
COLUMNS += ["device", "threads", "torch", "numpy", "date"]
REPEATS = 21


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    rows = [published_step(torch.randn(512, 4096, generator=generator))]
    for width in (4, 8, 16, 64, 512, 4096):
        scores = torch.randn(2**20 // width, width, generator=generator)
        rows.append(partition(f"{width} columns, distinct", scores))
        rows.append(partition(f"{width} columns, equal", torch.ones_like(scores)))
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def published_step(score: Tensor) -> dict[str, object]:
    """Rows at 50 %: the whole of `select_mask`, its check for NaN included, against Wanda's sort and scatter."""
    target, count = parse_target("0.5"), score.shape[1] // 2

    def published() -> Tensor:
        removed = torch.zeros_like(score) == 1
        return removed.scatter_(1, torch.sort(score, dim=-1, stable=True)[1][:, :count], True)

    return compare("select_mask", "512x4096 rows 0.5", lambda: select_mask(score, target), lambda: ~published())


def partition(case: str, score: Tensor) -> dict[str, object]:
    count = score.shape[1] // 2
    ours = lambda: torch.from_numpy(_lowest_by_partition(score.numpy(), count))  # noqa: E731
    return compare("partition", case, ours, lambda: _lowest_by_sort(score, count))


def compare(benchmark: str, case: str, ours: Callable[[], Tensor], theirs: Callable[[], Tensor]) -> dict[str, object]:
    """One row; both are timed in turn, so that a busy machine slows both. `baseline` is their median."""
    assert torch.equal(ours(), theirs()), f"{benchmark}, {case}: the masks differ"
    times = np.array([[seconds(ours), seconds(theirs)] for _ in range(REPEATS)])
    low, median, high = np.percentile(times[:, 0], [20, 50, 80])
    baseline = np.median(times[:, 1])
    print(f"{benchmark}, {case}: {1e3 * median:.2f} ms, {median / baseline:.2f} of the sort's {1e3 * baseline:.2f} ms")
    values = (benchmark, case, "s", *(f"{x:.3g}" for x in (median, low, high, baseline, median / baseline)))
    where = (cpu_name(), torch.get_num_threads(), torch.__version__, np.__version__, date.today().isoformat())
    return dict(zip(COLUMNS, (*values, *where), strict=True))


def seconds(run: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cpu_name() -> str:
    """As Linux names the processor, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
