"""Formulas of a campaign in every form: the winner, and the front with a panel for each of its points."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpmetric.errors import InputError
from gpmetric.files import checksum
from gpmetric.formats.request import ExportRequest
from gpmetric.pruning.requests import PruneRequest
from gpmetric.reporting.blocks import Copies, Figure, Panel, Panels, Section, Table, Winner, copied, told
from gpmetric.reporting.campaign import Campaign, Entry, best_formula
from gpmetric.reporting.charts import Line, Point, points
from gpmetric.reporting.formula import FormulaView, view_formula

__all__ = ["front_section", "winner_section"]

_SHOWN = 60  # formulas of a front that have a panel
_KEY = (
    ("winner", "the winner"), ("formula", "found formulas"), ("baseline", "baselines"),
    ("solver", "baselines that update weights"),
)  # fmt: skip


def winner_section(campaign: Campaign, entries: Sequence[Entry]) -> Iterator[Section]:
    result = campaign.result
    better = result.get("better", True) and "winner" in result
    best = entries[0] if better and entries else best_formula(entries)
    if best is None:
        return
    formula = view_formula(best.name)
    meaning = Table("What it reads of each layer", ("operand", "meaning"), formula.operands, words=2)
    title = "The winner" if better else "The best formula so far" if not result else "The best formula of the search"
    block = Winner(formula, meaning, _copies(campaign, best, formula))
    yield Section("winner", title, [block], str(result.get("because", "")) if better else "")


def _copies(campaign: Campaign, entry: Entry, formula: FormulaView) -> Copies:
    """The formula, its LaTeX source, and the commands that export it and prune with it."""
    found = {"formula": formula.text}
    if formula.latex:
        found["LaTeX"] = formula.latex
    output, stored = Path("metric.py"), entry.kind == "winner" and campaign.ledger is not None
    named = str(campaign.ledger) if stored else entry.name
    if entry.kind != "solver":
        found["export"] = copied("export", ExportRequest(formula=named, output=output))
    if (pruning := _pruning(campaign, entry)) is not None:
        found["prune"] = copied("prune", pruning)
    return Copies(found)


def _pruning(campaign: Campaign, entry: Entry) -> PruneRequest | None:
    """What prunes the campaign's model with a metric; None of several models, and where the text is not known."""
    result = campaign.result
    model, calibration = result.get("model"), result.get("splits", {}).get("calibration")
    if not isinstance(model, str) or calibration is None or not campaign.targets:
        return None
    ours = entry.kind in ("winner", "formula")
    try:
        return PruneRequest(
            model=None if model == "demo" else model,
            calibration=None if model == "demo" else str(calibration["text"]),
            samples=int(calibration["windows"]), sequence_length=int(calibration["sequence_length"]),
            seed=int(result["seed"]), metric=entry.name, target=campaign.targets[0],
            update=campaign.update if ours else "none", fit=str(result.get("fit", "own")) if ours else "own",
            output=Path("pruned"),
        )  # fmt: skip
    except InputError:
        return None


def front_section(campaign: Campaign, entries: Sequence[Entry]) -> Iterator[Section]:
    """Excess over the size of the formula, on validation and on the search text, with a panel for each point."""
    shown = sorted(entries, key=lambda one: (one.kind != "winner", _finite_or(one.mean("searched"))))
    formulas = [one for one in shown if one.kind in ("winner", "formula")][:_SHOWN]
    shown = [*formulas, *(one for one in shown if one.kind in ("baseline", "solver"))]
    views = {one.name: view_formula(one.name) for one in shown}
    shown = [one for one in shown if views[one.name].nodes is not None]
    # the same on every page of a campaign, so that one that is live goes on with what is selected
    ids = {one.name: f"point-{checksum(one.name.encode())}" for one in shown}
    figures = []
    for split, words, measure in (
        ("validation", "On the validation text", f"mean excess{campaign.unit}"),
        ("searched", "On the search text", campaign.measure),
    ):
        spots = [
            Point(one.name, one.kind, float(views[one.name].nodes or 0), one.mean(split), ids[one.name])
            for one in shown
        ]
        drawn = points(
            f"{words}: {measure}, over nodes of the formula", "nodes of the formula", measure, spots,
            [Line("the front", "front", _staircase(spots), steps=True)], whole=True,
        )  # fmt: skip
        if drawn and any(one.kind in ("formula", "winner") and math.isfinite(one.y) for one in spots):
            figures.append(Figure(drawn, f"{words}.", [row for row in _KEY if row[0] in {one.kind for one in spots}]))
    if not figures:
        return
    panels = [
        Panel(
            ids[one.name], one.name, views[one.name], _figures(campaign, one), _copies(campaign, one, views[one.name])
        )
        for one in shown
    ]
    note = "Select a point to see its formula; the arrow keys go from point to point."
    yield Section("front", "The front", [Panels(figures, panels)], note)


def _finite_or(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _staircase(spots: Sequence[Point]) -> list[tuple[float, float]]:
    """The lowest of the found formulas with so many nodes or fewer."""
    found: list[tuple[float, float]] = []
    for one in sorted(spots, key=lambda one: (one.x, one.y)):
        if one.kind in ("winner", "formula") and math.isfinite(one.y) and (not found or one.y < found[-1][1]):
            found.append((one.x, one.y))
    return found


def _figures(campaign: Campaign, entry: Entry) -> Table:
    """A formula's excess on each text."""
    known = {name: getattr(entry, name) for name in ("search", "validation", "test")}
    known = {name: found for name, found in known.items() if found}
    rows = [[target, *(told(found.get(target)) for found in known.values())] for target in campaign.targets]
    rows.append(["mean", *(told(mean if math.isfinite(mean := entry.mean(name)) else None) for name in known)])
    return Table("Excess by target", ("target", *known), rows, strong=frozenset({len(rows) - 1}))
