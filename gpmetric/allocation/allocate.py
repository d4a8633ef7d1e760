"""`gpmetric allocate`: which layers give how much, as a front between sparsity and loss and one allocation of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from gpmetric.allocation.allocators import Ground, Problem, diagonal, search
from gpmetric.allocation.candidate_objective import CandidateObjective
from gpmetric.allocation.evaluation_log import EvaluationLog, Measured
from gpmetric.allocation.exact_budget import uniform_budget
from gpmetric.allocation.front_table import write_csv
from gpmetric.allocation.in_use import by_rule, settled, uniform_in_use, uses_of
from gpmetric.allocation.levels import Levels
from gpmetric.allocation.listener import AllocateListener
from gpmetric.allocation.nsga2 import REFERENCE, hypervolume
from gpmetric.allocation.objective_workers import SharedObjective
from gpmetric.allocation.pareto_pick import Point, Scorer, held_out_front, knee, pick
from gpmetric.allocation.prepare import CalibratedModel, calibrate
from gpmetric.allocation.request import ALLOCATORS, AllocateRequest
from gpmetric.allocation.time_plan import FIRST_IN_USE, TimePlan
from gpmetric.errors import GpmetricError, InputError, TimeOverError
from gpmetric.evaluation.perplexity import perplexity
from gpmetric.files import write_json
from gpmetric.functions import as_function
from gpmetric.options import settings_of
from gpmetric.pruning.allocation import read_allocation
from gpmetric.results import AllocateResult
from gpmetric.session.caveats import few_tokens
from gpmetric.session.deadline import Deadline
from gpmetric.session.listeners import all_of
from gpmetric.session.memory import retried
from gpmetric.session.workers import meet
from gpmetric.tracking.recorder import Trackers

__all__ = ["TrackedAllocation", "allocate", "run_allocation", "write_pages"]


class TrackedAllocation(AllocateListener):
    """What trackers are told of each generation: loss and sparsity of the least, the middle and the most sparse."""

    def __init__(self, trackers: Trackers) -> None:
        self._trackers = trackers

    def generation(self, number: int, population: Sequence[Measured], batches: int, spent: float) -> None:
        ends = sorted(population, key=lambda one: one.sparsity)
        figures = {"share_of_budget": spent}
        for name, one in (("least", ends[0]), ("middle", ends[len(ends) // 2]), ("most", ends[-1])):
            figures |= {f"loss/{name}_sparse": one.value(batches), f"sparsity/{name}_sparse": one.sparsity}
        self._trackers.log(number, figures)


def run_allocation(
    request: AllocateRequest, listener: AllocateListener | None = None, started: float | None = None
) -> dict[str, Any]:
    """Searches the sparsity of each layer, and writes the allocation that is asked for.

    Where no allocation meets `sparsity` or `max_loss_ratio`, `picked` and `allocation` are None and `error` says why.
    `started` is the time.monotonic() at which `minutes` began, now by default.

    Returns:
        The JSON document of `gpmetric allocate`; its `allocation` is what an allocation file holds.

    Raises:
        InputError: for anything that cannot be used, before the search.
        GpmetricError: the metric gives no scores, no loss is finite, or a file cannot be written.
    """
    meet(request, (listener or AllocateListener()).progress)
    deadline = Deadline.starting(request.minutes, started)
    with Trackers(request.track, (request.ledger or request.output or Path("allocate")).stem) as trackers:
        told = all_of(AllocateListener, [listener or AllocateListener(), TrackedAllocation(trackers)])
        result = _searched(request, told, deadline, lambda: trackers.start(settings_of(request)))
        if result["allocation"] is not None:
            write_json(request.output, result["allocation"])
        picked = result["picked"] or {}
        trackers.finish({name: picked.get(name) for name in ("sparsity", "loss")})
    return result


def write_pages(result: Mapping[str, Any], request: AllocateRequest) -> None:
    """Writes the table and the page that are asked for; both can be made of the document again."""
    if request.csv is not None:
        write_csv(result, request.csv)
    if request.plot is not None:
        from gpmetric.allocation.plot import draw_front  # matplotlib takes half a second to import

        draw_front(result, request.plot)


allocate = as_function("allocate", AllocateRequest, run_allocation, "model", result=AllocateResult, write=write_pages)


def _searched(
    request: AllocateRequest, told: AllocateListener, deadline: Deadline, accepted: Callable[[], None]
) -> dict[str, Any]:
    """The document; `accepted` is called once nothing of the request can be refused any more."""
    profiles = [read_allocation(path, "--init") for path in request.init]
    times = [deadline.now()]
    calibrated = calibrate(request, deadline.watching(told.progress), told)
    times.append(deadline.now())
    _check_reach(request, calibrated)
    windows, table = calibrated.session.windows, calibrated.table
    scorer = Scorer(calibrated)
    survivors = request.population * len(windows["search"].tokens) / len(windows["validation"].tokens)
    plan = TimePlan(deadline, times[1] - times[0], deadline.now() - times[1], survivors)
    told.dense({windows["validation"].text.name: perplexity(scorer.dense)})
    if request.by_rule:
        accepted()
        return _warned(_described(request, calibrated, scorer) | _by_rule(calibrated, scorer), calibrated)
    uniform = _first_in_use(calibrated, scorer, plan)
    candidates = partial(CandidateObjective, calibrated.pruned, windows["search"].tokens, request.objective)
    local = retried(calibrated.session.model, candidates)
    identity = calibrated.identity(request) | {"init": [profile.digest for profile in profiles]}
    generations: list[tuple[float, int]] = []  # hypervolume, windows

    def on_generation(number: int, population: Sequence[Measured], batches: int, spent: float) -> None:
        generations.append((hypervolume(population, batches), sum(local.windows[:batches])))
        problem.searched(spent)
        told.generation(number, population, batches, spent)

    with (
        SharedObjective(calibrated, local, deadline) if request.shared_out else nullcontext(local) as objective,
        EvaluationLog(
            table,
            objective,
            request.ledger,
            identity,
            focus=request.sparsity,
            resume=request.resume,
            progress=told.progress,
        ) as log,
    ):
        searching = replace(request, minutes=log.planned(request.minutes, plan.search_minutes()))
        problem = Problem(table, calibrated.blocks, calibrated.evidence, log, told.progress, request.solves)
        accepted()
        problem.searched(0)
        found = list(dict.fromkeys(search(searching, problem, profiles, on_generation)))
        problem.searched(1)
        cost, steps = _cost(log), dict(local.seconds)
        result = _result(calibrated, problem, scorer, found, plan, uniform)
        after = {name: value - cost[name] for name, value in _cost(log).items()}
    progress = {
        "hypervolume": [area for area, _ in generations],
        "reference": {"objective": REFERENCE, "sparsity": 0.0},
        "rounds": _rounds(generations),
    }
    paid = cost | {"seconds_by_step": steps, "after_search": after}
    document = _described(request, calibrated, scorer) | paid | progress | result | {"cut": plan.cut}
    return _warned(document, calibrated)


def _by_rule(calibrated: CalibratedModel, scorer: Scorer) -> dict[str, Any]:
    """What a run has that searches nothing, under the names of one that does."""
    allocation, point, baselines = by_rule(calibrated, scorer)
    cost: dict[str, Any] = {"evaluations": 0, "tokens": 0, "seconds": 0.0}
    return cost | {
        "seconds_by_step": {},
        "after_search": dict(cost),
        "hypervolume": [],
        "reference": {"objective": REFERENCE, "sparsity": 0.0},
        "rounds": [],
        "front": [point],
        "knee": None,
        "picked": point,
        "error": None,
        "baselines": baselines,
        "allocation": allocation.document(),
        "cut": [],
    }


def _warned(result: dict[str, Any], calibrated: CalibratedModel) -> dict[str, Any]:
    """The document with what must be known of it: also the rules that beat what was picked."""
    picked, warnings = result["picked"], few_tokens(calibrated.session)
    if picked is not None:
        near = {
            name: min(points, key=lambda point: abs(point["sparsity"] - picked["sparsity"]))
            for name, points in result["baselines"].items()
        }
        better = [name for name, point in near.items() if point["excess"] < picked["excess"]]
        if better:
            told = f"{', '.join(better)} beat what was picked on validation"
            warnings.append(f"{told}: search longer (--evaluations), or use --allocator")
    return result | {"warnings": warnings}


def _cost(log: EvaluationLog) -> dict[str, Any]:
    return {"evaluations": log.evaluations, "tokens": log.tokens, "seconds": log.seconds}


def _result(
    calibrated: CalibratedModel,
    problem: Problem,
    scorer: Scorer,
    found: Sequence[Levels],
    plan: TimePlan,
    uniform: Mapping[str, float],
) -> dict[str, Any]:
    """What was found, on validation text and beside every rule at the same budgets, and what is picked of it."""
    request = calibrated.request
    if not found:
        span = f"--lowest {request.lowest:g} and --highest {request.highest:g}"
        raise GpmetricError(f"no allocation that was measured has a sparsity between {span}")
    shown = plan.fitting(found)
    points = _told(problem, "front", scorer.points(shown), len(shown))
    front = held_out_front(zip(points, shown, strict=True))
    if not front:
        raise GpmetricError("no allocation of the front has a finite loss on validation (--highest)")
    rule = ALLOCATORS[request.allocator].rule
    allocation, picked, error = None, None, None
    try:
        allocation, picked = pick(
            request, problem, scorer, lambda sparsity: [rule(problem, sparsity)] if rule else found, front
        )
    except GpmetricError as failure:  # the front is not lost with it
        error = str(failure)
    baselines = _baselines(request, problem, scorer, plan)
    if allocation is not None and picked is not None and request.changes:
        try:
            if not plan.affords(plan.use):
                raise TimeOverError("no time was left")
            allocation, picked = settled(calibrated, problem, scorer, (allocation, picked), baselines, uniform, plan)
        except TimeOverError as over:
            plan.cut.append(f"what was picked, in use: {over}")
    return {
        "front": [point for point, _ in front],
        "knee": knee([point for point, _ in front]),
        "picked": picked,
        "error": error,
        "baselines": baselines,
        "allocation": None if allocation is None else allocation.document(),
    }


def _first_in_use(calibrated: CalibratedModel, scorer: Scorer, plan: TimePlan) -> dict[str, float]:
    """The loss of the uniform allocation in use, by its name: under a limit of time, before the search.

    How long it takes says what the others will. Where it takes too long, nothing is measured in use.
    """
    request, deadline = calibrated.request, plan.deadline
    if not request.changes or deadline.minutes is None:
        return {}
    began = deadline.now()
    watching = deadline.until(began + FIRST_IN_USE * deadline.seconds).watching(calibrated.progress)
    ground = Ground(calibrated.table, calibrated.blocks, calibrated.evidence)
    sparsity = (request.lowest + request.highest) / 2 if request.sparsity is None else request.sparsity
    try:
        found = uniform_in_use(replace(calibrated, progress=watching), ground, sparsity)
    except TimeOverError:
        plan.use = math.inf
        return {}
    plan.use = deadline.now() - began
    plan.uses = uses_of(request, ground) - len(found)
    return found if request.sparsity is not None else {}


def _baselines(request: AllocateRequest, problem: Problem, scorer: Scorer, plan: TimePlan) -> dict[str, list[Point]]:
    """Every rule at sparsities over the range of the front; one that there is no time for is left out."""
    sparsities = diagonal(request, request.sparsity)
    found: dict[str, list[Point]] = {}
    longest = len(sparsities) * plan.validation
    for name, row in problem.rules.items():
        assert row.rule is not None
        extra = problem.tokens_of(row, len(sparsities)) * problem.log.seconds / max(1, problem.log.tokens)
        if not plan.affords_beside_use(longest + extra):
            plan.cut.append(f"baselines on validation: without {name}")
            continue
        started = plan.deadline.now()
        levels = [row.rule(problem, sparsity) for sparsity in sparsities]
        found[name] = _told(problem, name, scorer.points(levels), len(levels))
        longest = max(longest, plan.deadline.now() - started) if row.measures == "nothing" else longest
    return found


def _told(problem: Problem, what: str, points: Iterable[Point], count: int) -> list[Point]:
    """The points, each told of when it is there."""
    found = []
    problem.progress(f"{what} on validation", 0, count)
    for done, point in enumerate(points, start=1):
        found.append(point)
        problem.progress(f"{what} on validation", done, count)
    return found


def _check_reach(request: AllocateRequest, calibrated: CalibratedModel) -> None:
    """Refuses a sparsity that even the highest levels do not have."""
    highest = sum(int(removed[-1]) for removed in calibrated.table.removed)
    if request.sparsity is not None and uniform_budget(calibrated.table, request.sparsity) > highest:
        reach = highest / calibrated.table.entries
        raise InputError(f"--sparsity {request.sparsity:g} is out of reach: the highest levels have {reach:.4f}")


def _rounds(generations: Sequence[tuple[float, int]]) -> list[dict[str, int]]:
    """The first generation of each round, and the windows it is measured on."""
    found = []
    for number, (_, windows) in enumerate(generations):
        if number == 0 or windows != generations[number - 1][1]:
            found.append({"generation": number, "windows": windows})
    return found


def _described(request: AllocateRequest, calibrated: CalibratedModel, scorer: Scorer) -> dict[str, Any]:
    """What the figures depend on."""
    session, table = calibrated.session, calibrated.table
    names = ("metric", "genes", "allocator", "objective", "sparsity", "max_loss_ratio")
    used = {"update": request.update, "fit": request.fit} if request.changes else {}
    described = session.describe() | {name: getattr(request, name) for name in names} | used
    return (
        described
        | {
            "digest": session.model.digest,
            "formula": str(calibrated.metric.expression),
            "granularity": table.granularity,
            **{name: windows.describe() for name, windows in session.windows.items()},
            "layers": len(table.layers),
            "prunable": table.entries,
            "total": scorer.total,
            "dense": {"loss": scorer.dense, "perplexity": perplexity(scorer.dense)},
        }
        | session.experts()
    )
