"""Seconds that scoring 48 formulas takes on one thread; `python benchmarks/bench_tape.py` appends to results.csv.

Each case is timed, by the processor's clock and the wall's, against `plain`: torch as one would write it, one formula
after the other, with a new tensor for every result. `evaluate` is ours for one formula; `memo` keeps every value it has
computed, `single` is a program with row blocks for each formula alone, `whole` one without blocks, `tape` what
`SharedProgram` does. The formulas are random ones, or 44 children of 4 parents. Blocks of other sizes are the evidence
for `_BLOCK`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import torch
from results import append, row
from torch import Tensor

from gpmetric.evolution.variation import Variation
from gpmetric.expression import PRIMITIVES, Expression, shared_program
from gpmetric.expression.evaluate import evaluate
from gpmetric.expression.shared_program import SharedProgram
from gpmetric.expression.torch_forms import EXP_LIMIT, TINY
from gpmetric.operands import OPERANDS

FORMULAS = 48
REPEATS = {(64, 192): 31, (192, 512): 21, (1024, 4096): 5, (4096, 4096): 3}
BLOCKS = (2**15, 2**16, 2**17, 2**19)
WHOLE = 2**40
CLOCKS = ("cpu", "wall")

Run = Callable[[], None]


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for shape, repeats in REPEATS.items():
        for kind in ("random", "converged"):
            formulas, operands = population(kind), make_operands(*shape)
            runs = {"plain": plain(formulas, operands), "evaluate": naive(formulas, operands)}
            runs["tape"] = taped(formulas, operands, shared_program._BLOCK)
            if shape != (4096, 4096):  # takes 10 GB
                runs |= {"memo": memo(formulas, operands), "single": single(formulas, operands)}
            if shape == (1024, 4096):  # the smaller ones are one block
                runs["whole"] = taped(formulas, operands, WHOLE)
                runs |= {f"blocks of {block}": taped(formulas, operands, block) for block in BLOCKS}
            rows += compare(f"{shape[0]}x{shape[1]} {kind}", runs, repeats)
    append(rows)


def plain(formulas: Sequence[Expression], operands: Mapping[str, Tensor]) -> Run:
    forms = {name: replace(PRIMITIVES[name], torch=form) for name, form in PLAIN.items()}
    run = naive(formulas, operands)

    def run_plain() -> None:
        with patch.dict(PRIMITIVES, forms):
            run()

    return run_plain


def plain_pow(a: Tensor, b: Tensor) -> Tensor:
    """With the guards that this exponent needs; all exponents here are constants."""
    exponent = b.item()
    size = (a.abs() if exponent >= 0 else a.abs().clamp(min=TINY)).pow(exponent)
    return size.where(a >= 0, -size) if exponent % 2 == 1 else size


# the forms with masks and new tensors where ours do arithmetic in place
PLAIN = {
    "sqrt": lambda x: x.abs().sqrt(),
    "log": lambda x: (x.abs() + TINY).log(),
    "exp": lambda x: x.clamp(max=EXP_LIMIT).exp(),
    "inv": lambda x: 1.0 / x.masked_fill(x.abs() < TINY, TINY),
    "div": lambda a, b: a / b.masked_fill(b.abs() < TINY, TINY),
    "pow": plain_pow,
}


def naive(formulas: Sequence[Expression], operands: Mapping[str, Tensor]) -> Run:
    def run() -> None:
        for formula in formulas:
            evaluate(formula, operands)

    return run


def taped(formulas: Sequence[Expression], operands: Mapping[str, Tensor], block: int) -> Run:
    program = SharedProgram(formulas)
    return lambda: drain([program], operands, block)


def memo(formulas: Sequence[Expression], operands: Mapping[str, Tensor]) -> Run:
    program = SharedProgram(formulas)
    program._released = {}
    return lambda: drain([program], operands, WHOLE)


def single(formulas: Sequence[Expression], operands: Mapping[str, Tensor]) -> Run:
    programs = [SharedProgram([formula]) for formula in formulas]
    return lambda: drain(programs, operands, shared_program._BLOCK)


def drain(programs: Sequence[SharedProgram], operands: Mapping[str, Tensor], block: int) -> None:
    usual, shared_program._BLOCK = shared_program._BLOCK, block
    for program in programs:
        for _ in program.scores(operands):
            pass
    shared_program._BLOCK = usual


def compare(case: str, runs: Mapping[str, Run], repeats: int) -> list[dict[str, str]]:
    """Rows for each way but the first, whose median is `baseline`; all are run in turn, in random order."""
    times = np.empty((len(runs), 2, repeats))
    rng = np.random.default_rng(0)
    for repeat in range(repeats):
        for i in rng.permutation(len(runs)):  # what ran before leaves the allocator and the cache in another state
            times[i, :, repeat] = seconds(list(runs.values())[i])
    usual = np.median(times[0], axis=1)
    rows = []
    for name, values in list(zip(runs, times, strict=True))[1:]:
        rows += [row("tape", f"{case}, {name}", values[c], usual[c], f"{clock} s") for c, clock in enumerate(CLOCKS)]
        figures = (f"{clock} {np.median(values[c]):.3g} s, {usual[c] / np.median(values[c]):.2f} times faster than "
                   f"plain" for c, clock in enumerate(CLOCKS))  # fmt: skip
        print(f"{case}, {name}: {'; '.join(figures)}", flush=True)
    return rows


def seconds(run: Run) -> tuple[float, float]:
    """As in CLOCKS. Processor time includes the system's work for this process, and no other process's."""
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    return time.process_time() - cpu, time.perf_counter() - wall


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
    gradient, token = 1e-3 * torch.rand(2, out, columns, generator=generator)
    rms, curvature = torch.rand(2, columns, generator=generator) + 0.1
    return {"W": weight, "X": rms, "G": gradient, "H": gradient * gradient, "D": curvature, "F": token * token}


if __name__ == "__main__":
    main()
