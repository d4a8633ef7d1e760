"""What `gpmetric bench` and `gpmetric catalogue` show when they are done."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from gpmetric.options import Request
from gpmetric.terminal.figures import or_dash, shortened
from gpmetric.terminal.narrow import fitted, numbered
from gpmetric.terminal.text import Text
from gpmetric.terminal.warnings import print_warnings

__all__ = ["print_bench", "print_catalogue"]


def print_bench(console: Console, result: Mapping[str, Any], request: Request) -> None:
    """A table for each model that `gpmetric bench` measured, and for several models one of wins and losses."""
    for document in result.get("models", [result]):
        if "results" in document:
            _print_model(console, document)
        if "error" in document:
            console.print(Text(f"{document['model']} failed: {document['error']}"), soft_wrap=True)
    if result.get("transfer"):
        _print_win_loss(console, result["transfer"])


def _print_model(console: Console, result: Mapping[str, Any]) -> None:
    """A row per metric and target, a column per text, the best of a target marked."""
    texts = list(result["dense"])
    title = f"perplexity, {result['model']}, {result['protocol']}; *: the best at a target"
    table = numbered(title, "metric", "target", "update")
    for heading in (*texts, "sparsity", "seconds"):
        table.add_column(Text(heading), justify="right")
    table.add_row("", "dense", "", "", *(f"{value:.3f}  " for value in result["dense"].values()), "", "")
    for place, row in enumerate(result["results"], start=1):
        rivals = [other for other in result["results"] if other["target"] == row["target"] and not other["error"]]
        best = {text: min((other["ppl"][text] for other in rivals), default=math.nan) for text in texts}
        figures = [_marked(f"{row['ppl'][text]:.3f}", row["ppl"][text] == best[text]) for text in texts]
        table.add_row(
            str(place),
            *(Text(shortened(row[key])) for key in ("metric", "target", "update")),
            *figures,
            f"{row['sparsity']:.4f}",
            f"{row['seconds']:.1f}",
        )
    console.print(fitted(table, console.width))
    print_warnings(console, result)


def _marked(figure: str, best: bool) -> Text:
    """A figure with a mark behind it where it is the best, also where nothing is bold."""
    return Text(f"{figure} {'*' if best else ' '}", "bold" if best else "")


def _print_win_loss(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """A row per metric, its mean excess on each model with the best marked; then how it stands against Wanda."""
    models = {name: Path(name).name for name in rows[0]["mean_excess"]}
    if len(set(models.values())) < len(models):
        models = {name: name for name in models}
    duels = {row["metric"]: one for row in rows for one in row["against"] if one["metric"] == "wanda"}
    title = "mean excess log-loss by model, *: the best" + "; targets and texts won against wanda" * bool(duels)
    table = numbered(title, "metric", "update")
    for heading in models.values():
        table.add_column(Text(heading), justify="right")
    for heading in ("won", "lost", "tied", "ratio") if duels else ():
        table.add_column(heading, justify="right")
    best = {name: min(row["mean_excess"][name] for row in rows) for name in models}
    for place, row in enumerate(rows, start=1):
        means = [(row["mean_excess"][name], best[name]) for name in models]
        figures = [_marked(f"{mean:.4f}", mean == lowest) for mean, lowest in means]
        words = Text(shortened(row["metric"])), Text(row["update"])
        table.add_row(str(place), *words, *figures, *_standing(duels.get(row["metric"])))
    console.print(fitted(table, console.width))
    for metric, duel in duels.items():
        if duel["lost_at"]:
            console.print(Text(f"{metric} loses to wanda on {_where(duel['lost_at'], models)}"), soft_wrap=True)


def _standing(duel: Mapping[str, Any] | None) -> list[str]:
    """Won, lost, tied and the mean ratio, where there is one; nothing for Wanda itself."""
    if duel is None:
        return []
    ratio = "" if duel["mean_ratio"] is None else f"{duel['mean_ratio']:.3f}"
    return [*(str(duel[key]) for key in ("wins", "losses", "ties")), ratio]


def _where(places: Sequence[Mapping[str, Any]], models: Mapping[str, str]) -> str:
    """Targets by model, each once whatever the number of texts: `llama 0.5, 2:4; gpt2 2:4`."""
    targets: dict[str, dict[str, None]] = {}
    for place in places:
        targets.setdefault(models[place["model"]], {})[place["target"]] = None
    return "; ".join(f"{model} {', '.join(found)}" for model, found in targets.items())


def print_catalogue(console: Console, result: Mapping[str, Any], request: Request) -> None:
    """What every formula costs in units of SparseGPT on each model; of one alone, target by target."""
    alone = len(result["entries"]) == 1
    metrics = dict.fromkeys(name for model in result["models"] for name in model["metrics"])
    rows = [(name, target) for name in metrics for target in ("mean", *(_targets_of(result, name) if alone else ()))]
    table = numbered("excess log-loss in units of sparsegpt's", "formula")
    for model in result["models"]:
        table.add_column(Text(model["model"]), justify="right")
    for name, target in rows:
        told = [_ratio(model["metrics"], name, target) for model in result["models"]]
        place = str(list(metrics).index(name) + 1) if target == "mean" else ""
        table.add_row(place, Text(name if target == "mean" else f"  at {target}"), *told)
    if result["models"]:
        console.print(fitted(table, console.width))
    for name, entry in result["entries"].items():
        use = f"{entry['update']}, fit {entry['fit']}" if entry["update"] != "none" else "masks only"
        console.print(Text(f"{name}: {entry['formula']} ({use}); {entry['found']}"), soft_wrap=True)


def _targets_of(result: Mapping[str, Any], name: str) -> list[str]:
    found = (target for model in result["models"] for target in model["metrics"].get(name, {"excess": ()})["excess"])
    return list(dict.fromkeys(found))


def _ratio(metrics: Mapping[str, Any], name: str, target: str) -> str:
    """A metric's mean excess, or that at a target, over SparseGPT's."""
    if name not in metrics:
        return "-"
    if target == "mean":
        return or_dash(metrics[name]["ratio"], 3)
    mine, base = (metrics[one]["excess"].get(target) for one in (name, "sparsegpt"))
    return "-" if mine is None or not base else f"{mine / base:.3f}"
