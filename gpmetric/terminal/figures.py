"""Figures as text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["figure", "figures_of", "number"]


def number(value: float | None) -> float:
    """JSON holds null where a figure was not finite."""
    return math.inf if value is None else value


def figures_of(ppl: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {figure(value)}" for name, value in ppl.items())


def figure(ppl: float | Mapping[str, float] | None) -> str:
    """A perplexity, or those of several models: `(llama 12.300, gpt2 20.100)`; a dash where there was no time."""
    if ppl is None:
        return "-"
    return f"{ppl:.3f}" if isinstance(ppl, float) else f"({figures_of(ppl)})"
