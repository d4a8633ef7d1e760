"""`gpmetric export`: a formula, or the winner of a campaign, as a self-contained file."""

from __future__ import annotations

from typing import Any

from gpmetric.formats import export_expression
from gpmetric.formats.request import ExportRequest
from gpmetric.functions import as_function
from gpmetric.metrics import resolve_metric
from gpmetric.provenance import gpmetric_version

__all__ = ["export", "run_export"]

_SAMPLE = (128, 2048)  # GBLM's balance depends on the sample: sequences and tokens of its paper


def run_export(request: ExportRequest) -> dict[str, Any]:
    """Writes what is asked for and returns the JSON document of `gpmetric export`, with its `text` where no file is.

    Args:
        request: which formula, in which format, where to.

    Raises:
        InputError: no such formula or format.
        GpmetricError: the file cannot be written.
    """
    metric = resolve_metric(request.formula, *_SAMPLE)
    return export_expression(metric.expression, request.format, request.output, gpmetric_version(), metric.granularity)


export = as_function("export", ExportRequest, run_export, "formula")
