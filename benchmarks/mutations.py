"""What a reader's input is changed to: bits, lengths, words, and the values inside JSON, TOML, safetensors and so on.

`mutated` takes whatever it is given: where an input is no longer of its shape, bytes are changed instead.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import sqlite3
import tomllib
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpmetric.evolution.sqlite_schema import TABLES, row_checksum
from gpmetric.files import checksum

__all__ = ["SHAPES", "mutated"]

_LONGEST = 2**20  # bytes of an input
_DEEP = 100_000  # of a nesting
_TEXTS = (
    "",
    "..",
    "../../x",
    "/etc/passwd",
    "a/b",
    "con",
    "\0",
    "\x1b[31m",
    "\u202e",
    "\udcff",
    "[/red]",
    "<script>",
    "=cmd()",
    "nan",
    "-inf",
    "1e999",
    "9" * 5000,
    "W" * 70_000,
    "__import__('os').system('id')",
    "!!python/object",
    "${jndi:x}",
    "{0.__class__}",
    "%s%n",
    "\r\n",
    "\ufeff",
    "\uff37",
    "\U0010ffff",
    "'; DROP TABLE meta; --",
)
_NUMBERS = (
    0,
    -1,
    1,
    2,
    255,
    2**31,
    2**32,
    2**53,
    2**63,
    2**64,
    -(2**63),
    10**30,
    10**400,
    0.5,
    -0.0,
    1e-300,
    1e300,
    float("nan"),
    float("inf"),
    True,
    False,
    None,
)
_BYTES = (b"\0", b"\xff\xff\xff\xff", b"\x80", b"\xed\xa0\x80", b"\n", b'"', b"{", b"[", b"\\", b"\\ud800")


def mutated(content: bytes, shape: str, words: Sequence[bytes], draw: random.Random) -> bytes:
    """One to four changes of an input of a shape, a key of SHAPES, drawn with a generator."""
    for _ in range(draw.choice((1, 1, 2, 4))):
        change = SHAPES[shape] if draw.random() < 0.5 else None
        try:
            content = change(content, draw) if change else _bytes(content, words, draw)
        except _NOT_OF_IT:
            content = _bytes(content, words, draw)
    return content[:_LONGEST]


def _bytes(content: bytes, words: Sequence[bytes], draw: random.Random) -> bytes:
    """One change of bytes: a bit, a byte, a piece cut out, doubled or moved, a word put in, the end cut off."""
    place, other = draw.randint(0, len(content)), draw.randint(0, len(content))
    first, last = min(place, other), max(place, other)
    near = min(len(content), place + draw.randint(1, 8))
    kind = draw.randrange(9)
    if kind == 0 and content:
        bit = draw.randrange(8 * len(content))
        return content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]
    if kind == 1:
        return content[:place] + draw.randbytes(draw.randint(1, 4)) + content[near:]
    if kind == 2:
        return content[:place]
    if kind == 3:
        return content[:place] + content[near:]
    if kind == 4:
        return content[:last] + content[first:last] + content[last:]
    if kind == 5:
        return content[:first] + content[last:]
    if kind == 6:
        return content[:place] + draw.choice(_BYTES) * draw.choice((1, 1, 1, 3, 1000)) + content[near:]
    word = draw.choice(words) if words else draw.choice(_TEXTS).encode("utf-8", "surrogatepass")
    return content[:place] + word + content[near if kind == 7 else place :]


def _value(draw: random.Random, depth: int = 0) -> Any:
    """A value that JSON can spell, or nearly."""
    kind = draw.randrange(6 if depth < 3 else 4)
    if kind < 2:
        return draw.choice(_NUMBERS)
    if kind < 4:
        return draw.choice(_TEXTS)
    size = draw.randrange(4)
    if kind == 4:
        return [_value(draw, depth + 1) for _ in range(size)]
    return {draw.choice(_TEXTS): _value(draw, depth + 1) for _ in range(size)}


def _changed(value: Any, draw: random.Random) -> Any:
    """A document with one value somewhere in it replaced, left out, doubled, or under another name."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        kind = draw.randrange(8)
        if kind == 0:
            return {name: one for name, one in value.items() if name != key}
        if kind == 1:
            return {draw.choice(_TEXTS) if name == key else name: one for name, one in value.items()}
        if kind == 2:
            return value | {draw.choice([*value, *_TEXTS]): _value(draw)}
        if kind == 3:
            return value | {key: value[draw.choice(list(value))]}
        return value | {key: _changed(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.9:
        place = draw.randrange(len(value))
        kind = draw.randrange(6)
        if kind == 0:
            return value[:place] + value[place + 1 :]
        if kind == 1:
            return value[: place + 1] * 2
        return [*value[:place], _changed(value[place], draw), *value[place + 1 :]]
    if isinstance(value, str) and draw.random() < 0.5:
        return _bytes(value.encode("utf-8", "surrogatepass"), (), draw).decode("utf-8", "replace")
    if isinstance(value, int | float) and draw.random() < 0.3:
        return value + draw.choice((-1, 1, 0.5)) if abs(value) < 2**60 else -value
    return _value(draw)


def _deepened(text: bytes, draw: random.Random) -> bytes:
    """Now and then, a nesting that no recursion survives in place of the first value."""
    if draw.random() > 0.01:
        return text
    head, colon, _ = text.partition(b":")
    return head + colon + draw.choice((b"[" * _DEEP, b'{"a":' * _DEEP, b"[" * _DEEP + b"]" * _DEEP + b"}"))


def _json(content: bytes, draw: random.Random) -> bytes:
    return _deepened(json.dumps(_changed(json.loads(content), draw)).encode(), draw)


def _lines(content: bytes, draw: random.Random) -> bytes:
    """Of JSON Lines, one record, its checksum as it should be if it had one; or their order."""
    lines = content.split(b"\n")
    place = draw.randrange(len(lines))
    if draw.random() < 0.2:
        return b"\n".join([*lines[:place], lines[draw.randrange(len(lines))], *lines[place:]])
    record = json.loads(lines[place])
    summed = isinstance(record, dict) and record.pop("checksum", None) is not None
    text = json.dumps(_changed(record, draw)).encode()
    if summed and text.endswith(b"}"):
        text = text[:-1] + f', "checksum": "{checksum(text)}"}}'.encode()
    return b"\n".join([*lines[:place], text, *lines[place + 1 :]])


def _toml(content: bytes, draw: random.Random) -> bytes:
    changed = _changed(tomllib.loads(content.decode()), draw)
    return "".join(f"{json.dumps(key)} = {_in_toml(value)}\n" for key, value in changed.items()).encode()


def _in_toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {_in_toml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_in_toml, value)) + "]"
    return str(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _tensors(content: bytes, draw: random.Random) -> bytes:
    """Of a safetensors file, its header, whose length is told right or wrong, and maybe its end."""
    length = int.from_bytes(content[:8], "little")
    text = _deepened(json.dumps(_changed(json.loads(content[8 : 8 + length]), draw)).encode(), draw)
    told = draw.choice((len(text),) * 6 + (length, 2**63, 2**64 - 1, 0))
    return told.to_bytes(8, "little") + text + content[8 + length : draw.choice((None, None, None, -1))]


def _sqlite(content: bytes, draw: random.Random) -> bytes:
    """Of a ledger, a cell, with the checksum of its row as it should be, or something of the schema."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    try:
        connection.deserialize(content[:18] + b"\1\1" + content[20:])  # without the log that is not there
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA ignore_check_constraints = ON")
        table = draw.choice(TABLES)
        rows = connection.execute(f"SELECT rowid AS place, * FROM {table}").fetchall()
        if draw.random() < 0.1:
            connection.execute(
                draw.choice(
                    (
                        f"DELETE FROM {table}",
                        f"DROP TABLE {table}",
                        "PRAGMA user_version = 2",
                        "PRAGMA user_version = 3",
                        f"ALTER TABLE {table} ADD COLUMN more",
                        f"CREATE VIEW v AS SELECT * FROM {table}",
                        "PRAGMA application_id = 7",
                        "PRAGMA user_version = 99",
                    )
                )
            )
        else:
            row = dict(draw.choice(rows))
            place = row.pop("place")
            column = draw.choice([name for name in row if name != "checksum"])
            row[column] = _cell(row[column], draw)
            row["checksum"] = row_checksum(table, {name: one for name, one in row.items() if name != "checksum"})
            update = f"UPDATE {table} SET {column} = ?, checksum = ? WHERE rowid = ?"
            connection.execute(update, (row[column], row["checksum"], place))
        return connection.serialize()
    finally:
        connection.close()


def _cell(value: Any, draw: random.Random) -> Any:
    """A cell of any kind that SQLite takes; of JSON, often JSON again."""
    if isinstance(value, str) and value[:1] in "[{" and draw.random() < 0.7:
        return json.dumps(_changed(json.loads(value), draw))
    kind = draw.randrange(4)
    text = draw.choice(_TEXTS).encode("utf-8", "replace")
    return (None, draw.choice((0, -1, 2**62, 0.5, 1e300)), text, text.decode())[kind]


def _zip(content: bytes, draw: random.Random) -> bytes:
    """Of an archive of `pack`, its index, or the bytes of one of its files."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {one: archive.read(one) for one in archive.namelist()}
        comment = archive.comment
    name = draw.choice([*members, "index.json", "index.json"])
    members[name] = _json(members[name], draw) if name == "index.json" else _bytes(members[name], (), draw)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for one, inside in members.items():
            archive.writestr(one, inside)
        archive.comment = comment
    return made.getvalue()


def _gzip(content: bytes, draw: random.Random) -> bytes:
    return gzip.compress(_lines(gzip.decompress(content), draw), 1, mtime=0)


def _table(content: bytes, draw: random.Random) -> bytes:
    """Of Parquet, the table: names and kinds of its columns, and their values."""
    import pyarrow as pa
    from pyarrow.parquet import write_table

    kinds = (pa.string(), pa.binary(), pa.int64(), pa.list_(pa.string()), pa.large_string(), pa.null())
    kind = draw.choice(kinds)
    names = draw.sample(("text", "other", "", "a.b", "text"), draw.randint(1, 3))
    cells = {
        pa.string(): "a",
        pa.binary(): b"\xff",
        pa.int64(): 1,
        pa.list_(pa.string()): ["a"],
        pa.large_string(): "b",
    }
    column = pa.array([draw.choice((cells.get(kind), None)) for _ in range(draw.randint(0, 5))], kind)
    made = io.BytesIO()
    write_table(pa.Table.from_arrays([column] * len(names), names=names), made)
    return made.getvalue()


SHAPES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "text": lambda content, draw: _bytes(content, (), draw),
    "json": _json,
    "lines": _lines,
    "toml": _toml,
    "tensors": _tensors,
    "sqlite": _sqlite,
    "zip": _zip,
    "gzip": _gzip,
    "table": _table,
}
_NOT_OF_IT = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    RecursionError,
    OverflowError,
    OSError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    MemoryError,
    sqlite3.Error,
    zlib.error,
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
)
