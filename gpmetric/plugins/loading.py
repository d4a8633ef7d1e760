"""Plug-ins of this process: each is loaded once, checked as a whole, and then in the tables."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpmetric.errors import GpmetricError, InputError
from gpmetric.plugins.guard import guarded_row
from gpmetric.plugins.sources import Source, find_source
from gpmetric.plugins.tables import TABLES, Table

__all__ = ["adopt", "digests_of", "in_use", "load_plugin", "names_of", "places", "sources"]

_NAME = r"[A-Za-z][A-Za-z0-9_-]{0,59}"


@dataclass(frozen=True)
class _Loaded:
    """A plug-in and the names of its rows by kind."""

    source: Source
    rows: Mapping[str, tuple[str, ...]]


_LOADED: dict[str, _Loaded] = {}  # by name


def load_plugin(plugin: str | Path) -> dict[str, Any]:
    """Loads a plug-in into this process, as `--plugin` does: `gpmetric.load_plugin("my.py")`.

    Args:
        plugin: a Python file, or the name of an installed plug-in.

    Returns:
        Its `name`, `place` and `sha256`, and the names of its `rows` by kind.

    Raises:
        InputError: it cannot be loaded, clashes with what is there, or has a row that does not do what its table asks.
            Nothing of it is then in use.
    """
    return _load(find_source(str(plugin)))


def adopt(others: Iterable[Source]) -> None:
    """Loads the plug-ins of another process.

    Raises:
        InputError: as of `load_plugin`, or an installed one is another here.
    """
    for source in others:
        if source.text is None and (here := find_source(source.name)) != source:
            raise InputError(f"plug-in {source.name} is {_short(here)} here, {_short(source)} where it was asked for")
        _load(source)


def sources() -> tuple[Source, ...]:
    """The plug-ins of this process."""
    return tuple(one.source for one in _LOADED.values())


def places() -> tuple[str, ...]:
    """What names each of them for `--plugin`: its file, or the name of one that is installed."""
    return tuple(one.name if one.text is None else one.place for one in sources())


def in_use(key: str) -> dict[str, dict[str, str]]:
    """Digests of the plug-ins of this process by name, under a key; nothing where there are none."""
    return {key: {name: one.source.digest for name, one in sorted(_LOADED.items())}} if _LOADED else {}


def names_of(kind: str) -> tuple[str, ...]:
    """The rows of a kind that plug-ins have added, in order."""
    return tuple(name for one in _LOADED.values() for name in one.rows.get(kind, ()))


def digests_of(kind: str, names: Collection[str]) -> dict[str, str]:
    """Of those rows of a kind that are a plug-in's, its digest."""
    return {name: one.source.digest for one in _LOADED.values() for name in one.rows.get(kind, ()) if name in names}


def _load(source: Source) -> dict[str, Any]:
    known = _LOADED.get(source.name)
    if known is None:
        known = _LOADED[source.name] = _Loaded(source, _added(source, source.rows()))
    elif known.source.digest != source.digest:
        raise InputError(
            f"plug-in {source.name} is loaded as {_short(known.source)}, and {source.place} is {_short(source)}: "
            "another one of that name needs another process"
        )
    return {
        "name": source.name,
        "place": source.place,
        "sha256": source.digest,
        "rows": {kind: list(names) for kind, names in known.rows.items()},
    }


def _short(source: Source) -> str:
    return source.digest[:12]


def _added(source: Source, given: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Names by kind of a plug-in's rows, which are tried and in their tables: all of them, or none.

    Raises:
        InputError: naming plug-in and row.
    """
    added: dict[str, tuple[str, ...]] = {}
    try:
        for name, value in given.items():
            rows = dict(_by_kind(source, name, value))
            for kind, row in rows.items():
                others = {other: one for other, one in rows.items() if other != kind}
                variants = _tried(source, TABLES[kind], name, row, others)
                TABLES[kind].rows.update(variants)
                added[kind] = (*added.get(kind, ()), *variants)
    except BaseException:
        for kind, names in added.items():
            for name in names:
                del TABLES[kind].rows[name]
        raise
    return added


def _by_kind(source: Source, name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if re.fullmatch(_NAME, name) is None:
        raise InputError(f"plug-in {source.name}: a row's name must be letters, digits, - and _, but got {name!r:.60}")
    for row in value if isinstance(value, tuple) else (value,):
        table = next((one for one in TABLES.values() if isinstance(row, one.types)), None)
        if table is None:
            accepted = ", ".join(sorted(kind.__name__ for one in TABLES.values() for kind in one.types))
            raise InputError(f"plug-in {source.name}, {name}: a row must be of {accepted}, but got {row!r:.60}")
        yield table.kind, guarded_row(row, _told(source, table, name), source.place, table.makers)


def _tried(source: Source, table: Table, name: str, row: Any, others: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rows that come with one, which does what its table asks and is new to it."""
    told, variants = _told(source, table, name), table.variants(name, row)
    for variant in variants:
        if variant in table.rows:
            by = next((f"plug-in {of}" for of, one in _LOADED.items() if variant in one.rows.get(table.kind, ())), "")
            raise InputError(f"{told}: {by or 'gpmetric'} has one called {variant} already")
    try:
        table.check(name, row, others)
    except GpmetricError as error:
        raise InputError(str(error) if str(error).startswith(told) else f"{told}: {error}") from error
    return variants


def _told(source: Source, table: Table, name: str) -> str:
    return f"plug-in {source.name}, {table.kind} {name}"
