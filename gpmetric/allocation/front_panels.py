"""The panels of an allocation search's front: what it loses, and how that compares with a uniform allocation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from gpmetric.allocation.front_points import Pair, Point, against, baselines_of, measured, undominated
from gpmetric.pictures import printable, shortened

__all__ = ["FRONT", "MUTED", "draw_against_uniform", "draw_loss", "head", "is_compared", "is_measured"]

FRONT, _PICKED, MUTED = "#0072b2", "#d55e00", "#767676"  # Okabe and Ito's blue and vermilion
# the rest of their colours; a marker for each, so that the lines are told apart in print too
_BASELINES = (("#000000", "s"), ("#e69f00", "^"), ("#009e73", "D"), ("#cc79a7", "v"), ("#56b4e9", "P"))
_LOGARITHMIC = 20  # largest excess over smallest, from which the axis is logarithmic
_DEPTH = 1e-3  # of the largest excess: what is below is noise, and stands on a linear stretch at the foot of the axis
_WORST = 1.0  # above uniform: what is twice as bad is bad enough
_UNIFORM = "uniform"
_LABEL = 24  # characters of an allocator

_Document = Mapping[str, Any]


def is_measured(document: _Document) -> bool:
    """Whether the front, the picked point or an allocation by rule has a loss."""
    points = [*document["front"], document.get("picked") or {}]
    return bool(measured([*points, *(point for _, rule in baselines_of(document) for point in rule)]))


def is_compared(document: _Document) -> bool:
    """Whether anything can be set against a uniform allocation."""
    others = [document["front"], *(points for name, points in baselines_of(document) if name != _UNIFORM)]
    return any(against(measured(points), _uniform(document)) for points in others)


def draw_loss(axes: Axes, document: _Document) -> None:
    """Held-out excess against sparsity, the picked point a star; beside the front uniform alone, where it is there.

    The line runs through the points that none of the front dominates on the held-out text; the search chose them on
    another one.
    """
    validation = document.get("validation") or {}
    windows = f", {validation['windows']} windows" if "windows" in validation else ""
    head(axes, "held-out loss against sparsity", _sparsity_label(document))
    axes.set_ylabel(f"excess over dense (nats/token{windows})", fontsize=9)
    front, star = measured(document["front"]), measured([document.get("picked") or {}])
    rules = _rules(document)
    if is_compared(document):  # the next panel has the others
        rules = {_UNIFORM: rules[_UNIFORM]}
    drawn = _draw_rules(axes, rules)
    _draw_front(axes, front, str(document["allocator"]))
    _draw_star(axes, star)
    _scale_excess(axes, [excess for _, excess in [*front, *drawn, *star]], document["dense"].get("perplexity"))
    _finish(axes, bool(front) + bool(star))
    if star:  # its figures in the lower right corner, which is below the front and so empty
        axes.annotate(
            _numbers(document["picked"], document["dense"]), star[0], (0.985, 0.035), textcoords="axes fraction",
            fontsize=9, ha="right", va="bottom", multialignment="left", zorder=6,
            bbox={"boxstyle": "round,pad=0.4", "fc": "white", "ec": _PICKED},
            arrowprops={"arrowstyle": "-", "color": _PICKED, "shrinkB": 8},
        )  # fmt: skip


def draw_against_uniform(axes: Axes, document: _Document) -> None:
    """By how much the held-out excess of every allocation differs from that of a uniform one at the same sparsity."""
    head(axes, "excess against a uniform allocation's (below 0 is better)", _sparsity_label(document))
    axes.set_ylabel("difference to uniform", fontsize=9)
    curve = _uniform(document)
    rules = {name: against(pairs, curve) for name, pairs in _rules(document).items() if name != _UNIFORM}
    front = against(undominated(measured(document["front"])), curve)
    star = against(measured([document.get("picked") or {}]), curve)
    _draw_rules(axes, rules, first=1)
    if front:
        axes.plot(*zip(*front, strict=True), label=str(document["allocator"]), **_front_style(front))
    _draw_star(axes, star)
    axes.axhline(0, color="black", linewidth=1.1, linestyle="--", label=_UNIFORM)
    known = [value for _, value in [*front, *star, *(pair for pairs in rules.values() for pair in pairs)]]
    low, high = min(0.0, *known), min(max(0.0, *known), _WORST)
    span = (high - low) or 1.0
    axes.set_ylim(low - 0.08 * span, high + 0.35 * span)  # room for the legend
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if span > 0.05 else 1))
    _finish(axes, 0, columns=4)


def _draw_rules(axes: Axes, rules: Mapping[str, Sequence[Pair]], first: int = 0) -> list[Pair]:
    """A thin line with markers for each allocation by rule; what was drawn."""
    for number, (name, pairs) in enumerate(rules.items(), first):
        if pairs:
            colour, marker = _BASELINES[number % len(_BASELINES)]
            axes.plot(
                *zip(*pairs, strict=True), label=printable(shortened(name, _LABEL)), color=colour, marker=marker,
                markersize=5, linewidth=1, linestyle="--", alpha=0.85,
            )  # fmt: skip
    return [pair for pairs in rules.values() for pair in pairs]


def _draw_front(axes: Axes, front: Sequence[Pair], allocator: str) -> None:
    """A thick line through the points that none dominates, and the others pale."""
    best = undominated(front)
    others = [pair for pair in front if pair not in best]
    if best:
        label = f"{allocator} front ({len(best)} point{'s' * (len(best) > 1)})"
        axes.plot(*zip(*best, strict=True), label=label, **_front_style(best))
    if others:
        axes.plot(
            *zip(*others, strict=True), label=f"of its search, dominated here ({len(others)})", color=FRONT, marker="o",
            markersize=4, markerfacecolor="white", alpha=0.6, linestyle="",
        )  # fmt: skip


def _front_style(pairs: Sequence[Pair]) -> dict[str, Any]:
    return {"color": FRONT, "marker": "o", "markersize": 5 if len(pairs) <= 60 else 3, "linewidth": 2.2}


def _draw_star(axes: Axes, star: Sequence[Pair]) -> None:
    if star:
        axes.plot(
            *star[0], label="picked", color=_PICKED, marker="*", markersize=18, markeredgecolor="white", linestyle="",
            zorder=5,
        )  # fmt: skip


def _finish(axes: Axes, found: int, columns: int = 1) -> None:
    """Grid and legend: the front and the picked point, which were drawn last, before the allocations by rule."""
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda place: place < len(labels) - found)
    legend = axes.legend(
        [handles[i] for i in order], [labels[i] for i in order], loc="upper left", fontsize=8.5, framealpha=0.85,
        ncols=columns,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)


def _rules(document: _Document) -> dict[str, list[Pair]]:
    return {name: measured(points) for name, points in baselines_of(document)}


def _uniform(document: _Document) -> list[Pair]:
    return _rules(document).get(_UNIFORM, [])


def _sparsity_label(document: _Document) -> str:
    return f"sparsity of the prunable weights ({document['prunable']:,} of {document['total']:,} parameters)"


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


def head(axes: Axes, title: str, xlabel: str = "") -> None:
    """Title and horizontal label of a panel."""
    axes.set_title(title, fontsize=11, loc="left", fontweight="bold")
    axes.set_xlabel(xlabel, fontsize=9)


def _plain(value: float, figures: int = 3) -> str:
    """So many significant figures, and no power of ten between a ten-thousandth and a million."""
    return f"{value:,.0f}" if 10**figures - 0.5 <= abs(value) < 1e6 else f"{value:.{figures}g}"
