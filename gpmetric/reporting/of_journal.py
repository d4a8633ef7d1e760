"""The page of a search's or bench's own file, `--ledger a.jsonl`: what there is before there is a result."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gpmetric.errors import InputError
from gpmetric.reporting.blocks import Candidates, Figure, Page, Section, Table, file_names, told
from gpmetric.reporting.charts import Line, lines
from gpmetric.reporting.provenance import provenance
from gpmetric.tuning.recipe_name import recipe_name

__all__ = ["journal_page"]

_LAST = 12  # reports of a search that are told


def journal_page(name: str, settings: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> Page:
    """The page of a file of slim, tune or bench.

    Args:
        name: of the file.
        settings: of the search.
        records: as they were written.

    Raises:
        InputError: they are another command's, or there are none.
    """
    rows = [one["row"] for one in records if "row" in one]
    trials = [one for one in records if "losses" in one and "document" in one and one.get("split") != "search"]
    reports = [one for one in records if "step" in one and "loss" in one]
    if rows:
        what, sections = f"{len(rows)} rows of a bench are measured", _rows(rows)
    elif trials:
        what, sections = f"{len(trials)} recipes are measured", _trials(trials)
    elif reports:
        steps, loss = reports[-1]["step"], reports[-1]["loss"]
        what, sections = f"The search is at step {steps:,}, its loss at {told(loss)}", _reports(reports)
    else:
        raise InputError(f"{name!r} holds nothing to show: the --json of its command has more")
    known = {
        key: settings[key] for key in ("model", "dtype", "device", "seed", "target", "objective") if key in settings
    }
    document = {key: value for key, value in known.items() if key != "model"} | {"digest": known.get("model")}
    found = [*sections, *([provenance(document)] if known else [])]
    return Page(name, f"{what}; the result is not in this file.", [("records", told(len(records)))], found)


def _rows(rows: Sequence[Mapping[str, Any]]) -> Iterator[Section]:
    texts = list(dict.fromkeys(text for row in rows for text in row["ppl"]))
    cells = [
        [str(row["metric"]), str(row["target"]), str(row["update"]), *(told(row["ppl"].get(text), 3) for text in texts),
         told(row["sparsity"]), told(row["seconds"], 1)]
        for row in rows
    ]  # fmt: skip
    columns = ("metric", "target", "update", *file_names(texts), "sparsity", "seconds")
    table = Table("Perplexity, in the order measured", columns, cells, 3, code=frozenset({0}))
    yield Section("rows", "What is measured", [table])


def _trials(trials: Sequence[Mapping[str, Any]]) -> Iterator[Section]:
    """Validation loss by trial, and every recipe."""
    best, falling, rows = math.inf, [], []
    for at, one in enumerate(trials, start=1):
        loss = one["losses"][0]
        if one["share"] == 1.0 and loss is not None:
            best = min(best, float(loss))
            falling.append((float(at), best))
        name = recipe_name(one["document"])
        rows.append([name, str(one["error"] or "measured"), one["share"], one["seconds"], loss])
    drawn = [Line("best so far", "best", falling, steps=True)]
    if svg := lines("Best loss by trial", "trial", "loss on validation", drawn):
        yield Section("convergence", "Convergence", [Figure(svg, "Of recipes measured on all windows.")])
    rows.sort(key=lambda row: (row[4] is None, row[4] or 0.0))
    columns = [("recipe", False), ("state", False), ("share of the windows", True), ("seconds", True), ("loss", True)]
    yield Section("candidates", "Recipes that were tried", [Candidates(columns, rows, len(rows), "recipes")])


def _reports(reports: Sequence[Mapping[str, Any]]) -> Iterator[Section]:
    """The loss of a search by step."""
    places = [(float(one["step"]), math.nan if one["loss"] is None else float(one["loss"])) for one in reports]
    svg = lines("Loss by step", "step", "loss of the search", [Line("loss", "best", places)])
    names = [name for name, value in reports[-1].items() if isinstance(value, (int, float))]
    cells = [[told(one.get(name)) for name in names] for one in reports[-_LAST:]]
    table = Table("The last reports", names, cells, words=0)
    yield Section("convergence", "Convergence", [Figure(svg, "On the search text."), table])
