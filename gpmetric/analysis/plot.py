"""One page of plots of an analysis, as PNG or PDF."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gpmetric.files import check_picture, write_picture
from gpmetric.pictures import printable, shortened
from gpmetric.results.picture import Picture

__all__ = ["draw_page", "page_figure"]

_GOOD, _BAD = "#0072b2", "#d55e00"  # Okabe and Ito's blue and vermilion: told apart by everyone, and in grey by side
_MUTED, _FAINT = "#767676", "#c4c4c4"  # the first is dark enough for small text
_SIGNIFICANT = 0.05
_SHOWN = 18  # bars of a panel
_LABEL, _FORMULA, _NAME = 30, 76, 24  # characters of a bar's name, of a formula across a panel, of a target or baseline
_QUANTILE = 0.8  # of excess, above which points stand at the edge: the worst fifth is tens of times the best
_SPANS = 3.0  # of the progress axis: how far above the best, in units of what was gained on the best baseline or start
_APART = 0.045  # of an axis, between two labels at its edge

_Document = Mapping[str, Any]
_Panel = Callable[[Axes, _Document], None]


def draw_page(document: _Document, path: Path) -> None:
    """Writes the page of an analysis, whole or not at all; PDF is vector.

    A panel of which the ledger has nothing is left out, and the others take its room.

    Args:
        document: of `analyse`.
        path: ending in .png or .pdf.

    Raises:
        InputError: another suffix.
        GpmetricError: the file cannot be written.
    """
    check_picture("--output", path)
    write_picture(path, page_figure(document))


def page_figure(document: _Document) -> Figure:
    """The page of an analysis.

    Args:
        document: of `analyse`.
    """
    figure = Picture(figsize=(15, 9.5), layout="constrained")  # not pyplot's: no global state
    panels = _panels(document)
    upper = math.ceil(len(panels) / 2) if len(panels) > 2 else len(panels)
    counts = [count for count in (upper, len(panels) - upper) if count]
    places = [(row, count, column) for row, count in enumerate(counts) for column in range(count)]
    grid = figure.add_gridspec(len(counts), math.lcm(*counts))
    for panel, (row, count, column) in zip(panels, places, strict=True):
        width = grid.ncols // count
        axes = figure.add_subplot(grid[row, column * width : (column + 1) * width])
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        panel(axes, document)
    figure.suptitle(_title(document), fontsize=12, fontweight="bold", parse_math=False)
    return figure


def _title(document: _Document) -> str:
    counted = f"{document['formulas']} formulas of {document['lineages']} lineages measured"
    paid = f"{document['evaluations']} evaluations paid for"
    return printable(f"{shortened(Path(document['ledger']).name, _FORMULA)}: {counted}, {paid}")


def _panels(document: _Document) -> list[_Panel]:
    """Those that there is something to draw in; sizes and progress always are."""
    compared = any(pair["effect"] is not None for pair in document["target_pairs"])
    two = len(document["targets"]) == 2
    return [
        *([_symbols] if _rows(document, sub_expressions=False) else []),
        *([_sub_expressions] if _rows(document, sub_expressions=True) else []),
        *([_two_targets if two else _targets] if compared else []),
        *([_distances] if document["masks"] is not None else []),
        _sizes,
        _progress,
    ]


def _rows(document: _Document, sub_expressions: bool) -> list[Mapping[str, Any]]:
    """The strongest parts of either sort."""
    rows = [row for row in document["parts"] if (row["kind"] == "sub-expression") == sub_expressions]
    return [row for row in rows if row["effect"] is not None][:_SHOWN]


def _symbols(axes: Axes, document: _Document) -> None:
    _head(axes, "operands (bold), primitives and groups")
    _bars(axes, _rows(document, sub_expressions=False))
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text().isupper() else "normal")


def _sub_expressions(axes: Axes, document: _Document) -> None:
    _head(axes, "strongest recurring sub-expressions (c: any constant)")
    _bars(axes, _rows(document, sub_expressions=True))


def _bars(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Horizontal bars with their sign, the best part on top, and beside each the formulas and lineages with the part.

    An effect that rests on few lineages is grey, one that may be chance pale.
    """
    rows = sorted(rows, key=lambda row: row["effect"])
    effects = [row["effect"] for row in rows]
    colours = [_FAINT if row["rests_on_few"] else _GOOD if row["effect"] > 0 else _BAD for row in rows]
    for bar, row in zip(axes.barh(range(len(rows)), effects, color=colours), rows, strict=True):
        bar.set_alpha(1.0 if row["rests_on_few"] or row["q"] < _SIGNIFICANT else 0.4)
    axes.set_yticks(range(len(rows)), [_formula(row["name"], _LABEL) for row in rows], parse_math=False)
    axes.axvline(0, color="black", linewidth=0.8)
    limit = 1.4 * max(0.1, *map(abs, effects))
    axes.set_xlim(-limit, limit)
    for place, row in enumerate(rows):
        side = 1 if row["effect"] > 0 else -1
        axes.text(
            row["effect"] + 0.015 * side * limit, place, f"{row['with']} / {row['lineages_with']}", fontsize=7,
            va="center", ha="left" if side > 0 else "right", color=_MUTED,
        )  # fmt: skip
    key = "pale: q ≥ 0.05, grey: fewer than 6 lineages with or without it"
    axes.set_xlabel(f"rank-biserial effect, right is better; formulas / lineages with it\n{key}", fontsize=8)


def _two_targets(axes: Axes, document: _Document) -> None:
    """Every formula's excess at one target against that at the other."""
    [pair] = document["target_pairs"]
    first, second = ([point["excess"][pair[name]] for point in document["points"]] for name in ("first", "second"))
    right = float(np.quantile(first, _QUANTILE))
    _scatter(axes, np.minimum(first, right).tolist(), second, _GOOD)
    names = [_fitted(pair[name], _NAME) for name in ("first", "second")]
    _head(axes, f"every formula at {names[0]} and at {names[1]}", f"excess at {names[0]} ({_correlation(pair)})")
    span = (right - min(first)) or 1.0
    axes.set_xlim(min(first) - 0.05 * span, right + 0.05 * span)
    axes.set_ylabel(f"excess at {names[1]}\n▲, right edge: higher than the axis", fontsize=8, parse_math=False)


def _targets(axes: Axes, document: _Document) -> None:
    _head(axes, "rank correlation between targets")
    targets = document["targets"]
    matrix = np.eye(len(targets))
    for pair in document["target_pairs"]:
        first, second = targets.index(pair["first"]), targets.index(pair["second"])
        matrix[first, second] = matrix[second, first] = np.nan if pair["effect"] is None else pair["effect"]
    image = axes.imshow(matrix, cmap="RdBu", vmin=-1, vmax=1)
    names = [_fitted(target, _NAME) for target in targets]
    axes.set_xticks(range(len(names)), names, rotation=30 if max(map(len, names)) > 8 else 0, parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    for (row, column), value in np.ndenumerate(matrix):
        colour = "white" if abs(value) > 0.6 else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=9)
    axes.figure.colorbar(image, ax=axes, shrink=0.8).ax.tick_params(labelsize=8)


def _distances(axes: Axes, document: _Document) -> None:
    masks = document["masks"]
    excess = {point["evaluation"]: point["mean_excess"] for point in document["points"]}
    _scatter(axes, masks["to_best"]["distances"], [excess[evaluation] for evaluation in masks["evaluations"]], _GOOD)
    told = f"share of mask entries that differ ({_correlation(masks['to_best'])})"
    _head(axes, "masks: distance to the best formula's", told, f"{_excess(document)}\n▲: higher than the axis")


def _sizes(axes: Axes, document: _Document) -> None:
    points = document["points"]
    _scatter(axes, [point["nodes"] for point in points], [point["mean_excess"] for point in points], _MUTED)
    front = sorted((point["nodes"], point["mean_excess"]) for point in points if point["front"])
    axes.step(*zip(*front, strict=True), where="post", marker="o", markersize=4, color=_BAD)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    told = f"nodes of the formula ({_correlation(document['nodes'])})"
    _head(axes, "size and excess, Pareto front marked", told, f"{_excess(document)}\n▲: higher than the axis")


def _progress(axes: Axes, document: _Document) -> None:
    """The lowest excess so far beside every published metric that was measured on the same text, in the same unit."""
    points = document["points"]
    paid = [*(point["paid"] for point in points), document["evaluations"]]
    best = list(accumulate((point["mean_excess"] for point in points), min))
    axes.step(paid, [*best, best[-1]], where="post", color=_GOOD, linewidth=1.8)
    _head(axes, "best so far, and published metrics\n", "evaluations paid for", _excess(document))
    axes.set_xlim(0, document["evaluations"])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    formula = min(points, key=lambda point: point["mean_excess"])["formula"]
    axes.text(
        0, 1.012, _formula(formula, _FORMULA), transform=axes.transAxes, fontsize=8, va="bottom", color=_GOOD,
        family="monospace", parse_math=False,
    )  # fmt: skip
    levels = {_fitted(row["name"], _NAME): row["mean_excess"] for row in document["baselines"]}
    low, high = _limits(best, list(levels.values()))
    axes.set_ylim(low, high)
    for name, level, place in _placed(levels, low, high):
        if level <= high:
            axes.axhline(level, color=_MUTED, linewidth=0.8, linestyle="--", zorder=0)
        told = name if level <= high else f"▲ {name} {level:.3g}"
        axes.annotate(
            told, (1, min(level, high)), (1.03, place), xycoords=axes.get_yaxis_transform(),
            textcoords=axes.get_yaxis_transform(), fontsize=7.5, va="center", parse_math=False,
            arrowprops={"arrowstyle": "-", "color": _FAINT, "linewidth": 0.7, "shrinkA": 0, "relpos": (0, 0.5)},
        )  # fmt: skip


def _limits(best: Sequence[float], levels: Sequence[float]) -> tuple[float, float]:
    """The ends of the axis of progress: bad formulas at the beginning, or a bad baseline, do not squeeze the rest."""
    begun = best[len(best) // 10]  # one in ten formulas is not the search's achievement
    span = max([begun, *levels[:1]]) - best[-1]
    known = [value for value in (*best, *levels) if value <= best[-1] + _SPANS * span]
    low, high = min(known), max(known)
    room = 0.06 * ((high - low) or abs(high) or 1.0)
    return low - room, high + room


def _placed(levels: Mapping[str, float], low: float, high: float) -> list[tuple[str, float, float]]:
    """Name, level and the height of its label, lowest first: as near to the level as labels apart can be."""
    apart = _APART * (high - low)
    rows = sorted(levels.items(), key=lambda row: row[1])
    places: list[float] = []
    for _, level in rows:
        places.append(max([min(level, high), *(place + apart for place in places[-1:])]))
    top = high + apart  # what is pushed above the axis is moved down again, and what is below it, too
    for number in reversed(range(len(places))):
        places[number] = top = min(places[number], top - apart)
    return [(name, level, place) for (name, level), place in zip(rows, places, strict=True)]


def _excess(document: _Document) -> str:
    return f"mean excess on the search text ({document['unit']})"


def _head(axes: Axes, title: str, horizontal: str = "", vertical: str = "") -> None:
    axes.set_title(title, fontsize=10, loc="left", parse_math=False)
    axes.set_xlabel(horizontal, fontsize=8, parse_math=False)
    axes.set_ylabel(vertical, fontsize=8, parse_math=False)


def _scatter(axes: Axes, values: Sequence[float], excess: Sequence[float], colour: str) -> None:
    """Excess against something; the worst fifth stands at the upper edge."""
    top = float(np.quantile(excess, _QUANTILE))
    shown = np.minimum(excess, top)
    beyond = np.asarray(excess) > top
    for chosen, marker in ((~beyond, "o"), (beyond, "^")):
        axes.scatter(
            np.asarray(values)[chosen], shown[chosen], s=16, color=colour, alpha=0.5, linewidths=0, marker=marker
        )
    span = (top - min(excess)) or 1.0
    axes.set_ylim(min(excess) - 0.05 * span, top + 0.05 * span)


def _correlation(test: Mapping[str, Any]) -> str:
    known = test["effect"] is not None
    return f"Spearman {test['effect']:+.2f}, q = {test['q']:.2g}" if known else "no correlation"


def _formula(text: str, length: int) -> str:
    """Its beginning, which tells more than the parentheses at its end."""
    return printable(text if len(text) <= length else f"{text[: length - 1]}…")


def _fitted(text: str, length: int) -> str:
    return printable(shortened(text, length))
