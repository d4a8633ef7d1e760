"""Device seconds of the Triton kernels, beside those of a device copy and of other ways to the same (`published.py`).

Only `Cuda` needs a GPU: whatever else can be timed and asked for memory will do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Protocol

import numpy as np
import torch
from kernel_checks import DTYPES, by_kernel, draw
from published import OTHERS, Step, published
from results import row
from torch import Tensor

from gpmetric.codegen.loading import load_functions
from gpmetric.expression import parse
from gpmetric.targets import Target, parse_target

Shape = tuple[int, int]
Run = Callable[[], object]
Case = tuple[str, str, torch.dtype]  # formula, target, dtype of W

COPIES = "a copy of as many bytes"
PUBLISHED = "the published step"
REPEATS, FEW = 31, 5  # of what takes microseconds; of what takes milliseconds


class Machine(Protocol):
    """What a measurement asks of a device."""

    name: str
    device: str
    cache: int  # bytes

    def seconds(
        self, runs: Sequence[Run], repeats: int, before: Run | None = None, *, queued: bool = True
    ) -> np.ndarray:
        """Of all runs one after the other, [repeats]; `queued`: without the time that launches take the
        host, save where a run waits for the device in between, as one over a whole layer does."""

    def peak(self, run: Run) -> int:
        """Bytes that a run allocates at most."""


class Cuda:
    """The current CUDA device."""

    device = "cuda"

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(0)
        self.name = f"{properties.name}, triton {version('triton')}"
        self.cache = properties.L2_cache_size

    def seconds(
        self, runs: Sequence[Run], repeats: int, before: Run | None = None, *, queued: bool = True
    ) -> np.ndarray:
        times = []
        for repeat in range(-2, repeats):  # two to warm up: the first compiles
            if before:
                before()
            torch.cuda.synchronize()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if queued:  # half a millisecond for each launch, which takes the host a fifth of it
                torch.cuda._sleep(1_000_000 * min(len(runs), 200))
            start.record()
            for run in runs:
                run()
            end.record()
            torch.cuda.synchronize()
            if repeat >= 0:
                times.append(start.elapsed_time(end) / 1e3)
        return np.array(times)

    def peak(self, run: Run) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


@dataclass
class Result:
    """One way to prune one shape.

    Attributes:
        case, shape: of what.
        moved: bytes it must read and write.
        seconds: [repeats].
        copied, copy: bytes that a copy of the weight reads and writes, and the seconds it takes.
        others: median seconds of other ways, by name.
        extra: bytes beyond the operands that `ours` and the published step take.
    """

    case: Case
    shape: Shape
    moved: int
    seconds: np.ndarray
    copied: int
    copy: np.ndarray
    others: dict[str, float] = field(default_factory=dict)
    extra: dict[str, int] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        formula, target, dtype = self.case
        return f"{target} {formula} {DTYPES[dtype]}"

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.shape[0]}x{self.shape[1]}"

    @property
    def bandwidth(self) -> float:
        """Bytes that must move, a second."""
        return self.moved / float(np.median(self.seconds))

    @property
    def copy_bandwidth(self) -> float:
        return self.copied / float(np.median(self.copy))

    @property
    def share(self) -> float:
        """Of the copy's bandwidth."""
        return self.bandwidth / self.copy_bandwidth

    @property
    def speedup(self) -> float:
        """Over the published step."""
        return self.others[PUBLISHED] / float(np.median(self.seconds))

    def __str__(self) -> str:
        low, median, high = 1e6 * np.percentile(self.seconds, [20, 50, 80])
        times = f"{self.name:37s}{median:9.1f} us [{low:.1f}, {high:.1f}]"
        others = "".join(f"; {name} {1e6 * other / median:.3g}x" for name, other in self.others.items())
        return f"{times} {self.bandwidth / 1e9:.4g} GB/s, {self.share:.0%} of a copy's{others}"

    def rows(self, benchmark: str, device: str) -> list[dict[str, str]]:
        """For results.csv: beside the copy of as many bytes, and beside every other way."""
        against = {COPIES: float(np.median(self.copy)) * self.moved / self.copied} | self.others
        found = [
            row(benchmark, f"{self.name}, against {name}", self.seconds, other, device=device)
            for name, other in against.items()
        ]
        extra, most = np.array([self.extra["ours"]]), self.extra.get(PUBLISHED)
        return [*found, row(benchmark, f"{self.name}, memory beyond the operands", extra, most, "B", device)]


def moved_bytes(weight: Tensor, others: Sequence[Tensor], target: Target) -> int:
    """What a kernel must read and write: operands once, or twice where the whole layer competes, and the result."""
    passes = 2 if target.granularity == "layer" else 1
    return passes * sum(one.nbytes for one in (weight, *others)) + weight.nbytes


def measure(case: Case, shape: Shape, machine: Machine) -> Result:
    """A kernel over as many buffers as the cache would hold three times."""
    formula, target_text, dtype = case
    target = parse_target(target_text).resolved("row")
    size = dtype.itemsize * shape[0] * shape[1]
    drawn = [
        _Drawn(formula, dtype, shape, machine.device, seed) for seed in range(max(2, -(-3 * machine.cache // size)))
    ]
    last = drawn[-1]
    copy = machine.seconds([partial(one.out.copy_, one.weight) for one in drawn], REPEATS) / len(drawn)
    runs = [one.run(target) for one in drawn]
    seconds = machine.seconds(runs, REPEATS) / len(runs)
    moved = moved_bytes(last.weight, [*last.operands.matrices, *last.operands.columns], target)
    result = Result(case, shape, moved, seconds, 2 * size, copy, extra={"ours": machine.peak(runs[-1])})
    if "X" in last.named:
        compare(result, last.weight, last.named["X"].square(), target, machine)
    return result


class _Drawn:
    """A weight, what its score reads, and where its pruned copy goes."""

    def __init__(self, formula: str, dtype: torch.dtype, shape: Shape, device: str, seed: int) -> None:
        from gpmetric.kernels.reduce import prepare

        expression = parse(formula)
        functions = load_functions([expression])
        self.score = functions.score
        self.named = draw(shape, dtype, device, seed, "".join(sorted({"W", *expression.operands})))
        self.weight, self.out = self.named["W"], torch.empty_like(self.named["W"])
        self.operands = prepare(self.weight, self.named, functions.LAYOUT)
        self.bad = torch.zeros(1, dtype=torch.int64, device=device)

    def run(self, target: Target) -> Run:
        return partial(by_kernel, self.weight, self.score, self.operands, target, out=self.out, bad=self.bad)


def compare(result: Result, weight: Tensor, square: Tensor, target: Target, machine: Machine) -> None:
    """Adds what the other ways take; each prunes a fresh copy of the weight in place."""
    ways: dict[str, Callable[[], Step]] = {PUBLISHED: lambda: published}
    if weight.dtype == torch.bfloat16:
        ways |= OTHERS[target.granularity]
    again = weight.clone()
    restore = partial(again.copy_, weight)
    for name, make in ways.items():
        try:
            step = partial(make(), again, square, target)
            result.others[name] = float(np.median(machine.seconds([step], FEW, restore)))
        except Exception as error:  # out of memory, or no compiler: the others still count
            print(f"{result.name}: {name} failed: {type(error).__name__}: {str(error)[:200]}", flush=True)
            continue
        if name == PUBLISHED:
            restore()
            result.extra[name] = machine.peak(step)


def measure_model(case: Case, shapes: Sequence[Shape], blocks: int, machine: Machine) -> dict[str, np.ndarray]:
    """Seconds for all linear layers of a model: again and again those of one block, which no cache holds."""
    formula, target_text, dtype = case
    target = parse_target(target_text).resolved("row")
    block = [_Drawn(formula, dtype, shape, machine.device, seed).run(target) for seed, shape in enumerate(shapes)]
    return {
        "as called": machine.seconds(block * blocks, REPEATS, queued=False),
        "launches queued": machine.seconds(block * blocks, REPEATS),
    }
