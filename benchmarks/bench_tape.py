"""CPU seconds that scoring 48 formulas takes on one thread; `python benchmarks/bench_tape.py` appends to results.csv.

Each case is timed against `evaluate` for one formula after the other: `memo` keeps every value it has computed,
`single` is a tape with row blocks for each formula alone, `whole` one tape without blocks, `tape` what `Tape` does. The
formulas are random ones, or 44 children of 4 parents. Blocks of other sizes are the evidence for `_BLOCK`.
"""

from __future__ import annotations

import csv
import random
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date

import numpy as np
import torch
from bench_mask import COLUMNS, RESULTS, cpu_name
from torch import Tensor

from gpmetric.evolution.variation import Variation
from gpmetric.expression import PRIMITIVES, Expression, tape
from gpmetric.expression.evaluate import evaluate
from gpmetric.expression.tape import Tape
from gpmetric.operands import OPERANDS

FORMULAS = 48
REPEATS = {(64, 192): 31, (192, 512): 21, (1024, 4096): 5}
BLOCKS = (2**15, 2**19)
WHOLE = 2**40

Run = Callable[[], None]


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for shape, repeats in REPEATS.items():
        for kind in ("random", "converged"):
            formulas, operands = population(kind), make_operands(*shape)
            runs = variants(formulas, operands)
            if shape == (1024, 4096):  # the others are one block
                runs["whole"] = taped(formulas, operands, WHOLE)
                runs |= {f"blocks of {block}": taped(formulas, operands, block) for block in BLOCKS}
            rows += compare(f"{shape[0]}x{shape[1]} {kind}", runs, repeats)
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, COLUMNS, lineterminator="\n").writerows(rows)


def variants(formulas: Sequence[Expression], operands: Mapping[str, Tensor]) -> dict[str, Run]:
    """Ways to score a population, the one the others are compared with first."""
    return {
        "evaluate": naive(formulas, operands),
        "memo": memo(formulas, operands),
        "single": single(formulas, operands),
        "tape": taped(formulas, operands, tape._BLOCK),
    }


def naive(formulas: Sequence[Expression], operands: Mapping[str, Tensor]) -> Run:
    def run() -> None:
        for formula in formulas:
            evaluate(formula, operands)

    return run


def taped(formulas: Sequence[Expression], operands: Mapping[str, Tensor], block: int) -> Run:
    program = Tape(formulas)
    return lambda: drain([program], operands, block)


def memo(formulas: Sequence[Expression], operands: Mapping[str, Tensor]) -> Run:
    program = Tape(formulas)
    program._released = {}
    return lambda: drain([program], operands, WHOLE)


def single(formulas: Sequence[Expression], operands: Mapping[str, Tensor]) -> Run:
    programs = [Tape([formula]) for formula in formulas]
    return lambda: drain(programs, operands, tape._BLOCK)


def drain(programs: Sequence[Tape], operands: Mapping[str, Tensor], block: int) -> None:
    usual, tape._BLOCK = tape._BLOCK, block
    for program in programs:
        for _ in program.scores(operands):
            pass
    tape._BLOCK = usual


def compare(case: str, runs: Mapping[str, Run], repeats: int) -> list[dict[str, object]]:
    """A row for each way but the first, whose median is `baseline`; all are run in turn, in random order."""
    times = np.empty((repeats, len(runs)))
    rng = np.random.default_rng(0)
    for row in times:
        for i in rng.permutation(len(runs)):  # what ran before leaves the allocator and the cache in another state
            row[i] = cpu_seconds(list(runs.values())[i])
    low, median, high = np.percentile(times, [20, 50, 80], axis=0)
    where = (cpu_name(), torch.get_num_threads(), torch.__version__, np.__version__, date.today().isoformat())
    rows = []
    for i, name in enumerate(runs):
        print(f"{case}, {name}: {1e3 * median[i]:.1f} ms, {median[i] / median[0]:.2f} of evaluate", flush=True)
        figures = (f"{x:.3g}" for x in (median[i], low[i], high[i], median[0], median[i] / median[0]))
        rows.append(dict(zip(COLUMNS, ("tape", f"{case}, {name}", "cpu s", *figures, *where), strict=True)))
    return rows[1:]


def cpu_seconds(run: Run) -> float:
    """Of this process, the system's work for it included: other processes on the machine do not count."""
    start = time.process_time()
    run()
    return time.process_time() - start


def population(kind: str) -> list[Expression]:
    """48 formulas of at most 20 nodes: random ones, or 4 of those and children of what there is already."""
    rng = random.Random(0)
    variation = Variation(tuple(OPERANDS), tuple(PRIMITIVES), 20, rng)
    formulas = [variation.random_expression() for _ in range(FORMULAS if kind == "random" else 4)]
    while len(formulas) < FORMULAS:
        formulas.append(variation.vary(rng.choice(formulas), rng.choice(formulas)))
    return formulas


def make_operands(out: int, columns: int) -> dict[str, Tensor]:
    """Of the size they have in a model: weights near 0.02, gradients near 1e-3, the other statistics positive."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(out, columns, generator=generator)
    gradient = 1e-3 * torch.rand(out, columns, generator=generator)
    rms, curvature = torch.rand(2, columns, generator=generator) + 0.1
    return {"W": weight, "X": rms, "G": gradient, "H": gradient * gradient, "D": curvature}


if __name__ == "__main__":
    main()
