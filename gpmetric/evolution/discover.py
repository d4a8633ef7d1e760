"""A campaign from a model and texts to a winner: `gpmetric discover`.

Three disjoint texts serve calibration, search and the choice of the winner; a fourth is read once, at the end, for the
winner and every baseline.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpmetric.evolution.campaign import Campaign
from gpmetric.evolution.document import alone, circumstances, describe_individual, describe_metric, time_split
from gpmetric.evolution.executors import Executor
from gpmetric.evolution.held_out import HeldOut, HeldOutFigures, Measured, choose_finalists, choose_winner, interval
from gpmetric.evolution.ledger import BUDGET_KEYS, Ledger
from gpmetric.evolution.multi_model import label_targets
from gpmetric.evolution.request import DiscoverRequest
from gpmetric.evolution.rungs import describe_rungs
from gpmetric.evolution.search_config import SearchConfig, make_config
from gpmetric.evolution.selection import Individual
from gpmetric.evolution.time_budget import FINALISTS, TimeBudget
from gpmetric.evolution.workplace import collect_statistics, make_executor, open_sessions, torch_threads
from gpmetric.files import finite
from gpmetric.metrics import Metric, masks_only, resolve_metric
from gpmetric.options import as_function
from gpmetric.pruning.updaters import UPDATERS
from gpmetric.session.session import Listener, Session

__all__ = ["DiscoverListener", "discover", "run_campaign"]

_MORE = 36  # finalists that may follow the first ones within a share of --minutes
# options that decide what a campaign finds: one that goes on must agree in all of them
_DETERMINING = (
    "target", "update", "objective", "group", "operands", "primitives", "start", "forbid", "population", "max_nodes",
    "calibration_seeds", "seed", "include", "exclude",
)  # fmt: skip


class DiscoverListener(Listener):
    """What a campaign tells while it runs; every method may be overridden."""

    def baselines(self, excess: Mapping[str, Mapping[str, float]]) -> None:
        """The baselines' excess on validation by name and target."""

    def generation(self, number: int, front: Sequence[Individual], counts: Mapping[str, int]) -> None:
        """A generation is finished."""


def run_campaign(
    request: DiscoverRequest, listener: DiscoverListener | None = None, started: float | None = None
) -> dict[str, Any]:
    """Runs a campaign to its end: `gpmetric.discover("DIR", text="t.txt", minutes=30, ledger="campaign.sqlite")`.

    A script that calls it with more than one worker needs `if __name__ == "__main__":`, since workers import it.

    Args:
        request: one that has been checked.
        started: time.monotonic() at which `minutes` begin; now by default.

    Returns:
        The JSON document of `gpmetric discover`. Whatever is interrupted, nothing in the ledger is computed again; a
        finished one gives its result again.

    Raises:
        InputError: for anything that cannot be used, before the model runs.
        GpmetricError: the work failed; the ledger keeps what was done.
    """
    began = time.monotonic() if started is None else started
    request = request.completed()
    assert request.ledger is not None
    sessions = open_sessions(request)
    with Ledger.open(request.ledger, _settings(request, sessions), resume=request.resume) as ledger:
        return ledger.result() or _run(request, sessions, ledger, listener or DiscoverListener(), began)


discover = as_function("discover", DiscoverRequest, run_campaign, "model")


def _settings(request: DiscoverRequest, sessions: Mapping[str, Session]) -> dict[str, Any]:
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
    return {"models": models, **chosen}


def _run(
    request: DiscoverRequest, sessions: Mapping[str, Session], ledger: Ledger, told: DiscoverListener, began: float
) -> dict[str, Any]:
    """The result of a campaign that has none yet, saved in its ledger."""
    loaded = time.monotonic()
    statistics = {name: collect_statistics(request, one, told.progress) for name, one in sessions.items()}
    calibrated = time.monotonic()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpmetric-")))
        stack.enter_context(torch_threads(torch.get_num_threads()))  # an evaluator in this process takes one
        executor = stack.enter_context(make_executor(request, sessions, statistics, folder))
        held_out = HeldOut(executor, label_targets(request.target, sessions), request.update, ledger)
        found, steps = _find(request, sessions, held_out, told, began)
    seconds = {"load": loaded - began, "calibration": calibrated - loaded, **steps}
    seconds["total"] = time.monotonic() - began
    result: dict[str, Any] = finite(found | circumstances(request, sessions, ledger))
    ledger.save_result(result, seconds)
    return result | {"seconds": seconds}


def _find(
    request: DiscoverRequest, sessions: Mapping[str, Session], held_out: HeldOut, told: DiscoverListener, began: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Baselines on validation, the generation loop, the finalists, and the test: what is found, and seconds by step."""
    ledger, opening = held_out.ledger, time.monotonic()
    dense = {split: held_out.dense(split) for split in ("search", "validation")}
    told.dense({split: alone(ppl) for split, ppl in dense.items()})
    start = time.monotonic()
    baselines = held_out.measure(request.baselines, "validation")
    told.baselines({baseline.name: figures.excess for baseline, figures in baselines.items()})
    searching = time.monotonic()
    per_metric = (searching - start) / len(baselines)
    budget = TimeBudget(began, request.minutes, start - opening, per_metric, len(baselines), request.calibration_seeds)
    config = make_config(request, sessions, tuple(target.label for target in held_out.targets))
    campaign = _search(config, ledger, held_out.executor, budget, told)
    judging = time.monotonic()
    front = campaign.front()
    finalists = _measure_finalists(held_out, front, budget)
    dense["test"] = held_out.dense("test")
    tested = _test(held_out, request, finalists, baselines)
    drawing = time.monotonic()
    document = {
        **tested.describe(finalists),
        "confidence": _confidence(held_out, tested, request.calibration_draws, budget),
        "screening": describe_rungs(ledger.measurements(), config.rungs, config.objective),
        "finalists": len(finalists),
        "front": [describe_individual(one, config.objective, finalists) for one in front],
        "baselines": {one.name: tested.describe_baseline(one, figures) for one, figures in baselines.items()},
        "dense": {split: alone(ppl) for split, ppl in dense.items()},
    }
    seconds = {"baselines": searching - start, "search": judging - searching, "final": drawing - judging}
    seconds["confidence"] = time.monotonic() - drawing
    return document, seconds | {"per_evaluation": time_split(ledger)}


def _search(
    config: SearchConfig, ledger: Ledger, executor: Executor, budget: TimeBudget, told: DiscoverListener
) -> Campaign:
    """The generation loop, run to its end."""

    def out_of_time() -> bool:
        if not budget.is_over(FINALISTS, budget.for_more):
            return False
        # measurements, since the evaluations of a generation are recorded when all of them are there
        measured = sum(row.rung == config.rungs[-1].name and row.error is None for row in ledger.measurements())
        return measured > 0 and budget.is_over(min(FINALISTS, measured), budget.for_more)

    def tell(number: int, campaign: Campaign) -> None:
        told.generation(number, campaign.front(), ledger.counts())

    campaign = Campaign(config, ledger, executor, out_of_time=out_of_time, on_generation=tell)
    campaign.run()
    return campaign


def _measure_finalists(held_out: HeldOut, front: Sequence[Individual], budget: TimeBudget) -> Measured:
    """The first of the front on validation, and more of them while there is time."""
    first, others = choose_finalists(front, FINALISTS)
    finalists = held_out.measure(first, "validation")
    until = time.monotonic() + budget.for_more
    for metric in others[:_MORE]:
        if time.monotonic() > until or budget.is_over(1):
            break
        finalists |= held_out.measure([metric], "validation")
    return finalists


@dataclass(frozen=True)
class _Tested:
    """What is measured on the test text."""

    winner: Metric  # that validation chose
    free: Metric | None  # the best without gradients there
    rival: Metric  # the baseline that does best
    regrouped: Metric | None  # the best baseline in the winner's comparison group, where it does not stand beside it
    figures: Measured

    def describe(self, finalists: Measured) -> dict[str, Any]:
        """The rows of the document but those of baselines as published."""
        rows = {"winner": self.winner, "best_gradient_free": self.free, "regrouped": self.regrouped}
        told = {name: one and describe_metric(one) | self.figures[one].describe() for name, one in rows.items()}
        return told | {"winner": {**(told["winner"] or {}), "validation": finalists[self.winner].excess}}

    def describe_baseline(self, baseline: Metric, on_validation: HeldOutFigures) -> dict[str, Any]:
        """A baseline's row."""
        told = self.figures[baseline].describe()
        return told | {"validation": on_validation.excess, "masks_only": masks_only(baseline.name)}


def _test(held_out: HeldOut, request: DiscoverRequest, finalists: Measured, baselines: Measured) -> _Tested:
    """The winner is chosen, and measured on the test text beside every baseline."""
    masking = [baseline for baseline in baselines if masks_only(baseline.name)]
    rivals = list(baselines) if UPDATERS[request.update].solves else masking
    winner = choose_winner(finalists, {rival: baselines[rival] for rival in rivals})
    without = [metric for metric in finalists if not metric.needs_gradients]
    free = min(without, key=lambda metric: finalists[metric].mean, default=None)
    tested = held_out.measure([winner, *baselines, *([free] if free else [])], "test")
    moved = _regrouped({one: tested[one].mean for one in masking}, winner) if request.groups_matter else None
    tested |= held_out.measure([moved] if moved else [], "test")
    return _Tested(winner, free, min(rivals, key=lambda rival: tested[rival].mean), moved, tested)


def _regrouped(excess: Mapping[Metric, float], winner: Metric) -> Metric | None:
    """The best of these masking baselines, moved to the winner's comparison group; None where it stands beside it."""
    group, best = winner.granularity, min(excess, key=lambda one: excess[one])
    stands = any((one.expression, one.granularity) == (best.expression, group) for one in excess)
    return None if stands else resolve_metric(f"{group}:{best.name}")


def _confidence(held_out: HeldOut, tested: _Tested, draws: Sequence[str], budget: TimeBudget) -> dict[str, Any]:
    """Winner and best baseline on the test text again, each time with statistics of calibration windows drawn anew.

    A draw that would end after the deadline is not begun.

    Returns:
        `draws` `asked` for and made, the `rival`, the mean excess of both by draw, and the 95 % interval of the mean
        difference over such draws: wholly below zero, the gain does not hang on the sample. Source: Efron 1979.
    """
    pair, spent = (tested.winner, tested.rival), budget.per_draw
    rows: list[tuple[float, ...]] = []
    for draw in draws:
        start = time.monotonic()
        if budget.ends_within(spent):
            break
        found = held_out.measure(pair, "test", draw)
        rows.append(tuple(found[one].mean for one in pair))
        spent = time.monotonic() - start
    bounds = interval([mine - other for mine, other in rows])
    return {
        "asked": len(draws),
        "draws": len(rows),
        "rival": tested.rival.name,
        "winner_mean_excess": [mine for mine, _ in rows],
        "rival_mean_excess": [other for _, other in rows],
        "difference": None if bounds is None else sum(bounds) / 2,
        "interval": bounds,
    }
