"""The last few allocations as they will be used: pruned block after block, with the update and the fit asked for.

What a search compares is solved layer by layer on the dense model's statistics. In use, a layer is solved on what the
pruned blocks before it put out and may make up for their errors, so that the search's best need not be the best there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from gpmetric.allocation.allocators import Ground, Problem
from gpmetric.allocation.exact_budget import exact_allocation
from gpmetric.allocation.pareto_pick import Point, Scorer
from gpmetric.allocation.prepare import CalibratedModel, levels_of
from gpmetric.allocation.request import ALLOCATORS, AllocateRequest
from gpmetric.allocation.time_plan import TimePlan
from gpmetric.errors import TimeOverError
from gpmetric.evaluation.perplexity import perplexity
from gpmetric.pruning.allocation import Allocation
from gpmetric.pruning.protocol import Protocol, Rule
from gpmetric.session.memory import retried
from gpmetric.targets import Target

__all__ = ["WAYS", "by_rule", "figures_in_use", "settled", "uniform_in_use", "uses_of"]

# Of the way from uniform to what a search found, besides all of it: few windows and the database overstate how genes
# differ. Excess in use on 48 windows of ptb-valid, alps with fit dense at 0.6, llama-05m, at 0, 0.5, 0.75 and 1: 0.346,
# 0.258, 0.247 and 0.266.
WAYS = (0.75, 0.5)


def settled(
    calibrated: CalibratedModel,
    problem: Problem,
    scorer: Scorer,
    picked: tuple[Allocation, Point],
    baselines: Mapping[str, Sequence[Point]],
    known: Mapping[str, float],
    plan: TimePlan,
) -> tuple[Allocation, Point]:
    """What is written, and its point: the best in use.

    Of what was picked, what lies on the way from uniform to it, the rules that measure no candidate, and the best of
    the others beside the front; but a rule that was asked for by name stays. The point has the figures of all as
    `in_use`, and `written` says whose it is. Those that there is no time for are left out, and `plan` says which.

    Args:
        picked: an allocation, and its point.
        baselines: points of rules by name, on validation.
        known: losses of allocations that were measured in use before.
        plan: of the time.

    Raises:
        TimeOverError: not even what was picked was measured.
    """
    request, (allocation, point) = calibrated.request, picked
    sparsity = point["sparsity"] if request.sparsity is None else request.sparsity
    asked = ALLOCATORS[request.allocator].rule is not None
    plans = {request.allocator: allocation}  # first what nothing stands for where time is over
    if not asked and problem.table.nested:
        plans |= {f"{way:g} of it": _part(calibrated, problem, allocation, way, sparsity) for way in WAYS}
    always = [name for name, row in problem.rules.items() if row.measures == "nothing"]
    names = list(dict.fromkeys([*[request.allocator] * asked, *always]))
    others = {name: points for name, points in baselines.items() if name not in (*names, request.allocator)}
    if others:
        names.append(min(others, key=lambda name: _near(others[name], sparsity)["loss"]))
    plans |= {name: _of_rule(calibrated, problem, name, sparsity) for name in names}
    figures = figures_in_use(calibrated, plans, scorer.dense, known, plan)
    if request.allocator not in figures:
        raise TimeOverError("no time was left")
    if missing := [name for name in plans if name not in figures]:
        plan.cut.append(f"allocations in use: {len(figures)} of {len(plans)}, without {', '.join(missing)}")
    written = request.allocator if asked else min(figures, key=lambda name: float(figures[name]["loss"]))
    if plans[written] is not allocation:
        allocation = plans[written]
        profile = [allocation.targets[problem.table.layers[members[0]]].sparsity for members in problem.table.genes]
        point = scorer.point_of(allocation, problem.table.nearest(profile))
    return replace(allocation, made_for=_made_for(calibrated)), point | {"in_use": figures, "written": written}


def by_rule(calibrated: CalibratedModel, scorer: Scorer) -> tuple[Allocation, Point, dict[str, list[Point]]]:
    """(allocation, its point, baselines): a rule's that measures no candidate, and uniform beside it, both in use.

    Their points have the figures of the model as it will be; nothing else is pruned.
    """
    request, ground = calibrated.request, Ground(calibrated.table, calibrated.blocks, calibrated.evidence)
    assert request.sparsity is not None
    names = dict.fromkeys([request.allocator, "uniform"])
    plans = {name: _of_rule(calibrated, ground, name, request.sparsity) for name in names}
    figures = figures_in_use(calibrated, plans, scorer.dense)
    points = {name: scorer.told(plan, figures[name]["loss"]) for name, plan in plans.items()}
    point = points[request.allocator] | {"in_use": figures, "written": request.allocator}
    allocation = replace(plans[request.allocator], made_for=_made_for(calibrated))
    return allocation, point, {name: [one] for name, one in points.items()}


def _made_for(calibrated: CalibratedModel) -> dict[str, str]:
    request, metric = calibrated.request, calibrated.metric
    return {"formula": str(metric.expression), "update": metric.update or request.update, "fit": request.fit}


def figures_in_use(
    calibrated: CalibratedModel,
    plans: Mapping[str, Allocation],
    dense: float,
    known: Mapping[str, float] = {},
    plan: TimePlan | None = None,
) -> dict[str, dict[str, Any]]:
    """By name, loss, perplexity and excess over the dense loss of each allocation on validation, pruned in use.

    Args:
        plans: by name, the most important first.
        dense: loss of the dense model.
        known: losses that need not be measured.
        plan: of the time, by which the last are left out.
    """
    found = {name: loss for name, loss in known.items() if name in plans}
    found |= _measured_in_use(calibrated, {name: one for name, one in plans.items() if name not in found}, plan)
    return {
        name: {"loss": found[name], "perplexity": perplexity(found[name]), "excess": found[name] - dense}
        for name in plans
        if name in found
    }


def uniform_in_use(calibrated: CalibratedModel, ground: Ground, sparsity: float) -> dict[str, float]:
    """The loss on validation of the uniform allocation, pruned in use, by its name."""
    return _measured_in_use(calibrated, {"uniform": _of_rule(calibrated, ground, "uniform", sparsity)}, None)


def uses_of(request: AllocateRequest, ground: Ground) -> int:
    """How many allocations `settled` measures in use, at most."""
    found = ALLOCATORS[request.allocator].rule is None and ground.table.nested
    names = {name for name, row in ground.rules.items() if row.measures == "nothing"}
    return len(names | {request.allocator}) + len(WAYS) * found + 1


def _measured_in_use(
    calibrated: CalibratedModel, plans: Mapping[str, Allocation], plan: TimePlan | None
) -> dict[str, float]:
    """Losses by name; of the last ones none, where time is over."""
    session, request, metric = calibrated.session, calibrated.request, calibrated.metric
    calibrated.pruned.dense()
    protocol = Protocol(session, one_shot=False, progress=calibrated.progress, passed=calibrated.progress)
    protocol.prepare([metric], request.update)
    rules = [Rule(metric, plan, request.update, request.fit) for plan in plans.values()]
    tokens, together = [session.windows["validation"].tokens], session.plan.together
    losses: list[float] = []
    calibrated.progress("in use, on validation", 0, len(rules))
    try:
        while len(losses) < len(rules):
            count = together if plan is None else min(together, plan.affordable_uses)
            if not count:
                break
            measure = partial(protocol.measure, rules[len(losses) :][:count], tokens)
            losses += [one.losses[0] for one in retried(session.model, measure, session.forget_calls)]
            calibrated.progress("in use, on validation", len(losses), len(rules))
    except TimeOverError:
        if not losses:
            raise
    finally:
        session.forget()
    return dict(zip(plans, losses, strict=False))


def _near(points: Sequence[Point], sparsity: float) -> Point:
    return min(points, key=lambda point: abs(point["sparsity"] - sparsity))


def _finest(calibrated: CalibratedModel, ground: Ground) -> Ground:
    """With the finest levels, which nothing was solved at."""
    table = levels_of(calibrated.session.model, calibrated.request, calibrated.metric, finest=True)
    return replace(ground, table=table)


def _part(
    calibrated: CalibratedModel, problem: Problem, allocation: Allocation, way: float, sparsity: float
) -> Allocation:
    """So much of the way from uniform to an allocation, at the same budget."""
    ground = _finest(calibrated, problem)
    table = ground.table
    shares = [allocation.targets[table.layers[members[0]]].sparsity for members in table.genes]
    levels = ground.at_budget([sparsity + way * (share - sparsity) for share in shares], sparsity)
    return exact_allocation(table, levels, ground.budget(sparsity))


def _of_rule(calibrated: CalibratedModel, ground: Ground, name: str, sparsity: float) -> Allocation:
    """A rule's allocation, to the weight: by the finest levels, if it measures none."""
    row = ALLOCATORS[name]
    assert row.rule is not None
    if name == "uniform" and ground.table.nested:
        target = Target(str(sparsity), ground.table.granularity, sparsity)
        return Allocation(target.granularity or "row", dict.fromkeys(ground.table.layers, target))
    if row.measures == "nothing":
        ground = _finest(calibrated, ground)
    return exact_allocation(ground.table, ground.levels_of(name, row, sparsity), ground.budget(sparsity))
