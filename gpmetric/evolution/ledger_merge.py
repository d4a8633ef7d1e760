"""`gpmetric ledger merge`: several campaigns of one model, its texts and options in one ledger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from gpmetric.errors import LedgerError
from gpmetric.evolution import sqlite_schema as schema
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.ledger_requests import LedgerMergeRequest
from gpmetric.evolution.records import Candidate, Evaluation
from gpmetric.evolution.settings import BUDGET_KEYS, differences
from gpmetric.functions import as_function

__all__ = ["merge_ledgers", "run_merge"]

_FREE = BUDGET_KEYS | {"seed"}  # settings in which campaigns may differ


def run_merge(request: LedgerMergeRequest) -> dict[str, Any]:
    """Puts campaigns together: `gpmetric.merge_ledgers(["a.sqlite", "b.sqlite"], output="both.sqlite")`.

    Generations of each campaign are numbered on from those of the one before. Of equal masks, only the first are stored
    as an evaluation; later ones are duplicates of it. The one population holds all campaigns' last ones. What comes out
    can be exported, analysed and forked; it is no campaign that goes on.

    Args:
        request: names the ledgers, in which only seed and budget may differ, and the new one.

    Returns:
        The JSON document of `gpmetric ledger merge`: candidates and evaluations by ledger, and in all.

    Raises:
        LedgerError: settings differ, or a ledger cannot be used.
    """
    assert request.output is not None
    merged, first = _Merged(), None
    for name in request.ledgers:
        with Ledger.read(name) as ledger:
            settings = {key: value for key, value in ledger.settings.items() if key not in _FREE}
            if "merged" in ledger.history:
                raise LedgerError(f"ledger {name} is merged itself: name the campaigns that it is made of")
            if first is None:
                first = settings
            elif found := differences(first, settings):
                told = (
                    f"ledger {name} is of another campaign than {request.ledgers[0]}, which is there; they differ in:"
                )
                raise LedgerError(told, found)
            merged.add(name, ledger)
    assert first is not None
    schema.create(request.output, merged.tables(first))
    document = {"output": str(request.output), "merged": merged.parts, "candidates": len(merged.candidates)}
    return document | {"evaluations": len(merged.evaluations)}


merge_ledgers = as_function("merge_ledgers", LedgerMergeRequest, run_merge, "ledgers")


class _Merged:
    """The rows of the campaigns so far."""

    def __init__(self) -> None:
        self.parts: list[dict[str, Any]] = []
        self.candidates: list[Candidate] = []
        self.evaluations: list[Evaluation] = []
        self._measurements: list[dict[str, Any]] = []
        self._held_out: dict[tuple[str, ...], dict[str, Any]] = {}
        self._population: dict[str, None] = {}
        self._rng: Any = None
        self._by_mask: dict[str, Evaluation] = {}
        self._next = 0  # generation

    def add(self, name: str, ledger: Ledger) -> None:
        """Takes the rows of one more."""
        shift, paid = self._next, len(self.evaluations)
        numbers = self._pay(ledger.evaluations(), shift)
        drawn = ledger.candidates()
        for one in drawn:
            new = numbers.get(one.evaluation)
            status = "duplicate" if one.status == "evaluated" and new is not None and new <= paid else one.status
            self.candidates.append(
                replace(
                    one, id=len(self.candidates) + 1, generation=one.generation + shift, evaluation=new, status=status
                )
            )
        places = {(one.generation, one.position) for one in drawn}
        for row in (one for one in ledger.measurements() if (one.generation, one.position) in places):
            self._measurements.append(asdict(replace(row, generation=row.generation + shift)))
            self._next = max(self._next, row.generation + shift + 1)
        for held in ledger.comparable_tables()["judgements"]:
            self._held_out.setdefault(tuple(held[key] for key in ("metric", "target", "split", "calibration")), held)
        if (last := ledger.last_generation()) is not None:
            forms = {one.formula: one.id for one in ledger.evaluations("done")}
            kept = {self.evaluations[numbers[forms[formula]] - 1].formula: None for formula in last.population}
            self._population |= kept
            self._rng = last.rng
        self._next = max([self._next, *(one.generation + shift + 1 for one in drawn)])
        part = {"ledger": name, "seed": ledger.settings.get("seed"), "first_generation": shift}
        self.parts.append(part | {"candidates": len(drawn), "evaluations": len(self.evaluations) - paid})

    def _pay(self, rows: Sequence[Evaluation], shift: int) -> dict[int | None, int]:
        """New ids by old ones; of masks that were paid for, the first ones' id."""
        numbers: dict[int | None, int] = {}
        for row in rows:
            known = self._by_mask.get(row.fingerprint) if row.fingerprint else None
            if known is None:
                known = replace(row, id=len(self.evaluations) + 1, generation=row.generation + shift)
                self.evaluations.append(known)
                if row.fingerprint:
                    self._by_mask[row.fingerprint] = known
            assert known.id is not None
            numbers[row.id] = known.id
        return numbers

    def tables(self, settings: Mapping[str, Any]) -> dict[str, Iterator[dict[str, Any]]]:
        """Rows by table, cells as SQLite keeps them."""
        told = {**settings, "merged": self.parts}
        last = {"number": self._next - 1, "population": list(self._population), "rng": self._rng}
        generations = [last | {"evaluations": len(self.evaluations), "finished": None}] if self._population else []
        found: dict[str, Sequence[dict[str, Any]]] = {
            "meta": [{"key": key, "value": schema.to_json(value)} for key, value in sorted(told.items())],
            "generations": generations,
            "evaluations": [asdict(one) for one in self.evaluations],
            "candidates": [asdict(one) for one in self.candidates],
            "measurements": self._measurements,
            "judgements": list(self._held_out.values()),
        }
        return {table: map(_columns, rows) for table, rows in found.items()}


def _columns(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: schema.to_column(name, value) for name, value in row.items()}
