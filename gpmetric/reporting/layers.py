"""Sparsity by block and kind of matrix, from layers by their names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import fmean

from gpmetric.reporting.blocks import Figure, Table
from gpmetric.reporting.charts import heat_map

__all__ = ["layer_map"]

_LAYER = re.compile(r"(?:.*?\.)?(\d+)\.(.+)")
_MOST = 24  # kinds of matrices that are drawn


def layer_map(sparsity: Mapping[str, float], what: str) -> list[Figure | Table]:
    """A heat map, and the mean of each kind of matrix as a table; nothing of layers without blocks."""
    found: dict[tuple[int, str], list[float]] = {}
    for name, value in sparsity.items():
        if match := _LAYER.fullmatch(name):
            found.setdefault((int(match[1]), re.sub(r"\.\d+(?=\.)", "", match[2])), []).append(float(value))
    kinds = list(dict.fromkeys(kind for _, kind in found))[:_MOST]
    if not kinds:
        return []
    names = _short(kinds)
    blocks = sorted({block for block, _ in found})
    values = {(str(block), names[kind]): fmean(shares) for (block, kind), shares in found.items() if kind in names}
    drawn = heat_map(what, [str(block) for block in blocks], list(names.values()), values)
    rows = []
    for kind in kinds:
        own = [values[place] for block in blocks if (place := (str(block), names[kind])) in values]
        rows.append([kind, f"{min(own):.4f}", f"{fmean(own):.4f}", f"{max(own):.4f}"])
    rows.sort(key=lambda row: row[2])
    table = Table("Sparsity over the blocks", ("kind of matrix", "least", "mean", "most"), rows, code=frozenset({0}))
    return [
        Figure(
            drawn,
            f"{what}, in percent: a row for each block, a column for each kind of matrix; more colour is more.",
            wide=True,
        ),
        table,
    ]


def _short(kinds: Sequence[str]) -> dict[str, str]:
    """By kind, the last part of its name, with as many before it as tell it from the others."""
    for parts in range(1, 6):
        names = {kind: ".".join(kind.split(".")[-parts:]) for kind in kinds}
        if len(set(names.values())) == len(kinds):
            break
    return names
