"""One model, sparsity and seed: what every method keeps, judged on held-out texts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from gpmetric.data import check_disjoint
from gpmetric.evaluation.perplexity import mean_loss, perplexity
from gpmetric.evaluation.windows import read_windows
from gpmetric.structured.baselines import choose
from gpmetric.structured.export import Slimmed
from gpmetric.structured.ledger import Ledger
from gpmetric.structured.request import RULES, Estimator, Objective, SlimRequest
from gpmetric.structured.shrink import Shrinker
from gpmetric.structured.slim import Loaded, load, prepare, search

Settings = Mapping[str, Any]  # options of bench_structured.py, plain values

# method -> estimator and objective
SEARCHES: dict[str, tuple[Estimator, Objective]] = {
    "rloo": ("rloo", "kl"),
    "rloo on the loss": ("rloo", "loss"),
    "paper": ("paper", "loss"),
}
METHODS = (*RULES, "start", *SEARCHES, "uniform")


def make_request(settings: Settings, model: str, sparsity: float, seed: int) -> SlimRequest:
    """What is prepared, and what `rloo` is asked for."""
    names = (
        "calibration",
        "samples",
        "search_windows",
        "sequence_length",
        "steps",
        "batch",
        "repair",
        "device",
        "dtype",
    )
    return SlimRequest(
        model=model,
        sparsity=sparsity,
        windows=1,  # of validation, which nobody reads here
        add_bias=settings["repair"] != "none" and not settings["no_bias"],
        shuffle=True,
        seed=seed,
        **{name: settings[name] for name in names},
    )


def run_case(settings: Settings, model: str, sparsity: float, seed: int) -> dict[str, Any]:
    """`runs`, one per method and text, and the `seconds` of it all.

    Raises:
        GpmetricError: model or texts cannot be used.
    """
    start = time.monotonic()
    request = make_request(settings, model, sparsity, seed)
    loaded = load(request)
    length = loaded.splits["search"].tokens.shape[1]
    tests = [read_windows(loaded.model, source, length, settings["windows"]) for source in settings["test"]]
    for test in tests:
        check_disjoint({**loaded.splits, "test": test})
    dense = [mean_loss(loaded.model, test.tokens) for test in tests]
    runs = []
    for method, kept, cost in found(settings, request, loaded):
        for test, before in zip(tests, dense, strict=True):
            with Shrinker(loaded.model, loaded.groups).keeping(kept.kept, kept.repairs):
                loss = mean_loss(loaded.model, test.tokens)
            runs.append(
                {
                    "model": model, "sparsity": sparsity, "seed": seed, "method": method, "repair": request.repair,
                    "text": test.text.name, "loss": loss, "excess": loss - before, "perplexity": perplexity(loss),
                    "dense": perplexity(before), "removed": kept.groups.removed(kept.kept) / kept.groups.parameters,
                    "tokens": cost["tokens"], "seconds": cost["seconds"], "widths": kept.widths(),
                }
            )  # fmt: skip
    return {"runs": runs, "seconds": time.monotonic() - start}


def found(settings: Settings, request: SlimRequest, loaded: Loaded) -> Iterator[tuple[str, Slimmed, Mapping[str, Any]]]:
    """Each method, what it keeps, and the tokens and seconds that it took."""
    tokens = loaded.splits["calibration"].tokens
    prepared = prepare(request, loaded)
    for name in settings["method"]:
        start = time.monotonic()
        if name in RULES:
            kept = choose(loaded.model, loaded.groups, name, request.sparsity, tokens, loaded.features, request.seed)
            yield name, prepared.slimmed(kept), spent(start)
        elif name == "start":
            yield name, prepared.chosen(prepared.start), spent(start)
        elif name == "uniform":
            yield name, *searched(replace(request, format="uniform"), loaded)
        else:
            estimator, objective = SEARCHES[name]
            yield name, *searched(replace(request, estimator=estimator, objective=objective), loaded)
    for metric in settings["start"]:
        yield f"start:{metric}", *searched(replace(request, start=metric), loaded)


def spent(start: float) -> dict[str, Any]:
    return {"tokens": 0, "seconds": time.monotonic() - start}


def searched(request: SlimRequest, loaded: Loaded) -> tuple[Slimmed, dict[str, Any]]:
    """What a search delivers."""
    return search(request, prepare(request, loaded), Ledger(None, {}))
