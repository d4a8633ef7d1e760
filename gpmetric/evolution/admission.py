"""Which ledger a driver may go on with: one that is sound, of the same settings, and of no other driver."""

from __future__ import annotations

import json
import sqlite3
from typing import Any

from gpmetric.evolution import driver_lock
from gpmetric.evolution import sqlite_schema as schema
from gpmetric.evolution.seals import Seals, check_rows
from gpmetric.evolution.settings import HISTORY_KEYS, differences
from gpmetric.evolution.sqlite_schema import Refusal, schema_version, transaction

__all__ = ["checked", "claimed"]

_ENDED = {"merged": "is of several campaigns", "lost": "has lost settings, so that it cannot be gone on with"}


def checked(connection: sqlite3.Connection, version: int) -> Seals:
    """Seals that go on with a file of this version, which is refused where it is damaged."""
    schema.check_structure(connection, version)
    return check_rows(connection, version) if version >= schema.SUMMED_SINCE else Seals()


def claimed(
    connection: sqlite3.Connection,
    settings: dict[str, Any],
    *,
    resume: bool,
    reseed: bool,
    fork: dict[str, Any] | None,
    silent: driver_lock.Owner | None = None,
) -> tuple[str, Seals]:
    """Token of a ledger that this process owns from now on, its schema, rows and settings being in order; its seals."""
    with transaction(connection):
        version = schema_version(connection)
        if version and not resume:
            raise Refusal("exists: continue it with --resume or use another --ledger")
        seals = checked(connection, version) if version else Seals()
        schema.upgrade(connection, version)
        _settle(connection, settings, reseed=reseed, fork=fork)
        token = driver_lock.claim(connection, silent)
        seals.store(connection)
        return token, seals


def _settle(
    connection: sqlite3.Connection, settings: dict[str, Any], *, reseed: bool, fork: dict[str, Any] | None
) -> None:
    """Store the settings of a new campaign, or the budget or seed of one that is continued."""
    here: dict[str, Any] = json.loads(schema.to_json(settings))
    there = {key: json.loads(value) for key, value in connection.execute("SELECT key, value FROM meta")}
    if not there:
        here |= {"fork": fork} if fork else {}
    elif ended := there.keys() & _ENDED.keys():
        raise Refusal(f"{_ENDED[min(ended)]}: --fork begins a campaign from its population in another --ledger")
    else:
        here |= {key: there[key] for key in HISTORY_KEYS & there.keys()}
        anew = {"seed": here["seed"]} if reseed else {}
        if foreign := differences(there | anew, here):
            way = "is of another campaign; --fork begins one from its population, in another --ledger. They differ in:"
            raise Refusal(way, foreign)
        if reseed and here["seed"] != there["seed"]:
            here["reseeded"] = _reseeded(connection, there, here["seed"])
    if here != there:
        connection.execute("DELETE FROM results")
        connection.execute("DELETE FROM meta")
        told = [{"key": key, "value": schema.to_json(value)} for key, value in sorted(here.items())]
        rows = [pair | {"checksum": schema.row_checksum("meta", pair)} for pair in told]
        connection.executemany("INSERT INTO meta (key, value, checksum) VALUES (:key, :value, :checksum)", rows)


def _reseeded(connection: sqlite3.Connection, there: dict[str, Any], seed: int) -> list[list[int]]:
    """The history of seeds, with another one for the generation after the last that has a row."""
    tables = ("SELECT number AS one FROM generations", *(f"SELECT generation FROM {name}" for name in schema.DRAWN))
    (last,) = connection.execute(f"SELECT coalesce(max(one), -1) FROM ({' UNION ALL '.join(tables)})").fetchone()
    before = [pair for pair in there.get("reseeded", [[0, there["seed"]]]) if pair[0] <= last]
    return [*before, [last + 1, seed]]
