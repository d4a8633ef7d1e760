"""The ledger: one SQLite file that is one campaign, written by its driver alone.

It holds the settings, every drawn candidate, every evaluation paid for, and for each finished generation the
population and the random state, so that a killed campaign replays its unfinished generation and loses nothing.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from gpmetric.errors import LedgerError
from gpmetric.evolution import driver_lock
from gpmetric.evolution import sqlite_schema as schema
from gpmetric.evolution.admission import checked, claimed
from gpmetric.evolution.network_files import network_file_system
from gpmetric.evolution.records import Candidate, Evaluation, Generation, HeldOutMeasurement, Measurement
from gpmetric.evolution.seals import Seals
from gpmetric.evolution.settings import HISTORY_KEYS
from gpmetric.evolution.sqlite_schema import Refusal, explained, opened, schema_version, transaction
from gpmetric.plugins import in_use

__all__ = ["Ledger", "result_of"]

_LOG = logging.getLogger(__name__)
_UNSAFE_SECONDS = 1.0  # that a power cut may cost
# By name, the column of a candidate of which `counts` tells how many differ.
_LAYERS = {
    "unique_texts": "formula",
    "unique_opposites": "opposites",
    "unique_canonical": "canonical",
    "unique_ranked": "ranked",
    "unique_masks": "fingerprint",
}

Row = TypeVar("Row", Candidate, Evaluation, Generation, HeldOutMeasurement, Measurement)


class Ledger(AbstractContextManager["Ledger"]):
    """The database of record of one campaign, made by `open` or `read`.

    `open` admits one driver at a time, and waits for a minute where only silence tells that another one, on another
    host, has ended; each write is one transaction. `read` is a fixed snapshot, also while a driver runs. Every
    method raises LedgerError when the file cannot be used.
    """

    def __init__(
        self, path: Path, connection: sqlite3.Connection, token: str | None, seals: Seals | None = None
    ) -> None:
        self.path = path
        self._connection = connection
        self._token = token  # of our ownership; None when reading
        self._heart = None if token is None else driver_lock.Heart(path, token)
        self._safe = -math.inf  # when all that was written last was on the disk
        self._seals = seals or Seals()
        self._differing: dict[str, set[str]] | None = None  # values of each of _LAYERS, once they are asked for

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        settings: dict[str, Any],
        *,
        resume: bool,
        reseed: bool = False,
        fork: dict[str, Any] | None = None,
    ) -> Ledger:
        """Ledger owned by this process, created when the file is missing or empty.

        Args:
            path: the SQLite file, in an existing folder.
            settings: JSON values, all that determine the campaign's result. On resume those in BUDGET_KEYS may
                differ: the new ones are stored and the result under the old ones is dropped.
            resume: continue the campaign that is there instead of refusing it.
            reseed: on resume, `seed` may differ, too; it holds from the next generation on that is not begun.
            fork: what a new campaign begins with, told by `history` from then on.
        """
        with opened(Path(path), "mode=rwc") as connection:
            claim = partial(claimed, connection, settings, resume=resume, reseed=reseed, fork=fork)
            try:
                token, seals = claim()
            except driver_lock.Unheard as elsewhere:
                told = "ledger %s %s: it is taken over unless that is heard of within %.0f s"
                _LOG.warning(told, path, elsewhere, driver_lock.STALE_SECONDS)
                token, seals = claim(silent=driver_lock.watch(connection))
            if kind := network_file_system(Path(path)):
                told = "ledger %s is on a network file system (%s), where SQLite's locks and shared memory may fail: "
                _LOG.warning(
                    told + "name a --ledger on a local disk, and copy it when the campaign is done", path, kind
                )
            connection.execute("PRAGMA journal_mode = WAL")
        return cls(Path(path), connection, token, seals)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Ledger:
        """Ledger as it is now, for reading only; takes no ownership and writes nothing."""
        with opened(Path(path), schema.read_query(Path(path))) as connection:
            connection.execute("BEGIN")  # one snapshot for everything read later
            version = schema_version(connection)
            if not version:
                raise Refusal("holds no campaign")
            checked(connection, version)
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
        return {key: value for key, value in self._meta.items() if key not in HISTORY_KEYS}

    def check_plugins(self) -> None:
        """Refuses a campaign whose formulas may use what plug-ins have added that this process does not have."""
        there, here = (found.get("plugin") or {} for found in (self.settings, in_use("plugin")))
        for name, digest in there.items():
            if here.get(name) != digest:
                found = f"{here[name]:.12} here" if name in here else "not named"
                raise LedgerError(f"ledger {self.path} is of --plugin {name} ({digest:.12} there, {found})")

    @property
    def history(self) -> dict[str, Any]:
        """What became of the campaign, by HISTORY_KEYS: `fork`, `reseeded`, `merged`; empty of most."""
        return {key: value for key, value in self._meta.items() if key in HISTORY_KEYS}

    @property
    def seeds(self) -> dict[int, int]:
        """By generation, the seed that it and those after it are drawn from; empty where the campaign's is for all."""
        return {int(generation): int(seed) for generation, seed in self._meta.get("reseeded", ())}

    @property
    def _meta(self) -> dict[str, Any]:
        return {row["key"]: row["value"] for row in self._query("SELECT * FROM meta ORDER BY key")}

    def together(self) -> AbstractContextManager[None]:
        """All that is written inside is there at once, or nothing of it."""
        return self._write()

    def owner(self) -> dict[str, Any] | None:
        """Whose the ledger is, as `driver_lock.lives` takes it; None where no driver has it."""
        return next(iter(self._query("SELECT * FROM owner")), None)

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
            if self._differing is not None:
                _add_values(self._differing, asdict(candidate))
            return candidate.evaluation

    def measure(self, measurements: Sequence[Measurement]) -> None:
        """Store what rungs of the screening gave; a (generation, position, rung) already there is left unchanged."""
        with self._write(at_once=False):
            for measurement in measurements:
                self._insert("measurements", asdict(measurement), "OR IGNORE")

    def measurements(self, generation: int | None = None) -> list[Measurement]:
        """Every measurement in the order made, or those of one generation."""
        if generation is None:
            return self._select(Measurement, "measurements ORDER BY rowid")
        return self._select(Measurement, "measurements WHERE generation = ? ORDER BY rowid", generation)

    def hold_out(self, measurement: HeldOutMeasurement) -> None:
        """Store what a metric costs on held-out text; one already there is left unchanged."""
        with self._write():
            self._insert("judgements", asdict(measurement), "OR IGNORE")

    def held_out(self, split: str | None = None, calibration: str | None = None) -> list[HeldOutMeasurement]:
        """Every measurement on a split with statistics of some calibration windows, in the order made, or on all."""
        tail = "judgements WHERE (?1 IS NULL OR split = ?1) AND (?2 IS NULL OR calibration = ?2) ORDER BY rowid"
        return self._select(HeldOutMeasurement, tail, split, calibration)

    def commit_generation(self, number: int, population: Any, rng: Any) -> None:
        """Store a finished generation: JSON of its population, and `random.Random.getstate()` to breed the next."""
        row = {"number": number, "population": population, "rng": rng}
        with self._write():
            self._insert("generations", row | {"evaluations": self._count("evaluations"), "finished": time.time()})
            self._seals.store(self._connection)

    def generations(self) -> list[Generation]:
        """Every finished generation in order."""
        return self._select(Generation, "generations ORDER BY number")

    def last_generation(self) -> Generation | None:
        """The generation to resume from; None before the first is finished."""
        return self._first(Generation, "generations ORDER BY number DESC LIMIT 1")

    def candidates(self, generation: int | None = None) -> list[Candidate]:
        """Every candidate in the order drawn, or those of one generation."""
        if generation is None:
            return self._select(Candidate, "candidates ORDER BY id")
        return self._select(Candidate, "candidates WHERE generation = ? ORDER BY position", generation)

    def drawn(self, last: int) -> Iterator[tuple[str | None, str | None, int | None]]:
        """Ranked form, fingerprint and evaluation of every candidate until the end of a generation, as drawn."""
        columns = "ranked, fingerprint, evaluation"
        for row in self._query(f"SELECT {columns} FROM candidates WHERE generation <= ? ORDER BY id", last):
            yield row["ranked"], row["fingerprint"], row["evaluation"]

    def candidate(self, generation: int, position: int) -> Candidate | None:
        """The candidate recorded at this place."""
        return self._first(Candidate, "candidates WHERE generation = ? AND position = ?", generation, position)

    def evaluations(self, status: str | None = None, after: int = 0) -> list[Evaluation]:
        """Every evaluation in the order paid for whose id is greater than `after`, or those of one status."""
        tail = "evaluations WHERE id > ?1 AND (?2 IS NULL OR status = ?2) ORDER BY id"
        return self._select(Evaluation, tail, after, status)

    def evaluation(self, number: int) -> Evaluation | None:
        """The evaluation of an id."""
        return self._first(Evaluation, "evaluations WHERE id = ?", number)

    def evaluations_of(self, formulas: Sequence[str]) -> list[Evaluation]:
        """The evaluations of these formulas, in the order paid for."""
        places = ", ".join("?" * len(formulas))
        return self._select(Evaluation, f"evaluations WHERE formula IN ({places}) ORDER BY id", *formulas)

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
        if self._differing is None:
            self._differing = {column: set() for column in _LAYERS.values()}
            for row in self._query(f"SELECT {', '.join(self._differing)} FROM candidates"):
                _add_values(self._differing, row)
        unique = {name: len(self._differing[column]) for name, column in _LAYERS.items()}
        return {"drawn": self._count("candidates")} | unique | {"paid": self._count("evaluations")}

    def _count(self, table: str) -> int:
        return int(self._query(f"SELECT count(*) AS number FROM {table}")[0]["number"])

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
    def _write(self, *, at_once: bool = True) -> Iterator[None]:
        """A transaction, or a part of the one that is open.

        Whatever ends the process, it is there from then on. That a power cut leaves it there takes milliseconds of
        waiting for the disk: `at_once`, or for all that was written within a second.
        """
        with explained(self.path):
            if self._token is None:
                raise Refusal("is open for reading only")
            if self._connection.in_transaction:
                yield
                return
            now = time.monotonic()
            waits = at_once or now > self._safe + _UNSAFE_SECONDS
            self._connection.execute(f"PRAGMA synchronous = {'FULL' if waits else 'NORMAL'}")
            try:
                with transaction(self._connection):
                    driver_lock.beat(self._connection, self._token)
                    yield
                self._safe = now if waits else self._safe
            except BaseException:  # what was taken up of it is not there
                self._seals, self._differing = Seals(), None
                raise

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


def _add_values(differing: dict[str, set[str]], candidate: Mapping[str, Any]) -> None:
    for column, values in differing.items():
        if candidate[column] is not None:
            values.add(candidate[column])


def result_of(path: Path) -> dict[str, Any]:
    """The result of a finished campaign, whose winner has its comparison group before it unless that is the row.

    Raises:
        LedgerError: it is not finished, is of plug-ins that are not there, or the file is no ledger.
    """
    with Ledger.read(path) as ledger:
        ledger.check_plugins()
        result = ledger.result()
    if result is None:
        raise LedgerError(f"the campaign in {str(path)!r} is not finished; go on with gpmetric discover --resume")
    if not isinstance(result.get("winner"), dict) or "formula" not in result["winner"]:
        raise LedgerError(f"ledger {str(path)!r} is damaged: its result names no winner")
    return result
