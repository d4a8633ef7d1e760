"""Measures the figures of the README and the documentation again: `python benchmarks/benchmark.py --quick`.

Every figure comes from a command that the script prints. New figures are put beside those that the tables show, over
their seeds; rows go to results.csv, tables and pictures are made anew of them. `--quick` takes the embedded model, the
first seed and under twenty minutes of two cores; without it, all seeds, and what needs trained models and their texts
(`--models`, `--texts`: hours).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

import numpy as np
from figures import ROOT, figures_of, write_pages
from results import RESULTS, append, row

Figures = Iterator[tuple[str, str, float]]  # row, column, value

_BASELINES = ("magnitude", "wanda", "ria", "gblm_l1", "gblm_l2", "pruner_zero", "sparsegpt")
_TARGETS = ("0.5", "0.6", "2:4")
_MODELS = ("llama-05m", "gpt2-05m", "llama-4m", "gpt2-3m")
_HARD = ("layer:0.5", "layer:0.6", "layer:0.7", "2:4")
_MARKED = " (updates weights)"


@dataclass(frozen=True)
class Bench:
    """Where an experiment works and what it may use."""

    out: Path
    models: Path | None
    texts: Path | None
    seeds: int

    def gpmetric(self, name: str, *words: object) -> dict[str, Any]:
        """The JSON document of a command, which is not run again where `--resume` finds it."""
        result = self.out / f"{name}.json"
        command = ["gpmetric", *map(str, words)]
        print(f"  {shlex.join(command)}", flush=True)
        if not result.exists():
            run = [sys.executable, "-m", *command, "--json", str(result)]
            subprocess.run(run, check=True, cwd=self.out, stdout=subprocess.DEVNULL, env=os.environ | {"NO_COLOR": "1"})
        return json.loads(result.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Experiment:
    """What makes one table.

    Attributes:
        told: what is measured.
        run: (bench, seed) -> its figures.
        minutes: of two cores, for one seed.
        seeds: how many; one where nothing is drawn.
        spread: by which share a figure may leave the range of those that are there.
        trained: whether it needs trained models and texts besides the package.
    """

    told: str
    run: Callable[[Bench, int], Figures]
    minutes: float
    seeds: int = 1
    spread: float = 0.02
    trained: bool = False


def discovered(bench: Bench, seed: int) -> Figures:
    """The winner of a campaign on the embedded model beside published metrics, on its test text."""
    ledger = bench.out / f"campaign-{seed}.sqlite"
    targets = [word for target in _TARGETS for word in ("--target", target)]
    search = ("--samples", 64, "--evaluations", 150, "--seed", seed, "--ledger", ledger, "--resume")
    found = bench.gpmetric(f"discovered-{seed}", "discover", *targets, *search)
    named = [word for name in (found["winner"]["formula"], *_BASELINES) for word in ("--metric", name)]
    table = bench.gpmetric(f"discovered-{seed}-bench", "bench", *named, *targets, "--samples", 64, "--windows", 128)
    excess = _excess(table)
    best = min(excess, key=lambda name: excess[name]["mean"] if name in _BASELINES else float("inf"))
    print(f"  winner {found['winner']['formula']}, against {best}", flush=True)
    for name, columns in sorted(excess.items(), key=lambda one: one[0] in _BASELINES):
        line = name + _MARKED * (name == "sparsegpt") if name in _BASELINES else "discovered"
        for column, value in columns.items():
            yield line, column, value


def _excess(table: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """By metric, excess log-loss at every target, and their mean."""
    (dense,) = table["dense"].values()
    found: dict[str, dict[str, float]] = {}
    for one in table["results"]:
        (ppl,) = one["ppl"].values()
        found.setdefault(one["metric"], {})[one["target"]] = log(ppl / dense)
    return {name: by | {"mean": sum(by.values()) / len(by)} for name, by in found.items()}


def allocated(bench: Bench, seed: int) -> Figures:
    """Sparsity by layer, beside rules that remove as many weights."""
    sizes = ("--evaluations", 200, "--samples", 16, "--search-windows", 8, "--windows", 8, "--seed", seed)
    output = ("-o", bench.out / f"allocation-{seed}.json", "--plot", bench.out / f"allocation-{seed}.png", "--force")
    found = bench.gpmetric(f"allocated-{seed}", "allocate", "--sparsity", 0.6, *sizes, *output)
    sparsity = found["picked"]["sparsity"]
    yield "searched", "validation", found["picked"]["excess"]
    for name, points in found["baselines"].items():
        yield name, "validation", min(points, key=lambda point: abs(point["sparsity"] - sparsity))["excess"]


def slimmed(bench: Bench, seed: int) -> Figures:
    """A smaller model, by exchanges and by a policy."""
    ways = {"exchanges": ("--steps", 100), "policy gradient": ("--steps", 200, "--estimator", "rloo")}
    for name, options in ways.items():
        output = ("-o", bench.out / f"smaller-{name.split()[0]}-{seed}", "--force")
        sizes = ("--sparsity", 0.3, "--samples", 64, "--seed", seed)
        found = bench.gpmetric(f"slimmed-{name.split()[0]}-{seed}", "slim", *sizes, *options, *output)
        for column in ("dense", "initial", "perplexity"):
            yield name, {"initial": "its start", "perplexity": "searched"}.get(column, column), found[column]


def updaters(bench: Bench, seed: int) -> Figures:
    """Every update and fit on trained models, as a share of SparseGPT's mean excess."""
    assert bench.models is not None
    cells = [("Wanda", "abs(W)*X", "none", "own"), ("Wanda++, its scores alone", "wandapp_rgs", "none", "own")]
    for fit in ("own", "dense"):
        cells += [("Wanda", "abs(W)*X", "obs", fit), ("SparseGPT", "W*W*D", "obs-blockwise", fit)]
        cells += [("ALPS", "layer:abs(W)*X", "admm", fit), ("Wanda", "abs(W)*X", "block", fit)]
        cells += [("ALPS", "layer:abs(W)*X", "admm+block", fit)]
    targets = [word for target in _HARD for word in ("--target", target)]
    for model in _MODELS:
        means: dict[tuple[str, ...], float] = {}
        for name, formula, update, fit in cells:
            options = ("--metric", formula, "--update", update, "--fit", fit, "--samples", 64, "--windows", 100)
            texts = ("--calibration", _text(bench, "wikitext2-valid.txt"), "--text", _text(bench, "wikitext2-test.txt"))
            where = f"updaters-{model}-{name[:7]}-{update}-{fit}".replace("+", "-")
            words = (bench.models / model, *options, *texts, *targets, "--sequence-length", 256)
            table = bench.gpmetric(where, "bench", *words)
            means[name, f"`{update}`", fit] = next(iter(_excess(table).values()))["mean"]
        base = means["SparseGPT", "`obs-blockwise`", "own"]
        for key, mean in means.items():
            yield ", ".join(key), model, mean / base


def tuned(bench: Bench, seed: int) -> Figures:
    """What tune finds in 30 minutes, and what each of its parts is worth, as shares of SparseGPT's excess."""
    assert bench.models is not None
    texts = ("--calibration", _text(bench, "wikitext2-valid.txt"), "--text", _text(bench, "wikitext2-test.txt"))
    for target in ("0.6", "0.7"):
        options = ("--sparsity", target, "--minutes", 30, "--samples", 64, "--windows", 100, "--sequence-length", 256)
        output = ("--seed", seed, "-o", bench.out / f"tuned-{target}-{seed}", "--force")
        found = bench.gpmetric(f"tuned-{target}-{seed}", "tune", bench.models / "llama-05m", *options, *texts, *output)
        rows = {one["what"]: one["text_excess"][0] for one in found["table"] if one.get("text_excess")}
        for name, value in rows.items():
            if value is not None:
                yield name.partition(" (")[0], target, value / rows["sparsegpt"]


def _text(bench: Bench, name: str) -> Path:
    assert bench.texts is not None
    return bench.texts / name


EXPERIMENTS = {
    "discovered": Experiment("a campaign on the embedded model beside published metrics", discovered, 11, 3, 0.1),
    "allocated": Experiment("sparsity by layer of the embedded model", allocated, 1, 3, 0.1),
    "slimmed": Experiment("a smaller embedded model", slimmed, 4, 3, 0.1),
    "updaters": Experiment("updates and fits on trained models", updaters, 200, trained=True),
    "tuned": Experiment("the best recipe for a trained model", tuned, 60, 3, 0.15, trained=True),
}


def measure(name: str, bench: Bench) -> bool:
    """Runs an experiment and keeps its rows; whether every figure is as the table has it."""
    experiment, known, good = EXPERIMENTS[name], figures_of(name), True
    for seed in range(min(bench.seeds, experiment.seeds)):
        began = time.monotonic()
        print(f"{name}, seed {seed}: {experiment.told}, about {experiment.minutes:g} minutes of two cores", flush=True)
        found = list(experiment.run(bench, seed))
        for line, column, value in found:
            figure = known.get((line, column))
            within = figure is None or figure.allows(value, experiment.spread)
            good &= within
            told = "new" if figure is None else f"{figure.text(3)}{'' if within else ': OUTSIDE'}"
            print(f"  {line}, {column}: {value:.4f} (table: {told})", flush=True)
        rows = [_row(name, f"{line} | {column} | seed {seed}", value) for line, column, value in found]
        append(rows, RESULTS)
        print(f"  {(time.monotonic() - began) / 60:.1f} minutes", flush=True)
    return good


def _row(name: str, case: str, value: float) -> dict[str, str]:
    """A row of results.csv with four digits, as tables show them."""
    told = f"{value:.4g}"
    return row(f"figures: {name}", case, np.array([value]), unit="") | {"median": told, "p20": told, "p80": told}


def pictures(bench: Bench) -> None:
    """The pictures of the documentation, of the first seed's campaign and allocation."""
    place = ROOT / "docs" / "pictures"
    place.mkdir(exist_ok=True)
    ledger = bench.out / "campaign-0.sqlite"
    if ledger.exists():
        bench.gpmetric("analysed", "analyse", ledger, "-o", place / "analyse.png", "--force")
    if (bench.out / "allocation-0.png").exists():
        (place / "allocate.png").write_bytes((bench.out / "allocation-0.png").read_bytes())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the embedded model and one seed")
    parser.add_argument("--seeds", type=int, default=3, help="of each search, at most")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--models", type=Path, help=f"folder with {', '.join(_MODELS)}")
    parser.add_argument("--texts", type=Path, help="folder with wikitext2-valid.txt and wikitext2-test.txt")
    parser.add_argument("--resume", action="store_true", help="take what --out has, and measure the rest")
    parser.add_argument("--out", type=Path, default=Path("build/benchmark"), help="results of the commands, kept there")
    options = parser.parse_args(arguments)
    bench = Bench(options.out.resolve(), options.models, options.texts, 1 if options.quick else options.seeds)
    if not options.resume and bench.out.exists() and any(bench.out.iterdir()):
        parser.error(f"--out {str(options.out)!r} has results: go on with --resume, or name another")
    bench.out.mkdir(parents=True, exist_ok=True)
    there = options.models is not None and options.texts is not None and not options.quick
    names = options.only or [name for name, one in EXPERIMENTS.items() if there or not one.trained]
    if left := [name for name in EXPERIMENTS if name not in names]:
        print(f"left out: {', '.join(left)}")
    good = [measure(name, bench) for name in names]
    pictures(bench)
    for page, text in write_pages().items():
        page.write_text(text, encoding="utf-8")
        print(f"{page.relative_to(ROOT)}: tables written anew")
    print("all figures are within their spread" if all(good) else "some figures are OUTSIDE of their spread")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
