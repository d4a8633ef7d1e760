"""One model, metric and seed: what every allocator makes of the same levels and windows, judged on held-out texts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from gpmetric.allocation.allocate import search
from gpmetric.allocation.allocators import RULES, Problem
from gpmetric.allocation.archive import Archive
from gpmetric.allocation.exact import allocated, exact_allocation, uniform_budget
from gpmetric.allocation.levels import Ladder
from gpmetric.allocation.meter import Meter
from gpmetric.allocation.points import NEAREST, at_sparsity
from gpmetric.allocation.prepare import Prepared, prepare
from gpmetric.allocation.request import Request
from gpmetric.data import Windows, check_disjoint
from gpmetric.evaluation.perplexity import mean_loss, perplexity
from gpmetric.evaluation.windows import read_windows
from gpmetric.models import Model
from gpmetric.pruning.allocation import Allocation
from gpmetric.pruning.bench import Bench
from gpmetric.pruning.metrics import Metric
from gpmetric.pruning.target import Target

Settings = Mapping[str, Any]  # options of bench_allocation.py, plain values: another process can be given them


@dataclass(frozen=True)
class Found:
    """An allocation, the weights it removes, and what its allocator paid for all that it was asked for."""

    allocator: str
    sparsity: float
    allocation: Allocation
    removed: int
    budget: int
    cost: Mapping[str, Any]


def run_case(settings: Settings, model: str, metric: str, seed: int) -> dict[str, Any]:
    """`runs`, one per allocation and way of judging it, `allocations`, and the `seconds` of it all.

    Raises:
        GpmetricError: model, texts or metric cannot be used.
    """
    start = time.monotonic()
    request = make_request(settings, model, metric, seed)
    prepared = prepare(request, lambda *told: None)
    tests = read_tests(settings, prepared)
    found = find(settings, request, prepared)
    prepared.pruned.dense()
    loaded, rule, calibration = prepared.model, prepared.metric, prepared.splits["calibration"].tokens
    del prepared  # and with it the copies of the weights
    case = {"model": model, "metric": metric, "seed": seed}
    runs = [case | run for run in judged(settings, loaded, rule, calibration, tests, found)]
    allocations = [
        case | {"allocator": one.allocator, "sparsity": one.sparsity} | one.allocation.document() for one in found
    ]
    return case | {"runs": runs, "allocations": allocations, "seconds": time.monotonic() - start}


def make_request(settings: Settings, model: str, metric: str, seed: int) -> Request:
    """What is prepared, and what a search of the whole front is asked for; its range holds all sparsities compared."""
    sparsities = (settings["focus"], *settings["sparsity"])
    names = ("calibration", "samples", "search_windows", "sequence_length", "tokens", "device", "dtype", "chunk_layers")
    return Request(
        model=model,
        metric=metric,
        sparsity=settings["focus"],
        lowest=min(Request.lowest, *sparsities),
        highest=max(Request.highest, *sparsities),
        windows=1,  # of validation, which nobody reads here
        shuffle=True,
        seed=seed,
        **{name: settings[name] for name in names},
    )


def read_tests(settings: Settings, prepared: Prepared) -> list[Windows]:
    """The first windows of the test texts, alike for all seeds; refused where calibration or a search sees them."""
    length = prepared.splits["search"].tokens.shape[1]
    tests = [read_windows(prepared.model, source, length, settings["windows"]) for source in settings["test"]]
    seen = {name: prepared.splits[name] for name in ("calibration", "search")}
    check_disjoint(seen | {f"test {source}": test for source, test in zip(settings["test"], tests, strict=True)})
    return tests


def find(settings: Settings, request: Request, prepared: Prepared) -> list[Found]:
    """Every allocator's allocations. An archive of its own each: nobody profits from another's measurements."""
    meter = Meter(prepared.pruned, prepared.splits["search"].tokens, request.objective)
    found = []
    for allocator in settings["allocator"]:
        alone = allocator == "evopress"  # searches one sparsity, for the price of another's whole front
        parts = [[one] for one in settings["evopress_sparsity"]] if alone else [settings["sparsity"]]
        for sparsities in parts:
            archive = Archive(prepared.ladder, meter, focus=request.sparsity)
            budget = partial(uniform_budget, prepared.ladder)
            problem = Problem(archive, prepared.blocks, prepared.outliers, budget)
            made = allocations_of(problem, replace(request, allocator=allocator), sparsities)
            cost = {"tokens": archive.tokens, "evaluations": archive.evaluations, "seconds": archive.seconds}
            cost["bought"] = len(sparsities)  # allocations for that price
            for sparsity, allocation in zip(sparsities, made, strict=True):
                removed = allocated(prepared.ladder, allocation)
                found.append(Found(allocator, sparsity, allocation, removed, budget(sparsity), cost))
    return found


def allocations_of(problem: Problem, request: Request, sparsities: Sequence[float]) -> list[Allocation]:
    """One allocator's allocation at each sparsity, at the uniform mask's budget."""
    ladder = problem.ladder
    if request.allocator == "uniform":
        return [uniform_allocation(ladder, sparsity) for sparsity in sparsities]
    if request.allocator == "nsga2":
        assert request.tokens is not None
        picks = NEAREST * len(sparsities) * problem.archive.tokens_of(problem.archive.batches)
        front = search(replace(request, tokens=max(1, request.tokens - picks)), problem)
        return [at_sparsity(problem, front, sparsity)[0] for sparsity in sparsities]
    if request.allocator == "evopress":
        levels = [search(replace(request, sparsity=sparsity), problem)[0] for sparsity in sparsities]
    else:
        levels = [RULES[request.allocator](problem, sparsity) for sparsity in sparsities]
    pairs = zip(levels, sparsities, strict=True)
    return [exact_allocation(ladder, one, problem.budget(sparsity)) for one, sparsity in pairs]


def uniform_allocation(ladder: Ladder, sparsity: float) -> Allocation:
    """The uniform mask itself: one target for all layers, between levels or not."""
    target = Target(str(sparsity), ladder.granularity, sparsity)
    return Allocation(ladder.granularity, dict.fromkeys(ladder.layers, target))


def judged(
    settings: Settings,
    model: Model,
    metric: Metric,
    calibration: Tensor,
    tests: Sequence[Windows],
    found: Sequence[Found],
) -> Iterator[dict[str, Any]]:
    """Each allocation on each test text under each protocol and update."""
    dense = [mean_loss(model, test.tokens) for test in tests]
    total = sum(parameter.numel() for parameter in model.module.parameters())
    prunable = sum(layer.weight.numel() for layer in model.layers)
    for protocol in settings["protocol"]:
        bench = Bench(model, calibration, one_shot=protocol == "one-shot")
        bench.prepare([metric], max(settings["update"], key=lambda update: update != "none"))  # also what none needs
        for update in settings["update"]:
            for one in found:
                losses = bench.losses(metric, one.allocation, update, [test.tokens for test in tests])
                shared = {
                    "allocator": one.allocator,
                    "sparsity": one.sparsity,
                    "update": update,
                    "protocol": protocol,
                    "removed": one.removed,
                    "budget": one.budget,
                    "kept_prunable": prunable - one.removed,
                    "kept_total": total - one.removed,
                    **one.cost,
                }
                for test, loss, before in zip(tests, losses, dense, strict=True):
                    yield shared | {
                        "text": test.text.name,
                        "loss": loss,
                        "excess": loss - before,
                        "perplexity": perplexity(loss),
                        "dense_perplexity": perplexity(before),
                    }
