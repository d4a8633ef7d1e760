"""The page of a campaign: verdict, winner, convergence, front, what each step saved, the interval, candidates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gpmetric.evolution.fitness import mean_excess
from gpmetric.files import number
from gpmetric.reporting.blocks import Candidates, Figure, Page, Section, Table, told
from gpmetric.reporting.campaign import Campaign, Entry, best_entry, best_formula, entries_of
from gpmetric.reporting.campaign_front import front_section, winner_section
from gpmetric.reporting.charts import Line, bars, differences, lines
from gpmetric.reporting.provenance import provenance

__all__ = ["campaign_page"]

_LAYERS = {  # of the counts -> the layer of simplification that leaves so many
    "unique_texts": "the same text", "unique_opposites": "opposing operations", "unique_canonical": "canonical form",
    "unique_ranked": "the same ranking", "unique_masks": "the same masks",
}  # fmt: skip


def campaign_page(campaign: Campaign) -> Page:
    """The page of a campaign, finished or not."""
    entries = entries_of(campaign)
    sections = [
        *winner_section(campaign, entries),
        *_tested(campaign, entries),
        *_convergence(campaign),
        *front_section(campaign, entries),
        *_saved(campaign),
        *_interval(campaign),
        *_candidates(campaign),
        provenance(campaign.result or _settings(campaign), _history(campaign)),
    ]
    name = campaign.ledger.name if campaign.ledger is not None else _model(campaign)
    warnings = [*campaign.result.get("warnings", ()), *(f"cut: {one}" for one in campaign.result.get("cut", ()))]
    tiles = list(_tiles(campaign, entries))
    return Page(f"Campaign {name}", _verdict(campaign, entries), tiles, sections, warnings)


def _verdict(campaign: Campaign, entries: Sequence[Entry]) -> str:
    """What the campaign came to, in one sentence."""
    result = campaign.result
    if "winner" not in result or campaign.is_running:
        return _so_far(campaign, entries)
    winner, because = str(result["winner"]["formula"]), str(result.get("because", ""))
    if not result.get("better", True):
        told_why = because.partition(";")[0] or f"the winner is {winner}"
        return f"{told_why[0].upper()}{told_why[1:]}."
    mine, rival, theirs = _against(result)
    if not (math.isfinite(mine) and math.isfinite(theirs)):
        return f"{winner} is the winner: {because}."
    rivals = "the best baseline" + " that only masks" * (campaign.update == "none")
    found = f"On the test text, {winner} has a mean excess log-loss of {mine:.4f}"
    if mine < theirs and theirs > 0:
        return f"{found}, {1 - mine / theirs:.1%} less than the {theirs:.4f} of {rival}, {rivals}."
    return f"{found}, not less than the {theirs:.4f} of {rival}, {rivals}, though validation chose it."


def _so_far(campaign: Campaign, entries: Sequence[Entry]) -> str:
    state = {"running": "is running", "elsewhere": "runs on another host", "killed": "was killed",
             "stopped": "was stopped", "finished": "is finished"}[campaign.state]  # fmt: skip
    paid, generations = campaign.counts.get("paid", 0), campaign.generations
    found = f"The campaign {state} after {generations:,} generations and {paid:,} evaluations"
    best = best_formula(entries)
    if best is None:
        return f"{found}; no formula is measured yet."
    bar = best_entry(entries, ("baseline",), "search")
    beside = "" if bar is None else f", {bar.name}, the best baseline, one of {bar.mean('search'):.4f}"
    mine = f"its best formula {best.name} has a mean excess of {best.mean('search'):.4f}"
    return f"{found}; on the search text, {mine}{beside}."


def _against(result: Mapping[str, Any]) -> tuple[float, str, float]:
    """The winner's mean excess on the test text, the baseline that it is compared with, and its own."""
    rival = str(result["confidence"]["rival"])
    row = result["baselines"].get(rival, {})
    mine, theirs = map(number, (result["winner"]["mean_excess"], row["mean_excess"]))
    return mine, rival, theirs


def _tiles(campaign: Campaign, entries: Sequence[Entry]) -> Iterator[tuple[str, str]]:
    result, counts = campaign.result, campaign.counts
    if "winner" in result and not campaign.is_running:
        mine, rival, theirs = _against(result)
        yield f"mean excess of {'the winner' if result.get('better', True) else 'the best baseline'}", told(mine)
        yield f"mean excess of {rival}", told(theirs)
    elif (best := best_formula(entries)) is not None:
        yield "best mean excess on the search text", told(best.mean("search"))
    yield "evaluations paid for", told(counts.get("paid", 0))
    yield "formulas drawn", told(counts.get("drawn", 0))
    if isinstance(total := result.get("seconds", {}).get("total"), float):
        yield "minutes", f"{total / 60:,.1f}"


def _tested(campaign: Campaign, entries: Sequence[Entry]) -> Iterator[Section]:
    """The winner beside every baseline on the text that is read once."""
    result = campaign.result
    if "winner" not in result:
        return
    winner, targets = result["winner"], campaign.targets
    rows: dict[str, Mapping[str, Any]] = dict(result["baselines"])
    if result.get("better", True):
        rows[winner["formula"]] = winner
    for extra in ("regrouped", "best_gradient_free"):
        if (row := result.get(extra)) is not None:
            rows.setdefault(row["formula"], row)
    ordered = sorted(rows, key=lambda name: number(rows[name]["mean_excess"]))
    strong = frozenset(at for at, name in enumerate(ordered) if name == winner["formula"])
    masked = [rows[name].get("masks_only", True) for name in ordered]
    quiet = frozenset(at for at, masks in enumerate(masked) if not masks and campaign.update == "none")
    kinds = ["winner" if at in strong else "solver" if at in quiet else "baseline" for at in range(len(ordered))]
    drawn = bars(
        "Mean excess on the test text",
        [
            (str(name), number(rows[name]["mean_excess"]), kind, told(rows[name]["mean_excess"]))
            for name, kind in zip(ordered, kinds, strict=True)
        ],
    )
    columns = ("metric", *(f"ppl {target}" for target in targets), *(f"excess {target}" for target in targets), "mean")
    cells = [
        [
            str(name), *(told(rows[name]["ppl"][at], 3) for at in targets),
            *(told(rows[name]["excess"][at]) for at in targets), told(rows[name]["mean_excess"]),
        ]
        for name in ordered
    ]  # fmt: skip
    dense = result["dense"]["test"]
    spelled = (
        told(dense, 3) if not isinstance(dense, Mapping) else ", ".join(f"{a} {told(b, 3)}" for a, b in dense.items())
    )
    table = Table(
        f"Perplexity and excess on the test text; dense {spelled}", columns, cells, 1, strong, quiet, frozenset({0})
    )
    note = "" if not quiet else "Baselines that update the weights that stay are no rivals of metrics that only mask."
    yield Section(
        "test",
        "On the test text",
        [Figure(drawn, f"Mean excess log-loss{campaign.unit}; less is better."), table],
        note,
    )


def _convergence(campaign: Campaign) -> Iterator[Section]:
    """The best of each generation and until then, by what candidates are compared by."""
    by_generation: dict[int, float] = {}
    for row in campaign.evaluations:
        if figures := row.figures.get(campaign.objective):
            mean = mean_excess(figures)
            by_generation[row.generation] = min(mean, by_generation.get(row.generation, math.inf))
    if not by_generation:
        return
    best, falling = math.inf, []
    each = sorted(by_generation.items())
    for generation, mean in each:
        best = min(best, mean)
        falling.append((generation, best))
    rivals = {name: mean_excess(one.searched) for name, one in campaign.named.items()}
    level = min(((name, mean) for name, mean in rivals.items()), key=lambda one: one[1], default=None)
    drawn = [Line("best of a generation", "each", each), Line("best so far", "best", falling, steps=True)]
    words = f"Best {campaign.measure} by generation, from {each[0][1]:.4f} to {best:.4f}"
    svg = lines(words, "generation", campaign.measure, drawn, level)
    key = [
        ("best", "best so far"),
        ("each", "best of the generation"),
        *([("level", "best baseline")] if level else []),
    ]
    counted = [[str(number), told(mean), told(low)] for (number, mean), (_, low) in zip(each, falling, strict=True)]
    table = Table("The last generations", ("generation", "best of it", "best so far"), counted[-8:])
    yield Section("convergence", "Convergence", [Figure(svg, "On the search text.", key), table])


def _saved(campaign: Campaign) -> Iterator[Section]:
    """How many formulas each layer of simplification and each rung kept from the dearest measurement."""
    counts, rungs = campaign.counts, campaign.rungs
    if not counts.get("drawn"):
        return
    drawn, each = counts["drawn"], list(rungs.values())[-1][1] if rungs else 0.0
    spearman = {str(row["rung"]): row.get("spearman") for row in campaign.result.get("screening", ())}
    left, rows, shown = drawn, [["drawn", told(drawn), "", "", "", ""]], [("drawn", float(drawn), "plain", told(drawn))]
    for name, layer in _LAYERS.items():
        now = counts[name]
        rows.append([f"without {layer}", told(now), told(left - now), f"{(left - now) * each:,.1f} s", "", ""])
        shown.append((f"without {layer}", float(now), "plain", told(now)))
        left = now
    for name, (measured, seconds) in rungs.items():
        related = "" if spearman.get(name) is None else f"{spearman[name]:.2f}"
        out = max(0, left - measured)
        rows.append([f"measured: {name}", told(measured), told(out), f"{out * each:,.1f} s", f"{seconds:.3f}", related])
        shown.append((f"measured: {name}", float(measured), "rung", told(measured)))
        left = min(left, measured)
    columns = ("step", "left", "spared", "time saved", "s each", "correlation")
    table = Table(
        "Formulas spared by each step, and the time that they would have taken on the last rung", columns, rows
    )
    note = "Formulas that differ in nothing that matters are measured once; the first rung tells equal masks. "
    note += "Then few windows decide who goes on to more of them. The correlation is of ranks, with the last rung."
    yield Section("saved", "What was saved", [Figure(bars("Formulas left", shown)), table], note)


def _interval(campaign: Campaign) -> Iterator[Section]:
    """The winner against the best baseline on other draws of the calibration windows."""
    found = campaign.result.get("confidence") or {}
    pairs = list(zip(found.get("winner_mean_excess", ()), found.get("rival_mean_excess", ()), strict=True))
    pairs = [(mine, theirs) for mine, theirs in pairs if mine is not None and theirs is not None]
    if not pairs:
        return
    bounds = found["interval"]
    label = f"winner minus {found['rival']}, mean excess"
    words = "no interval: it takes two draws"
    if bounds:
        words = f"Mean {found['difference']:+.4f}, 95 % interval {bounds[0]:+.4f} to {bounds[1]:+.4f}"
    drawn = differences(f"{label}: {words}", [mine - theirs for mine, theirs in pairs], bounds and tuple(bounds), label)
    rows = [[str(at + 1), told(a), told(b), f"{a - b:+.4f}"] for at, (a, b) in enumerate(pairs)]
    table = Table("By draw", ("draw", "winner", str(found["rival"]), "difference"), rows)
    note = "Statistics of calibration windows drawn anew, figures on the test text. Below zero, the winner is better."
    yield Section("interval", "The interval", [Figure(drawn, f"{words}."), table], note)


def _candidates(campaign: Campaign) -> Iterator[Section]:
    if not campaign.candidates:
        return
    measured, targets = {row.id: row for row in campaign.evaluations}, campaign.targets
    rows: list[list[Any]] = []
    for one in campaign.candidates:
        paid = measured.get(one.evaluation)
        losses = paid.losses if paid is not None else {}
        mean = _short(mean_excess(losses)) if losses else None
        rows.append([one.formula, one.status, one.generation, paid and paid.nodes, mean,
                     *(_short(losses.get(target)) for target in targets)])  # fmt: skip
    rows.sort(key=lambda row: (row[4] is None, row[4] or 0.0))
    columns = [("formula", False), ("status", False), ("generation", True), ("nodes", True), ("mean excess", True)]
    columns += [(f"excess {target}", True) for target in targets]
    note = "Every formula that was drawn; excess is on the search text, of a duplicate its twin's."
    yield Section("candidates", "Candidates", [Candidates(columns, rows, len(rows))], note)


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 5)


def _model(campaign: Campaign) -> str:
    model = campaign.result.get("model", "")
    return model if isinstance(model, str) else ", ".join(map(str, model))


def _settings(campaign: Campaign) -> dict[str, Any]:
    """What there is to say before there is a result."""
    settings = campaign.settings
    models = settings.get("models", {})
    return {
        "model": list(models), "model_sha256": [one.get("digest") for one in models.values()],
        "targets": settings.get("target"),
    } | {name: settings.get(name) for name in ("update", "objective", "group", "seed")}  # fmt: skip


def _history(campaign: Campaign) -> dict[str, str]:
    found = {} if campaign.ledger is None else {"ledger": str(campaign.ledger)}
    if fork := campaign.history.get("fork"):
        found["forked from"] = str(fork.get("ledger"))
    if reseeded := campaign.history.get("reseeded"):
        found["reseeded"] = "; ".join(f"seed {seed} from generation {number} on" for number, seed in reseeded)
    return found
