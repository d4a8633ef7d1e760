"""How often a row is gone over until its threshold is found, counted in Triton's interpreter: no GPU is needed.

    python benchmarks/kernel_steps.py

Every pass over the scores of a row ends in a reduction over the program's threads, which is what rows wait for on a
GPU. The scores are those of a metric, heavy-tailed ones, signed ones, ones with many ties, and ones with zeros.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import numpy as np
import torch
from results import RESULTS, append, row
from torch import Tensor

from gpmetric.kernels import rows
from gpmetric.kernels.launch import Operands, weight_itself

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


if __name__ == "__main__":
    main()
