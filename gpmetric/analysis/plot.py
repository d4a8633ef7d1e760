"""One page of plots of an analysis, as PNG or PDF."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gpmetric.files import check_picture, write_picture
from gpmetric.results.picture import Picture

__all__ = ["draw_page", "page_figure"]

_GOOD, _BAD, _MUTED = "#0072b2", "#d55e00", "#9a9a9a"  # Okabe and Ito's blue and vermilion: told apart by everyone
_SIGNIFICANT = 0.05
_PARTS_SHOWN = 14  # sub-expressions
_LABEL = 30  # characters of a formula


def draw_page(document: Mapping[str, Any], path: Path) -> None:
    """Writes the page of an analysis, whole or not at all; PDF is vector.

    Args:
        document: of `analyse`.
        path: ending in .png or .pdf.

    Raises:
        InputError: another suffix.
        GpmetricError: the file cannot be written.
    """
    check_picture("--output", path)
    write_picture(path, page_figure(document))


def page_figure(document: Mapping[str, Any]) -> Figure:
    """The page of an analysis.

    Args:
        document: of `analyse`.
    """
    figure = Picture(figsize=(15, 9.5), layout="constrained")  # not pyplot's: no global state
    panels = [_symbols, _sub_expressions, _targets, _distances, _sizes, _progress]
    for axes, panel in zip(figure.subplots(2, 3).flat, panels, strict=True):
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        panel(axes, document)
    name = Path(document["ledger"]).name
    title = f"{name}: {document['formulas']} formulas measured, {document['evaluations']} evaluations paid for"
    figure.suptitle(title, fontsize=12, fontweight="bold", parse_math=False)
    return figure


def _symbols(axes: Axes, document: Mapping[str, Any]) -> None:
    _head(axes, "operands (bold), primitives and groups", "rank-biserial effect, right is better (pale: q ≥ 0.05)")
    _bars(axes, [row for row in document["parts"] if row["kind"] != "sub-expression" and row["effect"] is not None])
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text().isupper() else "normal")


def _sub_expressions(axes: Axes, document: Mapping[str, Any]) -> None:
    _head(axes, "strongest recurring sub-expressions", "rank-biserial effect (number: formulas with it)")
    rows = [row for row in document["parts"] if row["kind"] == "sub-expression" and row["effect"] is not None]
    _bars(axes, rows[:_PARTS_SHOWN])


def _bars(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Horizontal bars with their sign, the best part on top, and beside each the number of formulas with the part."""
    if not rows:
        return _nothing(axes, "nothing recurs")
    rows = sorted(rows, key=lambda row: row["effect"])
    effects = [row["effect"] for row in rows]
    bars = axes.barh(range(len(rows)), effects, color=[_GOOD if effect > 0 else _BAD for effect in effects])
    for bar, row in zip(bars, rows, strict=True):
        bar.set_alpha(1.0 if row["q"] < _SIGNIFICANT else 0.3)
    axes.set_yticks(range(len(rows)), [_shortened(row["name"]) for row in rows])
    axes.axvline(0, color="black", linewidth=0.8)
    limit = 1.25 * max(0.1, *map(abs, effects))
    axes.set_xlim(-limit, limit)
    for place, row in enumerate(rows):
        side = 1 if row["effect"] > 0 else -1
        axes.text(
            row["effect"] + 0.01 * side * limit, place, str(row["with"]), fontsize=7, va="center",
            ha="left" if side > 0 else "right", color=_MUTED,
        )  # fmt: skip


def _targets(axes: Axes, document: Mapping[str, Any]) -> None:
    _head(axes, "rank correlation between targets")
    targets = document["targets"]
    if len(targets) == 1:
        return _nothing(axes, f"{targets[0]} is the only target")
    matrix = np.eye(len(targets))
    for pair in document["target_pairs"]:
        first, second = targets.index(pair["first"]), targets.index(pair["second"])
        matrix[first, second] = matrix[second, first] = np.nan if pair["effect"] is None else pair["effect"]
    image = axes.imshow(matrix, cmap="RdBu", vmin=-1, vmax=1)
    axes.set_xticks(range(len(targets)), targets)
    axes.set_yticks(range(len(targets)), targets)
    for (row, column), value in np.ndenumerate(matrix):
        colour = "white" if abs(value) > 0.6 else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=9)
    axes.figure.colorbar(image, ax=axes, shrink=0.8).ax.tick_params(labelsize=8)


def _distances(axes: Axes, document: Mapping[str, Any]) -> None:
    masks = document["masks"]
    _head(axes, "masks: distance to the best formula's")
    if masks is None:
        return _nothing(axes, "this ledger holds no mask sketches")
    excess = {point["evaluation"]: point["mean_excess"] for point in document["points"]}
    _scatter(axes, masks["to_best"]["distances"], [excess[evaluation] for evaluation in masks["evaluations"]], _GOOD)
    axes.set_xlabel(f"share of mask entries that differ ({_correlation(masks['to_best'])})", fontsize=8)


def _sizes(axes: Axes, document: Mapping[str, Any]) -> None:
    _head(axes, "size and excess, Pareto front marked", f"nodes ({_correlation(document['nodes'])})")
    points = document["points"]
    _scatter(axes, [point["nodes"] for point in points], [point["mean_excess"] for point in points], _MUTED)
    front = sorted((point["nodes"], point["mean_excess"]) for point in points if point["front"])
    axes.step(*zip(*front, strict=True), where="post", marker="o", markersize=4, color=_BAD)


def _progress(axes: Axes, document: Mapping[str, Any]) -> None:
    points = document["points"]
    formula = min(points, key=lambda point: point["mean_excess"])["formula"]
    _head(axes, f"best so far: {_shortened(formula, 36)}", "evaluations paid for", "mean excess (nats/token)")
    paid = [*(point["paid"] for point in points), document["evaluations"]]
    best = list(accumulate((point["mean_excess"] for point in points), min))
    axes.step(paid, [*best, best[-1]], where="post", color=_GOOD)
    axes.set_xlim(0, document["evaluations"])
    for name, row in document["references"].items():
        if row is not None:
            axes.axhline(row["mean_excess"], color=_MUTED, linewidth=0.8, linestyle="--", zorder=0)
            axes.text(document["evaluations"], row["mean_excess"], name, ha="right", va="bottom", fontsize=8)


def _head(axes: Axes, title: str, horizontal: str = "", vertical: str = "") -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(horizontal, fontsize=8)
    axes.set_ylabel(vertical, fontsize=8)


def _scatter(axes: Axes, values: Sequence[float], excess: Sequence[float], colour: str) -> None:
    """Mean excess against something; the worst fifth, tens of times the best, stands at the upper edge."""
    top = float(np.quantile(excess, 0.8))
    shown = np.minimum(excess, top)
    beyond = np.asarray(excess) > top
    for chosen, marker in ((~beyond, "o"), (beyond, "^")):
        axes.scatter(
            np.asarray(values)[chosen], shown[chosen], s=16, color=colour, alpha=0.5, linewidths=0, marker=marker
        )
    span = (top - min(excess)) or 1.0
    axes.set_ylim(min(excess) - 0.05 * span, top + 0.05 * span)
    axes.set_ylabel("mean excess (nats/token; ▲ higher than the axis)", fontsize=8)


def _correlation(test: Mapping[str, Any]) -> str:
    known = test["effect"] is not None
    return f"Spearman {test['effect']:+.2f}, q = {test['q']:.2g}" if known else "no correlation"


def _nothing(axes: Axes, reason: str) -> None:
    axes.text(0.5, 0.5, reason, transform=axes.transAxes, ha="center", va="center", fontsize=9, color=_MUTED)
    axes.set_xticks([])
    axes.set_yticks([])


def _shortened(text: str, length: int = _LABEL) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
