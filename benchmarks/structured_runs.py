"""One model, sparsity and seed: what every method keeps, judged on held-out texts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from gpmetric.data import check_disjoint
from gpmetric.evaluation.perplexity import mean_loss, perplexity
from gpmetric.session.splits import open_text, read_windows
from gpmetric.structured.cost_budgets import pools_of, uniform_counts, uniform_pools
from gpmetric.structured.export import Slimmed
from gpmetric.structured.open_units import open_units
from gpmetric.structured.request import UNIT_RULES, SlimRequest
from gpmetric.structured.scores import UnitSession, unit_scores
from gpmetric.structured.search_log import SearchLog
from gpmetric.structured.shrink import Shrinker
from gpmetric.structured.slim import prepare, search
from gpmetric.structured.unit_space import find_space, top_units

Settings = Mapping[str, Any]  # options of bench_structured.py, plain values

# method -> estimator and objective
SEARCHES: dict[str, tuple[str, str]] = {
    "exchange": ("exchange", "kl"),
    "rloo": ("rloo", "kl"),
    "rloo on the loss": ("rloo", "loss"),
    "paper": ("paper", "loss"),
}
METHODS = (*(name for name, rule in UNIT_RULES.items() if rule.tells(experts=False)), "start", *SEARCHES, "uniform")


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
        output=Path("nowhere"),  # nothing is written
        sparsity=sparsity,
        windows=1,  # of validation, which nobody reads here
        add_bias=settings["repair"] != "none" and not settings["no_bias"],
        shuffle=True,
        estimator="rloo",
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
    units = open_units(request)
    length = units.session.tokens.shape[1]
    tests = [read_windows(units.model, open_text(one), length, settings["windows"]) for one in settings["test"]]
    for test in tests:
        check_disjoint({**units.session.windows, "test": test})
    dense = [mean_loss(units.model, test.tokens) for test in tests]
    runs = []
    for method, kept, cost in found(settings, request, units):
        for test, before in zip(tests, dense, strict=True):
            with Shrinker(units.model, units.groups).keeping(kept.kept, kept.repairs):
                loss = mean_loss(units.model, test.tokens)
            runs.append(
                {
                    "model": model, "sparsity": sparsity, "seed": seed, "method": method, "repair": request.repair,
                    "text": test.text.name, "loss": loss, "excess": loss - before, "perplexity": perplexity(loss),
                    "dense": perplexity(before), "removed": kept.groups.removed(kept.kept) / kept.groups.parameters,
                    "tokens": cost["tokens"], "seconds": cost["seconds"], "widths": kept.widths(),
                }
            )  # fmt: skip
    return {"runs": runs, "seconds": time.monotonic() - start}


def found(
    settings: Settings, request: SlimRequest, units: UnitSession
) -> Iterator[tuple[str, Slimmed, Mapping[str, Any]]]:
    """Each method, what it keeps, and the tokens and seconds that it took."""
    begun = prepare(request, units)
    for name in settings["method"]:
        start = time.monotonic()
        if name in UNIT_RULES:
            yield name, begun.slimmed(choose(name, units, request.sparsity)), spent(start)
        elif name == "start":
            yield name, begun.chosen(begun.start), spent(start)
        elif name == "uniform":
            yield name, *searched(replace(request, format="uniform"), units)
        else:
            estimator, objective = SEARCHES[name]
            yield name, *searched(replace(request, estimator=estimator, objective=objective), units)
    for metric in settings["start"]:
        yield f"start:{metric}", *searched(replace(request, start=metric), units)


def choose(name: str, units: UnitSession, sparsity: float) -> Tensor:
    """The units [units], bool, that stay by a rule.

    A `uniform` rule keeps as many heads and channels in every block, a `global` one compares units everywhere. Block
    influence takes whole blocks, the last of them in part, by position.

    Args:
        name: a key of UNIT_RULES.
        units: of a dense model.
        sparsity: share of the parameters inside the blocks that goes.
    """
    groups = units.groups
    space = find_space(groups, groups.kinds, layers=False)
    scores = unit_scores(name, units)
    if UNIT_RULES[name].loss:  # for what it costs
        scores = scores / groups.cost
    if UNIT_RULES[name].placing == "uniform":
        heads = range(groups.sublayers[0].units + 1)
        pools = uniform_pools(groups, space, uniform_counts(groups, sparsity, groups.kinds, heads))
        return top_units(scores, space, pools)
    return top_units(scores, space, pools_of(groups, space, sparsity, groups.cost))


def spent(start: float) -> dict[str, Any]:
    return {"tokens": 0, "seconds": time.monotonic() - start}


def searched(request: SlimRequest, units: UnitSession) -> tuple[Slimmed, dict[str, Any]]:
    """What a search delivers."""
    return search(request, prepare(request, units), SearchLog(None, {}))
