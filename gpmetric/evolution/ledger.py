"""The ledger: one SQLite file that is one campaign, written by its driver alone.

It holds the settings, every drawn candidate, every evaluation paid for, and for each finished generation the
population and the random state, so that a killed campaign replays its unfinished generation and loses nothing.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from gpmetric.errors import LedgerError
from gpmetric.evolution import driver_lock
from gpmetric.evolution import sqlite_schema as schema
from gpmetric.evolution.records import Candidate, Evaluation, Generation, HeldOutMeasurement, Measurement
from gpmetric.evolution.sqlite_schema import Refusal, explained, opened, schema_version, transaction

__all__ = ["BUDGET_KEYS", "Ledger", "is_ledger", "winner_of"]

_LOG = logging.getLogger(__name__)
BUDGET_KEYS = frozenset({"generations", "evaluations", "minutes"})  # settings a resumed campaign may change

Row = TypeVar("Row", Candidate, Evaluation, Generation, HeldOutMeasurement, Measurement)


class Ledger(AbstractContextManager["Ledger"]):
    """The database of record of one campaign, made by `open` or `read`.

    `open` admits one driver at a time, and waits for a minute where only silence tells that another one, on another
    host, has ended; each write is one durable transaction. `read` is a fixed snapshot, also while a driver runs. Every
    method raises LedgerError when the file cannot be used.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, token: str | None) -> None:
        self.path = path
        self._connection = connection
        self._token = token  # of our ownership; None when reading
        self._heart = None if token is None else driver_lock.Heart(path, token)

    @classmethod
    def open(cls, path: str | os.PathLike[str], settings: dict[str, Any], *, resume: bool) -> Ledger:
        """Ledger owned by this process, created when the file is missing or empty.

        Args:
            path: the SQLite file, in an existing folder.
            settings: JSON values, all that determine the campaign's result. On resume those in BUDGET_KEYS may
                differ: the new ones are stored and the result under the old ones is dropped.
            resume: continue the campaign that is there instead of refusing it.
        """
        with opened(Path(path), "mode=rwc") as connection:
            try:
                token = _claimed(connection, settings, resume=resume)
            except driver_lock.Unheard as elsewhere:
                told = "ledger %s %s: it is taken over unless that is heard of within %.0f s"
                _LOG.warning(told, path, elsewhere, driver_lock.STALE_SECONDS)
                silent = driver_lock.watch(connection)
                token = _claimed(connection, settings, resume=resume, silent=silent)
            connection.execute("PRAGMA journal_mode = WAL")
        return cls(Path(path), connection, token)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Ledger:
        """Ledger as it is now, for reading only; takes no ownership and writes nothing."""
        # A WAL database in a read-only folder opens only as immutable, which is right when no log is pending.
        still = not os.access(Path(path).parent, os.W_OK) and not Path(f"{path}-wal").exists()
        with opened(Path(path), "mode=ro&immutable=1" if still else "mode=ro") as connection:
            connection.execute("BEGIN")  # one snapshot for everything read later
            version = schema_version(connection)
            if not version:
                raise Refusal("holds no campaign")
            current = connection if version == schema.VERSION else schema.upgraded_copy(connection, version)
        return cls(Path(path), current, None)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release ownership and the file; a second call does nothing."""
        with closing(self._connection):
            if self._heart is not None and self._token is not None:
                self._heart.stop()
                driver_lock.release(self._connection, self._token)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings the campaign runs under, budget included."""
        return {row["key"]: row["value"] for row in self._query("SELECT * FROM meta ORDER BY key")}

    def record(self, candidate: Candidate, evaluation: Evaluation | None = None) -> int | None:
        """Id of the candidate's evaluation after writing the candidate and, if new, its evaluation.

        A (generation, position) already there is left unchanged. An evaluation whose fingerprint is already paid
        for is not stored: the candidate becomes a duplicate of the first, as it would have been in serial order.
        Another formula at this place is a LedgerError, a loss or time that is not finite a ValueError.
        """
        with self._write():
            known = self.candidate(candidate.generation, candidate.position)
            if known is not None and known.formula != candidate.formula:
                place = f"candidate {known.position} of generation {known.generation}"
                told = f"but this campaign draws {candidate.formula:.60}; were versions changed?"
                raise Refusal(f"has {known.formula:.60} as {place}, {told}")
            if known is not None:
                return known.evaluation
            twin = self.find_fingerprint(evaluation.fingerprint) if evaluation and evaluation.fingerprint else None
            if twin is not None:
                candidate = replace(candidate, status="duplicate", evaluation=twin.id)
            elif evaluation is not None:
                row = {"id": None, "host": socket.gethostname(), "finished": time.time()}
                row |= {name: value for name, value in asdict(evaluation).items() if value is not None}
                candidate = replace(candidate, evaluation=self._insert("evaluations", row))
            self._insert("candidates", {**asdict(candidate), "id": None})
            return candidate.evaluation

    def measure(self, measurements: Sequence[Measurement]) -> None:
        """Store what rungs of the screening gave; a (generation, position, rung) already there is left unchanged."""
        with self._write():
            for measurement in measurements:
                self._insert("measurements", asdict(measurement), "OR IGNORE")

    def measurements(self, generation: int | None = None) -> list[Measurement]:
        """Every measurement in the order made, or those of one generation."""
        tail = "measurements WHERE ?1 IS NULL OR generation = ?1 ORDER BY rowid"
        return self._select(Measurement, tail, generation)

    def hold_out(self, measurement: HeldOutMeasurement) -> None:
        """Store what a metric costs on held-out text; one already there is left unchanged."""
        with self._write():
            self._insert("judgements", asdict(measurement), "OR IGNORE")

    def held_out(self, split: str, calibration: str) -> list[HeldOutMeasurement]:
        """Every measurement on a split with statistics of some calibration windows, in the order made."""
        tail = "judgements WHERE split = ? AND calibration = ? ORDER BY rowid"
        return self._select(HeldOutMeasurement, tail, split, calibration)

    def commit_generation(self, number: int, population: Any, rng: Any) -> None:
        """Store a finished generation: JSON of its population, and `random.Random.getstate()` to breed the next."""
        row = {"number": number, "population": population, "rng": rng}
        with self._write():
            self._insert("generations", row | {"evaluations": self.counts()["paid"], "finished": time.time()})

    def generations(self) -> list[Generation]:
        """Every finished generation in order."""
        return self._select(Generation, "generations ORDER BY number")

    def last_generation(self) -> Generation | None:
        """The generation to resume from; None before the first is finished."""
        return self._first(Generation, "generations ORDER BY number DESC LIMIT 1")

    def candidates(self) -> list[Candidate]:
        """Every candidate in the order drawn."""
        return self._select(Candidate, "candidates ORDER BY id")

    def candidate(self, generation: int, position: int) -> Candidate | None:
        """The candidate recorded at this place."""
        return self._first(Candidate, "candidates WHERE generation = ? AND position = ?", generation, position)

    def evaluations(self, status: str | None = None) -> list[Evaluation]:
        """Every evaluation in the order paid for, or those of one status."""
        return self._select(Evaluation, "evaluations WHERE ?1 IS NULL OR status = ?1 ORDER BY id", status)

    def find_canonical(self, canonical: str) -> Evaluation | None:
        """What a canonical form was given: its own evaluation, or an earlier one with the same masks."""
        given = "SELECT evaluation FROM candidates WHERE canonical = ? AND evaluation IS NOT NULL ORDER BY id LIMIT 1"
        return self._first(Evaluation, f"evaluations WHERE id = ({given})", canonical)

    def find_fingerprint(self, fingerprint: str) -> Evaluation | None:
        """The evaluation that paid for these masks."""
        return self._first(Evaluation, "evaluations WHERE fingerprint = ?", fingerprint)

    def counts(self) -> dict[str, int]:
        """Candidates drawn, how many differ as text and after each layer of simplification, and evaluations paid for.

        The layers: opposing operations, sympy's canonical form, rank equivalence, and the masks themselves.
        """
        layers = {"texts": "formula", "opposites": "opposites", "canonical": "canonical", "ranked": "ranked"}
        distinct = ", ".join(f"count(DISTINCT {column}) AS unique_{name}" for name, column in layers.items())
        masks = "count(DISTINCT fingerprint) AS unique_masks"
        drawn = f"SELECT count(*) AS drawn, {distinct}, {masks} FROM candidates"
        return self._query(f"SELECT * FROM ({drawn}), (SELECT count(*) AS paid FROM evaluations)")[0]

    def save_result(self, document: dict[str, Any], seconds: dict[str, Any] | None = None) -> None:
        """Store the final document of the campaign, in place of an earlier one, and the times it took apart from it."""
        # unsorted: a resumed command prints the same bytes
        texts = [json.dumps(value, allow_nan=False) for value in (document, seconds or {})]
        with self._write():
            self._store("results", {"name": "result", "value": texts[0], "seconds": texts[1]}, "OR REPLACE")

    def result(self) -> dict[str, Any] | None:
        """The final document, with its times as `seconds`; None while the present budget is not finished."""
        rows = self._query("SELECT value, seconds FROM results WHERE name = 'result'")
        if rows and not isinstance(rows[0]["value"], dict):
            raise LedgerError(f"ledger {self.path} is damaged: its result is no object")
        return rows[0]["value"] | ({"seconds": rows[0]["seconds"]} if rows[0]["seconds"] else {}) if rows else None

    def comparable_tables(self) -> dict[str, list[dict[str, Any]]]:
        """Every table without its volatile columns: equal for two equal campaigns."""
        keys = {"measurements": "generation, position, rung", "judgements": "split, calibration, metric, target"}
        tables = {
            name: self._query(f"SELECT * FROM {name} ORDER BY {keys.get(name, 'rowid')}") for name in schema.TABLES
        }
        for row in chain(*tables.values()):
            for column in schema.VOLATILE & row.keys():
                del row[column]
        return tables

    @contextmanager
    def _write(self) -> Iterator[None]:
        with explained(self.path):
            if self._token is None:
                raise Refusal("is open for reading only")
            with transaction(self._connection):
                driver_lock.beat(self._connection, self._token)
                yield

    def _insert(self, table: str, row: dict[str, Any], conflict: str = "") -> int:
        """The id of a new row, or whatever SQLite calls it."""
        row = {name: schema.to_column(name, value) for name, value in row.items()}
        if row.get("id", 0) is None:  # the checksum is of the id, too
            row["id"] = self._connection.execute(f"SELECT coalesce(max(id), 0) + 1 FROM {table}").fetchone()[0]
        return self._store(table, row, conflict)

    def _store(self, table: str, row: dict[str, Any], conflict: str = "") -> int:
        row = {**row, "checksum": schema.row_checksum(table, row)}
        statement = f"INSERT {conflict} INTO {table} ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})"
        return self._connection.execute(statement, list(row.values())).lastrowid or 0

    def _first(self, kind: type[Row], tail: str, *arguments: object) -> Row | None:
        return next(iter(self._select(kind, tail, *arguments)), None)

    def _select(self, kind: type[Row], tail: str, *arguments: object) -> list[Row]:
        return [kind(**row) for row in self._query(f"SELECT * FROM {tail}", *arguments)]

    def _query(self, statement: str, *arguments: object) -> list[dict[str, Any]]:
        with explained(self.path):
            rows = map(dict, self._connection.execute(statement, arguments).fetchall())
            return [{name: schema.from_column(name, row[name]) for name in row if name != "checksum"} for row in rows]


def _claimed(
    connection: sqlite3.Connection, settings: dict[str, Any], *, resume: bool, silent: driver_lock.Owner | None = None
) -> str:
    """Token of a ledger that this process owns from now on, its schema and settings being in order."""
    with transaction(connection):
        version = schema_version(connection)
        if version and not resume:
            raise Refusal("exists: continue it with --resume or use another --ledger")
        schema.upgrade(connection, version)
        _settle(connection, settings)
        return driver_lock.claim(connection, silent)


def _settle(connection: sqlite3.Connection, settings: dict[str, Any]) -> None:
    """Store the settings of a new campaign, or the budget of one that is continued."""
    here = {key: schema.to_json(value) for key, value in settings.items()}
    there = dict(connection.execute("SELECT key, value FROM meta").fetchall())
    # SQLite lets any cell be of any kind, and a key be NULL
    changed = sorted((key for key in here.keys() | there.keys() if here.get(key) != there.get(key)), key=str)
    foreign = [key for key in changed if key not in BUDGET_KEYS]
    if there and foreign:
        pairs = (f"{key}={there.get(key, '?')!s:.60} there, {key}={here.get(key, '?')!s:.60} here" for key in foreign)
        raise Refusal(f"is of another campaign: {'; '.join(pairs)}")
    if changed:
        connection.execute("DELETE FROM results")
        connection.execute("DELETE FROM meta")
        told = [{"key": key, "value": value} for key, value in sorted(here.items())]
        rows = [pair | {"checksum": schema.row_checksum("meta", pair)} for pair in told]
        connection.executemany("INSERT INTO meta (key, value, checksum) VALUES (:key, :value, :checksum)", rows)


def is_ledger(name: str) -> bool:
    """Whether a name is a ledger's rather than a formula, which may be the name of a file, too."""
    if name.endswith(".sqlite"):
        return True
    if not os.path.isfile(name):
        return False
    with open(name, "rb") as file:
        return file.read(16) == b"SQLite format 3\0"


def winner_of(path: Path) -> str:
    """The winning metric of a finished campaign, its comparison group before it unless that is the row.

    Raises:
        LedgerError: it is not finished, or the file is no ledger.
    """
    with Ledger.read(path) as ledger:
        result = ledger.result()
    if result is None:
        raise LedgerError(f"the campaign in {str(path)!r} is not finished; go on with gpmetric discover --resume")
    try:
        return str(result["winner"]["formula"])
    except (KeyError, TypeError) as error:
        raise LedgerError(f"ledger {str(path)!r} is damaged: its result names no winner") from error
