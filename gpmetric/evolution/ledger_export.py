"""`gpmetric ledger export`: a campaign's candidates with their figures as a table."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpmetric.evolution.fitness import mean_excess
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.ledger_requests import LedgerExportRequest
from gpmetric.evolution.records import Candidate, Evaluation
from gpmetric.files import STDOUT, write_text
from gpmetric.functions import as_function

__all__ = ["export_ledger", "run_ledger_export"]

_Row = dict[str, Any]


def run_ledger_export(request: LedgerExportRequest) -> dict[str, Any]:
    """Writes every candidate with its figures: `gpmetric.export_ledger("campaign.sqlite", output="candidates.csv")`.

    A row holds a candidate's generation, position, formula and status, and of the evaluation that it amounts to, which
    is another one's of a duplicate, the formula that was measured, its nodes and operands, and the figures by objective
    and target: `loss 0.5` is the excess log-loss at 0.5 in nats per token, `mean_excess` the mean of these.

    Args:
        request: names the ledger, finished or not, and the file, whose suffix tells the format. In CSV, text that a
            spreadsheet would calculate has a ' before it.

    Returns:
        The JSON document of `gpmetric ledger export`.

    Raises:
        LedgerError: the ledger cannot be used.
        GpmetricError: the file cannot be written.
    """
    with Ledger.read(request.ledger) as ledger:
        evaluations = {row.id: row for row in ledger.evaluations()}
        candidates = ledger.candidates()
    names = {
        f"{kind} {target}": (kind, target)
        for row in evaluations.values()
        for kind, by_target in row.figures.items()
        for target in by_target
    }
    rows = [_row(one, evaluations.get(one.evaluation), names) for one in candidates]
    columns = list(_row(_NOTHING, None, names))
    _write(request.output, columns, rows)
    return {"ledger": str(request.ledger), "output": str(request.output), "candidates": len(rows), "columns": columns}


export_ledger = as_function("export_ledger", LedgerExportRequest, run_ledger_export, "ledger")
_NOTHING = Candidate(0, 0, "", None, "failed")


def _row(candidate: Candidate, given: Evaluation | None, names: dict[str, tuple[str, str]]) -> _Row:
    return {
        "generation": candidate.generation,
        "position": candidate.position,
        "formula": candidate.formula,
        "status": candidate.status,
        "reason": candidate.reason,
        "canonical": candidate.canonical,
        "fingerprint": candidate.fingerprint,
        "evaluation": candidate.evaluation,
        "measured": given and given.formula,
        "nodes": given and given.nodes,
        "operands": given and given.operands,
        **{name: given and given.figures.get(kind, {}).get(target) for name, (kind, target) in names.items()},
        "mean_excess": mean_excess(given.losses) if given and given.losses else None,
        "seconds_score": given and given.seconds_score,
        "seconds_loss": given and given.seconds_loss,
    }


def _write(path: Path, columns: Sequence[str], rows: Sequence[_Row]) -> None:
    suffix = ".csv" if path == STDOUT else path.suffix.lower()
    if suffix == ".parquet":
        write_text(path, "", lambda partial: _write_parquet(partial, columns, rows))
    elif suffix == ".jsonl":
        write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows))
    elif path == STDOUT:
        sys.stdout.write(_csv(columns, rows))
    else:
        write_text(path, _csv(columns, rows))


def _csv(columns: Sequence[str], rows: Sequence[_Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_harmless(row[name]) for name in columns] for row in rows)
    return text.getvalue()


def _harmless(cell: Any) -> Any:
    """A cell that a spreadsheet shows and does not calculate."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def _write_parquet(path: Path, columns: Sequence[str], rows: Sequence[_Row]) -> None:
    import pyarrow as pa  # takes half a second to import
    from pyarrow import parquet

    whole = ("generation", "position", "evaluation", "nodes")
    texts = ("formula", "status", "reason", "canonical", "fingerprint", "measured", "operands")
    kinds = {name: pa.int64() for name in whole} | {name: pa.string() for name in texts}
    fields = [(name, kinds.get(name, pa.float64())) for name in columns]
    made = pa.schema(fields, metadata={"made by": "gpmetric ledger export"})
    parquet.write_table(pa.Table.from_pylist(list(rows), made), path)
