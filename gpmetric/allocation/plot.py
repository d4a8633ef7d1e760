"""The front of an allocation search on one page, as PNG or PDF, and as a CSV table."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from gpmetric.files import check_picture, finite, write_picture, write_text
from gpmetric.results.picture import Picture, printable

__all__ = ["draw_front", "front_figure", "write_csv"]

_FIGURES = (
    "sparsity", "sparsity_total", "removed", "kept_prunable", "kept_total", "loss", "perplexity", "excess",
)  # fmt: skip

_FRONT, _PICKED, _MUTED = "#0072b2", "#d55e00", "#8c8c8c"  # Okabe and Ito's blue and vermilion
# the rest of their colours; a marker for each, so that the lines are told apart in print too
_BASELINES = (("#000000", "s"), ("#e69f00", "^"), ("#009e73", "D"), ("#cc79a7", "v"), ("#56b4e9", "P"))
_SHADES = "YlGnBu"
_DPI = 150  # of a PNG

_LOGARITHMIC = 20  # largest excess over smallest, from which the axis is logarithmic
_DEPTH = 1e-3  # of the largest excess: what is below is noise, and stands on a linear stretch at the foot of the axis
_CELLS, _CELL_ROWS, _CELL_COLUMNS = 210, 30, 30  # the largest heat map with numbers in its cells
_ROW_TICKS, _BLOCK_TICKS, _ROUND_LABELS = 32, 20, 8
_NAME, _ROW = 60, 28  # characters of a model or a metric, and of a row of the heat map
_TITLE = 100  # characters as wide as the page

Point = Mapping[str, Any]


def write_csv(document: Mapping[str, Any], path: Path) -> None:
    """Writes a row per point of the front and of each baseline, picked, dense; what is not finite is left empty.

    Args:
        document: of `gpmetric allocate`.
        path: of the table: method, the figures of the point, and the sparsity of each gene under its name.

    Raises:
        GpmetricError: the file cannot be written.
    """
    methods = [(document["allocator"], document["front"]), *_baselines(document)]
    methods += [("picked", [document["picked"]] if document.get("picked") else []), ("dense", [_dense(document)])]
    rows = [(method, point, _genes(point)) for method, points in methods for point in points]
    genes = list(dict.fromkeys(gene for _, _, found in rows for gene in found))
    table = io.StringIO()
    lines = [[method, *map(point.get, _FIGURES), *map(found.get, genes)] for method, point, found in rows]
    csv.writer(table, lineterminator="\n").writerows([["method", *_FIGURES, *genes], *finite(lines)])
    write_text(path, table.getvalue())


def draw_front(document: Mapping[str, Any], path: Path) -> None:
    """Writes the page of an allocation search, whole or not at all; PDF is vector.

    Args:
        document: of `gpmetric allocate`.
        path: ending in .png or .pdf.

    Raises:
        InputError: another suffix.
        GpmetricError: the file cannot be written.
    """
    check_picture("--plot", path)
    write_picture(path, front_figure(document), _DPI)


def front_figure(document: Mapping[str, Any]) -> Figure:
    """The page of an allocation search.

    Args:
        document: of `gpmetric allocate`.
    """
    document = finite(document)
    figure = Picture(figsize=(16, 9), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))  # not pyplot's
    places = figure.subplots(2, 2, height_ratios=[2.3, 1], width_ratios=[1, 1.15])
    for axes in places.flat:
        axes.tick_params(labelsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    grid = _grid(_genes(document.get("picked") or {}))
    _front(places[0, 0], document)
    _heat_map(places[0, 1], grid)
    _hypervolume(places[1, 0], document)
    _profile(places[1, 1], grid, document)
    title = _title(document)
    size = 14 * min(1.0, _TITLE / len(title))
    figure.suptitle(title, fontsize=size, fontweight="bold", parse_math=False)
    return figure


def _title(document: Mapping[str, Any]) -> str:
    """Model and settings; a character that the font lacks becomes a question mark."""
    name, metric = (_shortened(str(document[one]), _NAME) for one in ("model", "metric"))
    how = f"{document['allocator']} on {document['objective']}"
    return printable(f"{name}: {metric} by {document['granularity']}, sparsity allocated by {how}")


def _front(axes: Axes, document: Mapping[str, Any]) -> None:
    """Held-out excess against sparsity: the front a thick line, baselines thin ones, the picked point a star."""
    validation = document.get("validation") or {}
    windows = f" ({validation['windows']} windows)" if "windows" in validation else ""
    share = f"{document['prunable']:,} of {document['total']:,} parameters"
    _head(axes, "held-out loss against sparsity", f"sparsity of the prunable weights ({share})")
    axes.set_ylabel(f"excess over dense on held-out text{windows}, nats/token", fontsize=9)
    front, drawn, star = _measured(document["front"]), [], _measured([document.get("picked") or {}])
    for number, (name, points) in enumerate(_baselines(document)):
        if values := _measured(points):
            colour, marker = _BASELINES[number % len(_BASELINES)]
            drawn += values
            axes.plot(
                *zip(*values, strict=True), label=name, color=colour, marker=marker, markersize=5, linewidth=1,
                linestyle="--", alpha=0.85,
            )  # fmt: skip
    if not front and not drawn and not star:
        return _nothing(axes, "no loss is finite")
    if front:
        label = f"{document['allocator']} front ({len(front)} point{'s' * (len(front) > 1)})"
        size = 5 if len(front) <= 60 else 3
        axes.plot(*zip(*front, strict=True), label=label, color=_FRONT, marker="o", markersize=size, linewidth=2.2)
    if star:
        axes.plot(
            *star[0], label="picked", color=_PICKED, marker="*", markersize=20, markeredgecolor="white", linestyle="",
            zorder=5,
        )  # fmt: skip
    _scale_excess(axes, [excess for _, excess in [*front, *drawn, *star]], document["dense"].get("perplexity"))
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    _front_legend(axes, bool(front) + bool(star))
    if star:  # its figures in the lower right corner, which is below the front and so empty
        axes.annotate(
            _numbers(document["picked"], document["dense"]), star[0], (0.985, 0.025), textcoords="axes fraction",
            fontsize=9.5, ha="right", va="bottom", multialignment="left", zorder=6,
            bbox={"boxstyle": "round,pad=0.5", "fc": "white", "ec": _PICKED},
            arrowprops={"arrowstyle": "-", "color": _PICKED, "shrinkB": 8},
        )  # fmt: skip


def _front_legend(axes: Axes, found: int) -> None:
    """The front and the picked point, which were drawn last, before the baselines."""
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda place: place < len(labels) - found)
    legend = axes.legend([handles[i] for i in order], [labels[i] for i in order], loc="upper left", fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _numbers(picked: Point, dense: Mapping[str, Any]) -> str:
    lines = [f"picked: sparsity {picked['sparsity']:.3f}"]
    if picked.get("sparsity_total") is not None:
        lines[0] += f" ({picked['sparsity_total']:.3f} of all parameters)"
    lines.append(f"excess {_plain(picked['excess'])} nats/token")
    if picked.get("perplexity") is not None and dense.get("perplexity") is not None:
        lines.append(f"perplexity {_plain(picked['perplexity'])} (dense {_plain(dense['perplexity'])})")
    return "\n".join(lines)


def _scale_excess(axes: Axes, excess: Sequence[float], perplexity: float | None) -> None:
    """Chooses between a linear and a logarithmic axis and writes the perplexity beside each tick, on the right."""
    top = max(map(abs, excess))
    least = min((value for value in excess if value > 0), default=top)
    scale: dict[str, Any] = {"value": "linear"}
    if top > _LOGARITHMIC * least:
        foot = max(least, _DEPTH * top)
        scale = {"value": "symlog", "linthresh": foot, "linscale": 0.5} if min(excess) < foot else {"value": "log"}
        axes.set_yscale(**scale)
        ticks = _log_ticks(foot, 2 * top)
    else:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))  # 0 is the dense model
        ticks = [float(tick) + 0.0 for tick in axes.get_yticks()]  # -0 is 0
    low, high = axes.get_ylim()
    ticks = [tick for tick in ticks if low <= tick <= high]
    sides = [(axes, ticks)]
    if perplexity is not None:
        right = axes.twinx()  # matplotlib 3.11 places the ticks of a secondary axis wrongly on a symlog scale
        right.set_yscale(**scale)
        right.set_ylim(low, high)
        right.set_ylabel("perplexity", fontsize=9)
        right.spines[["top", "left"]].set_visible(False)
        sides.append((right, [perplexity * math.exp(min(tick, 600.0)) for tick in ticks]))
    for side, values in sides:
        side.set_yticks(ticks, _told_apart(values))
        side.minorticks_off()
        side.tick_params(labelsize=9)


def _log_ticks(least: float, largest: float) -> list[float]:
    """0 and, on both sides of it, 1, 2 and 5 times the powers of ten."""
    powers = range(math.floor(math.log10(least)), math.ceil(math.log10(largest)) + 1)
    ticks = [tick for power in powers for digit in (1, 2, 5) if (tick := digit * 10.0**power) >= least]
    return [-tick for tick in reversed(ticks)] + [0.0, *ticks]


def _told_apart(values: Sequence[float]) -> list[str]:
    """The numbers with as few figures as tell them apart, at least three."""
    texts = ([_plain(value, figures) for value in values] for figures in range(3, 17))
    return next((text for text in texts if len(set(text)) == len(set(values))), [f"{value}" for value in values])


def _hypervolume(axes: Axes, document: Mapping[str, Any]) -> None:
    _head(axes, "progress of the search", "generation (dotted: a round with more windows begins)")
    values = [math.nan if value is None else value for value in document.get("hypervolume") or []]
    if not any(map(math.isfinite, values)):
        return _nothing(axes, "no generations")
    few = len(values) <= 40
    axes.plot(range(len(values)), values, color=_FRONT, linewidth=2, marker="o" if few else "", markersize=3.5)
    axes.set_ylabel("hypervolume of the front", fontsize=9)
    axes.margins(y=0.16)  # room for the labels of the rounds
    if len(values) == 1:
        axes.set_xlim(-0.5, 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    rounds = document.get("rounds") or []
    labelled = _ticks(len(rounds), _ROUND_LABELS)
    for place, begun in enumerate(rounds):
        axes.axvline(begun["generation"], color=_MUTED, linewidth=0.9, linestyle=":")
        if place in labelled:
            unit = " windows" if place == 0 else ""
            axes.annotate(
                f"{begun['windows']}{unit}", (begun["generation"], 1), xycoords=axes.get_xaxis_transform(),
                xytext=(3, -2), textcoords="offset points", fontsize=8, color="#555555", va="top",
            )  # fmt: skip


@dataclass(frozen=True)
class _Grid:
    """Sparsities by kind of matrix and by block, in model order."""

    rows: list[str]  # names without the block and what stands before it
    blocks: list[int | None]  # indices; None at the end where a gene is in no block
    values: np.ndarray  # [rows, blocks]; NaN where there is no such gene


def _grid(genes: Mapping[str, float | None]) -> _Grid:
    parted = {gene: _parted(gene) for gene in genes}
    heads = [head for head, block, _ in parted.values() if block is not None]
    shared = len(list(takewhile(lambda parts: len(set(parts)) == 1, zip(*heads, strict=False))))
    kinds = {gene: ".".join(head[shared:] + tail) or "block" for gene, (head, _, tail) in parted.items()}
    rows = list(dict.fromkeys(kinds.values()))
    blocks = sorted({block for _, block, _ in parted.values()}, key=lambda block: (block is None, block))
    values = np.full((len(rows), len(blocks)), np.nan)
    for gene, sparsity in genes.items():
        if sparsity is not None:
            values[rows.index(kinds[gene]), blocks.index(parted[gene][1])] = sparsity
    return _Grid(rows, blocks, values)


def _parted(gene: str) -> tuple[list[str], int | None, list[str]]:
    """What stands before the first number of a dotted name, the number, what stands after it."""
    parts = gene.split(".")
    for place, part in enumerate(parts):
        if part.isascii() and part.isdigit():
            return parts[:place], int(part), parts[place + 1 :]
    return [], None, parts


def _heat_map(axes: Axes, grid: _Grid) -> None:
    _head(axes, "picked allocation: sparsity by matrix and block")
    known = grid.values[np.isfinite(grid.values)]
    if not known.size:
        return _nothing(axes, "no allocation")
    low, high = math.floor(known.min() * 10 + 1e-6) / 10, math.ceil(known.max() * 10 - 1e-6) / 10
    image = axes.imshow(
        grid.values, cmap=_SHADES, vmin=low, vmax=max(high, low + 0.1), aspect="auto", interpolation="nearest"
    )
    axes.patch.set(facecolor="#f4f4f4", hatch="////", edgecolor="#d9d9d9", linewidth=0)  # where there is no gene
    rows = _ticks(len(grid.rows), _ROW_TICKS)
    axes.set_yticks(rows, [printable(_shortened(grid.rows[row], _ROW)) for row in rows], parse_math=False)
    _label_blocks(axes, grid)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    height, width = grid.values.shape
    if height <= _CELL_ROWS + 10 and width <= 2 * _CELL_COLUMNS:  # white lines between cells
        axes.set_xticks(np.arange(width - 1) + 0.5, minor=True)
        axes.set_yticks(np.arange(height - 1) + 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.2 if width <= _CELL_COLUMNS else 0.6)
        axes.tick_params(which="minor", length=0)
    if grid.values.size <= _CELLS and height <= _CELL_ROWS and width <= _CELL_COLUMNS:
        _write_cells(axes, grid.values, image)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02, aspect=30)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=9)
    bar.set_label("sparsity", fontsize=9)


def _write_cells(axes: Axes, values: np.ndarray, image: Any) -> None:
    size = min(10.0, 185 / values.shape[1], 260 / values.shape[0])
    for (row, column), value in np.ndenumerate(values):
        if math.isfinite(value):
            red, green, blue, _ = image.to_rgba(value)
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.45
            axes.text(
                column, row, f"{value:.2f}", ha="center", va="center", fontsize=size,
                color="white" if dark else "black",
            )  # fmt: skip


def _profile(axes: Axes, grid: _Grid, document: Mapping[str, Any]) -> None:
    """Mean of each block, every matrix counting once, and the range; block stands under block of the heat map."""
    _head(axes, "picked allocation: profile over the blocks", "block")
    numbered = [place for place, block in enumerate(grid.blocks) if block is not None]
    columns = {place: column[np.isfinite(column)] for place in numbered for column in [grid.values[:, place]]}
    columns = {place: column for place, column in columns.items() if column.size}
    if not columns:
        return _nothing(axes, "no blocks")
    if len(grid.rows) > 1:
        low, high = [column.min() for column in columns.values()], [column.max() for column in columns.values()]
        axes.fill_between(list(columns), low, high, color=_FRONT, alpha=0.13, linewidth=0, label="range in the block")
    marker = "o" if len(columns) <= 40 else ""
    means = [column.mean() for column in columns.values()]
    axes.plot(list(columns), means, color=_FRONT, linewidth=2, marker=marker, markersize=4.5, label="mean of the block")
    sparsity = (document.get("picked") or {}).get("sparsity")
    if sparsity is not None:
        axes.axhline(sparsity, color="black", linewidth=1.1, linestyle="--", label=f"uniform {sparsity:.3f}")
    axes.set_xlim(-0.5, len(grid.blocks) - 0.5)
    axes.margins(y=0.12)
    axes.set_ylabel("sparsity", fontsize=9)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    _label_blocks(axes, grid)
    axes.legend(fontsize=8, ncols=3, loc="best", framealpha=0.8)


def _label_blocks(axes: Axes, grid: _Grid) -> None:
    places = _ticks(len(grid.blocks), _BLOCK_TICKS)
    axes.set_xticks(places, ["–" if grid.blocks[place] is None else str(grid.blocks[place]) for place in places])


def _ticks(count: int, most: int) -> list[int]:
    """Places of at most so many ticks, in round steps."""
    steps = (digit * 10**power for power in range(count + 1) for digit in (1, 2, 5))
    return list(range(0, count, next(step for step in steps if count <= step * most)))


def _measured(points: Iterable[Point]) -> list[tuple[float, float]]:
    """(sparsity, excess) of the points that have both, rising in sparsity."""
    pairs = [(point.get("sparsity"), point.get("excess")) for point in points]
    return sorted((sparsity, excess) for sparsity, excess in pairs if sparsity is not None and excess is not None)


def _baselines(document: Mapping[str, Any]) -> list[tuple[str, Sequence[Point]]]:
    return [(name, points) for name, points in (document.get("baselines") or {}).items() if points]


def _dense(document: Mapping[str, Any]) -> Point:
    """The model as it came, as a point."""
    kept = {"kept_prunable": document["prunable"], "kept_total": document["total"]}
    return {"sparsity": 0.0, "sparsity_total": 0.0, "removed": 0, "excess": 0.0, **kept, **document["dense"]}


def _genes(point: Point) -> Mapping[str, float | None]:
    return point.get("genes") or {}


def _head(axes: Axes, title: str, xlabel: str = "") -> None:
    axes.set_title(title, fontsize=11, loc="left", fontweight="bold")
    axes.set_xlabel(xlabel, fontsize=9)


def _nothing(axes: Axes, reason: str) -> None:
    axes.text(0.5, 0.5, reason, transform=axes.transAxes, ha="center", va="center", fontsize=10, color=_MUTED)
    axes.set_xticks([])
    axes.set_yticks([])


def _plain(value: float, figures: int = 3) -> str:
    """So many significant figures, and no power of ten between a ten-thousandth and a million."""
    return f"{value:,.0f}" if 10**figures - 0.5 <= abs(value) < 1e6 else f"{value:.{figures}g}"


def _shortened(text: str, length: int) -> str:
    """The text with its middle left out: the end of a name tells most, its beginning says whose it is."""
    return text if len(text) <= length else f"{text[: length // 3]}…{text[length // 3 + 1 - length :]}"
