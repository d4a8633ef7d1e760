"""The SQLite file under a ledger: schema and its upgrade, opening and refusing, and the form of a column.

Every row of a campaign carries a checksum; that all of them match is seen when a file is opened (`seals`).
"""

from __future__ import annotations

import json
import logging
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from gpmetric.errors import GpmetricError, LedgerError
from gpmetric.files import checksum

__all__ = [
    "APPLICATION_ID",
    "DRAWN",
    "RECOVERY",
    "SEALED_SINCE",
    "SUMMED_SINCE",
    "TABLES",
    "UPGRADES",
    "VERSION",
    "VOLATILE",
    "Refusal",
    "check_structure",
    "check_tables",
    "columns_of",
    "create",
    "explained",
    "from_column",
    "is_sound",
    "opened",
    "read_query",
    "row_checksum",
    "schema_version",
    "to_column",
    "to_json",
    "transaction",
    "upgrade",
    "upgraded_copy",
]

_LOG = logging.getLogger(__name__)
APPLICATION_ID = 0x67706D74  # "gpmt"
VERSION = 5
SUMMED_SINCE, SEALED_SINCE = 4, 5  # versions whose rows have checksums, and whose tables have seals
_ENCODED = frozenset({"population", "rng", "figures", "value", "seconds"})  # columns of JSON
_OBJECTS = frozenset({"figures", "seconds"})  # of JSON
VOLATILE = frozenset(
    {"seconds", "seconds_score", "seconds_loss", "duration", "host", "process", "attempt", "finished", "checksum"}
)
RECOVERY = "gpmetric ledger check FILE tells all, gpmetric ledger repair FILE -o NEW keeps what is sound"
_DISK = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)  # the work failed, and the same command goes on
_HINTS = {sqlite3.SQLITE_CORRUPT: RECOVERY, sqlite3.SQLITE_CANTOPEN: "its folder must exist and be writable"}

_COLUMNS = {
    "meta": "key TEXT PRIMARY KEY, value TEXT NOT NULL CHECK (json_valid(value))",
    "generations": "number INTEGER PRIMARY KEY, population TEXT NOT NULL CHECK (json_valid(population)), "
    "rng TEXT NOT NULL CHECK (json_valid(rng)), evaluations INTEGER NOT NULL, finished REAL",
    "evaluations": "id INTEGER PRIMARY KEY, formula TEXT NOT NULL, canonical TEXT, fingerprint TEXT UNIQUE, "
    "generation INTEGER NOT NULL, status TEXT NOT NULL CHECK (status IN ('done', 'failed')), reason TEXT, "
    "figures TEXT NOT NULL CHECK (json_valid(figures)), nodes INTEGER, operands TEXT, sketch TEXT, "
    "seconds_score REAL, seconds_loss REAL, host TEXT, process INTEGER, attempt INTEGER, finished REAL",
    "candidates": "id INTEGER PRIMARY KEY, generation INTEGER NOT NULL, position INTEGER NOT NULL, "
    "formula TEXT NOT NULL, canonical TEXT, opposites TEXT, ranked TEXT, fingerprint TEXT, status TEXT NOT NULL, "
    "evaluation INTEGER REFERENCES evaluations (id), reason TEXT, UNIQUE (generation, position), "
    "CHECK (status IN ('failed', 'screened') "
    "OR status IN ('evaluated', 'duplicate') AND evaluation IS NOT NULL)",
    "measurements": "generation INTEGER NOT NULL, position INTEGER NOT NULL, rung TEXT NOT NULL, "
    "value TEXT NOT NULL CHECK (json_valid(value)), error TEXT, duration REAL, process INTEGER, attempt INTEGER, "
    "PRIMARY KEY (generation, position, rung)",
    "judgements": "metric TEXT NOT NULL, target TEXT NOT NULL, split TEXT NOT NULL, calibration TEXT NOT NULL, "
    "excess REAL, loss REAL, error TEXT, PRIMARY KEY (metric, target, split, calibration)",
    "results": "name TEXT PRIMARY KEY, value TEXT NOT NULL CHECK (json_valid(value)), "
    "seconds TEXT NOT NULL CHECK (json_valid(seconds))",
    "owner": "id INTEGER PRIMARY KEY CHECK (id = 1), host TEXT NOT NULL, pid INTEGER NOT NULL CHECK (pid > 0), "
    "started TEXT NOT NULL, token TEXT NOT NULL, heartbeat REAL NOT NULL",
    "seals": "name TEXT PRIMARY KEY, last INTEGER NOT NULL, digest TEXT NOT NULL",
}
_DECLARED = re.compile(r"(?:^|, )([a-z_]+) (TEXT|INTEGER|REAL)\b")  # columns and their types
_KINDS: dict[str, tuple[type, ...]] = {"TEXT": (str,), "INTEGER": (int,), "REAL": (int, float)}
_ACCEPTED = {name: _KINDS[kind] for columns in _COLUMNS.values() for name, kind in _DECLARED.findall(columns)}
_INDEX = "CREATE INDEX candidates_canonical ON candidates (canonical)"
DRAWN = ("evaluations", "candidates", "measurements")  # whose rows are of a generation
TABLES = tuple(name for name in _COLUMNS if name not in ("owner", "seals"))  # whose rows have checksums


def _created(name: str) -> str:
    return f"CREATE TABLE {name} ({'checksum TEXT NOT NULL, ' if name in TABLES else ''}{_COLUMNS[name]})"


def columns_of(table: str) -> list[str]:
    """The columns of a table, but for the checksum."""
    return [column for column, _ in _DECLARED.findall(_COLUMNS[table])]


def _rebuilt(name: str) -> tuple[str, str]:
    """Statements that make a table anew, with room for checksums where it has them, from what was renamed."""
    names = ", ".join(columns_of(name))
    to, of = (f"checksum, {names}", f"'', {names}") if name in TABLES else (names, names)
    return _created(name), f"INSERT INTO {name} ({to}) SELECT {of} FROM old_{name} ORDER BY rowid"


_UNSEALED = (*map(_created, (*TABLES, "owner")), _INDEX)  # version 4
_SCHEMA = (*_UNSEALED, _created("seals"))
_NEW = (*_SCHEMA, f"PRAGMA application_id = {APPLICATION_ID}")
# Version -> what makes a file of it one of the next version. No released program wrote version 1.
UPGRADES: dict[int, tuple[str, ...]] = {
    2: (
        "ALTER TABLE generations DROP COLUMN hypervolume",
        # figures by objective and target in one column
        "ALTER TABLE evaluations ADD COLUMN figures TEXT NOT NULL DEFAULT '{}' CHECK (json_valid(figures))",
        "UPDATE evaluations SET figures = json_object('kl', json(divergences), 'loss', json(losses)) "
        "WHERE status = 'done'",
        "ALTER TABLE evaluations DROP COLUMN losses",
        "ALTER TABLE evaluations DROP COLUMN divergences",
        # candidates screened out were failed ones; a constraint cannot be changed in place
        "ALTER TABLE candidates RENAME TO old_candidates",
        "DROP INDEX candidates_canonical",
        f"CREATE TABLE candidates ({_COLUMNS['candidates']})",
        "INSERT INTO candidates SELECT id, generation, position, formula, canonical, opposites, ranked, fingerprint, "
        "CASE WHEN reason LIKE 'screened out after %' THEN 'screened' ELSE status END, evaluation, reason "
        "FROM old_candidates ORDER BY id",
        "DROP TABLE old_candidates",
        _INDEX,
        # an error has a column of its own
        "UPDATE measurements SET value = json_remove(value, '$.error') WHERE value <> 'null'",
    ),
    3: (
        # rows have checksums, which `upgrade` fills in; candidates refer to evaluations
        "DROP INDEX candidates_canonical",
        *(f"ALTER TABLE {name} RENAME TO old_{name}" for name in reversed((*TABLES, "owner"))),
        *(statement for name in (*TABLES, "owner") for statement in _rebuilt(name)),
        *(f"DROP TABLE old_{name}" for name in reversed((*TABLES, "owner"))),
        _INDEX,
    ),
    4: (_created("seals"),),
}


class Refusal(Exception):
    """Why a ledger cannot be used, and more lines on that; becomes a LedgerError naming the file."""

    def __init__(self, why: str, details: Iterable[str] = ()) -> None:
        super().__init__(why)
        self.details = tuple(details)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what goes wrong inside into one line for the user."""
    try:
        yield
    except Refusal as refusal:
        raise LedgerError(f"ledger {path} {refusal}", refusal.details) from None
    except (sqlite3.Error, json.JSONDecodeError, UnicodeDecodeError) as error:  # the last of a damaged schema
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the primary one
        hint = "it is a directory" if path.is_dir() else _HINTS.get(code)
        kind = GpmetricError if code in _DISK and not path.is_dir() else LedgerError
        raise kind(f"ledger {path} cannot be used: {error}{f' ({hint})' if hint else ''}") from error


def read_query(path: Path) -> str:
    """How a file is opened that is only read."""
    # A WAL database in a read-only folder opens only as immutable, which is right when no log is pending.
    still = not os.access(path.parent, os.W_OK) and not Path(f"{path}-wal").exists()
    return "mode=ro&immutable=1" if still else "mode=ro"


@contextmanager
def opened(path: Path, query: str) -> Iterator[sqlite3.Connection]:
    """Connection that stays open unless the checks made inside fail."""
    uri = f"{path.absolute().as_uri()}?{query}"  # as_uri quotes, so that "a?mode=ro" is only a name
    with explained(path), ExitStack() as stack:
        if query == "mode=rwc":
            with suppress(OSError):  # which SQLite tells; the files that it makes are 0644 whatever the umask says
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o666))
        connection = stack.enter_context(closing(sqlite3.connect(uri, uri=True, isolation_level=None)))
        connection.row_factory = sqlite3.Row
        for setting in ("busy_timeout = 30000", "synchronous = FULL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {setting}")
        yield connection
        stack.pop_all()


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    with connection:  # commits, or rolls back
        connection.execute("BEGIN IMMEDIATE")  # a deferred one fails at once when it upgrades, ignoring busy_timeout
        yield


def schema_version(connection: sqlite3.Connection) -> int:
    """Version of a ledger of ours; 0 for a file that holds nothing yet."""
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if application != APPLICATION_ID:
        if application or version or connection.execute("SELECT 1 FROM sqlite_master").fetchone():
            raise Refusal("is a SQLite file of another program")
        return 0
    if version > VERSION:
        raise Refusal(f"has schema version {version}, newer than {VERSION}: it needs a newer gpmetric")
    if version < min(UPGRADES):
        raise Refusal(f"has schema version {version}, which no released gpmetric wrote: it cannot be continued or read")
    return version


def check_structure(connection: sqlite3.Connection, version: int) -> None:
    """Refuses a file of this version that SQLite finds damaged, or as `check_tables` does."""
    (verdict,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if verdict != "ok":
        raise Refusal(f"is damaged: {verdict.splitlines()[-1]} ({RECOVERY})")
    check_tables(connection, version)


def check_tables(connection: sqlite3.Connection, version: int) -> None:
    """Refuses a file of this version whose tables are not those of a ledger."""
    for table in (*TABLES, "owner"):
        connection.execute(f"SELECT 1 FROM {table} LIMIT 1")  # a missing one is an error here, not hours later
    if version < SUMMED_SINCE:
        told = "ledger %r is of an earlier format, without checksums: damage to its rows is not seen"
        _LOG.warning(told, connection.execute("PRAGMA database_list").fetchone()["file"])
        return
    found = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY rowid")
    if sorted(statement for (statement,) in found) != sorted(_SCHEMA if version >= SEALED_SINCE else _UNSEALED):
        raise Refusal(f"is damaged: its tables are not those of a ledger ({RECOVERY})")


def is_sound(table: str, row: Mapping[str, Any]) -> bool:
    """Whether a row with its checksum is as it was written."""
    columns = {name: value for name, value in row.items() if name != "checksum"}
    return bool(row["checksum"] == row_checksum(table, columns))


def create(path: Path, tables: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    """Writes a new ledger with these rows, whole or not at all.

    Args:
        path: where none is, or an empty file.
        tables: rows by table in their order, cells as SQLite keeps them.
    """
    partial = path.with_name(f".{path.name[:40]}.{os.urandom(6).hex()}.partial")
    try:
        with opened(partial, "mode=rwc") as connection, closing(connection), transaction(connection):
            upgrade(connection, 0)
            for table, rows in tables.items():
                for row in rows:
                    full = {**row, "checksum": row_checksum(table, row)}
                    places = ", ".join("?" * len(full))
                    statement = f"INSERT INTO {table} ({', '.join(full)}) VALUES ({places})"
                    connection.execute(statement, list(full.values()))
        os.replace(partial, path)
    except (OSError, GpmetricError) as error:
        told = error.strerror if isinstance(error, OSError) else str(error).removeprefix(f"ledger {partial} ")
        raise GpmetricError(f"ledger {path} cannot be written: {told}") from error
    finally:
        partial.unlink(missing_ok=True)


def row_checksum(table: str, row: Mapping[str, Any]) -> str:
    """Of a row by column, as SQLite keeps it: whole numbers as integers, and no difference between NULL and nothing."""
    kept = {name: _plain(value) for name, value in row.items() if value is not None}
    return checksum(json.dumps([table, kept], sort_keys=True, default=repr).encode())


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, (bool, float)) and value == value // 1 else value


def upgrade(connection: sqlite3.Connection, version: int) -> None:
    """Bring a file of an older schema version, 0 for an empty one, to the newest."""
    while version != VERSION:
        statements, version = (UPGRADES[version], version + 1) if version else (_NEW, VERSION)
        for statement in (*statements, f"PRAGMA user_version = {version}"):
            connection.execute(statement)
    for table in TABLES:
        for row in connection.execute(f"SELECT rowid AS place, * FROM {table} WHERE checksum = ''").fetchall():
            columns = {name: value for name, value in dict(row).items() if name not in ("place", "checksum")}
            update = f"UPDATE {table} SET checksum = ? WHERE rowid = ?"
            connection.execute(update, (row_checksum(table, columns), row["place"]))


def upgraded_copy(connection: sqlite3.Connection, version: int) -> sqlite3.Connection:
    """The same file in memory, in the newest schema; the connection to the file is closed."""
    copy = sqlite3.connect(":memory:", isolation_level=None)
    try:
        with closing(connection):
            connection.backup(copy)
        copy.row_factory = sqlite3.Row
        upgrade(copy, version)
    except BaseException:
        copy.close()
        raise
    return copy


def to_json(value: Any) -> str:
    """The one JSON text of a value; ValueError when it holds a NaN or infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def to_column(name: str, value: Any) -> Any:
    if isinstance(value, str):  # a reason may quote a file name that is not UTF-8
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    text = to_json(value)  # of a number only to refuse what is not finite
    return text if name in _ENCODED else value


def from_column(name: str, value: Any) -> Any:
    """A cell as it was given; refused where it is not of its column's kind, as SQLite lets any cell be."""
    if value is not None and not isinstance(value, _ACCEPTED.get(name, (object,))):
        raise Refusal(f"is damaged: {name} is {value!r:.40}")
    if name not in _ENCODED:
        return value
    try:
        found = json.loads(str(value))
    except (ValueError, TypeError, RecursionError) as error:
        raise Refusal(f"is damaged: {name} is {value!r:.40}, which is no JSON: {error}") from error
    if name in _OBJECTS and not isinstance(found, dict):
        raise Refusal(f"is damaged: {name} is {value!r:.40}, which is no object")
    return found
