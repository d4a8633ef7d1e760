"""What commands show when they are done; formulas are printed as plain text, never as markup."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gpmetric.evolution.request import DiscoverRequest
from gpmetric.files import number
from gpmetric.metrics import BASELINES, masks_only
from gpmetric.options import Request, command_line
from gpmetric.pruning.updaters import UPDATERS
from gpmetric.terminal.figures import figure, needs_of, or_dash, shortened
from gpmetric.terminal.narrow import fitted, numbered
from gpmetric.terminal.text import Text
from gpmetric.terminal.warnings import print_warnings
from gpmetric.tuning.recipe_name import recipe_name

__all__ = [
    "print_allocation",
    "print_analysis",
    "print_discover",
    "print_evaluation",
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
    _print_tested(console, result, request.update)
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
    print_warnings(console, result)


def _other_without_gradients(result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The row of the best metric without gradients, unless it is the winner's or there is none."""
    free: Mapping[str, Any] | None = result["best_gradient_free"]
    return None if free is None or free["formula"] == result["winner"]["formula"] else free


def _print_tested(console: Console, result: Mapping[str, Any], update: str) -> None:
    """Perplexity by target and mean excess log-loss, the best first; what updates kept weights is marked."""
    model, dense = result["model"], result["dense"]["test"]
    name = model if isinstance(model, str) else ", ".join(model)
    table = numbered(f"perplexity on test, {name}, dense {figure(dense)}", "metric")
    for heading in (*result["targets"], "mean excess"):
        table.add_column(Text(heading), justify="right")
    rows = {**({"winner": result["winner"]} if result.get("better", True) else {}), **result["baselines"]}
    if (free := _other_without_gradients(result)) is not None:
        rows[_FREE] = free
    if (regrouped := result["regrouped"]) is not None:
        rows[regrouped["formula"]] = regrouped
    ranked, evolved = sorted(rows.items(), key=lambda item: number(item[1]["mean_excess"])), {"winner", _FREE}
    updating = [name for name in rows if UPDATERS[update].changes if name in evolved]
    updating += [name for name in rows if name in BASELINES and not masks_only(name)]
    for place, (name, row) in enumerate(ranked, start=1):
        figures = [or_dash(row["ppl"][target], 3) for target in result["targets"]]
        style = "bold" if name in ("winner", result["winner"]["formula"]) else ""
        words = Text(shortened(name) + " +u" * (name in updating))
        table.add_row(str(place), words, *figures, or_dash(row["mean_excess"], 4), style=style)
    console.print(fitted(table, console.width))
    if updating:
        console.print(Text("+u: kept weights are updated"), soft_wrap=True)


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


def print_allocation(console: Console, result: Mapping[str, Any], request: Request) -> None:
    """The picked allocation beside every named rule at the sparsity next to it, and what the front spans."""
    if result["error"] is not None:
        return
    picked = result["picked"]
    table = numbered(f"{result['metric']} on {Path(result['model']).name}, validation", "allocation")
    for heading in ("sparsity", "of all parameters", "perplexity", "excess"):
        table.add_column(heading, justify="right")
    rows = {f"picked ({result['allocator']})": picked} | {
        name: min(points, key=lambda point: abs(point["sparsity"] - picked["sparsity"]))
        for name, points in result["baselines"].items()
    }
    for place, (name, point) in enumerate(rows.items(), start=1):
        figures = (f"{point['sparsity']:.4f}", f"{point['sparsity_total']:.4f}", f"{point['perplexity']:.3f}")
        table.add_row(str(place), name, *figures, f"{point['excess']:.4f}", style="bold" if point is picked else "")
    console.print(fitted(table, console.width))
    print_warnings(console, result)
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
    title = f"{told}, 1 for always better; *: q < 0.05, pale or in brackets: rests on fewer than 6 lineages"
    table = numbered(title, "part")
    for heading in ("with", "without", "lineages", "effect", "q", *(f"at {target}" for target in result["targets"])):
        table.add_column(Text(heading), justify="right")
    shown = [row for row in result["parts"] if row["same_as"] is None and row["effect"] is not None]
    for place, row in enumerate(shown[:_PARTS_SHOWN], start=1):
        effects = [row["effect"], *(test["effect"] for test in row["targets"].values())]
        overall, *each = ("" if effect is None else f"{effect:+.2f}" for effect in effects)
        few = row["rests_on_few"]
        mark, style = ("", "dim") if few else ("*", "bold") if row["q"] < 0.05 else ("", "")
        counts = (str(row[name]) for name in ("with", "without", "lineages_with"))
        overall = f"({overall})" if few else overall
        table.add_row(f"{mark}{place}", Text(row["name"]), *counts, overall, f"{row['q']:.2g}", *each, style=style)
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
    print_warnings(console, result)
    asked = f"{result['asked']:g} of the experts" if experts else f"{result['asked']:g}"
    share = f"{result['sparsity']:.4f} of the parameters inside the blocks removed ({asked} asked for)"
    console.print(Text(f"{result['output']}: {before:,} -> {after:,} parameters, {share}; verified"), soft_wrap=True)


def print_tune(console: Console, result: Mapping[str, Any], request: Request) -> None:
    """The recipe, what it is without each of its parts, and its rivals; then what was written."""
    texts = [f"on {Path(one['text']).name}" for one in result["texts"]]
    title = f"excess log-loss, {Path(result['model']).name} at {result['target']}; *: the recipe"
    table = numbered(title, "recipe")
    for heading in ("on validation", *texts):
        table.add_column(Text(heading), justify="right")
    for place, row in enumerate(result["table"], start=1):
        excess = [row["excess"], *row.get("text_excess", [None] * len(texts))]
        mark, style = ("*", "bold") if row["what"] == "recipe" else ("", "")
        name = recipe_name(row["recipe"]) if row["what"] == "recipe" else row["what"]
        table.add_row(f"{mark}{place}", Text(shortened(name)), *(or_dash(one, 4) for one in excess), style=style)
    console.print(fitted(table, console.width))
    for line in result["cut"]:
        console.print(Text(f"cut: {line}"), soft_wrap=True)
    print_warnings(console, result)
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
    print_warnings(console, result)


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
