"""What commands show when they are done; formulas are printed as plain text, never as markup."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gpmetric.evolution.request import DiscoverRequest
from gpmetric.options import Request, command_line
from gpmetric.terminal.figures import experts_of, figure, needs_of, number, recipe_name
from gpmetric.terminal.narrow import fitted
from gpmetric.terminal.text import Text

__all__ = [
    "print_allocation",
    "print_analysis",
    "print_bench",
    "print_catalogue",
    "print_discover",
    "print_evaluation",
    "print_export",
    "print_plan",
    "print_prune",
    "print_slim",
    "print_tune",
    "print_verify",
]

_PARTS_SHOWN = 20  # rows of an analysis
_FREE = "best without gradients"


def print_discover(console: Console, result: Mapping[str, Any], request: DiscoverRequest) -> None:
    """The winner beside every baseline on the test text, and what the search did to find it."""
    _print_tested(console, result)
    _print_verdict(console, result, request)
    if (free := _other_without_gradients(result)) is not None:
        console.print(Text(f"{_FREE}: {free['formula']}"), soft_wrap=True)
    confidence = result["confidence"]
    if confidence["interval"]:
        low, high = confidence["interval"]
        console.print(
            Text(
                f"mean excess against {confidence['rival']} over {confidence['draws']} calibration draws: "
                f"{confidence['difference']:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}"
            ),
            soft_wrap=True,
        )
    elif confidence["asked"]:
        drawn = f"{confidence['draws']} of {confidence['asked']} draws fitted into the time"
        all_drawn = confidence["draws"] == confidence["asked"]
        reason = "it takes two draws with finite figures" if all_drawn else drawn
        console.print(Text(f"no confidence interval: {reason}"), soft_wrap=True)
    _print_rungs(console, result)
    seconds = result["seconds"]["per_evaluation"]["per_candidate"]
    console.print(
        Text(f"{result['evaluations']} evaluations, {seconds:.3f} s per distinct formula; ledger {request.ledger}"),
        soft_wrap=True,
    )


def _print_warnings(console: Console, result: Mapping[str, Any]) -> None:
    """What must be known of a result, a line each; of a mixture, also what its experts read."""
    if "tokens" in result.get("experts", ()):
        console.print(Text(experts_of(result["experts"])), soft_wrap=True)
    for line in result.get("warnings", ()):  # a ledger of an older version has none
        console.print(Text(f"warning: {line}"), soft_wrap=True)


def _print_verdict(console: Console, result: Mapping[str, Any], request: DiscoverRequest) -> None:
    """The winner and why, or that nothing better was found and how to go on; then what the time did not allow."""
    because = result.get("because", "")  # a ledger of an older version does not say
    better, stopped = result.get("better", True), result.get("stopped") is not None
    winner = [f"winner: {result['winner']['formula']}", *([because] if because else [])]
    lines = winner if better else [because.partition(";")[0]]
    if stopped or not better:
        further = replace(request, resume=True) if stopped else request.prolonged()
        lines.append(f"go on with: {command_line('discover', further)}")
    for line in (*lines, *(f"cut: {one}" for one in result.get("cut", ()))):
        console.print(Text(line), soft_wrap=True)
    _print_warnings(console, result)


def _other_without_gradients(result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The row of the best metric without gradients, unless it is the winner's or there is none."""
    free: Mapping[str, Any] | None = result["best_gradient_free"]
    return None if free is None or free["formula"] == result["winner"]["formula"] else free


def _print_tested(console: Console, result: Mapping[str, Any]) -> None:
    """Perplexity by target and mean excess log-loss, the best first."""
    model, dense = result["model"], result["dense"]["test"]
    name = model if isinstance(model, str) else ", ".join(model)
    table = Table(title=Text(f"perplexity on test, {name}, dense {figure(dense)}"), title_justify="left")
    table.add_column("metric")
    for heading in (*result["targets"], "mean excess"):
        table.add_column(Text(heading), justify="right")
    rows = {**({"winner": result["winner"]} if result.get("better", True) else {}), **result["baselines"]}
    if (free := _other_without_gradients(result)) is not None:
        rows[_FREE] = free
    if (regrouped := result["regrouped"]) is not None:
        rows[regrouped["formula"]] = regrouped
    for name, row in sorted(rows.items(), key=lambda item: number(item[1]["mean_excess"])):
        figures = [_or_dash(row["ppl"][target], 3) for target in result["targets"]]
        style = "bold" if name in ("winner", result["winner"]["formula"]) else ""
        table.add_row(Text(name), *figures, _or_dash(row["mean_excess"], 4), style=style)
    console.print(fitted(table, console.width))


def _or_dash(figure: float | None, digits: int) -> str:
    """A figure, or a dash where there is none or it is not finite."""
    return "-" if figure is None else f"{figure:.{digits}f}"


def _print_rungs(console: Console, result: Mapping[str, Any]) -> None:
    """How many formulas every layer of simplification and every rung of the screening let pass."""
    counts, seconds = result["counts"], result["seconds"]["per_evaluation"]["rungs"]
    layers = ("drawn", "unique_texts", "unique_opposites", "unique_canonical", "unique_ranked", "unique_masks")
    table = Table(title="what was paid for", title_justify="left")
    for heading in ("step", "formulas", "seconds each", "rank correlation with the last"):
        table.add_column(heading, justify="left" if heading == "step" else "right")
    for name in layers:
        table.add_row(name.replace("unique_", "distinct "), Text(counts[name]), "", "")
    for row in result["screening"]:
        correlation = "" if row["spearman"] is None else f"{row['spearman']:.2f}"
        table.add_row(Text(row["rung"]), Text(row["measured"]), f"{seconds.get(row['rung'], 0.0):.3f}", correlation)
    console.print(fitted(table, console.width))


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
    """A row per metric and target, a column per text, the best of a target in bold."""
    texts = list(result["dense"])
    table = Table(title=Text(f"perplexity, {result['model']}, {result['protocol']}"), title_justify="left")
    for heading in ("target", "metric", "update"):
        table.add_column(heading)
    for heading in (*texts, "sparsity", "seconds"):
        table.add_column(Text(heading), justify="right")
    table.add_row("dense", "", "", *(f"{value:.3f}" for value in result["dense"].values()), "", "")
    for row in result["results"]:
        rivals = [other for other in result["results"] if other["target"] == row["target"] and not other["error"]]
        best = {text: min((other["ppl"][text] for other in rivals), default=math.nan) for text in texts}
        figures = [Text(f"{row['ppl'][text]:.3f}", "bold" if row["ppl"][text] == best[text] else "") for text in texts]
        table.add_row(
            *(Text(row[key]) for key in ("target", "metric", "update")),
            *figures,
            f"{row['sparsity']:.4f}",
            f"{row['seconds']:.1f}",
        )
    console.print(fitted(table, console.width))
    _print_warnings(console, result)


def _print_win_loss(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """A row per metric, its mean excess on each model with the best in bold; then how it stands against Wanda."""
    models = {name: Path(name).name for name in rows[0]["mean_excess"]}
    if len(set(models.values())) < len(models):
        models = {name: name for name in models}
    duels = {row["metric"]: one for row in rows for one in row["against"] if one["metric"] == "wanda"}
    title = "mean excess log-loss by model" + "; targets and texts won against wanda" * bool(duels)
    table = Table(title=title, title_justify="left")
    for heading in ("metric", "update"):
        table.add_column(heading)
    for heading in models.values():
        table.add_column(Text(heading), justify="right")
    for heading in ("won", "lost", "tied", "ratio") if duels else ():
        table.add_column(heading, justify="right")
    best = {name: min(row["mean_excess"][name] for row in rows) for name in models}
    for row in rows:
        means = [(row["mean_excess"][name], best[name]) for name in models]
        figures = [Text(f"{mean:.4f}", "bold" if mean == lowest else "") for mean, lowest in means]
        table.add_row(Text(row["metric"]), Text(row["update"]), *figures, *_standing(duels.get(row["metric"])))
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


def print_allocation(console: Console, result: Mapping[str, Any], request: Request) -> None:
    """The picked allocation beside every named rule at the sparsity next to it, and what the front spans."""
    if result["error"] is not None:
        return
    picked = result["picked"]
    table = Table(title=Text(f"{result['metric']} on {Path(result['model']).name}, validation"), title_justify="left")
    for heading in ("allocation", "sparsity", "of all parameters", "perplexity", "excess"):
        table.add_column(heading, justify="left" if heading == "allocation" else "right")
    rows = {f"picked ({result['allocator']})": picked} | {
        name: min(points, key=lambda point: abs(point["sparsity"] - picked["sparsity"]))
        for name, points in result["baselines"].items()
    }
    for name, point in rows.items():
        figures = (f"{point['sparsity']:.4f}", f"{point['sparsity_total']:.4f}", f"{point['perplexity']:.3f}")
        table.add_row(name, *figures, f"{point['excess']:.4f}", style="bold" if point is picked else "")
    console.print(fitted(table, console.width))
    _print_warnings(console, result)
    if "in_use" in picked:
        told = ", ".join(f"{name} {number(point['excess']):.4f}" for name, point in picked["in_use"].items())
        used = f"--update {result['update']} --fit {result['fit']}"
        console.print(Text(f"in use ({used}): excess {told}; written: {picked['written']}"), soft_wrap=True)
    if not result["evaluations"]:  # nothing was searched
        return
    first, last = result["front"][0], result["front"][-1]
    span = f"{first['excess']:.4f} at {first['sparsity']:.3f} to {last['excess']:.4f} at {last['sparsity']:.3f}"
    cost = f"{result['evaluations']} evaluations, {result['tokens']:,} tokens, {result['seconds']:.0f} s"
    console.print(Text(f"front of {len(result['front'])}: excess {span}; {cost}"), soft_wrap=True)


def print_analysis(console: Console, result: Mapping[str, Any], request: Request) -> None:
    """The strongest parts of formulas by their effect, significant ones in bold, and the principles in words."""
    told = f"parts of {result['formulas']} formulas of {result['lineages']} lineages by effect on fitness"
    title = f"{told}, 1 for always better; bold: q < 0.05, pale: rests on fewer than 6 lineages"
    table = Table(title=title, title_justify="left")
    table.add_column("part")
    for heading in ("with", "without", "lineages", "effect", "q", *(f"at {target}" for target in result["targets"])):
        table.add_column(Text(heading), justify="right")
    shown = [row for row in result["parts"] if row["same_as"] is None and row["effect"] is not None]
    for row in shown[:_PARTS_SHOWN]:
        effects = [row["effect"], *(test["effect"] for test in row["targets"].values())]
        overall, *each = ("" if effect is None else f"{effect:+.2f}" for effect in effects)
        style = "dim" if row["rests_on_few"] else "bold" if row["q"] < 0.05 else ""
        counts = (str(row[name]) for name in ("with", "without", "lineages_with"))
        table.add_row(Text(row["name"]), *counts, overall, f"{row['q']:.2g}", *each, style=style)
    console.print(fitted(table, console.width))
    if result["masks"] is None:
        console.print(Text("this ledger holds no mask sketches: nothing is said about masks"))
    principles = result["principles"] or ["no finding is significant (q < 0.05)"]
    for line in (result["note"], "principles:", *(f"- {sentence}" for sentence in principles)):
        console.print(Text(line), soft_wrap=True)


def print_slim(console: Console, result: Mapping[str, Any], request: Request) -> None:
    """What stays of every block, and what that costs in perplexity."""
    table = Table(title=Text(f"{Path(result['model']).name}, what stays"), title_justify="left")
    experts = "expert" in result["granularity"]
    for heading in ("block", *(("experts", "removed") if experts else ("key/value groups", "channels"))):
        table.add_column(heading, justify="right", overflow="fold")
    for index, width in enumerate(result["widths"]):
        if experts:
            table.add_row(str(index), str(width["experts"]), " ".join(map(str, width["removed"])))
        else:
            table.add_row(str(index), str(width["heads"]), str(width["channels"]))
    console.print(fitted(table, console.width))
    before, after = result["parameters_before"], result["parameters_after"]
    figures = ", ".join(f"{name} {number(result[name]):.3f}" for name in ("dense", "initial", "perplexity"))
    console.print(Text(f"perplexity on validation: {figures}"), soft_wrap=True)
    if result["repair"] == "bias" and not result["repaired"]:
        told = "no output layer has a bias, so nothing was repaired: --add-bias gives them one"
        console.print(Text(told), soft_wrap=True)
    if result["starts"]:
        told = ", ".join(f"{name} {number(figure):.4f}" for name, figure in result["starts"].items())
        told = f"begun from {result['begun']}, the best start on the search text ({result['objective']}: {told})"
        console.print(Text(told), soft_wrap=True)
    _print_warnings(console, result)
    asked = f"{result['asked']:g} of the experts" if experts else f"{result['asked']:g}"
    share = f"{result['sparsity']:.4f} of the parameters inside the blocks removed ({asked} asked for)"
    console.print(Text(f"{result['output']}: {before:,} -> {after:,} parameters, {share}; verified"), soft_wrap=True)


def print_export(console: Console, result: Mapping[str, Any], request: Request) -> None:
    """Nothing: the file is there."""


def print_catalogue(console: Console, result: Mapping[str, Any], request: Request) -> None:
    """What every formula costs in units of SparseGPT on each model; of one alone, target by target."""
    alone = len(result["entries"]) == 1
    metrics = dict.fromkeys(name for model in result["models"] for name in model["metrics"])
    rows = [(name, target) for name in metrics for target in ("mean", *(_targets_of(result, name) if alone else ()))]
    table = Table(title="excess log-loss in units of sparsegpt's", title_justify="left")
    table.add_column("formula")
    for model in result["models"]:
        table.add_column(Text(model["model"]), justify="right")
    for name, target in rows:
        told = [_ratio(model["metrics"], name, target) for model in result["models"]]
        table.add_row(Text(name if target == "mean" else f"  at {target}"), *told)
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
        return _or_dash(metrics[name]["ratio"], 3)
    mine, base = (metrics[one]["excess"].get(target) for one in (name, "sparsegpt"))
    return "-" if mine is None or not base else f"{mine / base:.3f}"


def print_tune(console: Console, result: Mapping[str, Any], request: Request) -> None:
    """The recipe, what it is without each of its parts, and its rivals; then what was written."""
    texts = [f"on {Path(one['text']).name}" for one in result["texts"]]
    title = f"excess log-loss, {Path(result['model']).name} at {result['target']}"
    table = Table(title=Text(title), title_justify="left")
    for heading in ("recipe", "on validation", *texts):
        table.add_column(Text(heading), justify="left" if heading == "recipe" else "right")
    for row in result["table"]:
        excess = [row["excess"], *row.get("text_excess", [None] * len(texts))]
        style = "bold" if row["what"] == "recipe" else ""
        name = recipe_name(row["recipe"]) if row["what"] == "recipe" else row["what"]
        table.add_row(Text(name), *(_or_dash(one, 4) for one in excess), style=style)
    console.print(fitted(table, console.width))
    for line in result["cut"]:
        console.print(Text(f"cut: {line}"), soft_wrap=True)
    _print_warnings(console, result)
    pruned = result["pruned"]
    figures = f"perplexity {pruned['perplexity']:.4f}, dense {pruned['dense']:.4f}, on {pruned['text']['text']}"
    if "widths" in pruned:
        before, after = pruned["parameters_before"], pruned["parameters_after"]
        share = f"{pruned['sparsity']:.4f} of those inside the blocks removed ({pruned['asked']:g} asked for)"
        told = (
            f"{pruned['output']}: {before:,} -> {after:,} parameters, {share}; {figures}; {pruned['format']}; verified"
        )
        console.print(Text(told), soft_wrap=True)
        return
    share = f"{pruned['sparsity']:.4f} of the weights zero"
    console.print(Text(f"{pruned['output']}: {share}; {figures}; verified; recipe.toml is in it"), soft_wrap=True)


def print_prune(console: Console, result: Mapping[str, Any], request: Request) -> None:
    """What was reached, in one line."""
    sparsity = f"{result['sparsity']:.4f} of {len(result['layers'])} layers zero"
    if result["allocation"]:
        sparsity += f", allocated by {result['allocation']['file']}"
    if "permuted" in result:
        sparsity += f", inputs of {result['permuted']['layers']} of {result['permuted']['of']} N:M layers permuted"
    figures = f"perplexity {result['perplexity']:.4f}, dense {result['dense']:.4f}, on {result['text']['text']}"
    if result["text"]["sha256"] == result["calibration"]["sha256"]:
        figures += ", the text of the calibration (--text)"
    console.print(Text(f"{result['output']}: {sparsity}; {figures}; verified"), soft_wrap=True)
    _print_warnings(console, result)


def print_verify(console: Console, result: Mapping[str, Any], request: Request) -> None:
    """Every problem, or what was found to be as it should be."""
    for problem in result["problems"]:
        console.print(Text(problem), soft_wrap=True)
    if result["ok"]:
        found = result["perplexity"]
        measured = "no text at hand" if found is None else f"perplexity {found:.4f}"
        share = f"{result['layers']} layers zero" if result["layers"] else "the parameters inside the blocks gone"
        told = f"{result['checkpoint']}: ok, {result['sparsity']:.4f} of {share}, {measured}"
        console.print(Text(told), soft_wrap=True)
    for line in result["unchecked"]:
        console.print(Text(f"not checked: {line}"), soft_wrap=True)


def print_evaluation(console: Console, result: Mapping[str, Any], request: Request) -> None:
    """What was measured on; the listener has printed the figures."""
    whole = result["windows_in_all"]
    if not whole:  # tasks alone
        return
    windows = f"{result['windows']}{f' of {whole}' if whole > result['windows'] else ''} windows"
    size = f"{windows} of {result['sequence_length']} tokens"
    console.print(Text(f"{size}, {result['dtype']}, {result['device']}"), soft_wrap=True)


def print_plan(console: Console, result: Mapping[str, Any], request: Request) -> None:
    """What a command would take."""
    console.print(Text(needs_of(result)), soft_wrap=True)
