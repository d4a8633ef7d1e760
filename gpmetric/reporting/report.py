"""`gpmetric report`: a page of a campaign or of a result."""

from __future__ import annotations

from typing import Any

from gpmetric.files import write_text
from gpmetric.functions import as_function
from gpmetric.reporting.page import render
from gpmetric.reporting.request import ReportRequest
from gpmetric.reporting.source import page_of

__all__ = ["report", "run_report"]


def run_report(request: ReportRequest) -> dict[str, Any]:
    """Writes the page of a result: `gpmetric.report("campaign.sqlite", output="page.html")`.

    It is one file that asks nothing of any network. A ledger is read as it is now, also while a driver has it.

    Args:
        request: names the ledger or result, and the page.

    Returns:
        The JSON document of `gpmetric report`: the page's place, title, verdict, sections and bytes.

    Raises:
        InputError: the source cannot be used.
        GpmetricError: the page cannot be written.
    """
    request = request.completed()
    page = page_of(request.source)
    assert request.output is not None
    content = render(page)
    write_text(request.output, content)
    return {
        "source": str(request.source), "output": str(request.output), "title": page.title, "verdict": page.verdict,
        "sections": [section.id for section in page.sections], "bytes": len(content.encode()),
    }  # fmt: skip


report = as_function("report", ReportRequest, run_report, "source")
