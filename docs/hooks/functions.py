"""Signatures and docstrings of public functions that are made at run time, which the source alone does not show."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection
from typing import Any

import griffe

import gpmetric

__all__ = ["MadeFunctions"]


class MadeFunctions(griffe.Extension):
    """Puts a function in place of an attribute that holds one, among what gpmetric offers."""

    def on_package(self, *, pkg: griffe.Module, loader: Any, **_: Any) -> None:
        """Called once the package is read."""
        if pkg.name != "gpmetric":
            return
        for name in gpmetric.__all__:
            found = getattr(gpmetric, name)
            known = pkg[name]
            written = known.final_target if known.is_alias else known
            if inspect.isfunction(found) and written.is_attribute:
                written.parent.set_member(written.name, _function(found, written))


def _function(found: Any, written: griffe.Object) -> griffe.Function:
    signature = inspect.signature(found)
    parameters = (
        griffe.Parameter(
            one.name,
            annotation=None if one.annotation is one.empty else _shown(one.annotation),
            kind=griffe.ParameterKind[one.kind.name.lower()],
            default=None if one.default is one.empty else repr(one.default),
        )
        for one in signature.parameters.values()
    )
    made = griffe.Function(
        written.name,
        lineno=written.lineno,
        parameters=griffe.Parameters(*parameters),
        returns=_shown(signature.return_annotation),
        parent=written.parent,
    )
    told = _of_parameters(inspect.getdoc(found) or "", signature.parameters)
    made.docstring = griffe.Docstring(told, lineno=written.lineno, parent=made)
    return made


def _of_parameters(docstring: str, parameters: Collection[str]) -> str:
    """A docstring without arguments that the function does not have: those of what the command line calls."""

    def kept(section: re.Match[str]) -> str:
        entries = re.findall(r"\n    (\w+)(: [^\n]*(?:\n {5,}[^\n]*)*)", section[0])
        return "\nArgs:" + "".join(f"\n    {name}{told}" for name, told in entries if name in parameters)

    return re.sub(r"\nArgs:(?:\n {4}[^\n]*)+", kept, docstring)


def _shown(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) and not _generic(annotation) else str(annotation)


def _generic(annotation: Any) -> bool:
    return bool(getattr(annotation, "__args__", ()))
