"""Seconds of SparseGPT's solver; `python benchmarks/bench_solver.py` appends to results.csv.

    --device cuda [--quick]   layers of a 135M and of a 7B model by the kernels, beside the published loop on that GPU

Without, on one CPU thread: `prune_weights` under obs-blockwise, all targets of a search at once, against one plain
column loop per weight and target; an evolved metric against the same with every weight scored whenever some columns
are; and the evidence for the constants: `_STEP` against 128, `_TOGETHER` against one weight at a time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import published
import torch
from results import append, in_turn, row
from torch import Tensor

from gpmetric.calibration.accumulators import LayerStatistics, curvature
from gpmetric.expression import Expression
from gpmetric.expression.evaluate import evaluate
from gpmetric.metrics import Metric, resolve_metric
from gpmetric.pruning import obs, sparsegpt
from gpmetric.pruning.mask import select_mask
from gpmetric.pruning.updaters import prune_weights
from gpmetric.targets import Target, parse_target

Layers = Sequence[tuple[Tensor, LayerStatistics]]

SEARCH = [parse_target(text) for text in ("0.5", "0.6", "0.7", "2:4")]
WANDA = resolve_metric("wanda")


# out, in: the layers of a block of SmolLM2-135M, then two of Llama-2-7B
QUICK = [(576, 576), (192, 576), (1536, 576), (576, 1536), (4096, 4096)]
ALL = [*QUICK, (11008, 4096), (4096, 11008)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="on a GPU fewer layers, on a CPU fewer repeats and cases")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.device == "cuda":
        for found in on_device("cuda", QUICK if options.quick else ALL):
            append([found])
    elif options.quick:
        append([blockwise("8 of 512x192", [make_layer(512, 192) for _ in range(8)], 3)])
    else:
        on_cpu()


def on_device(device: str, shapes: Sequence[tuple[int, int]], repeats: int = 3) -> Iterator[dict[str, str]]:
    """Rows of one weight at a time, SparseGPT's metric; the published loop is the baseline. Factors are at hand."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    for shape in shapes:
        weight, statistics = make_layer(*shape, device)
        for target in (SEARCH[0], SEARCH[3]):
            ours = partial(_ours, weight, statistics, target)
            theirs = partial(published.solver, weight, statistics.factor, target)
            errors = [float(((one - weight) @ statistics["gram"] * (one - weight)).sum()) for one in (ours(), theirs())]
            if abs(errors[0] / errors[1] - 1) > 0.01:
                raise SystemExit(f"{shape}, {target.text}: squared errors {errors[0]:.4g} and {errors[1]:.4g}")
            times, others = in_turn([_waited(ours, device), _waited(theirs, device)], repeats, time.perf_counter)
            baseline = float(np.median(others))
            case = f"{shape[0]}x{shape[1]}, {target.text}, against the published loop"
            yield row("solver", case, times, baseline, device=name)
            print(f"{case}: {1e3 * np.median(times):.2f} ms of {1e3 * baseline:.2f} ms", flush=True)


def _ours(weight: Tensor, statistics: LayerStatistics, target: Target) -> Tensor:
    return solve([(weight, statistics)], [target], resolve_metric("sparsegpt"))[0]


def _waited(run: Callable[[], Tensor], device: str) -> Callable[[], None]:
    def waited() -> None:
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    return waited


def on_cpu() -> None:
    small = [make_layer(*shape) for shape in [(64, 64)] * 20 + [(192, 64)] * 10 + [(64, 192)] * 5]
    large = [make_layer(512, 192) for _ in range(8)]
    rows = [
        blockwise(f"one {shape[0]}x{shape[1]}", [make_layer(*shape)], 41) for shape in [(64, 64), (192, 64), (64, 192)]
    ]
    rows += [blockwise("35 of 64x64 to 64x192", small, 11), blockwise("8 of 512x192", large, 5)]
    rows += [blockwise("one 1024x1024, 0.5", [make_layer(1024, 1024)], 3, SEARCH[:1])]
    rows += [constant(sparsegpt, "_STEP", value, 128, "35 of 64x64 to 64x192", small, 21) for value in (4, 8, 16, 32)]
    rows += [constant(sparsegpt, "_STEP", value, 128, "8 of 512x192", large, 7) for value in (4, 8, 16, 32)]
    rows += [evolved("35 of 64x64 to 64x192", small, 11), evolved("8 of 512x192", large, 5)]
    sizes = (2**15, 2**17, 2**19, 2**21)
    rows += [constant(obs, "_TOGETHER", value, 1, "35 of 64x64 to 64x192", small, 21) for value in sizes]
    rows += [constant(obs, "_TOGETHER", value, 1, "8 of 512x192", large, 7) for value in sizes]
    append(rows)


def blockwise(case: str, layers: Layers, repeats: int, targets: Sequence[Target] = SEARCH) -> dict[str, str]:
    return compare(
        case,
        lambda: solve(layers, targets),
        lambda: [plain_solver(*layer, target) for target in targets for layer in layers],
        repeats,
    )


def evolved(case: str, layers: Layers, repeats: int) -> dict[str, str]:
    """A metric with powers, a reduction of what stays and one of what changes."""
    metric = resolve_metric("W**2.3*F/rowsum(G)**0.47/rownorm(W)**0.1")

    def ours() -> list[Tensor]:
        return solve(layers, SEARCH, metric)

    def theirs() -> list[Tensor]:
        quick, obs.ColumnScores = obs.ColumnScores, WholeMatrix
        try:
            return solve(layers, SEARCH, metric)
        finally:
            obs.ColumnScores = quick

    return compare(f"evolved: {case}", ours, theirs, repeats)


class WholeMatrix:
    """Scores of columns by way of those of the whole matrix."""

    def __init__(self, expression: Expression, layers: Sequence[Mapping[str, Tensor]]) -> None:
        self.expression, self.layers = expression, layers

    def parts(self) -> None:
        """None: there is nothing that kernels could choose by."""

    def __call__(self, weights: Tensor, start: int, end: int) -> Tensor:
        scores = [
            torch.stack([evaluate(self.expression, {**layer, "W": one})[:, start:end] for one in copies])
            for layer, copies in zip(self.layers, weights, strict=True)
        ]
        return torch.stack(scores)


def constant(
    module: object, name: str, value: int, other: int, case: str, layers: Layers, repeats: int
) -> dict[str, str]:
    """A constant at one value against another."""

    def at(number: int) -> list[Tensor]:
        setattr(module, name, number)
        return solve(layers, SEARCH)

    before = getattr(module, name)
    row = compare(f"{name} {value} of {other}: {case}", lambda: at(value), lambda: at(other), repeats)
    setattr(module, name, before)
    return row


def solve(layers: Layers, targets: Sequence[Target], metric: Metric = WANDA) -> list[Tensor]:
    weights, statistics = zip(*layers, strict=True)
    return [pruned for row in prune_weights(weights, metric, targets, statistics, "obs-blockwise") for pruned in row]


def plain_solver(weight: Tensor, statistics: LayerStatistics, target: Target) -> Tensor:
    """Wanda in SparseGPT's algorithm 1 as it is written, a target and a column at a time."""
    weights, factor, group = weight.clone(), statistics.factor, target.group
    rule = target if group else target.within("layer")
    for start in range(0, weights.shape[1], 128):
        end = min(start + 128, weights.shape[1])
        errors = torch.zeros_like(weights[:, start:end])
        for column in range(start, end):
            if column == start or (group and column % group == 0):
                reach = slice(column, column + group if group else end)
                keep = select_mask(weights[:, reach].abs() * statistics["X"][reach], rule)
            kept = torch.where(keep[:, column - reach.start], weights[:, column], 0)
            error = (weights[:, column] - kept) / factor[column, column]
            errors[:, column - start] = error
            weights[:, column] = kept
            weights[:, column + 1 : end] -= error[:, None] * factor[column, column + 1 : end]
        weights[:, end:] -= errors @ factor[start:end, end:]
    return weights


def make_layer(rows: int, columns: int, device: str = "cpu") -> tuple[Tensor, LayerStatistics]:
    """A weight and the statistics of correlated inputs."""
    generator = torch.Generator(device).manual_seed(0)
    mixing = torch.randn(columns, columns, generator=generator, device=device) / columns**0.5
    inputs = torch.randn(4 * columns, columns, generator=generator, device=device)
    inputs = inputs + inputs @ mixing
    gram = inputs.t() @ inputs / len(inputs)
    weight = torch.randn(rows, columns, generator=generator, device=device)
    G, F = torch.rand(2, rows, columns, generator=generator, device=device)
    return weight, LayerStatistics(X=gram.diagonal().sqrt(), D=curvature(gram), G=G, F=F, gram=gram)


def compare(
    case: str, ours: Callable[[], list[Tensor]], theirs: Callable[[], list[Tensor]], repeats: int
) -> dict[str, str]:
    """One row; both are timed in turn. `baseline` is their median."""
    for one, other in zip(ours(), theirs(), strict=True):
        # of equal scores but for fp32 rounding, either may go
        assert ((one != 0) == (other != 0)).float().mean() > 0.999, f"{case}: the masks differ"
    # of this thread on the processor: a busy machine interrupts milliseconds of Python more than it slows them
    times, others = in_turn([ours, theirs], repeats, time.thread_time)
    baseline = float(np.median(others))
    found = row("solver", case, times, baseline, "cpu s")
    print(f"{case}: {1e3 * np.median(times):.2f} ms, {found['ratio']} of {1e3 * baseline:.2f} ms", flush=True)
    return found


if __name__ == "__main__":
    main()
