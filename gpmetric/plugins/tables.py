"""The tables that plug-ins add rows to. Each is opened where it is defined, so that its rows cannot be made before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

__all__ = ["TABLES", "Table", "open_table"]

Row = TypeVar("Row")
Check = Callable[[str, Any, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Table:
    """What a plug-in may add rows to.

    Attributes:
        kind: what a row is called, "updater".
        rows: by name.
        types: of its rows.
        check: called with the name of a new row, the row, and the plug-in's other rows of that name by kind; raises
            GpmetricError where it is of no use. The name is checked there, too.
        makers: fields of a row whose functions make objects.
        variants: the rows that come with one, by name, itself among them.
    """

    kind: str
    rows: dict[str, Any]
    types: tuple[type, ...]
    check: Check
    makers: tuple[str, ...] = ()
    variants: Callable[[str, Any], Mapping[str, Any]] = lambda name, row: {name: row}


TABLES: dict[str, Table] = {}


def open_table(kind: str, rows: dict[str, Row], types: type | tuple[type, ...], check: Check, **more: Any) -> None:
    """Lets plug-ins add rows of these types to a table; arguments are attributes of `Table`."""
    TABLES[kind] = Table(kind, rows, types if isinstance(types, tuple) else (types,), check, **more)
