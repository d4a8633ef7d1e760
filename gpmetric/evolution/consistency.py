"""What the rows of a ledger say of each other: what contradicts, and what of a damaged one can be gone on with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

from gpmetric.evolution import sqlite_schema as schema
from gpmetric.evolution.rungs import PROBE
from gpmetric.evolution.sqlite_schema import Refusal

__all__ = ["contradictions", "sound_part"]

Row = dict[str, Any]
Rows = Mapping[str, Sequence[Row]]  # by table, in order, cells as SQLite keeps them
_SCREENED = "screened out after "


def contradictions(tables: Rows, *, merged: bool) -> Iterator[str]:
    """A line for each thing that is wrong with rows that are as they were written."""
    unreadable = [line for table, rows in tables.items() for row in rows for line in _cells(table, row)]
    yield from unreadable
    if unreadable:
        return  # what follows reads the cells
    yield from _places(tables, merged=merged)
    yield from _references(tables)
    measured = _Measured(tables["measurements"], tables["candidates"])
    for row in tables["candidates"]:
        if lost := measured.missing(row):
            yield f"{_named(row)} has no measurement {lost!r}, which it is made of"
    if not merged:
        paid = [row["generation"] for row in tables["evaluations"]]
        for row in tables["generations"]:
            if row["evaluations"] != (count := sum(one <= row["number"] for one in paid)):
                yield f"generation {row['number']} tells of {row['evaluations']} evaluations, but there are {count}"
    yield from _result(tables)


def _cells(table: str, row: Row) -> Iterator[str]:
    for name, value in row.items():
        try:
            schema.from_column(name, value)
        except Refusal as refusal:
            yield f"{table}: a cell {str(refusal).removeprefix('is damaged: ')}"


def _places(tables: Rows, *, merged: bool) -> Iterator[str]:
    """Gaps in generations and positions."""
    numbers = [row["number"] for row in tables["generations"]]
    if not merged and numbers != list(range(len(numbers))):
        yield f"generations are numbered {', '.join(map(str, numbers))}, not from 0 on"
    last = max(numbers, default=-1)
    positions: dict[int, list[int]] = {}
    for row in tables["candidates"]:
        positions.setdefault(row["generation"], []).append(row["position"])
    for number in sorted({*positions, *([] if merged else numbers)}):
        found = sorted(positions.get(number, []))
        if not found or found != list(range(len(found))):
            gap = next((at for at, one in enumerate(found) if at != one), len(found))
            yield f"generation {number} has no candidate {gap}"
        if number > last + 1:
            yield f"generation {number} has candidates, but generation {number - 1} is not finished"
    places = {(row["generation"], row["position"]) for row in tables["candidates"]}
    for row in tables["measurements"]:
        place = row["generation"], row["position"]
        if row["generation"] <= last and place not in places:
            yield f"measurement {row['rung']!r} is of candidate {place[1]} of generation {place[0]}, which is not there"


def _references(tables: Rows) -> Iterator[str]:
    evaluations = {row["id"]: row for row in tables["evaluations"]}
    paid = set()
    for row in tables["candidates"]:
        given = evaluations.get(row["evaluation"])
        if row["evaluation"] is not None and given is None:
            yield f"{_named(row)} has evaluation {row['evaluation']}, which is not there"
        elif given is not None and given["generation"] > row["generation"]:
            yield f"{_named(row)} has evaluation {given['id']}, which is of generation {given['generation']}"
        if row["status"] != "duplicate":
            paid.add(row["evaluation"])
    for number in evaluations.keys() - paid:
        yield f"evaluation {number} is of no candidate"
    formulas = {row["formula"]: row for row in tables["evaluations"] if row["status"] == "done"}
    for row in tables["generations"]:
        for formula in json.loads(row["population"]):
            if not isinstance(formula, str) or formula not in formulas:
                yield f"generation {row['number']} has {formula!r:.60} in its population, which was not evaluated"


def _result(tables: Rows) -> Iterator[str]:
    for row in tables["results"]:
        found = json.loads(row["value"])
        winner = found.get("winner") if isinstance(found, dict) else None
        formula = winner.get("formula") if isinstance(winner, dict) else None
        known = {one["formula"] for one in tables["evaluations"]} | {one["metric"] for one in tables["judgements"]}
        if formula not in known:
            yield f"the result's winner {formula!r:.60} is neither among the evaluations nor a metric that was measured"
        elif found.get("evaluations", len(tables["evaluations"])) != len(tables["evaluations"]):
            yield f"the result tells of {found['evaluations']} evaluations, but there are {len(tables['evaluations'])}"


def _named(row: Row) -> str:
    return f"candidate {row['position']} of generation {row['generation']}"


class _Measured:
    """The measurements by candidate, and the rungs that candidates climb."""

    def __init__(self, measurements: Sequence[Row], candidates: Sequence[Row]) -> None:
        self._at: dict[tuple[int, int], dict[str, Row]] = {}
        for row in measurements:
            self._at.setdefault((row["generation"], row["position"]), {})[row["rung"]] = row
        known = {
            rung
            for one in candidates
            if one["status"] == "evaluated"
            for rung in self._at.get((one["generation"], one["position"]), ())
        }
        self._rungs = [PROBE.name, *sorted(known - {PROBE.name}, key=_windows)] if known else []

    def missing(self, candidate: Row) -> str:
        """The first measurement that a candidate's fate was told by and that is not there, "" if there is none."""
        there = self._at.get((candidate["generation"], candidate["position"]), {})
        reason, needed = candidate["reason"] or "", list[str]()
        if candidate["status"] == "evaluated":
            needed = self._rungs
        elif candidate["status"] == "screened" and reason.removeprefix(_SCREENED) in self._rungs:
            needed = self._rungs[: self._rungs.index(reason.removeprefix(_SCREENED)) + 1]
        elif candidate["fingerprint"] is not None and self._rungs:
            needed = [PROBE.name]
        return next((rung for rung in needed if rung not in there), "")


def _windows(rung: str) -> float:
    number = rung.partition(" ")[0]
    return float(number) if number.isdecimal() else 0.0


def sound_part(tables: Rows, whole: Mapping[str, bool]) -> dict[str, list[Row]]:
    """Of rows that are as they were written, those that a campaign goes on from as if it had been stopped there.

    Generations count until the first of which something is missing. Candidates and evaluations follow each other
    without a gap, into the generation after the last. Measurements all stay: they are what was paid for, and what is
    drawn again finds them.

    Args:
        tables: the rows.
        whole: by table, whether no row of it is known to be lost.
    """
    kept = {table: list(rows) for table, rows in tables.items()}
    evaluations = {row["id"]: row for row in tables["evaluations"]}
    candidates = _unbroken(tables["candidates"], evaluations)
    every = whole["candidates"] and len(candidates) == len(tables["candidates"])
    measured = _Measured(tables["measurements"], tables["candidates"])
    generations: list[Row] = []
    for row in sorted(tables["generations"], key=lambda one: one["number"]):
        number = len(generations)
        drawn = [one for one in candidates if one["generation"] == number]
        closed = drawn and (every or candidates[-1]["generation"] > number)
        if row["number"] != number or not closed or any(map(measured.missing, drawn)):
            break
        if not _holds(row, [one for one in evaluations.values() if one["generation"] <= number]):
            break
        generations.append(row)
    kept["generations"] = generations
    begun = (row for row in candidates if row["generation"] <= len(generations))
    kept["candidates"] = list(takewhile(lambda row: not measured.missing(row), begun))
    used = {row["evaluation"] for row in kept["candidates"]}
    kept["evaluations"] = [row for row in tables["evaluations"] if row["id"] in used]
    lost = any(len(kept[table]) < len(tables[table]) or not whole[table] for table in tables)
    kept["results"] = [] if lost else kept["results"]
    return kept


def _unbroken(candidates: Sequence[Row], evaluations: Mapping[int, Row]) -> list[Row]:
    """Candidates from the first on, each at the next place and with the evaluation it amounts to."""
    found: list[Row] = []
    at, paid = (0, -1), 0
    for number, row in enumerate(sorted(candidates, key=lambda one: one["id"]), start=1):
        place = row["generation"], row["position"]
        if row["id"] != number or place not in ((at[0], at[1] + 1), (at[0] + 1, 0)):
            break
        if row["evaluation"] is not None:
            if row["evaluation"] not in evaluations or row["evaluation"] > paid + 1:
                break
            paid = max(paid, row["evaluation"])
        found.append(row)
        at = place
    return found


def _holds(generation: Row, evaluations: Sequence[Row]) -> bool:
    """Whether a generation's row agrees with the evaluations until its end."""
    done = {row["formula"] for row in evaluations if row["status"] == "done"}
    return generation["evaluations"] == len(evaluations) and set(json.loads(generation["population"])) <= done
