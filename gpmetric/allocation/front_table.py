"""The front of an allocation search as a CSV table."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpmetric.allocation.front_points import Point, baselines_of, genes_of
from gpmetric.files import finite, write_text

__all__ = ["write_csv"]

_FIGURES = (
    "sparsity", "sparsity_total", "removed", "kept_prunable", "kept_total", "loss", "perplexity", "excess",
)  # fmt: skip


def write_csv(document: Mapping[str, Any], path: Path) -> None:
    """Writes a row per point of the front and of each baseline, picked, dense; what is not finite is left empty.

    Args:
        document: of `gpmetric allocate`.
        path: of the table: method, the figures of the point, and the sparsity of each gene under its name.

    Raises:
        GpmetricError: the file cannot be written.
    """
    methods = [(document["allocator"], document["front"]), *baselines_of(document)]
    methods += [("picked", [document["picked"]] if document.get("picked") else []), ("dense", [_dense(document)])]
    rows = [(method, point, genes_of(point)) for method, points in methods for point in points]
    genes = list(dict.fromkeys(gene for _, _, found in rows for gene in found))
    table = io.StringIO()
    lines = [[method, *map(point.get, _FIGURES), *map(found.get, genes)] for method, point, found in rows]
    csv.writer(table, lineterminator="\n").writerows([["method", *_FIGURES, *genes], *finite(lines)])
    write_text(path, table.getvalue())


def _dense(document: Mapping[str, Any]) -> Point:
    """The model as it came, as a point."""
    kept = {"kept_prunable": document["prunable"], "kept_total": document["total"]}
    return {"sparsity": 0.0, "sparsity_total": 0.0, "removed": 0, "excess": 0.0, **kept, **document["dense"]}
