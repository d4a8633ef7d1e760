"""`gpmetric slim`: channels, heads, layers or experts removed, by measured exchanges; a smaller model written."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpmetric.errors import GpmetricError, InputError
from gpmetric.evaluation.perplexity import perplexity
from gpmetric.executors import TaskClock
from gpmetric.functions import as_function
from gpmetric.options import settings_of
from gpmetric.pruning.output_folder import check_folder, check_room, replacing
from gpmetric.results import SlimResult
from gpmetric.session.caveats import above_start, few_tokens
from gpmetric.session.deadline import Deadline
from gpmetric.session.evaluate import text_loss
from gpmetric.session.listeners import all_of
from gpmetric.session.workers import meet, torch_threads
from gpmetric.structured.cost_budgets import find_pools, macs
from gpmetric.structured.draw_objective import DrawObjective
from gpmetric.structured.draws import Measurer
from gpmetric.structured.exchange import ExchangeSearch
from gpmetric.structured.expert_scores import unreached
from gpmetric.structured.export import Slimmed, stored_dtypes, written_bytes
from gpmetric.structured.listener import SlimListener, TrackedSlim
from gpmetric.structured.mixtures import experts_kept
from gpmetric.structured.open_units import draws_executor, make_repairer, open_units
from gpmetric.structured.policy import Policy
from gpmetric.structured.repair import DAMPINGS, Repairer
from gpmetric.structured.request import ESTIMATORS, FORMATS, SlimRequest
from gpmetric.structured.scores import UnitSession
from gpmetric.structured.search import PolicySearch, Schedule
from gpmetric.structured.search_log import SearchLog, State, kept_search
from gpmetric.structured.shrink import Repair, Shrinker
from gpmetric.structured.slim_checkpoint import describe_slim, write_slimmed
from gpmetric.structured.starts import Start, best_start, make_start, started_from
from gpmetric.structured.unit_space import Pool, UnitSpace, find_space, project, top_units
from gpmetric.tracking.recorder import Trackers

__all__ = [
    "SHARES", "SearchStart", "begin", "explore", "identify", "prepare", "run_slim", "search", "slim",
]  # fmt: skip

# Of what a search found. Excess on validation at 0.2, 800 steps, by share: gpt2-3m 0.025, 0.020, 0.018, 0.017, 0.016,
# llama-4m 0.057, 0.044, 0.043, 0.057, 0.072; on 48 windows of the search text the divergence has the same order.
SHARES = (0.125, 0.25, 0.5, 1.0)  # and nothing of it
_JUDGED = 64  # steps' windows that they are judged on
_COMPARED = 16  # steps' windows that starts are compared on
_MINUTES = 6.0  # of a search without a budget
_SCORES, _WRITING = "scores of units", "writing, and reading in a fresh process"  # as progress calls them
_CAUTION = 1.3  # times what was measured before, on a machine that is busy


@dataclass(frozen=True)
class SearchStart:
    """What a search begins with: what there are probabilities for, their budgets, and the first ones [entries]."""

    units: UnitSession
    shrinker: Shrinker
    repairer: Repairer
    space: UnitSpace
    pools: Sequence[Pool]
    start: Tensor
    worth: Tensor  # of each atom, [atoms], standardised
    name: str = ""  # of the rule that it begins from
    compared: Mapping[str, float] = field(default_factory=dict)  # objective of each start that was measured

    def slimmed(self, kept: Tensor) -> Slimmed:
        """Units [units], bool, that stay, with their repairs, rounded as they will be stored."""
        dtype = stored_dtypes(self.units.model)[1]

        def rounded(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(dtype).to(value.dtype)

        found = self.repairer.repairs(kept)
        repairs = {index: Repair(rounded(one.weight), rounded(one.bias)) for index, one in found.items()}
        return Slimmed(self.units.groups, kept, repairs)

    def chosen(self, probabilities: Tensor) -> Slimmed:
        """What stays by probabilities [entries]."""
        return self.slimmed(top_units(self.space.stays(probabilities), self.space, self.pools))

    def moved(self, found: Tensor, share: float) -> Slimmed:
        """What stays a share of the way from the start to other probabilities [entries]."""
        return self.chosen(project(self.start + share * (found - self.start), self.space, self.pools))

    @property
    def atoms(self) -> Tensor:
        """Atoms [atoms], bool, that stay at the start."""
        kept, free = self.chosen(self.start).kept, self.space.atom >= 0
        found = torch.zeros(len(self.space.cost), dtype=torch.bool)
        found[self.space.atom[free]] = kept[free]
        return found

    def ended(self, state: State) -> Slimmed:
        """What a search of exchanges ended with."""
        return self.slimmed(self.space.kept(state.probabilities))

    def best(self, found: Tensor, objective: DrawObjective) -> tuple[Slimmed, float, int]:
        """What a search delivers, the share of the way from its start to what it found, and the tokens that it took.

        What is found is signal and noise, in parts that depend on the model and the length of the search; on the way,
        there is less of both. So the objective of some shares is compared on the same windows of the search text.
        """
        figures, tokens = [], 0
        for share in (0.0, *SHARES):
            slimmed = self.moved(found, share)
            total, read = self.judged(slimmed, objective, _JUDGED)
            tokens += read
            figures.append((total, share, slimmed))
        _, share, slimmed = min(figures, key=lambda figure: figure[:2])
        return slimmed, share, tokens

    def judged(self, slimmed: Slimmed, objective: DrawObjective, steps: int) -> tuple[float, int]:
        """Mean objective of a model on the windows of so many steps, if there are as many, and the tokens it took."""
        total, tokens, steps = 0.0, 0, min(steps, len(objective))
        for step in range(steps):
            objective.turn(step)
            with self.shrinker.keeping(slimmed.kept, slimmed.repairs):
                total += objective()
            tokens += objective.tokens(step)
        return total / steps, tokens


def run_slim(
    request: SlimRequest, listener: SlimListener | None = None, started: float | None = None
) -> dict[str, Any]:
    """Searches, writes what stays, and reads it in a fresh process.

    Args:
        request: what to remove.
        listener: told of the search.
        started: time.monotonic() at which `minutes` began; now by default.

    Returns:
        The JSON document of `gpmetric slim`: the manifest without its lists of files and tensors, and what it took.

    Raises:
        InputError: for anything that cannot be used, before the search.
        GpmetricError: no drawn model has a finite loss, or what was written is not what was found; `output` is then as
            it was.
    """
    assert request.output is not None
    meet(request, (listener or SlimListener()).progress)
    deadline = Deadline.starting(request.minutes, started)
    with torch_threads(), Trackers(request.track, request.output.name) as trackers:  # workers' models take their own
        told = all_of(SlimListener, [listener or SlimListener(), TrackedSlim(trackers)])
        result = _run(request, told, deadline, lambda: trackers.start(settings_of(request)))
        trackers.finish({name: result[name] for name in ("parameters_before", "initial", "found", "perplexity")})
    return result


def _run(request: SlimRequest, told: SlimListener, deadline: Deadline, accepted: Callable[[], None]) -> dict[str, Any]:
    """The document; `accepted` is called once nothing of the request can be refused any more."""
    output = request.output
    assert output is not None
    ledger = request.ledger and request.ledger.absolute().parent
    named = (request.model, request.calibration, request.search, request.validation, ledger)
    check_folder(output, request.force, [Path(str(name)) for name in named if name is not None])
    units = open_units(request, told)
    opened = deadline.elapsed
    model, validation = units.model, units.session.windows["validation"]
    check_room(output, written_bytes(model, request.form, request.sparsity * units.groups.parameters))
    identity = identify(request, units)
    before = sum(parameter.numel() for parameter in model.module.parameters())
    with kept_search(request.ledger, output) as path:
        # another search's ledger, or one in use, is refused before anything is computed
        with SearchLog(path, identity, resume=request.resume) as log:
            begun = prepare(request, units)
            accepted()
            measuring = deadline.now()
            dense = text_loss(model, validation.tokens, told.progress)
            window = (deadline.now() - measuring) / len(validation.tokens)
            if not math.isfinite(dense):
                raise GpmetricError(f"the dense model's loss on validation is not finite in {model.dtype} (--dtype)")
            told.dense({validation.text.name: perplexity(dense)})
            timed = replace(request, minutes=_search_minutes(request, units, deadline, opened, window))
            best, cost = search(timed, begun, log, told)
        start = begun.chosen(begun.start)
        initial = _held_out(begun, start, told)
        found = _held_out(begun, best, told) if cost["share"] else initial
        if not found < initial:  # on other text than it was chosen by
            best, cost = start, cost | {"share": 0.0}
        shrinker, name, compared, damping = begun.shrinker, begun.name, begun.compared, begun.repairer.damping
        del begun, start  # the moments of features, before the model is compared in float32 with what is written
        units.__dict__.pop("features", None)
        made = describe_slim(request, units) | {"dense": perplexity(dense)}
        made |= {"sparsity": units.groups.removed(best.kept) / units.groups.parameters}
        told.progress(_WRITING, 0, 1)
        with replacing(output, request.force) as folder:
            manifest = write_slimmed(model, shrinker, best, request.form, folder, validation, made)
        told.progress(_WRITING, 1, 1)
    figures = {"initial": perplexity(initial), "found": perplexity(found), "written": manifest["perplexity"]}
    warnings = unreached(units) if request.experts else few_tokens(units.session)
    warnings += above_start(bool(cost["share"]) or request.steps == 0, **figures)
    return {key: value for key, value in manifest.items() if key not in ("files", "tensors")} | {
        "output": str(output),
        "parameters_before": before,
        "initial": perplexity(initial),
        "found": perplexity(found),
        "begun": name,
        "starts": dict(compared),
        "damping": damping if request.mended == "least-squares" else None,
        **cost,
        "warnings": warnings,
        "progress": log.reports,
    }


def _held_out(begun: SearchStart, slimmed: Slimmed, told: SlimListener) -> float:
    """Mean loss of a model on the validation text."""
    session = begun.units.session
    with begun.shrinker.keeping(slimmed.kept, slimmed.repairs):
        return text_loss(session.model, session.windows["validation"].tokens, told.progress)


slim = as_function("slim", SlimRequest, run_slim, "model", result=SlimResult)


def prepare(request: SlimRequest, units: UnitSession) -> SearchStart:
    """Budgets, and the probabilities to begin with, of the start and damping that are best on the search text.

    Raises:
        InputError: start cannot be used, or the sparsity is out of reach.
    """
    begun = begin(request, units)
    names = started_from(request)
    starts = []
    for done, name in enumerate(names):
        units.session.told.progress(_SCORES, done, len(names))
        starts.append(make_start(name, units, begun.space, begun.pools, request.estimator))
    units.session.told.progress(_SCORES, len(names), len(names))
    return _compared(request, begun, starts)


def begin(request: SlimRequest, units: UnitSession, repairer: Repairer | None = None) -> SearchStart:
    """Budgets, and the probabilities to begin with, of the first start that the request names.

    Args:
        request: what to remove.
        units: of a dense model.
        repairer: of the repair that is asked for, where there is one already.

    Raises:
        InputError: start cannot be used, or the sparsity is out of reach.
    """
    model, groups = units.model, units.groups
    cost = groups.cost if request.cost == "parameters" else macs(groups, units.session.tokens.shape[1])
    space = find_space(groups, request.kinds, layers=request.layers, blocks=request.blocks, cost=cost)
    pools = find_pools(request, groups, space, cost, model.module.config)
    name = started_from(request)[0]
    start = make_start(name, units, space, pools, request.estimator)
    kept = top_units(space.stays(start.probabilities), space, pools)
    removed = float(cost[~kept].sum() / cost.sum())
    if removed < request.sparsity / 2 and not groups.mixtures:
        raise InputError(
            f"--sparsity {request.sparsity:g} cannot be met by --granularity {','.join(request.granularity)} in "
            f"--format {request.form}: the nearest below it removes {removed:.4f}"
        )
    repairer = repairer or make_repairer(request, units)
    shrinker, probabilities = Shrinker(model, groups), start.probabilities
    return SearchStart(units, shrinker, repairer, space, pools, probabilities, start.worth, name)


def _compared(request: SlimRequest, begun: SearchStart, starts: Sequence[Start]) -> SearchStart:
    """The best start, then the best damping of a fit from there, by the objective on the same few search windows."""
    units = begun.units
    windows = units.session.windows["search"].tokens
    objective = DrawObjective(units.model, windows, request.objective, request.batch, request.seed)
    solves = request.mended == "least-squares"
    if solves:  # in the middle, to compare starts by
        begun = replace(begun, repairer=begun.repairer.damped(DAMPINGS[-2]))
    compared, in_all = itertools.count(), len(starts) * (len(starts) > 1) + len(DAMPINGS) * solves

    def measure(one: SearchStart, probabilities: Tensor) -> float:
        units.session.told.progress("starts", next(compared), in_all)
        return one.judged(one.chosen(probabilities), objective, _COMPARED)[0]

    best = best_start(starts, partial(measure, begun))
    begun = replace(begun, start=best.probabilities, worth=best.worth, name=best.name, compared=best.compared)
    if solves:
        damped = [replace(begun, repairer=begun.repairer.damped(damping)) for damping in DAMPINGS]
        begun = min(damped, key=lambda one: measure(one, one.start))
    units.session.told.progress("starts", in_all, in_all)
    return begun


def search(
    request: SlimRequest, begun: SearchStart, log: SearchLog, listener: SlimListener | None = None
) -> tuple[Slimmed, dict[str, Any]]:
    """What a search delivers, the share of the way from its start, and the steps, tokens and seconds that it took."""
    state, objective = explore(request, begun, log, listener)
    if ESTIMATORS[request.estimator].rate is None:
        best, share = begun.ended(state), float(not torch.equal(state.probabilities, begun.atoms.double()))
        return best, {"share": share, "steps": state.step, "tokens": state.tokens, "seconds": state.seconds}
    started = time.monotonic()
    best, share, tokens = begun.best(state.probabilities, objective)
    seconds = state.seconds + time.monotonic() - started
    return best, {"share": share, "steps": state.step, "tokens": state.tokens + tokens, "seconds": seconds}


def explore(
    request: SlimRequest, begun: SearchStart, log: SearchLog, listener: SlimListener | None = None
) -> tuple[State, DrawObjective]:
    """Where a search ends, and the objective that its draws were compared by.

    Raises:
        GpmetricError: no drawn model has a finite loss.
    """
    minutes = _MINUTES if request.steps is None and request.minutes is None else request.minutes
    rate = request.rate or ESTIMATORS[request.estimator].rate
    schedule = Schedule(request.steps, minutes, request.draws, rate or 0.0, request.seed)
    told = listener or SlimListener()
    windows = begun.units.session.windows["search"].tokens
    objective = DrawObjective(begun.units.model, windows, request.objective, request.batch, request.seed)
    measurer = Measurer(begun.shrinker, begun.repairer, objective)
    with draws_executor(request, begun.units, begun.repairer.damping, measurer) as executor:
        if request.shared_out and minutes is not None:  # of a worker that does not answer nobody hears before
            left = 60 * minutes - (0.0 if log.state is None else log.state.seconds)
            executor.clock = TaskClock(end=time.monotonic() + left)
        parts = (begun.shrinker, begun.repairer, objective, schedule, log, executor)
        if rate is None:
            exchange = partial(ExchangeSearch, begun.units.groups, begun.space, begun.pools, begun.worth, begun.atoms)
            return exchange(*parts).run(told.report, told.progress), objective
        policy = Policy(begun.space, begun.pools, begun.start, request.estimator)
        return PolicySearch(policy, *parts).run(told.report, told.progress), objective


def _search_minutes(
    request: SlimRequest, units: UnitSession, deadline: Deadline, opened: float, window: float
) -> float | None:
    """Minutes of the search: what comes after it has its time, but not more than half of all.

    Args:
        opened: seconds to open the model, as a fresh process does that reads what is written.
        window: seconds that the dense model takes for one.
    """
    if request.minutes is None:
        return None
    judged = min(_JUDGED * request.batch, len(units.session.windows["search"].tokens))
    judged *= (1 + len(SHARES)) * (ESTIMATORS[request.estimator].rate is not None)
    after = _CAUTION * (opened + window * (judged + 5 * len(units.session.windows["validation"].tokens)))
    left = deadline.left
    return max(left - after, min(deadline.seconds, left) / 2) / 60


def identify(request: SlimRequest, units: UnitSession) -> dict[str, Any]:
    """All that a search depends on but its length."""
    names = ("sparsity", "budget", "cost", "estimator", "objective", "start", "repair", "add_bias", "draws", "batch")
    found = {name: getattr(request, name) for name in (*names, "rate", "seed")}
    if request.multiple_of > 1:  # so that searches from before it was an option go on
        found["multiple_of"] = request.multiple_of
    if mixtures := units.groups.mixtures:
        kept = experts_kept(mixtures, request.sparsity)
        found["experts"] = [{"block": one.block, "of": one.units, "kept": kept * one.groups} for one in mixtures]
    return found | {
        "granularity": sorted(request.granularity),
        "equal": FORMATS[request.form].equal,
        "model": units.model.digest,
        "dtype": units.model.dtype,
        "device": units.model.device.type,
        "calibration": units.session.windows["calibration"].tokens_digest,
        "search": units.session.windows["search"].tokens_digest,
    }
