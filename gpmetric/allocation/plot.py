"""The front of an allocation search and the allocation picked of it on one page, as PNG or PDF."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from gpmetric.allocation.front_panels import (
    FRONT,
    MUTED,
    draw_against_uniform,
    draw_loss,
    head,
    is_compared,
    is_measured,
)
from gpmetric.allocation.front_points import genes_of
from gpmetric.files import check_picture, finite, write_picture
from gpmetric.pictures import printable, shortened
from gpmetric.results.picture import Picture

__all__ = ["draw_front", "front_figure"]

_SHADES = "YlGnBu"
_DPI = 150  # of a PNG
_CELLS, _CELL_ROWS, _CELL_COLUMNS = 210, 30, 30  # the largest heat map with numbers in its cells
_ROW_TICKS, _BLOCK_TICKS, _ROUND_LABELS = 32, 20, 8
_NAME, _ROW = 60, 28  # characters of a model or a metric, and of a row of the heat map
_TITLE = 100  # characters as wide as the page

_Document = Mapping[str, Any]
_Panel = Callable[[Axes], None]


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


def front_figure(document: _Document) -> Figure:
    """The page of an allocation search.

    Args:
        document: of `gpmetric allocate`.
    """
    document = finite(document)
    figure = Picture(figsize=(16, 10), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))  # not pyplot's
    columns = [column for column in (_left(document), _right(document)) if column]
    outer = figure.add_gridspec(1, max(1, len(columns)), width_ratios=[1, 1.15][: len(columns)] or [1])
    for place, column in enumerate(columns):
        inner = outer[place].subgridspec(len(column), 1, height_ratios=[height for height, _ in column])
        for row, (_, draw) in enumerate(column):
            axes = figure.add_subplot(inner[row])
            axes.tick_params(labelsize=9)
            axes.spines[["top", "right"]].set_visible(False)
            draw(axes)
    title = _title(document)
    size = 14 * min(1.0, _TITLE / len(title))
    figure.suptitle(title, fontsize=size, fontweight="bold", parse_math=False)
    return figure


def _left(document: _Document) -> list[tuple[float, _Panel]]:
    """Heights and panels of the search that there is something to draw in."""
    values = [value for value in document.get("hypervolume") or [] if value is not None]
    return [
        *([(1.5, partial(draw_loss, document=document))] if is_measured(document) else []),
        *([(1.5, partial(draw_against_uniform, document=document))] if is_compared(document) else []),
        *([(0.8, partial(_hypervolume, document=document))] if values else []),
    ]


def _right(document: _Document) -> list[tuple[float, _Panel]]:
    """The same of the picked allocation."""
    grid = _grid(genes_of(document.get("picked") or {}))
    known = np.isfinite(grid.values)
    in_blocks = known[:, [block is not None for block in grid.blocks]]
    return [
        *([(2.3, partial(_heat_map, grid=grid))] if known.any() else []),
        *([(1.0, partial(_profile, grid=grid, document=document))] if in_blocks.any() else []),
    ]


def _title(document: _Document) -> str:
    """Model, metric and who allocated; a character that the font lacks becomes a question mark."""
    name, metric = (shortened(str(document[one]), _NAME) for one in ("model", "metric"))
    how = "searched" if document.get("hypervolume") else "set"
    return printable(f"{name} pruned by {metric}: how much of each part is removed, {how} by {document['allocator']}")


def _hypervolume(axes: Axes, document: Mapping[str, Any]) -> None:
    head(axes, "progress of the search", "generation (dotted: a round with more windows begins)")
    values = [math.nan if value is None else value for value in document.get("hypervolume") or []]
    few = len(values) <= 40
    axes.plot(range(len(values)), values, color=FRONT, linewidth=2, marker="o" if few else "", markersize=3.5)
    axes.set_ylabel("hypervolume of the front", fontsize=9)
    axes.margins(y=0.16)  # room for the labels of the rounds
    if len(values) == 1:
        axes.set_xlim(-0.5, 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    rounds = [begun for begun in document.get("rounds") or [] if begun["generation"] < len(values)]
    labelled = _ticks(len(rounds), _ROUND_LABELS)
    for place, begun in enumerate(rounds):
        axes.axvline(begun["generation"], color=MUTED, linewidth=0.9, linestyle=":")
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
    head(axes, "picked allocation: sparsity by matrix and block", "block")
    known = grid.values[np.isfinite(grid.values)]
    low, high = math.floor(known.min() * 10 + 1e-6) / 10, math.ceil(known.max() * 10 - 1e-6) / 10
    image = axes.imshow(
        grid.values, cmap=_SHADES, vmin=low, vmax=max(high, low + 0.1), aspect="auto", interpolation="nearest"
    )
    axes.patch.set(facecolor="#f4f4f4", hatch="////", edgecolor="#d9d9d9", linewidth=0)  # where there is no gene
    rows = _ticks(len(grid.rows), _ROW_TICKS)
    axes.set_yticks(rows, [printable(shortened(grid.rows[row], _ROW)) for row in rows], parse_math=False)
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
    head(axes, "picked allocation: profile over the blocks", "block")
    numbered = [place for place, block in enumerate(grid.blocks) if block is not None]
    columns = {place: column[np.isfinite(column)] for place in numbered for column in [grid.values[:, place]]}
    columns = {place: column for place, column in columns.items() if column.size}
    if len(grid.rows) > 1:
        low, high = [column.min() for column in columns.values()], [column.max() for column in columns.values()]
        axes.fill_between(list(columns), low, high, color=FRONT, alpha=0.13, linewidth=0, label="range in the block")
    marker = "o" if len(columns) <= 40 else ""
    means = [column.mean() for column in columns.values()]
    axes.plot(list(columns), means, color=FRONT, linewidth=2, marker=marker, markersize=4.5, label="mean of the block")
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
