"""Where a plug-in is: a Python file, or an installed package's entry point of the group `gpmetric.plugins`."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from gpmetric.errors import InputError
from gpmetric.modules import load_module
from gpmetric.plugins.guard import told_of

__all__ = ["GROUP", "Source", "find_source", "installed"]

GROUP = "gpmetric.plugins"  # of entry points
_TABLE = "PLUGIN"  # what a plug-in's module calls its rows
_NAME = r"[A-Za-z_][A-Za-z0-9_-]{0,59}"
_LARGEST = 2**20  # bytes of a file


@dataclass(frozen=True)
class Source:
    """A plug-in as it is found; plain data, which other processes load the same from.

    Attributes:
        name: the file's without its suffix, or the entry point's.
        place: the file, or the entry point's module and object.
        text: of the file; None of an entry point, which is installed wherever it is loaded.
        digest: sha256 of the file's content; of an entry point, of its module's file.
    """

    name: str
    place: str
    text: bytes | None
    digest: str

    def rows(self) -> Mapping[str, Any]:
        """What the module holds as PLUGIN: rows by name, a tuple of them where a name has several.

        Raises:
            InputError: it cannot be loaded, or holds no such table.
        """
        where = f"plug-in {self.name}"
        try:
            found = self._object()
        except (Exception, SystemExit) as error:
            raise InputError(f"{where} cannot be loaded from {self.place}: {told_of(error, self.place)}") from error
        if not isinstance(found, Mapping) or not found or not all(isinstance(name, str) for name in found):
            raise InputError(f"{where}: {self.place} must hold {_TABLE}, rows by name, but it is {found!r:.60}")
        return found

    def _object(self) -> Any:
        if self.text is not None:
            module = load_module(Path(self.place), self.text, f"gpmetric_plugin_{self.name}")
            return getattr(module, _TABLE, None)
        module = import_module(self.place.partition(":")[0])
        found = module
        for part in (self.place.partition(":")[2] or _TABLE).split("."):
            found = getattr(found, part)
        return found


def find_source(named: str) -> Source:
    """The plug-in that is called by a path, which ends in .py or names a folder, or by an entry point's name.

    Raises:
        InputError: it is not there, or cannot be read.
    """
    if not named.endswith(".py") and os.sep not in named:
        return _installed(named)
    path = Path(named)
    if re.fullmatch(_NAME, path.stem) is None or path.suffix != ".py":
        raise InputError(f"--plugin {named!r}: the file's name must be letters, digits, - and _, and end in .py")
    try:
        if not path.is_file():
            raise InputError(f"--plugin {named!r} is no file")
        with path.open("rb") as file:
            text = file.read(_LARGEST + 1)
    except (OSError, ValueError) as error:
        raise InputError(f"--plugin {named!r} cannot be read: {error}") from error
    if len(text) > _LARGEST:
        raise InputError(f"--plugin {named!r} holds more than {_LARGEST} bytes")
    return Source(path.stem, str(path.absolute()), text, hashlib.sha256(text).hexdigest())


def installed() -> list[dict[str, str]]:
    """The plug-ins of installed packages: `name`, `place`, `package` and `version`; none of them is loaded for it."""
    found = []
    for one in sorted(entry_points(group=GROUP), key=lambda one: one.name):
        told = {"package": one.dist.name, "version": one.dist.version} if one.dist else {}
        found.append({"name": one.name, "place": one.value} | told)
    return found


def _installed(named: str) -> Source:
    found: dict[str, EntryPoint] = {one.value: one for one in entry_points(group=GROUP, name=named)}
    if not found:
        known = ", ".join(one["name"] for one in installed()) or "none is installed"
        raise InputError(f"--plugin {named!r} is neither a file NAME.py nor an installed plug-in ({known})")
    if len(found) > 1:
        raise InputError(f"--plugin {named!r}: several packages have one of that name: {', '.join(found)}")
    ((place, entry),) = found.items()
    try:
        import_module(entry.module)
        file = sys.modules[entry.module].__file__
        digest = hashlib.sha256(Path(str(file)).read_bytes()).hexdigest()
    except (Exception, SystemExit) as error:
        raise InputError(f"plug-in {named} cannot be loaded from {place}: {told_of(error, place)}") from error
    return Source(named, place, None, digest)
