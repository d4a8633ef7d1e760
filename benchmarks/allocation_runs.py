"""One model, metric and seed: what every allocator makes of the same levels and windows, judged on held-out texts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gpmetric.allocation.allocators import Problem, search
from gpmetric.allocation.candidate_objective import CandidateObjective
from gpmetric.allocation.evaluation_log import EvaluationLog
from gpmetric.allocation.exact_budget import allocated, exact_allocation
from gpmetric.allocation.levels import LevelTable
from gpmetric.allocation.pareto_pick import NEAREST, at_sparsity
from gpmetric.allocation.prepare import CalibratedModel, calibrate
from gpmetric.allocation.request import ALLOCATORS, AllocateRequest
from gpmetric.data import Windows, check_disjoint
from gpmetric.evaluation.perplexity import mean_loss, perplexity
from gpmetric.metrics import Metric
from gpmetric.pruning.allocation import Allocation
from gpmetric.pruning.protocol import Protocol, Rule
from gpmetric.session.session import Session
from gpmetric.session.splits import open_text, read_windows
from gpmetric.targets import Target

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
    calibrated = calibrate(request, lambda *told: None)
    session, scored_by = calibrated.session, calibrated.metric
    tests = read_tests(settings, session)
    found = find(settings, request, calibrated)
    calibrated.pruned.dense()
    del calibrated  # and with it the copies of the weights
    case = {"model": model, "metric": metric, "seed": seed}
    runs = [case | run for run in judged(settings, session, scored_by, tests, found)]
    allocations = [
        case | {"allocator": one.allocator, "sparsity": one.sparsity} | one.allocation.document() for one in found
    ]
    return case | {"runs": runs, "allocations": allocations, "seconds": time.monotonic() - start}


def make_request(settings: Settings, model: str, metric: str, seed: int) -> AllocateRequest:
    """What is prepared, and what a search of the whole front is asked for; its range holds all sparsities compared."""
    sparsities = (settings["focus"], *settings["sparsity"])
    needing = [name for name in settings["allocator"] if ALLOCATORS[name].needs]  # what it needs is measured
    names = ("calibration", "samples", "search_windows", "sequence_length", "tokens", "device", "dtype")
    return AllocateRequest(
        model=model,
        metric=metric,
        allocator=needing[0] if needing else AllocateRequest.allocator,
        sparsity=settings["focus"],
        lowest=min(AllocateRequest.lowest, *sparsities),
        highest=max(AllocateRequest.highest, *sparsities),
        windows=1,  # of validation, which nobody reads here
        shuffle=True,
        seed=seed,
        **{name: settings[name] for name in names},
    )


def read_tests(settings: Settings, session: Session) -> list[Windows]:
    """The first windows of the test texts, alike for all seeds; refused where calibration or a search sees them."""
    length = session.tokens.shape[1]
    tests = [read_windows(session.model, open_text(one), length, settings["windows"]) for one in settings["test"]]
    seen = {name: session.windows[name] for name in ("calibration", "search")}
    check_disjoint(seen | {f"test {source}": test for source, test in zip(settings["test"], tests, strict=True)})
    return tests


def find(settings: Settings, request: AllocateRequest, calibrated: CalibratedModel) -> list[Found]:
    """Every allocator's allocations. A log of its own each: nobody profits from another's measurements."""
    windows, table = calibrated.session.windows, calibrated.table
    objective = CandidateObjective(calibrated.pruned, windows["search"].tokens, request.objective)
    found = []
    for allocator in settings["allocator"]:
        alone = ALLOCATORS[allocator].one_sparsity  # searches one sparsity, for the price of another's whole front
        parts = [[one] for one in settings["evopress_sparsity"]] if alone else [settings["sparsity"]]
        for sparsities in parts:
            log = EvaluationLog(table, objective, focus=request.sparsity)
            problem = Problem(table, calibrated.blocks, calibrated.evidence, log, lambda *told: None)
            made = allocations_of(problem, replace(request, allocator=allocator), sparsities)
            cost = {"tokens": log.tokens, "evaluations": log.evaluations, "seconds": log.seconds}
            cost["bought"] = len(sparsities)  # allocations for that price
            for sparsity, allocation in zip(sparsities, made, strict=True):
                removed = allocated(table, allocation)
                found.append(Found(allocator, sparsity, allocation, removed, problem.budget(sparsity), cost))
    return found


def allocations_of(problem: Problem, request: AllocateRequest, sparsities: Sequence[float]) -> list[Allocation]:
    """One allocator's allocation at each sparsity, at the uniform mask's budget."""
    table, row = problem.table, ALLOCATORS[request.allocator]
    if request.allocator == "uniform":
        return [uniform_allocation(table, sparsity) for sparsity in sparsities]
    if row.rule is None and not row.one_sparsity:
        assert request.tokens is not None
        picks = NEAREST * len(sparsities) * problem.log.tokens_of(problem.log.batches)
        front = search(replace(request, tokens=max(1, request.tokens - picks)), problem)
        return [at_sparsity(problem, front, sparsity)[0] for sparsity in sparsities]
    if row.rule is None:
        levels = [search(replace(request, sparsity=sparsity), problem)[0] for sparsity in sparsities]
    else:
        levels = [row.rule(problem, sparsity) for sparsity in sparsities]
    pairs = zip(levels, sparsities, strict=True)
    return [exact_allocation(table, one, problem.budget(sparsity)) for one, sparsity in pairs]


def uniform_allocation(table: LevelTable, sparsity: float) -> Allocation:
    """The uniform mask itself: one target for all layers, between levels or not."""
    target = Target(str(sparsity), table.granularity, sparsity)
    return Allocation(table.granularity, dict.fromkeys(table.layers, target))


def judged(
    settings: Settings, session: Session, metric: Metric, tests: Sequence[Windows], found: Sequence[Found]
) -> Iterator[dict[str, Any]]:
    """Each allocation on each test text under each protocol and update."""
    model = session.model
    dense = [mean_loss(model, test.tokens) for test in tests]
    total = sum(parameter.numel() for parameter in model.module.parameters())
    prunable = sum(layer.weight.numel() for layer in model.layers)
    for name in settings["protocol"]:
        protocol = Protocol(session, one_shot=name == "one-shot")
        protocol.prepare([metric], max(settings["update"], key=lambda update: update != "none"))  # also what none needs
        for update in settings["update"]:
            for one in found:
                rule = Rule(metric, one.allocation, update)
                (measured,) = protocol.measure([rule], [test.tokens for test in tests])
                if measured.error is not None:
                    raise measured.error
                shared = {
                    "allocator": one.allocator,
                    "sparsity": one.sparsity,
                    "update": update,
                    "protocol": name,
                    "removed": one.removed,
                    "budget": one.budget,
                    "kept_prunable": prunable - one.removed,
                    "kept_total": total - one.removed,
                    **one.cost,
                }
                for test, loss, before in zip(tests, measured.losses, dense, strict=True):
                    yield shared | {
                        "text": test.text.name,
                        "loss": loss,
                        "excess": loss - before,
                        "perplexity": perplexity(loss),
                        "dense_perplexity": perplexity(before),
                    }
