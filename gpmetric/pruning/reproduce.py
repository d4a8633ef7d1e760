"""`gpmetric reproduce`: published figures measured again by the published protocol, ours beside theirs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from gpmetric.errors import GpmetricError, InputError
from gpmetric.functions import as_function
from gpmetric.pruning.bench import run_bench
from gpmetric.pruning.listeners import BenchListener
from gpmetric.pruning.published import PUBLISHED, Study
from gpmetric.pruning.requests import BenchRequest, ReproduceRequest
from gpmetric.results import ReproduceResult

__all__ = ["reproduce", "run_reproduce"]

# Relative. Reruns of one method differ by 0.02 of a perplexity of 7 at 50 % and by a quarter at 70 %; patterns and
# magnitude, which are worse, in between.
_DENSE, _NEAR, _FAR = 0.005, 0.01, 0.05


def run_reproduce(
    request: ReproduceRequest, listener: BenchListener | None = None, started: float | None = None
) -> dict[str, Any]:
    """Runs the studies that are asked for, or all whose models are on this machine.

    Args:
        request: which, and models or texts in place of the published ones.
        listener: told of every row.
        started: time.monotonic() at which `minutes` began; now by default.

    Returns:
        `studies`: each with its `name`, `source`, protocol and `rows`, of which each has `metric` (`dense` first),
        `target`, `published`, `tolerance` and, where it was run, `ours` and whether it is `within`; `error`, the first
        study that failed; with `list`, nothing is run.

    Raises:
        InputError: as `bench`; no model of a study is on this machine.
    """
    told = listener or BenchListener()
    names = [request.name] if request.name is not None else list(PUBLISHED)
    if not request.list and request.name is None and request.model is None:
        names = [name for name in names if _is_here(PUBLISHED[name].model)]
        if not names:
            models = ", ".join(dict.fromkeys(study.model for study in PUBLISHED.values()))
            raise InputError(f"no model of a published study is on this machine ({models}): NAME --model DIR names one")
    began = time.monotonic() if started is None else started
    studies, error = [], None
    for name in names:
        study = PUBLISHED[name]
        document = _described(name, study)
        studies.append(document)
        if request.list:
            continue
        told.model(f"{name}: {request.model or study.model}")
        try:
            _compare(document, run_bench(_bench(request, study), told, began))
        except GpmetricError as failure:
            if len(names) == 1:
                raise
            document["error"] = str(failure)
            error = error or f"{name}: {failure}"
    return {"studies": studies, "error": error}


reproduce = as_function("reproduce", ReproduceRequest, run_reproduce, "name", result=ReproduceResult)


def _is_here(model: str) -> bool:
    """Whether a model of the Hub was downloaded."""
    return isinstance(try_to_load_from_cache(model, "config.json"), str) or Path(model).is_dir()


def _bench(request: ReproduceRequest, study: Study) -> BenchRequest:
    """The published protocol; texts and the model may be others, and windows fewer."""
    metrics = dict.fromkeys(metric for metric, _ in study.figures)
    made = BenchRequest(**request.shared | {
        "model": request.model or study.model,
        "calibration": request.calibration or study.calibration,
        "text": (request.text or study.text,),
        "metric": tuple(metrics),
        "target": tuple(dict.fromkeys(target for _, target in study.figures)),
        "sequence_length": request.sequence_length or study.sequence_length,
        "sampling": "documents",
        "bos": "never",
    })  # fmt: skip
    made.check()
    return made


def _described(name: str, study: Study) -> dict[str, Any]:
    rows: list[dict[str, Any]] = [] if study.dense is None else [_row("dense", None, study.dense)]
    rows += [_row(metric, target, figure) for (metric, target), figure in study.figures.items()]
    told = {one: getattr(study, one) for one in ("source", "model", "calibration", "text")}
    return {"name": name} | told | {"samples": 128, "sequence_length": study.sequence_length, "rows": rows}


def _row(metric: str, target: str | None, figure: float) -> dict[str, Any]:
    near = target == "0.5" and metric != "magnitude"
    tolerance = _DENSE if target is None else _NEAR if near else _FAR
    return {"metric": metric, "target": target, "published": figure, "tolerance": round(tolerance * figure, 4)}


def _compare(document: dict[str, Any], found: Mapping[str, Any]) -> None:
    """Puts ours beside each published figure."""
    (dense,) = found["dense"].values()
    ours: dict[tuple[str, str | None], float] = {("dense", None): dense}
    for row in found["results"]:
        if row["error"] is None:
            (ours[row["metric"], row["target"]],) = row["ppl"].values()
    for row in document["rows"]:
        figure = ours.get((row["metric"], row["target"]))
        row["ours"] = figure
        row["within"] = figure is not None and abs(figure - row["published"]) <= row["tolerance"]
    document["run"] = {
        key: found[key] for key in ("model", "sequence_length", "calibration", "texts", "bos", "sampling")
    }
