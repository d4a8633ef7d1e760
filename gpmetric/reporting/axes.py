"""Axes of a drawing in SVG: ticks at round numbers, a grid, and words along them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

__all__ = ["Axis", "across_at", "framed", "number", "ticks", "up_at"]

_WIDTH, _HEIGHT = 540.0, 340.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 14.0, 14.0, 50.0  # margins
_TICKS = 5


def number(value: float) -> str:
    """A coordinate."""
    return f"{value:.1f}".removesuffix(".0")


@dataclass(frozen=True)
class Axis:
    """A range of values and what they are; `whole` ones have ticks at whole numbers only."""

    low: float
    high: float
    label: str
    whole: bool = False

    @classmethod
    def of(cls, values: Sequence[float], label: str, whole: bool = False, margin: float = 0.06) -> Axis:
        """One that holds all the values, and a little more; a ValueError of none."""
        low, high = min(values), max(values)
        spread = margin * (high - low) or max(abs(high), 1.0) * margin
        return cls(low - spread, high + spread, label, whole)

    def place(self, value: float) -> float:
        """From 0 at the low end to 1."""
        return (value - self.low) / (self.high - self.low)


def ticks(axis: Axis) -> list[float]:
    """Round numbers of an axis, about five."""
    span = axis.high - axis.low
    if not math.isfinite(span) or span <= 0:
        raise ValueError(f"an axis from {axis.low} to {axis.high}")
    rough = span / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * one for one in (1, 2, 5, 10) if power * one >= rough)
    step = max(1.0, round(step)) if axis.whole else step
    first = math.ceil(axis.low / step)
    return [step * place for place in range(first, math.floor(axis.high / step) + 1)]


def framed(across: Axis, up: Axis, content: Markup, title: str, *, live: bool = False) -> Markup:
    """A drawing of so many axes around its content; a live one holds links, a still one is a picture."""
    parts = [
        Markup('<svg class="frame" viewBox="0 0 {} {}" role="{}" aria-label="{}">').format(
            number(_WIDTH), number(_HEIGHT), "group" if live else "img", title
        )
    ]
    for value in ticks(up):
        y = up_at(up, value)
        parts.append(
            Markup('<path class="grid" d="M{} {}H{}"/><text class="tick end" x="{}" y="{}">{}</text>').format(
                number(_LEFT), number(y), number(_WIDTH - _RIGHT), number(_LEFT - 8), number(y + 4), _tick(value)
            )
        )
    for value in ticks(across):
        x = across_at(across, value)
        parts.append(
            Markup('<path class="grid" d="M{0} {1}V{2}"/><text class="tick mid" x="{0}" y="{3}">{4}</text>').format(
                number(x), number(_TOP), number(_HEIGHT - _BOTTOM), number(_HEIGHT - _BOTTOM + 18), _tick(value)
            )
        )
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(
        Markup(
            '<text class="axis mid" x="{}" y="{}">{}</text>'
            '<text class="axis mid" transform="translate(14 {}) rotate(-90)">{}</text>'
        ).format(number((_LEFT + _WIDTH - _RIGHT) / 2), number(_HEIGHT - 8), across.label, number(middle), up.label)
    )
    return Markup("").join([*parts, content, Markup("</svg>")])


def across_at(axis: Axis, value: float) -> float:
    """Where a value is, from the left."""
    return _LEFT + axis.place(value) * (_WIDTH - _LEFT - _RIGHT)


def up_at(axis: Axis, value: float) -> float:
    """Where a value is, from the top."""
    return _HEIGHT - _BOTTOM - axis.place(value) * (_HEIGHT - _TOP - _BOTTOM)


def _tick(value: float) -> str:
    return f"{value:.6g}".replace("-", "\N{MINUS SIGN}")
