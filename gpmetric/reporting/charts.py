"""Drawings as SVG of our own: lines, points that can be selected, bars, a heat map and differences.

Colours are classes, so that a page's theme decides them. What is not finite is not drawn; of nothing there is no
drawing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from gpmetric.reporting.axes import Axis, across_at, framed, number, up_at

__all__ = ["Line", "Point", "bars", "differences", "heat_map", "lines", "points"]

_WIDTH, _ROW, _BAR = 420.0, 38.0, 350.0  # of bars: all of it, the height of one with its name, the longest
_CELL, _FIRST = 34.0, 46.0  # of a heat map: height of a row, width of the blocks' numbers
_LONGEST = 48  # letters of a bar's name
_MOST_ROWS = 300


@dataclass(frozen=True)
class Line:
    """Points (x, y) under a name; `kind` is its class, `steps` joins them as what is so until the next."""

    name: str
    kind: str
    places: Sequence[tuple[float, float]]
    steps: bool = False


@dataclass(frozen=True)
class Point:
    """A point under a name; `panel` is the id of what is shown when it is selected."""

    name: str
    kind: str
    x: float
    y: float
    panel: str = ""


def lines(title: str, across: str, up: str, drawn: Sequence[Line], level: tuple[str, float] | None = None) -> Markup:
    """Lines over whole numbers, with a level that they are to be below, if there is one."""
    drawn = [Line(one.name, one.kind, _finite(one.places), one.steps) for one in drawn]
    drawn = [one for one in drawn if one.places]
    if not drawn:
        return Markup("")
    values = [y for one in drawn for _, y in one.places]
    values += [level[1]] if level is not None and math.isfinite(level[1]) else []
    horizontal = Axis.of([x for one in drawn for x, _ in one.places], across, whole=True, margin=0.02)
    vertical = Axis.of(values, up)
    content = [_line(one, horizontal, vertical) for one in drawn]
    if level is not None and math.isfinite(level[1]):
        ends = ((horizontal.low, level[1]), (horizontal.high, level[1]))
        content.append(_line(Line(level[0], "level", ends), horizontal, vertical))
        words = '<text class="note end" x="{}" y="{}">{}</text>'
        height = up_at(vertical, level[1])
        content.append(Markup(words).format(number(across_at(horizontal, horizontal.high) - 4), number(height - 6),
                                            level[0]))  # fmt: skip
    return framed(horizontal, vertical, Markup("").join(content), title)


def points(
    title: str, across: str, up: str, drawn: Sequence[Point], joined: Sequence[Line] = (), *, whole: bool = False
) -> Markup:
    """Points, those with a panel as links to it, over lines."""
    drawn = [one for one in drawn if math.isfinite(one.x) and math.isfinite(one.y)]
    joined = [Line(one.name, one.kind, _finite(one.places), one.steps) for one in joined]
    if not drawn:
        return Markup("")
    places = [(one.x, one.y) for one in drawn] + [place for one in joined for place in one.places]
    horizontal = Axis.of([x for x, _ in places], across, whole=whole)
    vertical = Axis.of([y for _, y in places], up)
    content = [_line(one, horizontal, vertical) for one in joined if one.places]
    content += [_point(one, horizontal, vertical) for one in sorted(drawn, key=lambda one: (one.x, one.y))]
    live = any(one.panel for one in drawn)
    return framed(horizontal, vertical, Markup("").join(content), title, live=live)


def _finite(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in places if math.isfinite(x) and math.isfinite(y)]


def _line(one: Line, across: Axis, up: Axis) -> Markup:
    spots = [(number(across_at(across, x)), number(up_at(up, y))) for x, y in one.places]
    path = "M{} {}".format(*spots[0])
    for (_, before), (x, y) in pairwise(spots):
        path += f"H{x}V{y}" if one.steps and before is not None else f"L{x} {y}"
    return Markup('<path class="line {}" d="{}"><title>{}</title></path>').format(one.kind, path, one.name)


def _point(one: Point, across: Axis, up: Axis) -> Markup:
    x, y = across_at(across, one.x), up_at(up, one.y)
    if one.kind in ("baseline", "solver"):  # told by their form as well as by their colour
        shape = Markup('<path class="mark {}" d="M{} {}l6 6l-6 6l-6 -6z"/>').format(one.kind, number(x), number(y - 6))
    else:
        shape = Markup('<circle class="mark {}" cx="{}" cy="{}" r="5.5"/>').format(one.kind, number(x), number(y))
    told = f"{one.name}: {one.x:.6g}, {one.y:.4f}"
    shape += Markup("<title>{}</title>").format(told)
    if not one.panel:
        return Markup("<g>{}</g>").format(shape)
    return Markup('<a class="point" href="#{}" aria-label="{}">{}</a>').format(one.panel, told, shape)


def bars(title: str, rows: Sequence[tuple[str, float, str, str]]) -> Markup:
    """Horizontal bars from zero, each below its name: name, length, class, and the words at the end of it."""
    rows = [row for row in rows if math.isfinite(row[1])][:_MOST_ROWS]
    if not rows:
        return Markup("")
    longest = max(abs(length) for _, length, _, _ in rows) or 1.0
    parts = [_head("bars", _WIDTH, _ROW * len(rows) + 4, title)]
    for place, (name, length, kind, words) in enumerate(rows):
        y, shown = _ROW * place, _BAR * max(0.0, length) / longest
        short = name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}\N{HORIZONTAL ELLIPSIS}"
        parts.append(
            Markup(
                '<text class="name" x="0" y="{}">{}<title>{}</title></text>'
                '<rect class="bar {}" x="0" y="{}" width="{}" height="13" rx="2"/>'
                '<text class="tick" x="{}" y="{}">{}</text>'
            ).format(
                number(y + 13), short, name, kind, number(y + 18), number(max(1.0, shown)), number(shown + 7),
                number(y + 29), words,
            )
        )  # fmt: skip
    return Markup("").join([*parts, Markup("</svg>")])


def heat_map(
    title: str, rows: Sequence[str], columns: Sequence[str], values: Mapping[tuple[str, str], float]
) -> Markup:
    """Shares from 0 to 1 by row and column, each cell with its figure in percent, the more the larger of them."""
    low, high = min(values.values()), max(values.values())
    rows = rows[:_MOST_ROWS]
    wide = max(58.0, 8.0 * max((len(one) for one in columns), default=0) + 10)
    width, height = _FIRST + wide * len(columns) + 4, _CELL * len(rows) + 30
    parts = [_head("heat", width, height, title)]
    for at, name in enumerate(columns):
        parts.append(
            Markup('<text class="tick mid" x="{}" y="18">{}</text>').format(number(_FIRST + wide * (at + 0.5)), name)
        )
    for down, row in enumerate(rows):
        y = 30 + _CELL * down
        parts.append(
            Markup('<text class="tick end" x="{}" y="{}">{}</text>').format(number(_FIRST - 8), number(y + 20), row)
        )
        for at, name in enumerate(columns):
            if (value := values.get((row, name))) is not None and math.isfinite(value):
                parts.append(
                    _cell(
                        _FIRST + wide * at, y, wide, value, (value - low) / (high - low or 1.0), f"block {row}, {name}"
                    )
                )
    return Markup("").join([*parts, Markup("</svg>")])


def _cell(x: float, y: float, wide: float, value: float, share: float, name: str) -> Markup:
    shade = 0.1 + 0.85 * share
    return Markup(
        '<g><title>{}: {}</title><rect class="cell" x="{}" y="{}" width="{}" height="{}" fill-opacity="{:.2f}"/>'
        '<text class="heat mid{}" x="{}" y="{}">{:.0f}</text></g>'
    ).format(
        name, f"{value:.4f}", number(x), number(y), number(wide - 2), number(_CELL - 2), shade,
        " on" if shade > 0.55 else "", number(x + wide / 2 - 1), number(y + 20), 100 * value,
    )  # fmt: skip


def differences(title: str, found: Sequence[float], interval: tuple[float, float] | None, label: str) -> Markup:
    """Differences as points on one line, zero, and the interval of their mean."""
    found = [one for one in found if math.isfinite(one)]
    if not found:
        return Markup("")
    axis = Axis.of([*found, 0.0, *(interval or ())], label, margin=0.12)
    height, middle = 116.0, 44.0
    at = [number(across_at(axis, one)) for one in (0.0, *found)]
    parts = [_head("frame", 540.0, height, title)]
    for value in (axis.low, 0.0, axis.high):
        place = across_at(axis, value)
        kind = "mid" if value == 0 else "end" if value == axis.high else ""
        parts.append(
            Markup('<text class="tick {}" x="{}" y="88">{}</text>').format(
                kind, number(place), f"{value:+.3g}" if value else "0"
            )
            if value == 0 or abs(value) > 0.2 * (axis.high - axis.low)
            else Markup("")
        )
    parts.append(Markup('<path class="zero" d="M{} 12V74"/>').format(at[0]))
    if interval is not None:
        ends = [number(across_at(axis, one)) for one in interval]
        parts.append(
            Markup('<path class="interval" d="M{0} {2}H{1}M{0} {3}v16M{1} {3}v16"/>').format(
                *ends, number(middle), number(middle - 8)
            )
        )
    parts += [
        Markup('<circle class="mark winner" cx="{}" cy="{}" r="5.5"><title>{}</title></circle>').format(
            place, number(middle), f"{one:+.4f}"
        )
        for place, one in zip(at[1:], found, strict=True)
    ]
    parts.append(Markup('<text class="axis mid" x="270" y="110">{}</text>').format(label))
    return Markup("").join([*parts, Markup("</svg>")])


def _head(kind: str, width: float, height: float, title: str) -> Markup:
    head = '<svg class="{0}" viewBox="0 0 {1} {2}" width="{1}" height="{2}" role="img" aria-label="{3}">'
    return Markup(head).format(kind, number(width), number(height), title)
