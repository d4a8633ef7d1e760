"""What a ledger of many candidates costs its driver: opening it, going on, and each candidate more.

    python benchmarks/bench_ledger.py [--candidates 100000] [--note TEXT] [--append]

The ledger is synthetic: generations of a hundred candidates of which 15 are evaluated, 30 repeat an earlier one and the
others are screened out, each with the measurements that a real one has. The evaluator answers at once, so what is timed
is the driver's own work: the ledger, what is kept of the candidates, survival and the front. Drawing and simplifying
formulas is left out, as it does not grow with the ledger.
"""

from __future__ import annotations

import argparse
import random
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import results

from gpmetric.evolution import sqlite_schema as schema
from gpmetric.evolution.breeding import Draw
from gpmetric.evolution.campaign import Campaign
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.records import Candidate, Evaluation, Generation, Measurement
from gpmetric.evolution.rungs import PROBE, Rung
from gpmetric.evolution.search_config import SearchConfig, named
from gpmetric.evolution.tasks import MaskFingerprint, ProbeTask, Task
from gpmetric.executors import Serial
from gpmetric.expression import PRIMITIVES, parse

SETTINGS = {"seed": 1}
TARGETS = ("0.5", "0.6", "0.7", "2:4")
RUNGS = (Rung("4 windows", 0, 4, 0.4), Rung("16 windows", 4, 16, 0.5), Rung("32 windows", 16, 32, 1.0))
SIZE, EVALUATED, REPEATED = 100, 15, 30  # of a generation


def formula(number: int) -> str:
    """One of its own for each number, as long as those of campaigns are."""
    return f"abs(W)*X**{0.5 + number / 1e6:.6g}*sqrt(H)/(rowsum(abs(W)) + {1 + number})"


def figures(number: int) -> dict[str, dict[str, float]]:
    rng = random.Random(number)
    return {kind: {target: rng.random() for target in TARGETS} for kind in ("loss", "kl")}


def fill(path: Path, candidates: int) -> None:
    """A ledger of so many candidates, made in one transaction."""
    Ledger.open(path, SETTINGS, resume=False).close()
    connection = sqlite3.connect(path)
    rng = random.Random(1)
    for generation in range(candidates // SIZE):
        for table, row in rows_of(generation, rng):
            columns = {name: schema.to_column(name, value) for name, value in row.items()}
            columns["checksum"] = schema.row_checksum(table, columns)
            places = ", ".join("?" * len(columns))
            connection.execute(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({places})", list(columns.values()))
    connection.commit()
    connection.close()
    Ledger.open(path, SETTINGS, resume=True).close()  # seals them, as a driver does after each generation


def rows_of(generation: int, rng: random.Random) -> Iterator[tuple[str, dict[str, Any]]]:
    """Tables and rows of one generation, as a campaign writes them."""
    for position in range(SIZE):
        number = generation * SIZE + position
        text, mask = formula(number), f"{number:064x}"
        fresh = position < SIZE - REPEATED or not generation
        if fresh:
            sketch = f"{rng.getrandbits(1024):0256x}"
            probe = asdict(MaskFingerprint(mask, sketch, dict.fromkeys(TARGETS, rng.random())))
            yield "measurements", asdict(Measurement(generation, position, PROBE.name, probe, None, 0.01, 7, 1))
        if position >= EVALUATED:
            known = rng.randrange(EVALUATED * max(1, generation)) + 1
            row = Candidate(generation, position, text, text, "screened", None, f"screened out after {PROBE.name}",
                            text, text, mask, number + 1)  # fmt: skip
            if not fresh:
                row = Candidate(
                    generation, position, text, text, "duplicate", known, None, text, text, None, number + 1
                )
            yield "candidates", asdict(row)
            continue
        for rung in RUNGS:
            measured = Measurement(generation, position, rung.name, figures(number), None, 0.1, 7, 1)
            yield "measurements", asdict(measured)
        paid = generation * EVALUATED + position + 1
        yield "evaluations", asdict(
            Evaluation(text, text, generation, "done", mask, None, figures(number), 12, "W,X,H", sketch, 0.01, 0.3,
                       "host", 7, 1, 1e9, paid)
        )  # fmt: skip
        yield (
            "candidates",
            asdict(Candidate(generation, position, text, text, "evaluated", paid, None, text, text, mask, number + 1)),
        )
    best = [formula(generation * SIZE + position) for position in range(EVALUATED)]
    paid = (generation + 1) * EVALUATED
    yield "generations", asdict(Generation(generation, best, rng.getstate(), paid, 1e9))


class Breeder:
    """Stands in for what draws: formulas of its own, as if simplified."""

    def __init__(self, first: int) -> None:
        self.next = first

    def draw(self, *_: object) -> list[Draw]:
        metrics = [named(parse(formula(number)), "row") for number in range(self.next, self.next + SIZE)]
        self.next += SIZE
        return [Draw(one, one.expression, one.expression, one.expression, one) for one in metrics]


def answer(task: Task) -> Any:
    if isinstance(task, ProbeTask):
        numbers = [hash(metric.name) for metric in task.metrics]
        return [MaskFingerprint(f"{n:x}", f"{n:x}", dict.fromkeys(TARGETS, abs(n) / 2**63)) for n in numbers]
    return figures(hash(task.metric.name))  # type: ignore[union-attr]


def campaign(ledger: Ledger, generations: int) -> Campaign:
    start = (named(parse("abs(W)*X"), "row"),)
    config = SearchConfig(TARGETS, ("W", "X", "H"), tuple(PRIMITIVES), start, start, SIZE, 30, 1, RUNGS, "kl",
                          generations=generations, evaluations=10**9)  # fmt: skip
    return Campaign(config, ledger, Serial(answer))


def measure(path: Path, candidates: int, more: int) -> dict[str, Sequence[float]]:
    """Seconds of the processor by what is done, each in turn, and of the clock where the disk is waited for."""
    found: dict[str, list[float]] = {}

    def timed(name: str, work: Any) -> Any:
        began, waited = time.process_time(), time.perf_counter()
        result = work()
        found.setdefault(name, []).append(time.process_time() - began)
        found.setdefault(f"{name}, by the clock", []).append(time.perf_counter() - waited)
        return result

    for _ in range(3):
        timed("opening", lambda: Ledger.open(path, SETTINGS, resume=True)).close()
        timed("reading", lambda: Ledger.read(path)).close()
    with Ledger.open(path, SETTINGS, resume=True) as ledger:
        done = campaign(ledger, candidates // SIZE + more)
        timed("restoring", done._restore)
        timed("first counts", ledger.counts)
        timed("first front", done.front)
        done._breeder = Breeder(candidates)  # type: ignore[assignment]
        for _ in range(more):
            assert done.wants_more()
            timed("generation", done._generation)
            timed("counts", ledger.counts)
            timed("front", done.front)
        for clock in ("", ", by the clock"):
            whole = zip(*(found[name + clock] for name in ("generation", "counts", "front")), strict=True)
            found[f"a candidate{clock}"] = [sum(one) / SIZE for one in whole]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--candidates", type=int, default=100_000)
    parser.add_argument("--generations", type=int, default=5, help="that are added and timed")
    parser.add_argument("--note", default="", help="what stands behind each case")
    parser.add_argument("--append", action="store_true", help="add the rows to results.csv")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.sqlite"
        fill(path, asked.candidates)
        print(f"{asked.candidates} candidates, {path.stat().st_size / 2**20:.0f} MiB")
        found = measure(path, asked.candidates, asked.generations)
    rows = []
    for name, seconds in found.items():
        case = f"{asked.candidates} candidates: {name}{asked.note and f', {asked.note}'}"
        rows.append(results.row("ledger", case, np.array(seconds)))
        print(f"{name:28} {np.median(seconds):.4f} s")
    if asked.append:
        results.append(rows)


if __name__ == "__main__":
    main()
