"""A campaign from a model and texts to a winner: `gpmetric discover`.

Three disjoint texts serve calibration, search and the choice of the winner; a fourth is read once, at the end, for the
winner and every baseline.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from typing import Any

from gpmetric.errors import GpmetricError, LedgerError
from gpmetric.evolution.baselines import baselines_among
from gpmetric.evolution.campaign import Campaign
from gpmetric.evolution.document import alone, circumstances, describe_individual, time_split
from gpmetric.evolution.fork import population_of
from gpmetric.evolution.generation_hook import GenerationHook
from gpmetric.evolution.held_out import HeldOut, Measured, choose_finalists
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.listener import DiscoverListener
from gpmetric.evolution.live_page import LivePage
from gpmetric.evolution.multi_model import label_targets
from gpmetric.evolution.progress_note import ProgressNote
from gpmetric.evolution.request import DiscoverRequest
from gpmetric.evolution.rungs import describe_rungs
from gpmetric.evolution.search_config import SearchConfig, make_config
from gpmetric.evolution.selection import Individual
from gpmetric.evolution.settings import BUDGET_KEYS
from gpmetric.evolution.stop_request import StopRequest
from gpmetric.evolution.time_budget import FINALISTS, TimeBudget
from gpmetric.evolution.tracked import TrackedCampaign
from gpmetric.evolution.verdict import confidence, decide, doubts, measure_test
from gpmetric.evolution.workplace import collect_statistics, make_executor, open_sessions, released
from gpmetric.executors import Executor, OutOfTime
from gpmetric.files import finite
from gpmetric.functions import as_function
from gpmetric.options import settings_of
from gpmetric.plugins import in_use
from gpmetric.results import DiscoverResult
from gpmetric.session.caveats import few_tokens
from gpmetric.session.deadline import Deadline
from gpmetric.session.listeners import all_of
from gpmetric.session.session import Session
from gpmetric.session.workers import meet, torch_threads
from gpmetric.tracking.recorder import Trackers

__all__ = ["campaign_settings", "discover", "find", "run_campaign"]

_MORE = 36  # finalists that may follow the first ones within a share of --minutes
# options that decide what a campaign finds: one that goes on must agree in all of them
_DETERMINING = (
    "target", "update", "objective", "group", "operands", "primitives", "start", "forbid", "population", "max_nodes",
    "calibration_seeds", "seed", "include", "exclude",
)  # fmt: skip


def run_campaign(
    request: DiscoverRequest,
    listener: DiscoverListener | None = None,
    started: float | None = None,
    now: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Runs a campaign to its end: `gpmetric.discover("DIR", text="t.txt", minutes=30, ledger="campaign.sqlite")`.

    Args:
        request: one that has been checked.
        started: when `minutes` began, by `now`; they begin now by default.
        now: seconds of a clock that only goes forward.

    Returns:
        The JSON document of `gpmetric discover`. Whatever is interrupted, nothing in the ledger is computed again; a
        finished one gives its result again.

    Raises:
        InputError: for anything that cannot be used, before the model runs.
        GpmetricError: the work failed; the ledger keeps what was done.
    """
    deadline = Deadline.starting(request.minutes, started, now)
    meet(request, (listener or DiscoverListener()).progress)
    request = request.completed()
    with _served(request, listener or DiscoverListener()):
        return _campaign(request, listener, deadline)


@contextmanager
def _served(request: DiscoverRequest, told: DiscoverListener) -> Iterator[None]:
    """Has the campaign's page served, if that is asked for."""
    if request.live is None:
        yield
        return
    assert request.ledger is not None
    with LivePage(request.live, request.ledger) as page:
        told.serving(page.address)
        yield


def _campaign(request: DiscoverRequest, listener: DiscoverListener | None, deadline: Deadline) -> dict[str, Any]:
    """What `run_campaign` returns."""
    assert request.ledger is not None
    fork = None if request.fork is None or _goes_on(request) else population_of(request.fork, request)
    sessions = open_sessions(request, listener)
    if len(sessions) == 1:  # of several, one after the other is in memory
        next(iter(sessions.values())).start()
    settings = campaign_settings(request, sessions)
    opened = Ledger.open(request.ledger, settings, resume=request.resume, reseed=request.reseed, fork=fork)
    with ExitStack() as stack:
        ledger = stack.enter_context(opened)
        if request.fork is not None and ledger.history.get("fork", {}).get("ledger") != str(request.fork):
            raise LedgerError(
                f"ledger {request.ledger} was not begun by --fork {request.fork}: leave it out, or name another ledger"
            )
        result = ledger.result()
        if result is not None and result.get("stopped") is None:
            return result
        asked = stack.enter_context(StopRequest(request.ledger))
        note = stack.enter_context(ProgressNote(request.ledger, deadline.elapsed, request.minutes))
        told = all_of(DiscoverListener, [note, listener or DiscoverListener(), *_others(request, stack)])
        return _run(request, sessions, ledger, told, deadline, asked)


def _others(request: DiscoverRequest, stack: ExitStack) -> Iterator[DiscoverListener]:
    """Who else listens, as the request asks for it, until the stack is closed."""
    assert request.ledger is not None
    if request.on_generation is not None:
        yield stack.enter_context(GenerationHook(request.on_generation, request.ledger))
    if request.track:
        trackers = stack.enter_context(Trackers(request.track, request.ledger.stem))
        trackers.start(settings_of(request))
        yield TrackedCampaign(trackers)


def _goes_on(request: DiscoverRequest) -> bool:
    """Whether its ledger is there, and says what the campaign was forked from."""
    path = request.ledger
    return request.resume and path is not None and path.is_file() and path.stat().st_size > 0


discover = as_function("discover", DiscoverRequest, run_campaign, "model", result=DiscoverResult)


def campaign_settings(request: DiscoverRequest, sessions: Mapping[str, Session]) -> dict[str, Any]:
    """What determines the campaign's result; a resumed one must agree in all of it but its budget."""
    chosen = {name: getattr(request, name) for name in (*_DETERMINING, *BUDGET_KEYS)}
    models = {
        name: {
            "digest": session.model.digest,
            "dtype": session.model.dtype,
            "tokens": {split: windows.tokens_digest for split, windows in session.windows.items()},
        }
        for name, session in sessions.items()
    }
    kept = {} if request.kept_dtype is None else {"statistics_dtype": request.statistics_dtype}
    fitted = {} if request.fit == "own" else {"fit": request.fit}
    return {"models": models, **chosen, **kept, **fitted, **in_use("plugin")}


def _run(
    request: DiscoverRequest,
    sessions: Mapping[str, Session],
    ledger: Ledger,
    told: DiscoverListener,
    deadline: Deadline,
    asked: Callable[[], bool],
) -> dict[str, Any]:
    """The result of a campaign that has none yet, saved in its ledger."""
    loaded = deadline.elapsed
    told.step("calibration")
    progress = deadline.watching(told.progress)
    statistics = {}
    for name, session in sessions.items():
        if len(sessions) > 1:
            session.start()
        statistics[name] = collect_statistics(request, session, progress)
        if released(request, sessions):
            session.release()
    seconds = {"load": loaded, "calibration": deadline.elapsed - loaded}
    with ExitStack() as stack:
        stack.enter_context(torch_threads())  # an evaluator in this process takes its own number
        executor = stack.enter_context(make_executor(request, sessions, statistics))
        read = ("calibration", "validation", "test")
        fewest = min(len(session.windows[split].tokens) for session in sessions.values() for split in read)
        held_out = HeldOut(
            executor, label_targets(request.target, sessions), request.update, request.fit, ledger, fewest,
            progress=told.progress,
        )  # fmt: skip
        found, steps = find(request, sessions, held_out, told, TimeBudget(deadline), seconds, asked)
    seconds |= steps | {"total": deadline.elapsed}
    result: dict[str, Any] = finite(found | circumstances(request, sessions, ledger))
    ledger.save_result(result, seconds)
    told.finished(result)
    return result | {"seconds": seconds}


def find(
    request: DiscoverRequest,
    sessions: Mapping[str, Session],
    held_out: HeldOut,
    told: DiscoverListener,
    budget: TimeBudget,
    before: Mapping[str, float],
    asked: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Baselines on validation, the generation loop, the finalists, and the test.

    Args:
        held_out: whose executor evaluates; it is given the budget's clock.
        budget: the time that there is.
        before: seconds by step until now.
        asked: whether the search is to end after its present generation.

    Returns:
        What is found, as the result tells it, and seconds by step.

    Raises:
        GpmetricError: time was over before one baseline was measured, or no formula could be evaluated.
    """
    ledger, now, first = held_out.ledger, budget.deadline.now, request.baselines_by_importance[0]
    held_out.executor.clock = budget.clock
    told.step("baselines")
    start = now()
    try:
        dense = {"search": held_out.dense("search")}
        budget.fit_windows(held_out, first)
        dense["validation"] = held_out.dense("validation")
    except OutOfTime:
        raise _too_short(request) from None
    told.dense({split: alone(ppl) for split, ppl in dense.items()})
    opened = now()
    baselines = budget.measure_baselines(held_out, request)
    if not baselines:
        raise _too_short(request)
    told.baselines({baseline.name: figures.excess for baseline, figures in baselines.items()})
    seconds = {"opening": opened - start, "baselines": now() - opened}
    plan = budget.plan_search(held_out, len(baselines), request.calibration_seeds, dict(before) | seconds)
    if plan is not None:
        told.plan(plan, budget.cut)
    searching = now()
    labels = tuple(target.label for target in held_out.targets)
    config = make_config(request, sessions, labels, ledger.history.get("fork", {}).get("formulas", ()))
    told.step("search")
    campaign = _search(config, request.update, ledger, held_out.executor, told, asked)
    budget.end_search()
    stopped = campaign.last_generation if campaign.ended else None
    if stopped is not None:
        budget.cut.append(f"search: ended after generation {stopped}, as was asked")
    judging = now()
    told.step("finalists")
    front = campaign.front()
    finalists = _measure_finalists(held_out, front, len(baselines), budget)
    verdict = decide(request, finalists, baselines, ledger.counts()["paid"])
    told.step("test")
    dense["test"] = _dense_test(held_out)
    tested = measure_test(held_out, request, verdict, (finalists, baselines), budget)
    drawing = now()
    told.step("draws")
    drawn = confidence(held_out, tested, request.calibration_draws, budget)
    few = {name: few_tokens(session) for name, session in sessions.items()}
    prefix = len(sessions) > 1
    document = {
        **tested.describe(),
        "warnings": [f"{name}: {told}" if prefix else told for name, found in few.items() for told in found]
        + doubts(tested, drawn),
        "confidence": drawn,
        "screening": describe_rungs(ledger.measurements(), config.rungs, config.objective),
        "finalists": len(finalists),
        "front": [describe_individual(one, config.objective, finalists) for one in front],
        "baselines": {one.name: tested.describe_baseline(one, figures) for one, figures in baselines.items()},
        "dense": {split: alone(ppl) for split, ppl in dense.items()},
        "plan": None if plan is None else asdict(plan),
        "cut": budget.cut,
        "stopped": stopped,
    }
    seconds |= {"search": judging - searching, "final": drawing - judging, "confidence": now() - drawing}
    return document, seconds | {"per_evaluation": time_split(ledger)}


def _too_short(request: DiscoverRequest) -> GpmetricError:
    return GpmetricError(
        f"--minutes {request.minutes:g} were over before one baseline was measured on validation: allow more, or take "
        "fewer --windows, --samples or --target; --resume goes on with what the ledger holds"
    )


def _search(
    config: SearchConfig,
    update: str,
    ledger: Ledger,
    executor: Executor,
    told: DiscoverListener,
    asked: Callable[[], bool],
) -> Campaign:
    """The generation loop, run to its end."""
    named = False

    def tell(number: int, campaign: Campaign) -> None:
        nonlocal named
        if not named:
            named = True
            told.rivals(baselines_among((one for _, one in campaign.started()), update))
        told.generation(number, campaign.front(), ledger.counts())

    campaign = Campaign(config, ledger, executor, tell, asked, told.progress)
    campaign.run()
    return campaign


def _measure_finalists(held_out: HeldOut, front: Sequence[Individual], baselines: int, budget: TimeBudget) -> Measured:
    """The first of the front on validation, and more of them while there is time; so many baselines are tested."""
    first, others = choose_finalists(front, FINALISTS)
    until = budget.finalists_until(held_out, baselines)
    finalists = budget.measure(held_out, first, "validation", until)
    budget.note("finalists on validation", [one.name for one in first if one not in finalists], len(first))
    until = min(until, budget.more_until)
    for metric in others[:_MORE]:
        if budget.deadline.now() >= until:
            break
        finalists |= budget.measure(held_out, [metric], "validation", until)
    return finalists


def _dense_test(held_out: HeldOut) -> dict[str, float]:
    """Perplexity of the dense model on the test text, by model; NaN where there was no time."""
    with suppress(OutOfTime):
        return held_out.dense("test")
    return dict.fromkeys((target.model for target in held_out.targets), math.nan)
