"""Pictures of results, of what their tables hold; what is not finite is left out, and said to be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib.ticker import MaxNLocator

from gpmetric.errors import GpmetricError
from gpmetric.pictures import printable
from gpmetric.results.picture import BLUE, GREY, ORANGE, Picture, axes_of

__all__ = ["draw_bench", "draw_blocks", "draw_front", "draw_recipes"]

_EXCESS = "excess log-loss over the dense model, nats per token"
_NAME = 40  # characters of a name beside a bar
_BARS = 60
_APART = 0.045  # of the axis, between two names of lines


def draw_bench(title: str, rows: Sequence[Mapping[str, Any]]) -> Picture:
    """Bars of the mean excess over models and texts: targets below each other, metrics within them, the best first.

    Raises:
        GpmetricError: no figure is finite.
    """
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if _is_finite(row.get("excess")):
            found.setdefault((row["target"], row["metric"]), []).append(row["excess"])
    targets = {target: place for place, target in enumerate(dict.fromkeys(target for target, _ in found))}
    means = sorted(
        ((*pair, fmean(values)) for pair, values in found.items()), key=lambda one: (targets[one[0]], one[2])
    )
    best = {target: min(mean for other, _, mean in means if other == target) for target in targets}
    bars = [(f"{_short(target)}  {_short(metric)}", mean, mean == best[target]) for target, metric, mean in means]
    return _bars(title, bars)


def draw_recipes(title: str, rows: Sequence[Mapping[str, Any]]) -> Picture:
    """Bars of the excess on validation, in the order of the table; the recipe stands out.

    Raises:
        GpmetricError: no figure is finite.
    """
    found = [(_short(row["what"]), row["excess"], row["what"] == "recipe") for row in rows if _is_finite(row["excess"])]
    return _bars(title, found)


def draw_blocks(title: str, rows: Sequence[Mapping[str, Any]]) -> Picture:
    """What stays of each block: bars of channels, of heads, or of experts.

    Raises:
        GpmetricError: there are no blocks.
    """
    kinds = [kind for kind in ("channels", "heads", "experts") if any(kind in row for row in rows)]
    if not kinds:
        raise GpmetricError("there is nothing to draw: the result has no blocks")
    picture = Picture(figsize=(9, 2.6 * len(kinds)), layout="constrained")
    for axes, kind in zip(picture.subplots(len(kinds), squeeze=False)[:, 0], kinds, strict=True):
        axes.bar([row["block"] for row in rows], [row.get(kind, 0) for row in rows], color=BLUE)
        axes.set_ylabel(f"{'key/value groups' if kind == 'heads' else kind} that stay")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("block")
        axes.spines[["top", "right"]].set_visible(False)
    picture.suptitle(printable(title), x=0.01, ha="left", parse_math=False)
    return picture


def draw_front(title: str, document: Mapping[str, Any]) -> Picture:
    """Mean excess on validation against nodes: formulas of the front that were measured there, baselines as lines.

    Raises:
        GpmetricError: no figure is finite.
    """
    picture, axes = axes_of(title, "nodes of the formula", "mean excess on validation, nats per token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    front = [(one["nodes"], _mean(one.get("validation"))) for one in document["front"]]
    measured = [(nodes, mean) for nodes, mean in front if mean is not None]
    winner = document["winner"]
    star = [(winner["nodes"], mean)] if (mean := _mean(winner.get("validation"))) is not None else []
    lines = {name: _mean(row.get("validation")) for name, row in document["baselines"].items()}
    drawn = sorted((mean, name) for name, mean in lines.items() if mean is not None)
    if not measured and not star and not drawn:
        raise GpmetricError("there is nothing to draw: no figure on validation is finite")
    if measured:
        axes.plot(*zip(*measured, strict=True), "o", color=BLUE, label="front", zorder=2)
    if star:
        axes.plot(*zip(*star, strict=True), "*", color=ORANGE, markersize=14, label="winner", zorder=3)
    for mean, _ in drawn:
        axes.axhline(mean, color=GREY, linewidth=0.8, linestyle="--", zorder=1)
    low, high = axes.get_ylim()
    place = -math.inf
    for mean, name in drawn:  # names of lines that are close stand above each other, so each tells its figure
        place = max(mean, place + _APART * (high - low))
        axes.annotate(
            f"{_short(name)} {mean:.3f}",
            (1.01, place),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
            parse_math=False,
        )
    if measured or star:
        axes.legend(frameon=False)
    return picture


def _bars(title: str, bars: Sequence[tuple[str, float, bool]]) -> Picture:
    """Bars from above to below, each a name, a figure, and whether it stands out."""
    if not bars:
        raise GpmetricError("there is nothing to draw: no figure of the result is finite")
    shown = bars[:_BARS]
    left = f" ({len(bars) - _BARS} more are in table())" if len(bars) > _BARS else ""
    picture, axes = axes_of(title + left, _EXCESS, "", (9, 1.4 + 0.3 * len(shown)))
    places = range(len(shown))
    drawn = axes.barh(places, [value for _, value, _ in shown], color=[ORANGE if best else BLUE for *_, best in shown])
    axes.bar_label(drawn, [f"{value:.3f}" for _, value, _ in shown], padding=3, fontsize=8)
    axes.set_yticks(places, [name for name, _, _ in shown], parse_math=False, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    return picture


def _mean(by_target: Mapping[str, float | None] | None) -> float | None:
    """The mean over targets, None where one is missing or not finite."""
    values = list((by_target or {}).values())
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return fmean(finite) if finite and len(finite) == len(values) else None


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _short(text: Any) -> str:
    told = printable(str(text))
    return told if len(told) <= _NAME else f"{told[: _NAME - 3]}..."
