"""Figures as text."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["duration", "experts_of", "figure", "figures_of", "needs_of", "or_dash", "shortened", "size"]


_CONSTANT = re.compile(r"(?<![\w.])\d+(\.\d+)?(e[+-]?\d+)?(?![\w.:])")


def shortened(formula: str) -> str:
    """A formula with its constants to two significant digits."""
    return _CONSTANT.sub(lambda found: f"{float(found[0]):.2g}" if found[1] or found[2] else found[0], formula)


def or_dash(value: float | None, digits: int) -> str:
    """A figure, or a dash where there is none or it is not finite."""
    return "-" if value is None else f"{value:.{digits}f}"


def figures_of(ppl: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {figure(value)}" for name, value in ppl.items())


def figure(ppl: float | Mapping[str, float] | None) -> str:
    """A perplexity, or those of several models: `(llama 12.300, gpt2 20.100)`; a dash where there was no time."""
    if ppl is None:
        return "-"
    return f"{ppl:.3f}" if isinstance(ppl, float) else f"({figures_of(ppl)})"


def size(count: float) -> str:
    """Bytes in the unit that reads best."""
    return f"{count / 1e9:.2g} GB" if count >= 1e9 else f"{math.ceil(count / 1e6)} MB"


def needs_of(plan: Mapping[str, Any]) -> str:
    """What a command takes: memory, disk and time, and how the model is held."""
    disk = f", {size(plan['disk_bytes'])} of disk" if plan["disk_bytes"] else ""
    held = "" if plan["resident"] else "; weights are read block by block"
    held += "; weights at all levels are in files" if plan["aside"] else ""
    return f"needs about {size(plan['memory_bytes'])} of memory{disk}, about {duration(plan['seconds'])}{held}"


def experts_of(experts: Mapping[str, Any]) -> str:
    """How many calibration tokens the experts of a mixture read, and how many layers read too few."""
    tokens, starved = experts["tokens"], len(experts["starved"])
    told = f"experts read {min(tokens.values())} to {max(tokens.values())} calibration tokens each"
    return f"{told}; {starved} of {len(tokens)} layers too few: theirs are siblings' statistics" if starved else told


def duration(seconds: float) -> str:
    """Seconds in the unit that reads best."""
    for unit, size, most in (("s", 1, 120), ("min", 60, 7200)):
        if seconds < most:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 3600:.1f} h"
