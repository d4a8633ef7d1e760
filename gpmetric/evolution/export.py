"""`gpmetric export`: a formula, or the winner of a campaign, as a self-contained file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpmetric.evolution.ledger import is_ledger, winner_of
from gpmetric.formats import export_expression
from gpmetric.formats.request import ExportRequest
from gpmetric.metrics import resolve_metric
from gpmetric.options import as_function
from gpmetric.provenance import gpmetric_version

__all__ = ["export", "run_export"]

_SAMPLE = (128, 2048)  # GBLM's balance depends on the sample: sequences and tokens of its paper


def run_export(request: ExportRequest) -> dict[str, Any]:
    """Writes what is asked for and returns the JSON document of `gpmetric export`.

    Args:
        request: which formula, in which format, where to.

    Raises:
        InputError: no such formula or format, or a ledger of a campaign that is not finished.
        GpmetricError: the file cannot be written.
    """
    assert request.output is not None
    named = winner_of(Path(request.formula)) if is_ledger(request.formula) else request.formula
    metric = resolve_metric(named, *_SAMPLE)
    return export_expression(metric.expression, request.format, request.output, gpmetric_version(), metric.granularity)


export = as_function("export", ExportRequest, run_export, "formula")
