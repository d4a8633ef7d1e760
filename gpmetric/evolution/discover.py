"""A campaign from a model and texts to a winner: `gpmetric discover`.

Three disjoint texts serve calibration, search and the choice of the winner; a fourth is read once, at the end, for the
winner and every baseline.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from gpmetric.data import Windows, overlap
from gpmetric.evolution.campaign import Campaign
from gpmetric.evolution.executors import Executor
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.objectives import mean_excess
from gpmetric.evolution.plan import make_plan
from gpmetric.evolution.request import Request, check_request
from gpmetric.evolution.screening import describe_ladder
from gpmetric.evolution.selection import Individual
from gpmetric.evolution.sites import (
    Site,
    calibration_draw,
    collect,
    labels,
    make_executor,
    needs_gradients,
    open_sites,
    threads,
)
from gpmetric.evolution.verdict import Judge, choose_finalists, choose_winner, interval
from gpmetric.provenance import finite, versions
from gpmetric.pruning.metrics import BASELINES, Update, masks_only, resolve_metric

__all__ = ["DiscoverListener", "discover", "run_campaign"]

_FINALISTS = 12  # front members compared on validation
_MORE = 36  # that may follow them within a share of --minutes
_SHARE = 0.1  # of it, for these
_DETERMINING = (
    "target",
    "update",
    "objective",
    "group",
    "operands",
    "primitives",
    "start",
    "forbid",
    "population",
    "max_nodes",
    "calibration_seeds",
    "seed",
    "include",
    "exclude",
)


class DiscoverListener:
    """What a campaign tells while it runs; every method may be overridden."""

    def progress(self, what: str, done: int, total: int) -> None:
        """A step before the search has come so far."""

    def dense(self, ppl: Mapping[str, float]) -> None:
        """Perplexity of the dense model by split, before anything is pruned."""

    def baselines(self, excess: Mapping[str, Mapping[str, float]]) -> None:
        """The baselines' excess on validation by name and target."""

    def generation(self, number: int, front: Sequence[Individual], counts: Mapping[str, int]) -> None:
        """A generation is finished."""


def discover(
    model: str | Sequence[str] | None = None, *, ledger: str | Path, resume: bool = False, **options: Any
) -> dict[str, Any]:
    """Runs a campaign to its end: `gpmetric.discover("DIR", text="t.txt", minutes=30, ledger="campaign.sqlite")`.

    A script that calls it with more than one worker needs `if __name__ == "__main__":`, since workers import it.

    Args:
        model: a directory or Hub name, or several that one metric is to serve; None is the demo model.
        ledger: the campaign's SQLite file.
        resume: go on with the ledger if it is there.
        options: the fields of `Request`, as on the command line.

    Returns:
        The JSON document of `gpmetric discover`.

    Raises:
        InputError, GpmetricError: as `run_campaign`.
    """
    return run_campaign(
        Request(model=model if model is None or isinstance(model, str) else tuple(model), **options),
        Path(ledger),
        resume=resume,
    )


def run_campaign(
    request: Request,
    ledger: Path,
    *,
    resume: bool = False,
    listener: DiscoverListener | None = None,
    started: float | None = None,
) -> dict[str, Any]:
    """Runs a campaign to its end and returns the JSON document of `gpmetric discover`.

    Args:
        request: what to search for and with.
        ledger: the campaign's SQLite file; whatever is interrupted, nothing in it is computed again.
        resume: go on with the ledger if it is there; a finished one gives its result again.
        listener: told of progress.
        started: time.monotonic() at which `minutes` begin; now by default.

    Raises:
        InputError: for anything that cannot be used, before the model runs.
        GpmetricError: the work failed; the ledger keeps what was done.
    """
    began = time.monotonic() if started is None else started
    told = listener or DiscoverListener()
    update = check_request(request)
    sites = open_sites(request)
    with ExitStack() as stack:
        book = stack.enter_context(Ledger.open(ledger, _settings(request, sites), resume=resume))
        finished = book.result()
        if finished is not None:
            return finished
        loaded = time.monotonic()
        for site in sites.values():
            site.statistics = collect(request, site, update, partial(told.progress, "calibration"))
        calibrated = time.monotonic()
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpmetric-")))
        stack.enter_context(threads(torch.get_num_threads()))  # an evaluator in this process takes one
        executor = stack.enter_context(make_executor(request, sites, folder, update))
        deadline = None if request.minutes is None else began + 60 * request.minutes
        verdict, steps = _search(request, sites, book, executor, update, deadline, told)
        seconds = {"load": loaded - began, "calibration": calibrated - loaded, **steps}
        seconds["total"] = time.monotonic() - began
        result: dict[str, Any] = finite(verdict | _circumstances(request, sites, update, book))
        book.save_result(result, seconds)
    return result | {"seconds": seconds}


def _settings(request: Request, sites: Mapping[str, Site]) -> dict[str, Any]:
    """What determines the campaign's result; a resumed one must agree in all of it but its budget."""
    chosen = {name: getattr(request, name) for name in _DETERMINING}
    models = {
        name: {
            "digest": site.model.digest,
            "dtype": site.model.dtype,
            "tokens": {split: windows.tokens_digest for split, windows in site.splits.items()},
        }
        for name, site in sites.items()
    }
    budget = {name: getattr(request, name) for name in ("generations", "evaluations", "minutes")}
    return {"models": models, **chosen, **budget}


def _search(
    request: Request,
    sites: Mapping[str, Site],
    book: Ledger,
    executor: Executor,
    update: Update,
    deadline: float | None,
    told: DiscoverListener,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Baselines on validation, the generation loop, the finalists, and the test: the verdict, and seconds by step."""
    targets = labels(request, sites)
    judge = Judge(executor, targets, update, book)
    opening = time.monotonic()
    dense = {split: judge.dense(split) for split in ("search", "validation")}
    told.dense({split: _alone(ppl) for split, ppl in dense.items()})
    start = time.monotonic()
    names = _baselines(request)
    baselines = judge.measure(names, "validation")
    told.baselines({name: verdict.excess for name, verdict in baselines.items()})
    per_formula = (time.monotonic() - start) / len(names)

    plan = make_plan(request, sites, targets)
    # a draw of the calibration text takes gradients anew; all of them are not to cost more than a sixth of the time
    for_draws = min(4 * per_formula * request.calibration_seeds, 10 * (request.minutes or 0))

    for_more = _SHARE * 60 * (request.minutes or 0)

    def over(finalists: int, besides: float = 0) -> bool:
        """Whether what comes after the search would no longer fit: workers anew, finalists, winner and baselines."""
        left = start - opening + 1.2 * per_formula * (finalists + 3 + len(names)) + for_draws + besides
        return deadline is not None and time.monotonic() > deadline - left

    def out_of_time() -> bool:
        if not over(_FINALISTS, for_more):
            return False
        # measurements, since the evaluations of a generation are recorded when all of them are there
        measured = sum(row.rung == plan.rungs[-1].name and row.error is None for row in book.measurements())
        return measured > 0 and over(min(_FINALISTS, measured), for_more)

    searching = time.monotonic()
    campaign = Campaign(
        plan,
        book,
        executor,
        out_of_time=out_of_time,
        on_generation=lambda number, campaign: told.generation(number, campaign.front(), book.counts()),
    )
    campaign.run()
    judging = time.monotonic()
    front = campaign.front()
    first, others = choose_finalists(front, _FINALISTS)
    finalists = judge.measure(first, "validation")
    until = time.monotonic() + for_more
    for metric in others[:_MORE]:
        if time.monotonic() > until or over(1):
            break
        finalists |= judge.measure([metric], "validation")
    rivals = [name for name in names if masks_only(name) or update != "none"]
    winner = choose_winner(finalists, {name: baselines[name] for name in rivals})
    dense["test"] = judge.dense("test")
    without = [metric for metric in finalists if not resolve_metric(metric).needs_gradients]
    free = min(without, key=lambda metric: finalists[metric].mean, default=None)
    tested = judge.measure(dict.fromkeys([winner, *names, *([free] if free else [])]), "test")
    rival = min(rivals, key=lambda name: tested[name].mean)
    masking = {name: tested[name].mean for name in names if masks_only(name)}
    regrouped = _regrouped(masking, winner) if request.groups_matter else []
    tested |= judge.measure(regrouped, "test")
    found = time.monotonic()
    confidence = _confidence(judge, winner, rival, request.calibration_seeds, deadline, 4 * per_formula)
    verdict = {
        "winner": _row(winner) | tested[winner].describe() | {"validation": finalists[winner].excess},
        "best_gradient_free": None if free is None else _row(free) | tested[free].describe(),
        "regrouped": next((_row(name) | tested[name].describe() for name in regrouped), None),
        "confidence": confidence,
        "screening": describe_ladder(book.measurements(), plan.rungs, plan.objective),
        "finalists": len(finalists),
        "front": [
            _row(one.text)
            | {"excess": one.excess, "mean_excess": mean_excess(one.excess), request.objective: one.searched}
            | {"validation": finalists[one.text].excess if one.text in finalists else None}
            for one in front
        ],
        "baselines": {
            name: tested[name].describe() | {"validation": baselines[name].excess, "masks_only": masks_only(name)}
            for name in names
        },
        "dense": {split: _alone(ppl) for split, ppl in dense.items()},
    }
    return verdict, {
        "baselines": searching - start,
        "search": judging - searching,
        "final": found - judging,
        "confidence": time.monotonic() - found,
        "per_evaluation": _time_split(book),
    }


def _confidence(
    judge: Judge, winner: str, rival: str, draws: int, deadline: float | None, spent: float
) -> dict[str, Any]:
    """Winner and best baseline on the test text again, each time with statistics of calibration windows drawn anew.

    Args:
        spent: seconds the first draw is thought to take; one that would end after the deadline is not begun.

    Returns:
        `draws` `asked` for and made, the `rival`, the mean excess of both by draw, and the 95 % interval of the mean
        difference over such draws: wholly below zero, the gain does not hang on the sample. Source: Efron 1979.
    """
    rows: list[tuple[float, float]] = []
    for number in range(draws):
        start = time.monotonic()
        if deadline is not None and start + spent > deadline:
            break
        found = judge.measure([winner, rival], "test", calibration_draw(number))
        rows.append((found[winner].mean, found[rival].mean))
        spent = time.monotonic() - start
    bounds = interval([mine - other for mine, other in rows])
    return {
        "asked": draws,
        "draws": len(rows),
        "rival": rival,
        "winner_mean_excess": [mine for mine, _ in rows],
        "rival_mean_excess": [other for _, other in rows],
        "difference": None if bounds is None else sum(bounds) / 2,
        "interval": bounds,
    }


def _alone(by_model: Mapping[str, Any]) -> Any:
    """What is said of the one model, or of all of them by name."""
    return next(iter(by_model.values())) if len(by_model) == 1 else dict(by_model)


def _circumstances(request: Request, sites: Mapping[str, Site], update: Update, book: Ledger) -> dict[str, Any]:
    """What the verdict rests on."""
    counts = book.counts()
    described = {name: _describe_splits(site.splits) for name, site in sites.items()}
    models = {name: site.model for name, site in sites.items()}
    first = next(iter(sites.values()))
    return {
        "evaluations": counts["paid"],
        "unique_masks": counts["unique_masks"],
        "counts": counts,
        "splits": _alone(described),
        "model": _alone({name: model.name for name, model in models.items()}),
        "model_sha256": _alone({name: model.digest for name, model in models.items()}),
        "dtype": first.model.dtype,
        "device": str(first.model.device),
        "targets": list(labels(request, sites)),
        "update": update,
        "objective": request.objective,
        "unit": "nats per token" if len(sites) == 1 else "wanda's mean on the same model, pruned in one shot",
        "group": request.group,
        "seed": request.seed,
        "sequence_length": first.splits["search"].tokens.shape[1],
        "versions": versions(),
    }


def _describe_splits(splits: Mapping[str, Windows]) -> dict[str, Any]:
    shared = overlap(splits)
    return {split: windows.describe() | {"overlap": shared[split]} for split, windows in splits.items()}


def _time_split(book: Ledger) -> dict[str, Any]:
    """Mean seconds of an evaluation by what they went into: nothing is loaded, calibrated or tokenised in one.

    `per_candidate` is all that was measured, screening included, over the distinct metrics drawn; `rungs` is the mean
    of a measurement on each step of the screening.
    """
    measured = book.measurements()
    names = dict.fromkeys(row.rung for row in measured)
    done = [row for row in book.evaluations() if row.seconds_score is not None and row.seconds_loss is not None]
    count, drawn = max(1, len(done)), max(1, book.counts()["unique_ranked"])
    return {
        "score_and_mask": sum(row.seconds_score or 0.0 for row in done) / count,
        "prune_and_loss": sum(row.seconds_loss or 0.0 for row in done) / count,
        "per_candidate": sum(row.duration for row in measured) / drawn,
        "rungs": {name: fmean(row.duration for row in measured if row.rung == name) for name in names},
    }


def _row(text: str) -> dict[str, Any]:
    """A metric as every command reads it, comparison group included, and what is to be known of it."""
    metric = resolve_metric(text)
    expression = metric.expression
    return {
        "formula": text,
        "group": metric.granularity,
        "nodes": len(expression),
        "operands": list(expression.operands),
    }


def _regrouped(excess: Mapping[str, float], winner: str) -> list[str]:
    """The best baseline that only masks, moved to the winner's comparison group; nothing where it stands beside it.

    Args:
        excess: mean excess of these baselines.
        winner: a metric as text.
    """
    group = resolve_metric(winner).granularity
    best = min(excess, key=lambda name: excess[name])
    published = {(metric.expression, metric.granularity) for metric in map(resolve_metric, excess)}
    return [] if (resolve_metric(best).expression, group) in published else [f"{group}:{best}"]


def _baselines(request: Request) -> list[str]:
    """The baselines to compare with: all of them, but for those of gradients where none are collected."""
    gradients = needs_gradients(request)
    return [name for name in BASELINES if gradients or not resolve_metric(name).needs_gradients]
