"""The pages of models that were made smaller: `prune`, `slim` and `allocate`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from gpmetric.errors import InputError
from gpmetric.pruning.requests import PruneRequest, VerifyRequest
from gpmetric.reporting.blocks import Block, Copies, Figure, Page, Section, Table, copied, told
from gpmetric.reporting.charts import Line, Point, bars, lines, points
from gpmetric.reporting.layers import layer_map
from gpmetric.reporting.provenance import provenance

__all__ = ["allocation_page", "pruned_page", "slimmed_page"]

_EXCESS = "excess log-loss, nats per token"


def pruned_page(document: Mapping[str, Any]) -> Page:
    """The page of a model that `gpmetric prune` wrote."""
    model, sparsity = Path(str(document["model"])).name, float(document["sparsity"])
    dense, after = document["dense"], document["perplexity"]
    verdict = f"{document['metric']} set {sparsity:.1%} of the prunable weights of {model} to zero; the perplexity on "
    verdict += f"{document['text']['text']} went from {told(dense, 3)} to {told(after, 3)}."
    layers = {str(layer["name"]): float(layer["sparsity"]) for layer in document["layers"]}
    sections = [_sparsity(layers), Section("next", "What to do next", [_verify(document)]), provenance(document)]
    tiles = [("sparsity", told(sparsity)), ("perplexity", told(after, 3)), ("perplexity, dense", told(dense, 3)),
             ("layers pruned", told(len(layers)))]  # fmt: skip
    return Page(f"{model}, pruned", verdict, tiles, [one for one in sections if one.blocks], _warnings(document))


def _warnings(document: Mapping[str, Any]) -> list[str]:
    return [*document.get("warnings", ()), *(f"cut: {one}" for one in document.get("cut", ()))]


def _sparsity(layers: Mapping[str, float]) -> Section:
    return Section("sparsity", "Sparsity by layer", layer_map(layers, "Sparsity by block and matrix"))


def _verify(document: Mapping[str, Any]) -> Copies:
    against = str(document["model"])
    found = VerifyRequest(folder=str(document["output"]), against=None if against == "demo" else against)
    return Copies({"verify": copied("verify", found)})


def slimmed_page(document: Mapping[str, Any]) -> Page:
    """The page of a model that `gpmetric slim` made."""
    model, before, after = (
        Path(str(document["model"])).name,
        document["parameters_before"],
        document["parameters_after"],
    )
    dense, now = document["dense"], document["perplexity"]
    verdict = f"{model} has {after:,} parameters instead of {before:,}, {1 - after / before:.1%} fewer; the perplexity "
    verdict += f"on {document['text']['text']} went from {told(dense, 3)} to {told(now, 3)}."
    found = [*_stays(document["widths"]), *_starts(document)]
    sections = [*found, Section("next", "What to do next", [_verify(document)]), provenance(document)]
    tiles = [("parameters", told(after)), ("before", told(before)), ("perplexity", told(now, 3)),
             ("perplexity, dense", told(dense, 3))]  # fmt: skip
    return Page(f"{model}, slimmer", verdict, tiles, sections, _warnings(document))


def _stays(widths: Sequence[Mapping[str, Any]]) -> Iterator[Section]:
    """What stays of each block; the bars are of numbers, other entries are in the table."""
    names = [name for name, value in widths[0].items() if isinstance(value, int) and not isinstance(value, bool)]
    figures: list[Block] = []
    for name in names:
        rows = [(f"block {at}", float(one[name]), "plain", told(one[name])) for at, one in enumerate(widths)]
        figures.append(Figure(bars(f"{name} that stay of each block", rows), f"{name.capitalize()} that stay."))
    cells = [[str(at), *(told(one.get(name)) for name in widths[0])] for at, one in enumerate(widths)]
    table = Table("What stays of each block", ("block", *(name.replace("_", " ") for name in widths[0])), cells)
    yield Section("stays", "What stays of each block", [*figures, table])


def _starts(document: Mapping[str, Any]) -> Iterator[Section]:
    """What the search began from, and what it brought."""
    starts = {str(name): value for name, value in document.get("starts", {}).items() if value is not None}
    if not starts:
        return
    ordered = sorted(starts.items(), key=lambda one: one[1])
    begun = document.get("begun")
    drawn = bars(
        "Objective of each start",
        [(name, float(value), "winner" if name == begun else "plain", told(value)) for name, value in ordered],
    )
    steps = [("dense", document["dense"]), ("the start", document["initial"]), ("after the search", document["found"])]
    table = Table(
        "Perplexity on validation", ("model", "perplexity"), [[name, told(value, 3)] for name, value in steps]
    )
    note = f"The search took {told(document.get('steps'))} steps from {begun}."
    yield Section(
        "starts", "Starts and search", [Figure(drawn, "On a few search windows; less is better."), table], note
    )


def allocation_page(document: Mapping[str, Any]) -> Page:
    """The page of `gpmetric allocate`."""
    model, picked = Path(str(document["model"])).name, document["picked"]
    sections = [*_picked(document), *_fronts(document), *_search(document)]
    if document["allocation"] is not None:
        layers = {str(name): float(value) for name, value in document["allocation"]["sparsity"].items()}
        sections.append(_sparsity(layers))
        asked = None if document.get("sparsity") is None else f"{float(document['sparsity']):g}"
        sections.append(Section("next", "What to do next", [_prune(document, asked)]))
    sections.append(provenance({**document, "seconds": document.get("seconds_by_step")}))
    if picked is None:
        verdict = f"Nothing was picked: {document['error']}."
    else:
        verdict = (
            f"At sparsity {picked['sparsity']:.4f}, the allocation for {document['metric']} on {model} has excess "
        )
        verdict += f"{told(picked['excess'])} on validation{_beside(document, picked)}."
    tiles = [("evaluations", told(document["evaluations"])), ("points of the front", told(len(document["front"])))]
    if picked is not None:
        tiles = [("excess of what was picked", told(picked["excess"])), ("perplexity", told(picked["perplexity"], 3)),
                 ("perplexity, dense", told(document["dense"]["perplexity"], 3)), *tiles]  # fmt: skip
    return Page(f"Allocation for {model}", verdict, tiles, [one for one in sections if one.blocks], _warnings(document))


def _near(document: Mapping[str, Any], picked: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Each rule at the sparsity next to the one picked."""
    return {
        str(name): min(found, key=lambda one: abs(one["sparsity"] - picked["sparsity"]))
        for name, found in document["baselines"].items()
        if found
    }


def _beside(document: Mapping[str, Any], picked: Mapping[str, Any]) -> str:
    uniform = _near(document, picked).get("uniform")
    return "" if uniform is None else f"; all layers alike have {told(uniform['excess'])}"


def _prune(document: Mapping[str, Any], target: str | None) -> Copies:
    try:
        request = PruneRequest(
            model=None if document["model"] == "demo" else str(document["model"]), metric=str(document["metric"]),
            calibration=None if document["model"] == "demo" else str(document["calibration"]["text"]), target=target,
            allocation=Path("allocation.json"), output=Path("pruned"), seed=int(document["seed"]),
            update=str(document.get("update", "none")), fit=str(document.get("fit", "own")),
        )  # fmt: skip
    except InputError:
        return Copies({})
    return Copies({"prune": copied("prune", request)})


def _picked(document: Mapping[str, Any]) -> Iterator[Section]:
    picked = document["picked"]
    if picked is None:
        return
    rows = {f"picked ({document['allocator']})": picked} | _near(document, picked)
    ordered = sorted(rows, key=lambda name: rows[name]["excess"])
    drawn = bars(
        "Excess of what was picked and of rules",
        [
            (name, float(rows[name]["excess"]), "winner" if rows[name] is picked else "baseline",
             told(rows[name]["excess"]))
            for name in ordered
        ],
    )  # fmt: skip
    cells = [
        [name, told(rows[name]["sparsity"]), told(rows[name]["sparsity_total"]), told(rows[name]["perplexity"], 3),
         told(rows[name]["excess"])]
        for name in ordered
    ]  # fmt: skip
    strong = frozenset({ordered.index(next(iter(rows)))})
    columns = ("allocation", "sparsity", "of all parameters", "perplexity", "excess")
    table = Table("On the validation text", columns, cells, strong=strong)
    yield Section("picked", "What was picked, beside rules", [Figure(drawn, f"{_EXCESS.capitalize()}."), table])


def _fronts(document: Mapping[str, Any]) -> Iterator[Section]:
    """The front and every rule, and the same as differences to the uniform rule."""
    rules = {str(name): _places(found) for name, found in document["baselines"].items()}
    front, picked = _places(document["front"]), document["picked"]
    drawn = [Line("the front", "best", front)]
    drawn += [Line(name, f"rule-{1 + at % 6}", found) for at, (name, found) in enumerate(rules.items())]
    spots = [Point(f"front {at}", "formula", x, y) for at, (x, y) in enumerate(front)]
    if picked is not None:
        spots.append(Point("picked", "winner", float(picked["sparsity"]), _number(picked["excess"])))
    key = [("winner", "picked"), *((one.kind, one.name) for one in drawn)]
    whole = points("Excess over sparsity", "sparsity", _EXCESS, spots, drawn)
    blocks: list[Block] = [Figure(whole, "Excess over sparsity.", key)]
    if uniform := rules.get("uniform"):
        less = [Line(one.name, one.kind, _less(one.places, uniform)) for one in drawn if one.name != "uniform"]
        places = [place for one in less for place in one.places]
        if places:
            own = [Point(f"front {at}", "formula", x, y) for at, (x, y) in enumerate(less[0].places)]
            svg = points("Difference to all layers alike", "sparsity", "excess minus uniform's", own, less)
            blocks.append(Figure(svg, "Difference to all layers alike; below zero is better.",
                                 [(one.kind, one.name) for one in less]))  # fmt: skip
    yield Section("front", "The front", blocks)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _places(found: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    places = [(float(one["sparsity"]), _number(one["excess"])) for one in found]
    return sorted(place for place in places if all(map(math.isfinite, place)))


def _less(places: Sequence[tuple[float, float]], of: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The differences to a line, where it has a value."""
    found = []
    for x, y in places:
        for (left, low), (right, high) in pairwise(of):
            if left <= x <= right and right > left:
                found.append((x, y - low - (high - low) * (x - left) / (right - left)))
                break
    return found


def _search(document: Mapping[str, Any]) -> Iterator[Section]:
    area = [(float(at), float(value)) for at, value in enumerate(document.get("hypervolume", ())) if value is not None]
    if len(area) < 2:
        return
    svg = lines(
        "Hypervolume by generation", "generation", "hypervolume", [Line("hypervolume", "best", area, steps=True)]
    )
    note = "It is measured anew where a generation is the first on more windows."
    yield Section(
        "convergence", "Convergence", [Figure(svg, "Area between front and reference; more is better.")], note
    )
