"""Are the kernels right, and how fast? `python benchmarks/bench_kernels.py` checks, then appends to results.csv.

On a GPU: device seconds of the Triton kernels on the linear layers of Llama-2-7B and 70B, over buffers that no cache
holds, beside a device copy of as many bytes and other ways to the same (`published.py`). On a CPU: one thread of
`select_mask` beside the published mask, and its ways to select beside a stable sort, the evidence for `_RANKS_UP_TO`.
With TRITON_INTERPRET=1 the kernels are checked on the CPU, on small shapes, and nothing is measured.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from kernel_checks import CheckError, check_all, choices, other_choices
from kernel_times import PUBLISHED, Case, Cuda, Machine, Result, Shape, measure, measure_model
from matplotlib import pyplot
from matplotlib.ticker import LogLocator, NullLocator
from published import MASKS
from results import RESULTS, append, cpu_name, in_turn, row
from torch import Tensor

from gpmetric.pruning.mask import _lowest_by_partition, _lowest_by_rank, _lowest_by_sort, select_mask
from gpmetric.targets import parse_target

# model -> (blocks, [out, in] of the linear layers of one)
MODELS: dict[str, tuple[int, list[Shape]]] = {
    "Llama-2-7B": (32, [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]),
    "Llama-2-70B": (80, [(8192, 8192)] * 2 + [(1024, 8192)] * 2 + [(28672, 8192)] * 2 + [(8192, 28672)]),
}
# the first is what all linear layers of a model are pruned by
CASES: list[Case] = [
    ("abs(W)*X", "0.5", torch.bfloat16),
    ("abs(W)*X", "0.5", torch.float32),
    ("abs(W)*G", "0.5", torch.bfloat16),
    ("abs(W)", "0.5", torch.bfloat16),
    ("abs(W)*X", "2:4", torch.bfloat16),
    ("abs(W)*X", "4:8", torch.bfloat16),
    ("abs(W)*X", "layer:0.5", torch.bfloat16),
]
MOST = {"Llama-2-7B": 15, "Llama-2-70B": 150}  # milliseconds for all linear layers
CPU_CASES = [((512, 4096), "0.5"), ((512, 11008), "0.5"), ((512, 4096), "2:4"), ((512, 4096), "layer:0.5")]
CPU_SHAPES = [(64, 4096), (16, 11008), (33, 528)]  # that the checks are made on
CPU_REPEATS = 21
WIDTHS = (2, 4, 8, 16, 64, 512, 4096)  # of groups, for the ways to select
RANKED = 16  # the widest that ranks are tried on


def goals(results: Sequence[Result]) -> Iterator[tuple[str, bool]]:
    """What the kernels are to reach on bf16 weights, save where a whole layer competes, and whether they did."""
    for one in results:
        formula, target, dtype = one.case
        if dtype != torch.bfloat16 or target.startswith("layer"):
            continue
        least = 0.8 if ":" in target else 0.65 if "G" in formula else 0.5
        yield f"{one.name}: {one.share:.0%} of copy bandwidth, {least:.0%} wanted", one.share >= least
        yield f"{one.name}: {one.extra['ours']} bytes beyond the operands, 0 wanted", one.extra["ours"] == 0
        if ":" not in target and PUBLISHED in one.others:
            times = 50 if one.shape[1] >= 8192 else 30
            yield f"{one.name}: {one.speedup:.3g}x {PUBLISHED}, {times}x wanted", one.speedup >= times


def bench_gpu(machine: Machine, models: Sequence[str], path: Path) -> list[Result]:
    """Every case on every shape; rows are appended at once, since the time on a lent machine may end."""
    results: list[Result] = []
    verdicts = []
    for model in models:
        blocks, shapes = MODELS[model]
        for shape in dict.fromkeys(shapes):
            for case in CASES:
                results.append(measure(case, shape, machine))
                print(results[-1], flush=True)
                append(results[-1].rows("kernels", machine.name), path)
        theirs = {one.shape: one.others.get(PUBLISHED, math.nan) for one in results if one.case == CASES[0]}
        baseline = blocks * sum(theirs[shape] for shape in shapes)  # one by one
        for how, seconds in measure_model(CASES[0], shapes, blocks, machine).items():
            name = f"{model}, {blocks * len(shapes)} linear layers, {results[0].kind}, {how}"
            append([row("kernels", name, seconds, baseline, device=machine.name)], path)
            taken = 1e3 * float(np.median(seconds))
            print(f"{name}: {taken:.2f} ms; {PUBLISHED} {1e3 * baseline / taken:.3g}x", flush=True)
            verdicts.append((f"{name}: {taken:.2f} ms, {MOST[model]} ms wanted", taken <= MOST[model]))
    for told, met in [*goals(results), *verdicts]:
        print("met   " if met else "MISSED", told)
    return results


def bench_cpu(repeats: int, widths: Sequence[int], path: Path) -> list[Result]:
    """`select_mask`, its check for NaN included, beside the published masks of the same scores; then its ways."""
    generator = torch.Generator().manual_seed(0)
    results, rows = [], []
    for shape, text in CPU_CASES:
        score, target = torch.randn(shape, generator=generator), parse_target(text).resolved("row")
        ours, theirs = partial(select_mask, score, target), partial(MASKS[target.granularity], score, target)
        case = f"{shape[0]}x{shape[1]} {'rows ' if target.granularity == 'row' else ''}{text}"
        if not torch.equal(ours(), ~theirs()):
            raise CheckError(f"select_mask, {case}: the published mask is another")
        buffers = [score.clone() for _ in range(32)]  # 256 MB and more, which no cache holds
        copies = [partial(out.copy_, one) for out, one in zip(buffers[:16], buffers[16:], strict=True)]
        copy = in_turn(copies, 4, time.perf_counter)[:, 1:].flatten()
        seconds, other = in_turn([ours, theirs], repeats, time.perf_counter)
        against = {PUBLISHED: float(np.median(other))}
        moved = score.nbytes + score.numel()
        scores: Case = ("scores", text, score.dtype)
        results.append(Result(scores, shape, moved, seconds, 2 * score.nbytes, copy, against))
        print(results[-1], flush=True)
        rows.append(row("select_mask", case, seconds, against[PUBLISHED]))
    for width in widths:
        score = torch.randn(2**20 // width, width, generator=generator)
        rows += selections(f"{width} columns, distinct", score, repeats)
        rows += selections(f"{width} columns, equal", torch.ones_like(score), repeats)
    append(rows, path)
    speedup = results[0].speedup
    print("met   " if speedup >= 5 else "MISSED", f"rows of 4096: {speedup:.2g}x {PUBLISHED}, 5x wanted")
    return results


def selections(case: str, score: Tensor, repeats: int) -> Iterator[dict[str, str]]:
    """Ranks, where groups are small, and a partition against a stable sort."""
    count = score.shape[1] // 2
    ways: dict[str, Callable[[], Tensor]] = {"sort": partial(_lowest_by_sort, score, count)}
    ways["partition"] = lambda: torch.from_numpy(_lowest_by_partition(score.numpy(), count))
    if score.shape[1] <= RANKED:
        ways["ranks"] = partial(_lowest_by_rank, score, count)
    for way, run in ways.items():
        if not torch.equal(run(), ways["sort"]()):
            raise CheckError(f"{way}, {case}: the masks differ")
    baseline, *times = in_turn(list(ways.values()), repeats, time.perf_counter)
    for way, seconds in zip(list(ways)[1:], times, strict=True):
        found = row(way, case, seconds, float(np.median(baseline)))
        print(f"{way}, {case}: {1e3 * float(found['median']):.2f} ms, {found['ratio']} of the sort's")
        yield found


def draw_plot(results: Sequence[Result], device: str, path: Path) -> None:
    """Bandwidth reached against bytes that must be moved, with the copy's as the line to reach."""
    matplotlib.use("agg")
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    roof = sorted({one.copied / 1e6: one.copy_bandwidth / 1e9 for one in results}.items())
    axes.plot(*zip(*roof, strict=True), color="black", marker=".", label="copy")
    for number, kind in enumerate(dict.fromkeys(one.kind for one in results)):
        mine = sorted((one for one in results if one.kind == kind), key=lambda one: one.moved)
        style: dict[str, Any] = {"color": f"C{number}", "marker": "os^Dv<>"[number % 7], "ls": ":", "lw": 0.8}
        axes.plot([x.moved / 1e6 for x in mine], [x.bandwidth / 1e9 for x in mine], label=kind, **style)
        known = [(x.moved / 1e6, x.bandwidth / x.speedup / 1e9) for x in mine if PUBLISHED in x.others]
        if known:
            axes.plot(*zip(*known, strict=True), label=f"{kind}, published", fillstyle="none", **style)
    axes.set(xscale="log", yscale="log", title=device, xlabel="MB that must be moved", ylabel="GB/s of these")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    axes.grid(lw=0.3)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def check_first(device: str, models: Sequence[str], interpreted: bool) -> None:
    """Prints what was checked.

    Raises:
        CheckError: something is wrong.
    """
    if interpreted:
        shapes = few = [(3, 48), (2, 300)]
    elif device == "cpu":
        shapes = few = CPU_SHAPES
    else:
        shapes = list(dict.fromkeys(shape for model in models for shape in MODELS[model][1]))
        few = [(4096, 4096), (4096, 11008)]
    for found, those in ((choices, shapes), (other_choices, few)):
        for line in check_all(found(device, interpreted), those, device):
            print(line, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--quick", action="store_true", help="on a GPU the 7B shapes only, on a CPU few repeats")
    parser.add_argument("--plot", type=Path, default=Path("build/kernels.png"))
    parser.add_argument("--csv", type=Path, default=RESULTS, help="rows are appended here")
    options = parser.parse_args(arguments)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    found = "cuda" if torch.cuda.is_available() and not interpreted else "cpu"
    device = found if options.device == "auto" else options.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device")
    torch.set_num_threads(1)
    models = list(MODELS)[:1] if options.quick else list(MODELS)
    try:
        check_first(device, models, interpreted)
        if interpreted:
            return
        if device == "cuda":
            machine = Cuda()
            name, results = machine.name, bench_gpu(machine, models, options.csv)
        else:
            repeats, widths = (3, WIDTHS[:2]) if options.quick else (CPU_REPEATS, WIDTHS)
            name, results = cpu_name(), bench_cpu(repeats, widths, options.csv)
    except CheckError as error:
        raise SystemExit(f"check failed: {error}") from error
    draw_plot(results, name, options.plot)


if __name__ == "__main__":
    main()
