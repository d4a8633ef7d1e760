"""The pages of `bench` and of `tune`: metrics and recipes beside each other, on texts and models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from gpmetric.files import number
from gpmetric.pruning.requests import PruneRequest, VerifyRequest
from gpmetric.reporting.blocks import Block, Candidates, Copies, Figure, Page, Section, Table, copied, file_names, told
from gpmetric.reporting.charts import Line, bars, lines
from gpmetric.reporting.layers import layer_map
from gpmetric.reporting.provenance import provenance
from gpmetric.tuning.recipe_name import recipe_name

__all__ = ["bench_page", "tuned_page"]

_MEAN = "mean excess log-loss over targets and texts, nats per token"


def bench_page(document: Mapping[str, Any]) -> Page:
    """The page of a bench, on one model or several."""
    models = [one for one in document.get("models", [document]) if "results" in one]
    failed = [f"{one['model']} failed: {one['error']}" for one in document.get("models", ()) if one.get("error")]
    warnings = [*failed, *(line for one in models for line in one.get("warnings", ()))]
    warnings += [f"{row['metric']} at {row['target']}: {row['error']}" for one in models for row in one["results"]
                 if row.get("error")]  # fmt: skip
    means = [_means(one) for one in models]
    sections = [*_transfer(document.get("transfer", ()))]
    for at, (one, found) in enumerate(zip(models, means, strict=True)):
        sections.append(_model(one, found, f"model-{at}"))
    sections += [provenance(one) if len(models) == 1 else _named(provenance(one), one, at)
                 for at, one in enumerate(models)]  # fmt: skip
    names = ", ".join(Path(str(one["model"])).name for one in models)
    tiles = [("metrics", told(len({row["metric"] for one in models for row in one["results"]}))),
             ("rows", told(sum(len(one["results"]) for one in models))), ("models", told(len(models)))]  # fmt: skip
    return Page(f"Bench on {names}", _best(means), tiles, sections, warnings)


def _named(section: Section, document: Mapping[str, Any], at: int) -> Section:
    return Section(f"provenance-{at}", f"Provenance of {Path(str(document['model'])).name}", section.blocks)


def _means(document: Mapping[str, Any]) -> dict[str, tuple[float, str]]:
    """By metric its mean excess and its update; infinite where a figure is."""
    found: dict[str, list[float]] = {}
    updates: dict[str, str] = {}
    for row in document["results"]:
        updates[str(row["metric"])] = str(row["update"])
        for text, ppl in row["ppl"].items():
            found.setdefault(str(row["metric"]), []).append(_excess(ppl, document["dense"][text]))
    return {name: (fmean(values), updates[name]) for name, values in found.items()}


def _excess(ppl: float | None, dense: float | None) -> float:
    return math.inf if not ppl or not dense else math.log(ppl / dense)


def _best(means: Sequence[Mapping[str, tuple[float, str]]]) -> str:
    """Which metric is best, of those that mask and of all, over the models."""
    shared = [name for name in means[0] if all(name in one for one in means)] if means else []
    overall = {name: fmean(one[name][0] for one in means) for name in shared}
    finite = {name: mean for name, mean in overall.items() if math.isfinite(mean)}
    if not finite:
        return "No metric has finite figures everywhere."
    best = min(finite, key=lambda name: finite[name])
    told_best = f"{best} is best of {len(overall)} metrics, with a mean excess log-loss of {finite[best]:.4f}"
    masking = [name for name in finite if means[0][name][1] == "none"]
    if means[0][best][1] != "none" and masking:
        first = min(masking, key=lambda name: finite[name])
        return f"{told_best}; of those that only mask, it is {first} with {finite[first]:.4f}."
    return f"{told_best}."


def _model(document: Mapping[str, Any], means: Mapping[str, tuple[float, str]], identity: str) -> Section:
    """Every row of a model, and the mean of each metric."""
    texts = list(document["dense"])
    ordered = sorted(means.items(), key=lambda one: one[1][0])
    low = ordered[0][0] if ordered else ""
    drawn = bars(
        "Mean excess by metric",
        [
            (name, mean, "winner" if name == low else "solver" if update != "none" else "baseline", told(mean))
            for name, (mean, update) in ordered
        ],
    )
    rows = [["dense", "", "", *(told(document["dense"][text], 3) for text in texts), "", ""]]
    strong = set()
    for row in document["results"]:
        rivals = [one["ppl"] for one in document["results"] if one["target"] == row["target"] and not one.get("error")]
        best = {text: min((one[text] for one in rivals if one[text] is not None), default=None) for text in texts}
        strong |= {len(rows)} if best and all(row["ppl"][text] == best[text] for text in texts) else set()
        rows.append([
            str(row["metric"]), str(row["target"]), str(row["update"]), *(told(row["ppl"][text], 3) for text in texts),
            told(row["sparsity"]), told(row["seconds"], 1),
        ])  # fmt: skip
    columns = ("metric", "target", "update", *file_names(list(map(str, texts))), "sparsity", "seconds")
    table = Table(
        "Perplexity; the best of each target stands out", columns, rows, 3, frozenset(strong), code=frozenset({0})
    )
    title = f"{Path(str(document['model'])).name}, {document['protocol']} protocol"
    return Section(identity, title, [Figure(drawn, f"{_MEAN.capitalize()}."), table])


def _transfer(rows: Sequence[Mapping[str, Any]]) -> Iterator[Section]:
    """A metric on several models: its mean excess on each, and how it stands against Wanda."""
    if not rows:
        return
    models = list(rows[0]["mean_excess"])
    lowest = {name: min(number(row["mean_excess"][name]) for row in rows) for name in models}
    cells, wins = [], []
    for row in rows:
        duel = next((one for one in row["against"] if one["metric"] == "wanda"), None)
        ratio = None if duel is None else duel["mean_ratio"]
        cells.append([
            str(row["metric"]), str(row["update"]), *(told(row["mean_excess"][name]) for name in models),
            *(("", "", "") if duel is None else (told(duel["wins"]), told(duel["losses"]), told(duel["ties"]))),
            "" if ratio is None else f"{ratio:.3f}",
        ])  # fmt: skip
        if ratio is not None:
            wins.append((str(row["metric"]), float(ratio), "winner" if ratio < 1 else "baseline", f"{ratio:.3f}"))
    strong = frozenset(
        at for at, row in enumerate(rows) if all(number(row["mean_excess"][name]) == lowest[name] for name in models)
    )
    columns = ("metric", "update", *file_names(list(map(str, models))), "won", "lost", "tied", "ratio")
    blocks: list[Block] = [
        Table("Mean excess by model; won and lost against Wanda", columns, cells, 2, strong, code=frozenset({0}))
    ]
    if wins:
        drawn = bars("Excess over that of Wanda", sorted(wins, key=lambda one: one[1]))
        note = "Mean of excess over Wanda's on the same model, target and text; below 1 is better."
        blocks.insert(0, Figure(drawn, note))
    yield Section("transfer", "Over the models", blocks)


def tuned_page(document: Mapping[str, Any]) -> Page:
    """The page of `gpmetric tune`, of weights or of units."""
    recipe, pruned = document["recipe"], document.get("pruned") or {}
    model, name = Path(str(document["model"])).name, recipe_name(recipe)
    verdict = (
        f"The best recipe for {model} at {document['target']} is {name}, with excess {told(document['excess'])} on "
    )
    verdict += "validation"
    others = [row for row in document["table"] if row["what"] in ("wanda", "sparsegpt")]
    verdict += "".join(f"; {row['what']} has {told(row['excess'])}" for row in others) + "."
    sections = [*_parts(document), *_trials(document)]
    allocation = recipe.get("allocation")
    if isinstance(allocation, Mapping) and isinstance(found := allocation.get("sparsity"), Mapping):
        layers = {str(layer): float(value) for layer, value in found.items()}
        sections.append(Section("sparsity", "Sparsity by layer", layer_map(layers, "Sparsity by block and matrix")))
    sections += [Section("next", "What to do next", [_again(document, pruned)]), provenance(document)]
    tiles = [
        ("excess on validation", told(document["excess"])),
        ("perplexity", told(pruned.get("perplexity"), 3)),
        ("perplexity, dense", told(pruned.get("dense"), 3)),
        ("recipes tried", told(len(document["trials"]))),
    ]
    warnings = [*document.get("warnings", ()), *(f"cut: {one}" for one in document.get("cut", ()))]
    return Page(f"Recipe for {model}", verdict, tiles, sections, warnings)


def _again(document: Mapping[str, Any], pruned: Mapping[str, Any]) -> Copies:
    output, own = Path(str(pruned.get("output", "tuned"))), str(document["model"]) == "demo"
    calibration = document.get("splits", {}).get("calibration", {}).get("text")
    model = None if own else str(document["model"])
    found = {"verify": copied("verify", VerifyRequest(folder=str(output), against=model))}
    if "start" not in document["recipe"]:
        again = PruneRequest(
            model=model, calibration=None if own or calibration is None else str(calibration),
            recipe=output / "recipe.toml", output=Path("again"),
        )  # fmt: skip
        found["prune"] = copied("prune", again)
    return Copies(found)


def _parts(document: Mapping[str, Any]) -> Iterator[Section]:
    """The recipe without each of its parts, beside the rivals."""
    texts = [str(one["text"]) for one in document.get("texts", ())]
    rows = sorted(document["table"], key=lambda row: number(row["excess"]))
    drawn = bars(
        "Excess of the recipe, and without its parts",
        [
            (str(row["what"]), number(row["excess"]), "winner" if row["what"] == "recipe" else "plain",
             told(row["excess"]))
            for row in rows
        ],
    )  # fmt: skip
    cells = []
    for row in rows:
        on_texts = [*row.get("text_excess", ()), *[None] * len(texts)][: len(texts)]
        cells.append([str(row["what"]), told(row["excess"]), *map(told, on_texts), told(row["seconds"], 1)])
    strong = frozenset(at for at, row in enumerate(rows) if row["what"] == "recipe")
    columns = ("what", "validation", *file_names(texts), "seconds")
    table = Table("Excess log-loss, nats per token", columns, cells, strong=strong)
    yield Section("parts", "What each part is worth", [Figure(drawn, "Excess on validation; less is better."), table])


def _trials(document: Mapping[str, Any]) -> Iterator[Section]:
    """The best so far, and every recipe that was tried."""
    trials = document["trials"]
    best, falling = math.inf, []
    for at, row in enumerate(trials, start=1):
        if row["share"] == 1.0 and row["excess"] is not None:
            best = min(best, row["excess"])
            falling.append((float(at), best))
    if len(falling) > 1:
        drawn = [Line("best so far", "best", falling, steps=True)]
        svg = lines("Best excess by trial", "trial", "excess on validation", drawn)
        yield Section("convergence", "Convergence", [Figure(svg, "Of recipes measured on all windows.")])
    rows = [
        [recipe_name(row["recipe"]), str(row.get("error") or "measured"), row["share"], row["seconds"], row["excess"]]
        for row in trials
    ]
    rows.sort(key=lambda row: (row[4] is None, row[4] or 0.0))
    columns = [("recipe", False), ("state", False), ("share of the windows", True), ("seconds", True), ("excess", True)]
    yield Section("candidates", "Recipes that were tried", [Candidates(columns, rows, len(rows), "recipes")])
