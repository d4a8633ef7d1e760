"""Parts of the JSON document of a campaign: its metrics, what they rest on, and what evaluating took."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from gpmetric.data import Windows, overlap
from gpmetric.evolution.fitness import mean_excess
from gpmetric.evolution.held_out import Measured
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.multi_model import label_targets
from gpmetric.evolution.request import DiscoverRequest
from gpmetric.evolution.selection import Individual
from gpmetric.metrics import Metric
from gpmetric.plugins import in_use
from gpmetric.provenance import versions
from gpmetric.session.session import Session

__all__ = ["alone", "circumstances", "describe_individual", "describe_metric", "time_split"]


def alone(by_model: Mapping[str, Any]) -> Any:
    """What is said of the one model, or of all of them by name."""
    return next(iter(by_model.values())) if len(by_model) == 1 else dict(by_model)


def describe_metric(metric: Metric) -> dict[str, Any]:
    """A metric as every command reads it, comparison group included, and what is to be known of it."""
    form = metric.expression
    return {"formula": metric.name, "group": metric.granularity, "nodes": len(form), "operands": list(form.operands)}


def describe_individual(individual: Individual, objective: str, finalists: Measured) -> dict[str, Any]:
    """A member of the front with its figures on the search text, and on validation where it is a finalist."""
    figures = finalists.get(individual.metric)
    return describe_metric(individual.metric) | {
        "excess": individual.excess,
        "mean_excess": mean_excess(individual.excess),
        objective: individual.searched,
        "validation": None if figures is None else figures.excess,
    }


def circumstances(request: DiscoverRequest, sessions: Mapping[str, Session], ledger: Ledger) -> dict[str, Any]:
    """What the result rests on."""
    counts = ledger.counts()
    models = {name: session.model for name, session in sessions.items()}
    first = next(iter(sessions.values()))
    return {
        "evaluations": counts["paid"],
        "unique_masks": counts["unique_masks"],
        "counts": counts,
        "splits": alone({name: _describe_splits(session.windows) for name, session in sessions.items()}),
        "model": alone({name: model.name for name, model in models.items()}),
        "model_sha256": alone({name: model.digest for name, model in models.items()}),
        "dtype": first.model.dtype,
        "device": str(first.model.device),
        "targets": [target.label for target in label_targets(request.target, sessions)],
        "update": request.update,
        "fit": request.fit,
        "objective": request.objective,
        "unit": "nats per token" if len(sessions) == 1 else "wanda's mean on the same model, pruned in one shot",
        "group": request.group,
        "seed": request.seed,
        "shuffle": request.shuffle,
        "bos": request.bos,
        "sampling": request.sampling,
        "text_column": request.text_column,
        "left_out": alone({name: session.left_out for name, session in sessions.items()}),
        "sequence_length": first.windows["search"].tokens.shape[1],
        "versions": versions(),
        **in_use("plugins"),
    } | _experts(sessions)


def _experts(sessions: Mapping[str, Session]) -> dict[str, Any]:
    """Of mixtures, what their experts read in the dense model."""
    found = {name: session.experts(pruned=False) for name, session in sessions.items()}
    return {"experts": alone({name: one["experts"] for name, one in found.items()})} if all(found.values()) else {}


def _describe_splits(splits: Mapping[str, Windows]) -> dict[str, Any]:
    shared = overlap(splits)
    return {split: windows.describe() | {"overlap": shared[split]} for split, windows in splits.items()}


def time_split(ledger: Ledger) -> dict[str, Any]:
    """Mean seconds of an evaluation by what they went into: nothing is loaded, calibrated or tokenised in one.

    `per_candidate` is all that was measured, screening included, over the distinct metrics drawn; `rungs` is the mean
    of a measurement on each step of the screening.
    """
    measured = ledger.measurements()
    names = dict.fromkeys(row.rung for row in measured)
    done = [row for row in ledger.evaluations() if row.seconds_score is not None and row.seconds_loss is not None]
    count, drawn = max(1, len(done)), max(1, ledger.counts()["unique_ranked"])
    return {
        "score_and_mask": sum(row.seconds_score or 0.0 for row in done) / count,
        "prune_and_loss": sum(row.seconds_loss or 0.0 for row in done) / count,
        "per_candidate": sum(row.duration for row in measured) / drawn,
        "rungs": {name: fmean(row.duration for row in measured if row.rung == name) for name in names},
    }
