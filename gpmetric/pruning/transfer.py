"""`gpmetric catalogue`: formulas that were found, and how they transfer, from the package or measured anew."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from gpmetric.discovered import CATALOGUE, EVIDENCE, PREFIX
from gpmetric.errors import GpmetricError
from gpmetric.functions import as_function
from gpmetric.pruning.bench import bench_work, first_failure, run_bench
from gpmetric.pruning.listeners import BenchListener
from gpmetric.pruning.requests import BESIDE, CatalogueRequest
from gpmetric.results import CatalogueResult
from gpmetric.session.session import Session
from gpmetric.session.work import Work

__all__ = ["catalogue", "catalogue_work", "run_catalogue"]


def run_catalogue(
    request: CatalogueRequest, listener: BenchListener | None = None, started: float | None = None
) -> dict[str, Any]:
    """The formulas with what each is worth: as it stands in the package, or measured on the models asked for.

    Args:
        request: which formula, which models.
        listener: told of every row where models are measured.
        started: time.monotonic() at which `minutes` began; now by default.

    Returns:
        `entries`: by name, formula, update, fit and where it was found. `models`: for each, what it was measured on,
        and by metric the `excess` log-loss in nats per token by target (null where it failed), their `mean`, and its
        `ratio` to SparseGPT's. Both are what the package holds.

    Raises:
        InputError: as `bench`.
    """
    names = tuple(CATALOGUE) if request.name is None else (request.name,)
    entries = {name: asdict(CATALOGUE[name]) for name in names}
    if request.model is None:
        return {"entries": entries, "models": _shipped(names)}
    found = run_bench(request.bench, listener, started)
    whole = [document for document in found.get("models", [found]) if not document.get("error")]
    return {"entries": entries, "models": list(map(_measured, whole)), "error": first_failure(found)}


catalogue = as_function("catalogue", CatalogueRequest, run_catalogue, "name", result=CatalogueResult)


def catalogue_work(session: Session) -> Work:
    """What measuring the formulas on a session's model takes."""
    assert isinstance(session.inputs, CatalogueRequest)
    return bench_work(replace(session, inputs=session.inputs.bench))


def _shipped(names: Sequence[str]) -> list[dict[str, Any]]:
    """What the package holds of some formulas.

    Raises:
        GpmetricError: its file is damaged.
    """
    try:
        models = json.loads(EVIDENCE.read_text(encoding="utf-8"))["models"]
        shown = {*BESIDE, *(f"{PREFIX}:{name}" for name in names)}
        return [
            one | {"metrics": {name: row for name, row in one["metrics"].items() if name in shown}} for one in models
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GpmetricError(f"{EVIDENCE.name!r} of the package is damaged: {error}") from error


def _measured(document: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a bench: no place of a file, one figure a target."""
    (text,) = document["texts"]
    dense = document["dense"][text["text"]]
    excess: dict[str, dict[str, float]] = {}
    for row in document["results"]:
        (ppl,) = row["ppl"].values()
        excess.setdefault(row["metric"], {})[row["target"]] = math.log(ppl / dense)
    base = fmean(excess[BESIDE[-1]].values())
    metrics = {
        name: {"excess": by_target, "mean": fmean(by_target.values()), "ratio": fmean(by_target.values()) / base}
        for name, by_target in excess.items()
    }
    told = {key: document[key] for key in ("dtype", "seed", "protocol", "versions")}
    return {
        "model": Path(document["model"]).name,
        **told,
        "calibration": _text_of(document["calibration"]),
        "text": _text_of(text),
        "dense": dense,
        "metrics": metrics,
    }


def _text_of(described: Mapping[str, Any]) -> dict[str, Any]:
    return {**described, "text": Path(described["text"]).name}
