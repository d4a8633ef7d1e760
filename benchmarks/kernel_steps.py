"""What kernels do, counted in Triton's interpreter: no GPU is needed.

    python benchmarks/kernel_steps.py

How often a row is gone over until its threshold is found: every pass over its scores ends in a reduction over the
program's threads, which is what rows wait for on a GPU. The scores are those of a metric, heavy-tailed ones, signed
ones, ones with many ties, and ones with zeros. How many launches the solver makes for 128 columns. And how many
operations the updater `admm` takes for the linear layers of a 7B model.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import numpy as np
import torch
from results import RESULTS, append, row
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import KernelInterface

from gpmetric.kernels import rows, solver
from gpmetric.kernels.launch import Operands, wanda, weight_itself
from gpmetric.pruning import admm

LLAMA_7B = ([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]) * 32
REDUCTIONS = {"_survey": 1, "_counts": 1, "_valid": 1, "_extremes": 2}  # by function of `rows`


def scores(kind: str, count: int, width: int) -> Tensor:
    """[count, width], as kernels read them."""
    draw = torch.Generator().manual_seed(0)
    weight = (0.02 * torch.randn(count, width, generator=draw)).bfloat16().float().abs()
    wanda = weight * torch.randn(width, generator=draw).exp()
    makers: dict[str, Callable[[], Tensor]] = {
        "abs(W)*X": lambda: wanda,
        "abs(W) in bf16": lambda: weight.bfloat16(),
        "heavy-tailed": lambda: wanda * torch.randn(count, width, generator=draw).abs().mul(3).exp(),
        "signed": lambda: torch.randn(count, width, generator=draw),
        "abs(W)*X, 40 % zeros": lambda: wanda.where(torch.rand(count, width, generator=draw) > 0.4, 0),
        "60 % zeros": lambda: wanda.where(torch.rand(count, width, generator=draw) > 0.6, 0),
        "rounded": lambda: (3 * torch.randn(count, width, generator=draw)).round(),
    }
    return makers[kind]()


KINDS = ("abs(W)*X", "abs(W) in bf16", "heavy-tailed", "signed", "abs(W)*X, 40 % zeros", "60 % zeros", "rounded")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--width", type=int, nargs="+", default=[576, 4096, 11008])
    parser.add_argument("--csv", type=Path, default=RESULTS, help="rows are appended here; - for nowhere")
    options = parser.parse_args()
    for width in options.width:
        for kind in KINDS:
            found = np.array(steps(scores(kind, options.rows, width), width // 2))
            print(f"{kind}, {width} columns, half: {found.mean():.2f} reductions a row")
            if str(options.csv) != "-":
                append([row("kernel steps", f"{kind}, {width} columns, half", found, unit="reductions")], options.csv)
    taken = alps_operations(LLAMA_7B)
    print(f"admm, linear layers of a 7B: {taken:.3g} operations, {taken / 60e12:.0f} s at 60 TFLOP/s")
    for target in ("obs", "0.5", "2:4"):
        found = np.array([launches(target)])
        print(f"solver, {target}, of any number of layers and copies: {found[0]:.2f} launches for 128 columns")
        if str(options.csv) != "-":
            append([row("kernel steps", f"solver, {target}, for 128 columns", found, unit="launches")], options.csv)


def alps_operations(shapes: Sequence[tuple[int, int]]) -> float:
    """Multiplications and additions of `admm` for layers [out, in]: its products, its Cholesky factors and inverses."""
    products = 1 + admm._STEPS + admm._FITTING + 1  # with the goal and the first residual
    inverses = admm._STEPS // admm._EVERY
    return float(sum(2 * products * rows * width**2 + inverses * width**3 for rows, width in shapes))


def steps(score: Tensor, removed: int) -> list[float]:
    """Reductions of each row, in the programs' order; two programs take turns."""
    counted: list[float] = []
    kept = {name: getattr(rows, name) for name in REDUCTIONS}

    def counting(name: str) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            if name == "_survey":  # the first of a row
                counted.append(0)
            counted[-1] += REDUCTIONS[name]
            return kept[name](*arguments)

        return run

    try:
        for name in REDUCTIONS:
            setattr(rows, name, counting(name))
        pruned = rows.prune_rows(score, removed, weight_itself, Operands())
    finally:
        for name, function in kept.items():
            setattr(rows, name, function)
    assert torch.equal(pruned, rows.reference(score, removed, score))
    return counted


def launches(target: str) -> float:
    """Kernels and tensor operations that 128 more columns take; masks are given where the target is `obs`."""
    return (_launches(target, 768) - _launches(target, 256)) / 4


def _launches(target: str, width: int, layers: int = 4, rows: int = 8, copies: int = 4) -> int:
    """Of the whole solver; kernels are counted and not run."""
    weights, operands = torch.ones(layers, rows, width), Operands(columns=(torch.ones(layers, width),))
    kept = torch.ones(layers, copies, rows, width, dtype=torch.bool)
    group = int(target.partition(":")[2] or 0)
    choice = solver.Choice(weights, wanda, operands, [lambda size: size // 2] * copies, group)

    def rule(block: solver.Block) -> solver.Rule:
        if target == "obs":
            return solver.Given(kept[..., block.first : block.first + block.size])
        return choice(block)

    count = _Counted()
    names = [name for name, one in vars(solver).items() if isinstance(one, KernelInterface) and name[0] == "_"]
    plain = {name: getattr(solver, name) for name in names}
    try:
        for name in names:
            setattr(solver, name, count)
        with count:
            solver.solve(weights, torch.eye(width).repeat(layers, 1, 1), copies, rule)
    finally:
        for name, kernel in plain.items():
            setattr(solver, name, kernel)
    return count.launches


class _Counted(TorchDispatchMode):
    """Counts operations on tensors, but for those that allocate or make a view; and kernels that it stands for."""

    launches = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        name = function.overloadpacket.__name__
        self.launches += not function.is_view and name not in ("empty", "new_empty", "_unsafe_view", "detach")
        return function(*arguments, **(options or {}))

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        self.launches += 1
        return lambda *arguments, **options: None


if __name__ == "__main__":
    main()
