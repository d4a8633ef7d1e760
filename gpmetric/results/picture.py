"""Pictures that a notebook shows by themselves, drawn without the global state of pyplot."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gpmetric.pictures import printable

__all__ = ["BLUE", "GREY", "ORANGE", "Picture", "axes_of"]

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#8c8c8c"  # Okabe and Ito's blue and vermilion


class Picture(Figure):
    """A figure that a notebook shows although pyplot was never imported: its own hook is not set then."""

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, format="png", dpi=110)
        return content.getvalue()


def axes_of(title: str, below: str, beside: str, size: tuple[float, float] = (9, 5)) -> tuple[Picture, Axes]:
    """An empty picture with its title and the names of its axes; what others wrote is text, never mathematics."""
    picture = Picture(figsize=size, layout="constrained")
    axes: Any = picture.subplots()
    axes.set_title(printable(title), loc="left", parse_math=False, wrap=True)
    axes.set_xlabel(below, parse_math=False)
    axes.set_ylabel(beside, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    return picture, axes
