"""Makes gpmetric/__init__.pyi of the functions of the package and their requests: `make stubs`.

Type checkers and editors read it in place of functions that are made when the package runs.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING
from pathlib import Path
from textwrap import fill, indent
from typing import Any, get_args, get_type_hints

import gpmetric
from gpmetric.options import Described, Request, described

__all__ = ["STUB", "stub_text"]

STUB = Path(__file__).parents[1] / "gpmetric" / "__init__.pyi"

_HEAD = '"""Made by `make stubs` of the requests of the commands; not to be edited."""\n'
_PLAIN = {bool: "bool", int: "int", float: "float", Path: "str | Path"}


def stub_text() -> str:
    """What the file is to hold, in the format of ruff."""
    imports = {"collections.abc": {"Iterable"}, "pathlib": {"Path"}, "typing": {"Literal"}, "torch": {"Tensor"}}
    functions = []
    for name in gpmetric.__all__:
        value = getattr(gpmetric, name)
        if hasattr(value, "request"):
            functions.append("\n".join(_function(name, value, imports)))
        else:
            imports.setdefault(f"gpmetric.{gpmetric._HOMES[name]}", set()).add(name)
    lines = [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(imports.items())]
    exported = f"__all__ = {gpmetric.__all__!r}\n__version__: str"
    text = "\n".join([_HEAD, *lines, "", exported, "", *functions])
    for command in (["check", "--select", "I", "--fix-only"], ["format"]):
        text = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--quiet", "--stdin-filename", str(STUB), "-"],
            input=text, capture_output=True, text=True, check=True, cwd=STUB.parents[1],
        ).stdout  # fmt: skip
    return text


def _function(name: str, function: Callable[..., Any], imports: dict[str, set[str]]) -> Iterator[str]:
    """The lines of a function, and into `imports`, by module, what they name."""
    request: type[Request] = function.request  # type: ignore[attr-defined]
    signature = inspect.signature(function)
    fields = {field.name: field for field in described(request)}
    shown = [
        one for one in signature.parameters.values() if one.name not in fields or not fields[one.name].option.hidden
    ]
    yield f"def {name}("
    keywords = False
    for parameter in shown:
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not keywords:
            keywords = True
            yield "    *,"
        if parameter.name in fields:
            yield f"    {_parameter(fields[parameter.name])},"
        elif parameter.name == "listener":
            yield f"    listener: {_listener(function, imports)} = None,"
        else:
            yield f"    {parameter.name}: bool | None = None,"
    told = fill((inspect.getdoc(function) or "").split("\n\n")[0], 105)
    result = signature.return_annotation
    if result is dict:
        returned = inspect.unwrap(function).__annotations__["return"]  # as it is written
    else:
        returned = result.__name__
        imports.setdefault("gpmetric.results", set()).add(returned)
    yield indent(f') -> {returned}:\n"""{told}"""\n', "    ").lstrip()


def _parameter(field: Described) -> str:
    kind = field.kind
    if field.several or kind is str:
        kind = _text(field)
        kind = f"{kind} | Iterable[{kind}]" if field.several else kind
    else:
        kind = _PLAIN[kind]
    default = "" if field.default is MISSING else f" = {_default(field.default)}"
    return f"{field.name}: {kind}{' | None' if field.optional else ''}{default}"


def _text(field: Described) -> str:
    """A text: of a fixed list of choices, which a table that grows is not; of a name of a file; or any."""
    if isinstance(field.option.choices, tuple):
        return f"Literal[{', '.join(map(repr, field.option.choices))}]"
    if field.name == "target":
        return "str | float"
    return "str | Path" if field.option.reads else "str"


def _default(value: Any) -> str:
    return repr(value) if isinstance(value, bool | int | float | str | tuple | None) else "..."


def _listener(function: Callable[..., Any], imports: dict[str, set[str]]) -> str:
    kind = get_args(get_type_hints(inspect.unwrap(function))["listener"])[0]
    imports.setdefault(kind.__module__, set()).add(kind.__name__)
    return f"{kind.__name__} | None"


if __name__ == "__main__":
    STUB.write_text(stub_text(), encoding="utf-8")
