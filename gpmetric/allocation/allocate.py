"""`gpmetric allocate`: which layers give how much, as a front between sparsity and loss and one allocation of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gpmetric.allocation.allocators import RULES, Problem, arithmetic, evopress, uniform
from gpmetric.allocation.archive import Archive, Budget, Candidate
from gpmetric.allocation.exact import uniform_budget
from gpmetric.allocation.levels import Levels
from gpmetric.allocation.meter import Meter
from gpmetric.allocation.nsga2 import REFERENCE, Settings, evolve, hypervolume
from gpmetric.allocation.points import Point, Scorer, held_out_front, knee, pick
from gpmetric.allocation.prepare import Prepared, prepare
from gpmetric.allocation.request import Request, check_request
from gpmetric.allocation.transfer import transferred
from gpmetric.errors import GpmetricError, InputError
from gpmetric.evaluation.perplexity import perplexity
from gpmetric.provenance import versions
from gpmetric.pruning.allocation import Allocation, read_allocation

__all__ = ["AllocateListener", "allocate", "run_allocation", "search"]

_EVALUATIONS = 800  # of a search without a budget
_DIAGONAL = 5  # sparsities at which the rules stand in the first population, and as baselines beside the front


class AllocateListener:
    """What an allocation tells while it runs; every method may be overridden."""

    def progress(self, what: str, done: int, total: int) -> None:
        """A step has come so far."""

    def dense(self, ppl: Mapping[str, float]) -> None:
        """The dense model's perplexity on validation, before anything is pruned."""

    def generation(self, number: int, population: Sequence[Candidate], batches: int, spent: float) -> None:
        """A generation is finished: its population, measured on so many batches, and the share of the budget spent."""


def allocate(model: str | None = None, **options: Any) -> dict[str, Any]:
    """Searches the sparsity of each layer: `gpmetric.allocate("DIR", calibration="c.txt", sparsity=0.7)`.

    Args:
        model: a directory or Hub name; None is the demo model.
        options: the fields of `gpmetric.allocation.request.Request`, as on the command line.

    Returns:
        The JSON document of `gpmetric allocate`; its `allocation` is what an allocation file holds.

    Raises:
        InputError, GpmetricError: as `run_allocation`.
    """
    for name, several in (("init", options.get("init")), ("patterns", options.get("patterns"))):
        if several is not None:
            options[name] = (several,) if isinstance(several, str) else tuple(several)
    if options.get("archive") is not None:
        options["archive"] = Path(options["archive"])
    return run_allocation(Request(model=model, **options))


def run_allocation(request: Request, listener: AllocateListener | None = None) -> dict[str, Any]:
    """Runs what is asked for to its end and returns the JSON document of `gpmetric allocate`.

    Where no allocation meets `sparsity` or `max_loss_ratio`, `picked` and `allocation` are None and `error` says why.

    Raises:
        InputError: for anything that cannot be used, before the search.
        GpmetricError: the metric gives no scores, or no loss is finite.
    """
    check_request(request)
    told = listener or AllocateListener()
    profiles = [read_allocation(path, "--init") for path in request.init]
    prepared = prepare(request, told.progress)
    _check_reach(request, prepared)
    scorer = Scorer(prepared)
    told.dense({prepared.splits["validation"].text.name: perplexity(scorer.dense)})
    meter = Meter(prepared.pruned, prepared.splits["search"].tokens, request.objective)
    identity = prepared.identity(request) | {"init": [profile.digest for profile in profiles]}
    generations: list[tuple[float, int]] = []  # hypervolume, windows

    def on_generation(number: int, population: Sequence[Candidate], batches: int, spent: float) -> None:
        generations.append((hypervolume(population, batches), sum(meter.windows[:batches])))
        told.generation(number, population, batches, spent)

    with Archive(
        prepared.ladder, meter, request.archive, identity, focus=request.sparsity, resume=request.resume
    ) as archive:
        budget = partial(uniform_budget, prepared.ladder)
        problem = Problem(archive, prepared.blocks, prepared.outliers, budget, told.progress)
        found = list(dict.fromkeys(search(request, problem, profiles, on_generation)))
        cost, steps = _cost(archive), dict(meter.seconds)
        result = _result(request, problem, scorer, found)
        after = {name: value - cost[name] for name, value in _cost(archive).items()}
    progress = {
        "hypervolume": [area for area, _ in generations],
        "reference": {"objective": REFERENCE, "sparsity": 0.0},
        "rounds": _rounds(generations),
    }
    paid = cost | {"seconds_by_step": steps, "after_search": after}
    return _described(request, prepared, scorer) | paid | progress | result


def search(
    request: Request,
    problem: Problem,
    profiles: Sequence[Allocation] = (),
    on_generation: Callable[[int, Sequence[Candidate], int, float], None] = lambda *told: None,
) -> list[Levels]:
    """What an allocator finds within its budget: the candidates of a front, or one.

    Args:
        request: which allocator, its budget, seed and range of sparsities.
        problem: what it works with.
        profiles: allocations to begin with too.
        on_generation: as `evolve` calls it.
    """
    budget = Budget(request.evaluations, request.tokens, request.minutes)
    if budget == Budget():
        budget = Budget(evaluations=_EVALUATIONS)
    rng = random.Random(request.seed)
    if request.allocator == "evopress":
        assert request.sparsity is not None
        return [evopress(problem, request.sparsity, budget, rng)]
    sparsities = _diagonal(request, problem.archive.focus)
    if request.allocator != "nsga2":
        return [RULES[request.allocator](problem, sparsity) for sparsity in sparsities]
    focus = problem.archive.focus
    centre = (request.lowest + request.highest) / 2 if focus is None else focus
    ladder = problem.ladder
    dear = {"arithmetic"} if _affords_probes(problem, budget, sparsities) else {"arithmetic", "sensitivity"}
    first = [rule(problem, sparsity) for name, rule in RULES.items() if name not in dear for sparsity in sparsities]
    shapes = [ladder.profile(arithmetic(problem, centre))]  # its trials are dear: once
    shapes += [transferred(profile, ladder, len(problem.outliers)) for profile in profiles]
    for shape in map(np.array, shapes):
        shifts = [sparsity - np.average(shape, weights=ladder.sizes) for sparsity in sparsities]
        first += [problem.at_budget(shape + shift, one) for shift, one in zip(shifts, sparsities, strict=True)]
    settings = Settings(request.population, min(sparsities), max(sparsities), focus)
    return [one.levels for one in evolve(problem.archive, first, settings, budget, rng, on_generation)]


def _cost(archive: Archive) -> dict[str, Any]:
    return {"evaluations": archive.evaluations, "tokens": archive.tokens, "seconds": archive.seconds}


def _result(request: Request, problem: Problem, scorer: Scorer, found: Sequence[Levels]) -> dict[str, Any]:
    """What was found, on validation text and beside every rule at the same budgets, and what is picked of it.

    Raises:
        GpmetricError: no loss is finite.
    """
    sparsities = _diagonal(request, request.sparsity)
    if not found:
        span = f"--lowest {request.lowest:g} and --highest {request.highest:g}"
        raise GpmetricError(f"no allocation that was measured has a sparsity between {span}")
    front = held_out_front(zip(_scored(problem, scorer, "front", found), found, strict=True))
    if not front:
        raise GpmetricError("no allocation of the front has a finite loss on validation (--highest)")
    points = [point for point, _ in front]
    rule = RULES.get(request.allocator)
    allocation, picked, error = None, None, None
    try:
        allocation, picked = pick(
            request, problem, scorer, lambda sparsity: [rule(problem, sparsity)] if rule else found, front
        )
    except GpmetricError as failure:  # the front is not lost with it
        error = str(failure)
    return {
        "front": points,
        "knee": knee(points),
        "picked": picked,
        "error": error,
        "baselines": {
            name: _scored(problem, scorer, name, [rule(problem, sparsity) for sparsity in sparsities])
            for name, rule in RULES.items()
        },
        "allocation": None if allocation is None else allocation.document(),
        "versions": versions(),
    }


def _scored(problem: Problem, scorer: Scorer, what: str, found: Sequence[Levels]) -> list[Point]:
    points = []
    for done, levels in enumerate(found, start=1):
        points.append(scorer.point(levels))
        problem.progress(f"{what} on validation", done, len(found))
    return points


def _check_reach(request: Request, prepared: Prepared) -> None:
    """Refuses a sparsity that even the highest levels do not have."""
    highest = sum(int(table[-1]) for table in prepared.ladder.removed)
    if request.sparsity is not None and uniform_budget(prepared.ladder, request.sparsity) > highest:
        reach = highest / prepared.ladder.entries
        raise InputError(f"--sparsity {request.sparsity:g} is out of reach: the highest levels have {reach:.4f}")


def _affords_probes(problem: Problem, budget: Budget, sparsities: Sequence[float]) -> bool:
    """Whether the probes of every gene alone take at most half of the budget, minutes as uniform candidates take."""
    archive = problem.archive
    evaluations, tokens = problem.cost_of_probes()
    minutes = 0.0
    if budget.minutes is not None:
        for sparsity in sparsities:
            archive.measure(uniform(problem, sparsity), 1)
        minutes = archive.spent(Budget(minutes=1)) * tokens / archive.tokens
    limits = ((evaluations, budget.evaluations), (tokens, budget.tokens), (minutes, budget.minutes))
    return all(limit is None or 2 * cost <= limit for cost, limit in limits)


def _diagonal(request: Request, focus: float | None) -> list[float]:
    """Sparsities over the range of the front, one that is asked for among them."""
    spaced = np.linspace(request.lowest, request.highest, _DIAGONAL).round(4).tolist()
    return sorted({*spaced, *([] if focus is None else [focus])})


def _rounds(generations: Sequence[tuple[float, int]]) -> list[dict[str, int]]:
    """The first generation of each round, and the windows it is measured on."""
    found = []
    for number, (_, windows) in enumerate(generations):
        if number == 0 or windows != generations[number - 1][1]:
            found.append({"generation": number, "windows": windows})
    return found


def _described(request: Request, prepared: Prepared, scorer: Scorer) -> dict[str, Any]:
    """What the figures depend on."""
    model, ladder = prepared.model, prepared.ladder
    return {
        "model": model.name,
        "digest": model.digest,
        "dtype": model.dtype,
        "device": str(model.device),
        "metric": request.metric,
        "formula": str(prepared.metric.expression),
        "granularity": ladder.granularity,
        "genes": request.genes,
        "allocator": request.allocator,
        "objective": request.objective,
        "sparsity": request.sparsity,
        "max_loss_ratio": request.max_loss_ratio,
        "seed": request.seed,
        "shuffle": request.shuffle,
        **{name: windows.describe() for name, windows in prepared.splits.items()},
        "layers": len(ladder.layers),
        "prunable": ladder.entries,
        "total": scorer.total,
        "dense": {"loss": scorer.dense, "perplexity": perplexity(scorer.dense)},
    }
