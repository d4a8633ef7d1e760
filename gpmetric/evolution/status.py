"""Where a campaign is, by its ledger and the note that its driver keeps beside it.

A look takes no ownership, writes nothing and keeps no lock, so that it can be taken at any time: `gpmetric status
campaign.sqlite --watch 5`.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from gpmetric.errors import LedgerError
from gpmetric.evolution.baselines import baselines_among
from gpmetric.evolution.beside import read_note, stop_file
from gpmetric.evolution.driver_lock import lives
from gpmetric.evolution.fitness import best_of, mean_excess
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.records import Candidate, Evaluation, Generation, HeldOutMeasurement, Measurement
from gpmetric.evolution.request import DiscoverRequest
from gpmetric.evolution.selection import Individual, by_merit, pareto
from gpmetric.evolution.status_request import StatusRequest
from gpmetric.functions import as_function
from gpmetric.metrics import BASELINES, masks_only, resolve_metric
from gpmetric.options import make_request

__all__ = ["StatusListener", "on_validation", "ranked", "run_status", "state_of", "status"]

_BEST = 10  # members of the front that are told
_RECENT = 8  # generations that the speed is of
_AFTER = ("finalists", "test", "draws")  # steps after the search
_TOLD = ("winner", "better", "because", "stopped", "evaluations")  # of a result
_NUMBER = re.compile(r"\d+(\.\d+)?([eE][+-]?\d+)?")


class StatusListener:
    """What looking again and again tells; the method may be overridden."""

    def status(self, document: Mapping[str, Any]) -> None:
        """The campaign was looked at, and will be again."""


def run_status(request: StatusRequest, listener: StatusListener | None = None) -> dict[str, Any]:
    """Where a campaign is: `gpmetric.status("campaign.sqlite")`.

    Args:
        request: names the ledger, and how often it is looked at.
        listener: told of every look but the last.

    Returns:
        The JSON document of `gpmetric status`, of the last look. Its `state` is running, elsewhere (a driver of another
        host or container, which only its heartbeat tells of), killed, stopped or finished. Excess is ln(ppl / dense
        ppl) in nats per token, on the search text but under `validation`. What the ledger does not tell is null.

    Raises:
        LedgerError: the ledger cannot be used.
    """
    while True:
        document = _look(request.ledger)
        if request.watch is None or document["state"] not in ("running", "elsewhere"):
            return document
        (listener or StatusListener()).status(document)
        time.sleep(request.watch)


status = as_function("status", StatusRequest, run_status, "ledger")


def _look(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise LedgerError(f"ledger {path} does not exist")
    with Ledger.read(path) as book:
        book.check_plugins()
        settings, owner, result, counts = book.settings, book.owner(), book.result(), book.counts()
        generations, candidates, evaluations = book.generations(), book.candidates(), book.evaluations()
        held_out, number = book.held_out(), len(generations)
        measured = book.measurements(number) or book.measurements(max(0, number - 1))
    state, note, now = state_of(owner, result), read_note(path), time.time()
    if note is not None and (owner is None or any(note[key] != owner[key] for key in ("host", "pid"))):
        note = None  # of a driver before
    runs = state in ("running", "elsewhere")
    begun = state != "finished" and {row.generation for row in measured} == {number}
    step = note["step"] if note else "finished" if state == "finished" else _furthest(held_out, candidates or measured)
    minutes = (now - note["began"]) / 60 if note and runs else None
    spent = {"generations": number, "evaluations": counts["paid"], "minutes": minutes}
    budget = make_request(DiscoverRequest, {name: settings.get(name) for name in spent}).limits
    speed = _speed(generations)
    front, baselines = ranked(evaluations, candidates, settings)
    return {
        "ledger": str(path),
        "state": state,
        "step": step,
        "progress": note and note.get("progress"),
        "began": note and note["began"],
        "stop_asked": runs and stop_file(path).exists(),
        "owner": owner and _describe_owner(owner, now),
        "models": sorted(settings.get("models", {})),
        "targets": settings.get("target", []),
        "budget": budget,
        "spent": spent,
        "share": max((spent[name] / limit for name, limit in budget.items() if limit and spent[name]), default=0.0),
        "left_seconds": _left(budget, spent, speed, is_searching=step not in _AFTER) if runs else None,
        "speed": speed,
        "generation": _describe_generation(number, measured) if begun else None,
        "counts": counts,
        "fates": dict(Counter(row.status for row in candidates)),
        "failures": _failures(candidates, held_out),
        "workers": _workers(measured, evaluations),
        "front": [_describe(one) for one in front[:_BEST]],
        "baselines": sorted(
            ({"name": name} | _describe(one) for name, one in baselines.items()), key=lambda row: row["mean_excess"]
        ),
        "validation": on_validation(held_out, settings.get("update", "none")),
        "result": result and {key: result.get(key) for key in _TOLD},
    }


def state_of(owner: Mapping[str, Any] | None, result: Mapping[str, Any] | None) -> str:
    """The `state` of a campaign, of what its ledger says of owner and result."""
    if owner is None:
        return "stopped" if result is None or result.get("stopped") is not None else "finished"
    return {True: "running", False: "killed", None: "elsewhere"}[lives(owner)]


def _describe_owner(owner: Mapping[str, Any], now: float) -> dict[str, Any]:
    """Who drives the campaign, and since when it was not heard of, by the clocks of both hosts."""
    silent = max(0.0, now - owner["heartbeat"])
    return {"host": owner["host"], "pid": owner["pid"], "alive": lives(owner), "silent_seconds": silent}


def _furthest(held_out: Sequence[HeldOutMeasurement], searched: Sequence[Any]) -> str:
    """The last step that the ledger holds something of."""
    if any(row.calibration != "calibration" for row in held_out):
        return "draws"
    if any(row.split.startswith("test") for row in held_out):
        return "test"
    if any(row.metric not in BASELINES for row in held_out):
        return "finalists"
    return "search" if searched else "baselines" if held_out else "calibration"


def _speed(generations: Sequence[Generation]) -> dict[str, float] | None:
    """Of the last generations: seconds and evaluations of one; a time that the campaign stood still is none of it."""
    recent = generations[-_RECENT - 1 :]
    pairs = [(one, other) for one, other in pairwise(recent) if one.finished and other.finished]
    if not pairs:
        return None
    seconds = median(later.finished - earlier.finished for earlier, later in pairs)
    paid = fmean(later.evaluations - earlier.evaluations for earlier, later in pairs)
    return {"seconds_per_generation": seconds, "evaluations_per_generation": paid}


def _left(
    budget: Mapping[str, Any], spent: Mapping[str, Any], speed: Mapping[str, float] | None, *, is_searching: bool
) -> float | None:
    """Seconds until the first limit: of the command's minutes, or of the search at its present speed."""
    found = []
    if budget["minutes"] is not None and spent["minutes"] is not None:
        found.append(60 * (budget["minutes"] - spent["minutes"]))
    if speed is not None and is_searching:
        seconds, paid = speed["seconds_per_generation"], speed["evaluations_per_generation"]
        if budget["generations"] is not None:
            found.append(seconds * (budget["generations"] - spent["generations"]))
        if budget["evaluations"] is not None and paid > 0:
            found.append(seconds * (budget["evaluations"] - spent["evaluations"]) / paid)
    return max(0.0, min(found)) if found else None


def _describe_generation(number: int, measured: Sequence[Measurement]) -> dict[str, Any]:
    """The generation that is not finished: how many formulas every rung has measured."""
    return {"number": number, "rungs": dict(Counter(row.rung for row in measured))}


def _failures(candidates: Iterable[Candidate], held_out: Iterable[HeldOutMeasurement]) -> list[dict[str, Any]]:
    """Reasons of failed formulas that differ in more than numbers, the commonest first."""
    reasons = [row.reason for row in candidates if row.status == "failed"] + [row.error for row in held_out]
    kinds = Counter(_NUMBER.sub("N", reason) for reason in reasons if reason)
    return [{"reason": reason, "count": count} for reason, count in kinds.most_common()]


def _workers(measured: Sequence[Measurement], evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """The processes that measured formulas of the last generation that there is something of."""
    hosts = {row.process: row.host for row in evaluations}
    found = []
    for process in sorted({row.process for row in measured if row.process is not None}):
        own = [row for row in measured if row.process == process]
        retried = sum((row.attempt or 1) > 1 for row in own)
        seconds = sum(row.duration for row in own)
        one = {"process": process, "host": hosts.get(process), "measured": len(own), "seconds": seconds}
        found.append(one | {"retried": retried})
    return found


def ranked(
    evaluations: Sequence[Evaluation], candidates: Sequence[Candidate], settings: Mapping[str, Any]
) -> tuple[list[Individual], dict[str, Individual]]:
    """The front, the best first, and the baselines among the first formulas by name, as the search measured them."""
    objective = settings.get("objective", "kl")
    done = {row.id: row for row in evaluations if row.losses and row.figures.get(objective)}
    metrics = {index: resolve_metric(row.formula) for index, row in done.items()}
    plain = {index: Individual(metrics[index], row.figures[objective], row.losses) for index, row in done.items()}
    first = [plain[row.evaluation] for row in candidates if row.generation == 0 and row.evaluation in plain]
    named = baselines_among(first, settings.get("update", "none"))
    bar = best_of(one.excess for one in named.values())
    front = by_merit(pareto([Individual(one.metric, one.searched, one.excess, {}, bar) for one in plain.values()]))
    return front, named


def _describe(one: Individual) -> dict[str, Any]:
    return {"formula": one.text, "mean_excess": mean_excess(one.excess), "excess": one.excess}


def on_validation(held_out: Sequence[HeldOutMeasurement], update: str) -> list[dict[str, Any]]:
    """Mean excess of what there are figures of at every target, on as many windows as was measured last.

    A formula's rivals are baselines that only mask, unless the campaign updates weights.
    """
    rows = [row for row in held_out if row.split.startswith("validation") and row.calibration == "calibration"]
    rows = [row for row in rows if row.split == rows[-1].split]
    targets, found = {row.target for row in rows}, []
    for metric in dict.fromkeys(row.metric for row in rows):
        excess = {row.target: row.excess for row in rows if row.metric == metric and row.excess is not None}
        if excess.keys() == targets:
            kind = "formula" if metric not in BASELINES else "baseline"
            kind = "rival" if kind == "baseline" and (update != "none" or masks_only(metric)) else kind
            found.append({"metric": metric, "kind": kind, "mean_excess": mean_excess(excess)})
    return sorted(found, key=lambda row: row["mean_excess"])
