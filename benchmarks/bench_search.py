"""Is the search worth it? `python benchmarks/bench_search.py --ablations -o search.png --json search.json`

Searches are compared by the metric they would give now, the best so far by their own criterion, on text they never saw:
its mean excess ln(ppl / dense ppl) over 0.5, 0.6 and 2:4, pruned in one shot, over that of the best published mask-only
metric there. They are compared at equal numbers of full evaluations, and at equal processor seconds: on the one thread
used these are wall seconds without the machine's other work. Every run goes to the JSON file as soon as it is over
(`--resume` goes on from there), and the outcome to results.csv.

ours         a campaign as `gpmetric discover` makes it. What is screened out after a few windows is paid for in seconds
             but is no full evaluation; `no_screening` has none of that.
random       the same without start formulas, every formula drawn at random
rows_only    scores compete within rows, as the baselines' do; `ours` evolves where they compete
pruner_zero  Pruner-Zero's search as far as it is published (`pruner_zero.py`), charged for every candidate the seconds
             of the published procedure, measured in the same run

Model, statistics and texts are loaded before the clock of a campaign starts; nobody pays for the gradients' file.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any
from unittest.mock import patch

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot
from pruner_zero import Tree, evolve, formula, published_procedure
from results import COLUMNS, RESULTS, cpu_name
from sympy.core.cache import clear_cache

from gpmetric.calibration.cache import load_statistics
from gpmetric.errors import GpmetricError
from gpmetric.evolution import breeding, screening
from gpmetric.evolution.campaign import Campaign
from gpmetric.evolution.evaluator import Evaluator
from gpmetric.evolution.fitness import mean_excess
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.request import DiscoverRequest
from gpmetric.evolution.rungs import PROBE, Rung
from gpmetric.evolution.search_config import SearchConfig, make_config
from gpmetric.evolution.tasks import ExcessTask, Task
from gpmetric.evolution.workplace import collect_statistics, open_sessions
from gpmetric.executors import OutOfTime, Serial
from gpmetric.metrics import BASELINES, masks_only
from gpmetric.provenance import versions

TARGETS = ("0.5", "0.6", "2:4")  # the demo model is destroyed at 0.7, where metrics rank by chance
POPULATION = 20  # of every search
TEXTS = ("text", "calibration", "search", "validation", "test")
AXES = ("evaluations", "seconds")
HIGHEST = 1.4  # in the plot: a random formula's excess can be many times that of a published one


@dataclass(frozen=True)
class Variant:
    """A campaign that differs from ours in what it is asked for, in its config or in constants of our modules."""

    request: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    constants: tuple[tuple[ModuleType, str, Any], ...] = ()


_UNREFINED = ((breeding, "_REFINED", 0),)
_UNSCREENED = ((screening, "PROBE", replace(PROBE, keep=1.0)),)
CAMPAIGNS = {"ours": Variant(), "random": Variant({}, {"breeding": False, "start": ()}, _UNREFINED)}
ABLATIONS = {
    "no_breeding": Variant({}, {"breeding": False}, _UNREFINED),  # the baselines, then random formulas
    "no_seeding": Variant({}, {"start": ()}),
    "no_fingerprints": Variant({}, {"fingerprints": False}),
    "no_screening": Variant({}, {"rungs": ()}, _UNSCREENED),  # (): one rung, of all windows
    "no_refinement": Variant({}, {}, _UNREFINED),
    "one_target": Variant({}, {"targets": ("0.5",)}),
    "loss": Variant({"objective": "loss"}),
    "rows_only": Variant({"group": "row"}),
}
METHODS = (*CAMPAIGNS, "pruner_zero", *ABLATIONS)


def main() -> None:
    options = read_options()
    torch.set_num_threads(1)
    methods = dict.fromkeys([*options.methods, *(ABLATIONS if options.ablations else ())])
    budget = {axis: getattr(options, axis) for axis in AXES}
    checkpoints = {axis: [most / 8, most / 4, most / 2, most] for axis, most in budget.items()}
    lab = Lab(options)
    document = opened(options, lab)
    done = {(run["method"], run["seed"]) for run in document["runs"]}
    for seed in range(options.seeds):  # the outer loop: what else the machine does falls on all methods alike
        for method in methods:
            if (method, seed) in done:
                continue
            if method == "pruner_zero":
                run = run_pruner_zero(lab, seed, budget)
            else:
                run = run_campaign(lab, (CAMPAIGNS | ABLATIONS)[method], seed, budget)
            for axis, limits in checkpoints.items():
                for metric in filter(None, (incumbent(run, axis, limit) for limit in limits)):
                    if metric not in document["held_out"]:
                        document["held_out"][metric] = lab.held_out(metric)
            document["runs"].append({"method": method, "seed": seed} | run)
            save(document, options.json)
            print(f"{method}, seed {seed}: {run['evaluations']} evaluations, {run['seconds']:.0f} s", flush=True)
    summaries = summarise(document, checkpoints)
    report(document, summaries)
    if options.output:
        draw(document, summaries, options.output)
    with options.csv.open("a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, COLUMNS, lineterminator="\n").writerows(rows(document, summaries))


def opened(options: argparse.Namespace, lab: Lab) -> dict[str, Any]:
    """The document of raw results: the one to go on with, or a new one with the baselines' excess."""
    outside = ("methods", "ablations", "seeds", "output", "json", "csv", "resume")
    settings = {name: value for name, value in vars(options).items() if name not in outside}
    if options.resume and options.json.exists():
        document: dict[str, Any] = json.loads(options.json.read_text(encoding="utf-8"))
        if document["settings"] != settings:
            raise SystemExit(f"{options.json} was made with {document['settings']}, not with {settings}")
        return document
    baselines = {name: lab.held_out(name) for name in BASELINES if masks_only(name)}
    where = {"versions": versions(), "device": cpu_name(), "baselines": baselines}
    return {"settings": settings, **where, "best_baseline": min(baselines.values()), "held_out": {}, "runs": []}


class Lab:
    """Model, texts and statistics that all runs share; whatever a search makes for itself is made again for each."""

    def __init__(self, options: argparse.Namespace) -> None:
        texts = {name: getattr(options, name) for name in TEXTS}
        self.request = DiscoverRequest(
            model=options.model, **texts, target=TARGETS, population=POPULATION, samples=options.samples,
            sequence_length=options.sequence_length, search_windows=options.search_windows, windows=options.windows,
            device="cpu",
        )  # fmt: skip
        self.sessions = open_sessions(self.request)
        (self.session,) = self.sessions.values()
        self.file = collect_statistics(self.request, self.session, lambda what, done, total: None)
        self._dense = replace(self.session, dense=load_statistics(self.file))
        self.windows = len(self.session.windows["search"].tokens)
        held_out = self.session.windows["validation"]
        session = replace(self._dense, windows={**self.session.windows, "search": held_out})
        self._judge = Evaluator(session, TARGETS, "none")

    def config(self, variant: Variant, seed: int) -> SearchConfig:
        """What `gpmetric discover` would search for, changed as the variant says, without a budget."""
        usual = make_config(replace(self.request, **variant.request), self.sessions, TARGETS)
        changed = replace(usual, seed=seed, generations=None, evaluations=None, **variant.config)
        return changed if changed.rungs else replace(changed, rungs=(Rung("all", 0, self.windows, 1.0),))

    def evaluator(self, targets: Sequence[str]) -> Evaluator:
        return Evaluator(self._dense, targets, "none")

    def held_out(self, metric: str) -> float:
        """Mean excess over TARGETS on the validation windows; infinite where the metric cannot be applied."""
        try:
            return mean_excess(self._judge(ExcessTask(self.session.metric(metric)))["loss"])
        except GpmetricError:
            return math.inf


def run_campaign(lab: Lab, variant: Variant, seed: int, budget: Mapping[str, float]) -> dict[str, Any]:
    """A campaign until both budgets are spent: its incumbents, and what it cost."""
    config = lab.config(variant, seed)
    evaluator = lab.evaluator(config.targets)
    paid: list[tuple[str, float]] = []  # metric and time of every full evaluation, failed ones included
    clear_cache()  # sympy's: a run must not profit from the one before
    wall, start = time.monotonic(), time.process_time()

    def traced(task: Task) -> Any:
        if len(paid) >= budget["evaluations"] and time.process_time() - start >= budget["seconds"]:
            raise OutOfTime
        try:
            return evaluator(task)
        finally:
            if isinstance(task, ExcessTask) and task.last == lab.windows:
                paid.append((task.metric.name, time.process_time() - start))

    with ExitStack() as stack:
        for module, name, value in variant.constants:
            stack.enter_context(patch.object(module, name, value))
        folder = stack.enter_context(TemporaryDirectory())
        book = stack.enter_context(Ledger.open(Path(folder) / "ledger.sqlite", {}, resume=False))
        campaign = Campaign(config, book, Serial(traced))
        campaign.run()
        seconds, counts = time.process_time() - start, book.counts()
        figures = {one.text: one.mean for one in campaign.individuals()}
    spent = {"seconds": seconds, "wall": time.monotonic() - wall, "counts": counts}
    trace = [(text, figures.get(text, math.inf), at) for text, at in paid]
    return {"steps": incumbents(trace), "evaluations": len(paid), **spent}


def run_pruner_zero(lab: Lab, seed: int, budget: Mapping[str, float]) -> dict[str, Any]:
    """Pruner-Zero's search at 0.5 until both budgets are spent: its incumbents, and what it would have cost.

    Candidates are really measured as ours are, on the search windows with dense statistics, and charged the published
    procedure, which would take over ten minutes a run.
    """
    published = published_procedure(lab.session, lab.file)
    charge = published["common"] + published["whole text"]
    evaluator = lab.evaluator(("0.5",))
    sample = lab.session.tokens.shape

    def fitness(tree: Tree) -> float:
        try:
            return float(evaluator(ExcessTask(lab.session.metric(formula(tree, *sample))))["loss"]["0.5"])
        except GpmetricError:  # scores that are not finite; the published code would sort them
            return math.inf

    trace: list[tuple[str, float, float]] = []
    for tree, value in evolve(fitness, POPULATION, random.Random(seed)):
        trace.append((formula(tree, *sample), value, charge * (len(trace) + 1)))
        if len(trace) >= budget["evaluations"] and trace[-1][2] >= budget["seconds"]:
            break
    spent = {"evaluations": len(trace), "seconds": trace[-1][2], "published": published}
    return {"steps": incumbents(trace), **spent}


def incumbents(trace: Sequence[tuple[str, float, float]]) -> list[dict[str, Any]]:
    """Where the best figure changes along the (metric, figure, seconds) of each full evaluation."""
    steps: list[dict[str, Any]] = []
    best = math.inf
    for number, (metric, figure, seconds) in enumerate(trace, start=1):
        if figure < best:
            best = figure
            steps.append({"evaluations": number, "seconds": seconds, "metric": metric})
    return steps


def incumbent(run: Mapping[str, Any], axis: str, limit: float) -> str | None:
    """The metric held when that many evaluations or seconds were spent; None before the first."""
    return next((step["metric"] for step in reversed(run["steps"]) if step[axis] <= limit), None)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, lowest and highest; values may be infinite."""
    p20, median, p80 = np.percentile(values, [20, 50, 80], method="linear" if np.isfinite(values).all() else "nearest")
    return {"median": float(median), "p20": float(p20), "p80": float(p80), "low": min(values), "high": max(values)}


def verdict(ours: Mapping[str, float], other: Mapping[str, float]) -> str:
    """Whether the ranges of two methods overlap, less being better.

    Of five equal runs against five, ranges are apart with a chance of 2 in 252 (the exact rank-sum test): p = 0.008.
    """
    if ours["high"] < other["low"]:
        return "ours is better"
    return "ours is worse" if other["high"] < ours["low"] else "ranges overlap"


def summarise(document: Mapping[str, Any], checkpoints: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """By axis, checkpoint and method: the summary over seeds of the incumbents' held-out excess."""
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for run in document["runs"]:
        by_method.setdefault(run["method"], []).append(run)
    held = document["held_out"]
    return {
        axis: {
            limit: {
                method: summary([held.get(incumbent(run, axis, limit), math.inf) for run in runs])
                for method, runs in by_method.items()
            }
            for limit in limits
        }
        for axis, limits in checkpoints.items()
    }


def per_candidate(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Over seeds: processor seconds of ours by what they are counted over, of a candidate as published by its text."""
    mine = [run for run in runs if run["method"] == "ours"]
    published = [run["published"] for run in runs if run["method"] == "pruner_zero"]
    costs = {
        "a distinct metric": [run["seconds"] / run["counts"]["unique_ranked"] for run in mine],
        "a full evaluation": [run["seconds"] / run["evaluations"] for run in mine],
        "whole text": [one["common"] + one["whole text"] for one in published],
        "search windows": [one["common"] + one["search windows"] for one in published],
    }
    return {name: summary(values) for name, values in costs.items() if values}


def cost_pairs(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, dict[str, float], float]]:
    """Seconds of ours beside the median of the published procedure; nothing where one of them was not run."""
    costs = per_candidate(runs)
    pairs = product(("a distinct metric", "a full evaluation"), ("whole text", "search windows"))
    found = [(f"{ours}, published on {text}", ours, text) for ours, text in pairs if {ours, text} <= costs.keys()]
    return [(case, costs[ours], costs[text]["median"]) for case, ours, text in found]


def rows(document: Mapping[str, Any], summaries: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What results.csv is told: every method at the end of both axes, and the seconds per candidate."""
    cases = [
        (f"{method}, {limit:g} {axis}", "nats", one, document["best_baseline"])
        for axis, by_limit in summaries.items()
        for limit, by_method in list(by_limit.items())[-1:]
        for method, one in by_method.items()
    ]
    cases += [(case, "cpu s", one, published) for case, one, published in cost_pairs(document["runs"])]
    where = (cpu_name(), torch.get_num_threads(), torch.__version__, np.__version__, date.today().isoformat())
    table = []
    for case, unit, one, baseline in cases:
        values = (one["median"], one["p20"], one["p80"], baseline, one["median"] / baseline)
        table.append(dict(zip(COLUMNS, ("search", case, unit, *(f"{x:.3g}" for x in values), *where), strict=True)))
    return table


def report(document: Mapping[str, Any], summaries: Mapping[str, Any]) -> None:
    """Prints the table, the verdicts and the ratio of seconds per candidate."""
    bar = document["best_baseline"]
    seeds = len({run["seed"] for run in document["runs"]})
    print(f"\nheld-out excess over the best baseline's {bar:.4f} nats: median [range] of {seeds} seeds")
    for axis, by_limit in summaries.items():
        for limit, by_method in by_limit.items():
            print(f"at {limit:g} {axis}")
            for method, one in by_method.items():
                against = verdict(by_method["ours"], one) if method != "ours" and "ours" in by_method else ""
                low, median, high = (one[key] / bar for key in ("low", "median", "high"))
                print(f"  {method:16s}{median:8.3f} [{low:.3f}, {high:.3f}]  {against}")
    for case, one, published in cost_pairs(document["runs"]):
        print(f"{case}: {one['median']:.3f} s, published {published:.2f} s: {published / one['median']:.1f} times ours")


def draw(document: Mapping[str, Any], summaries: Mapping[str, Any], path: Path) -> None:
    """Two panels: medians over seeds along evaluations and seconds, main methods with the range of the seeds."""
    matplotlib.use("agg")
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    bar = document["best_baseline"]
    for panel, by_limit in zip(panels, summaries.values(), strict=True):
        for number, method in enumerate(next(iter(by_limit.values()))):
            points = [(limit, by_method[method]) for limit, by_method in by_limit.items()]
            low, median, high = (np.array([one[key] for _, one in points]) / bar for key in ("low", "median", "high"))
            limits = [limit for limit, _ in points]
            main = method not in ABLATIONS
            style: dict[str, Any] = {"lw": 2.2, "marker": "o"} if main else {"lw": 1, "ls": "--", "marker": "."}
            panel.plot(limits, median, color=f"C{number}", label=method.replace("_", " "), **style)
            if main:
                panel.fill_between(limits, low, high, where=np.isfinite(high), color=f"C{number}", alpha=0.15, lw=0)
        panel.axhline(1, color="black", lw=0.8, zorder=1)
        panel.set_xscale("log", base=2)
        panel.set_xlim(0.9 * min(by_limit), 1.1 * max(by_limit))
        panel.set_xticks(list(by_limit), [f"{limit:g}" for limit in by_limit])
        panel.minorticks_off()
        panel.grid(axis="y", lw=0.4)
    panels[0].set_xlabel("full evaluations")
    panels[1].set_xlabel("processor seconds")
    panels[0].set_ylabel("excess on held-out text / best baseline's")
    lowest = min(one["low"] for by_limit in summaries.values() for found in by_limit.values() for one in found.values())
    panels[0].set_ylim(min(lowest / bar, 1) - 0.02, HIGHEST)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150)


def save(document: Mapping[str, Any], path: Path) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1), encoding="utf-8")
    os.replace(partial, path)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model directory, with --text or the four texts; the demo model by default")
    for name in TEXTS:
        parser.add_argument(f"--{name}", help="cut into all four splits" if name == "text" else "a text file")
    parser.add_argument("--methods", nargs="+", default=["ours", "random", "pruner_zero"], choices=METHODS)
    parser.add_argument("--ablations", action="store_true", help=f"also {', '.join(ABLATIONS)}")
    parser.add_argument("--seeds", type=int, default=5, help="runs of every method")
    parser.add_argument("--evaluations", type=int, default=80, help="full evaluations a run makes at least")
    parser.add_argument("--seconds", type=float, default=60, help="processor seconds a run takes at least")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--search-windows", type=int, default=32)
    parser.add_argument("--windows", type=int, default=128, help="held-out windows")
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("-o", "--output", type=Path, help="the plot, PNG")
    parser.add_argument("--json", type=Path, default=Path("search.json"), help="every run, as soon as it is over")
    parser.add_argument("--csv", type=Path, default=RESULTS, help="rows are appended here at the end")
    parser.add_argument("--resume", action="store_true", help="go on with the runs in --json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
