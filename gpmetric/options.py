"""Requests: what a command is asked for, as a dataclass whose fields are the command's options.

A field is annotated with its option, `samples: Annotated[int, Option("Calibration windows.", least=1)] = 128`. From
these annotations come the command line, the keywords of the Python function, and the checks that need no model.
"""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Self, TypeVar, get_args, get_origin, get_type_hints

from gpmetric.errors import InputError, one_of
from gpmetric.files import check_picture
from gpmetric.formula_files import named_formulas
from gpmetric.outputs import check_outputs, hub_folders

__all__ = [
    "FORCE_FILES",
    "Common",
    "Described",
    "Option",
    "Request",
    "check_request",
    "command_line",
    "described",
    "make_request",
    "read_by",
    "settings_of",
]


@dataclass(frozen=True)
class Option:
    """What a field is on the command line.

    Attributes:
        help: one sentence; `{default}` and `{choices}` are filled in.
        metavar: what stands for the value in the help.
        names: spelled otherwise than --field-name, `("--output", "-o")`, or a flag's two, `("--a/--b",)`.
        accepted: more spellings that the help does not show, those of the published scripts for instance.
        argument: whether it is an argument instead.
        choices: what is accepted, where that is a table or a list.
        listed: a tuple that is written as one text with commas, `--operands W,X`, instead of repeating the option.
        least: the smallest number accepted.
        above, below: bounds that a number may not reach.
        reads: whether the value names something that is read, and must not be written.
        writes: what the command writes there, as `outputs.check_outputs` has it.
        hidden: whether it is accepted and not offered, as the command has no use for it.
        formula: whether it names metrics, so that a file of one stands for it; see `formula_files`.
    """

    help: str
    metavar: str | None = None
    names: tuple[str, ...] = ()
    accepted: tuple[str, ...] = ()
    argument: bool = False
    choices: Collection[str] | None = None
    listed: bool = False
    least: int | None = None
    above: float | None = None
    below: float | None = None
    reads: bool = False
    writes: str | None = None
    hidden: bool = False
    formula: bool = False


_SHORT = 24  # letters of choices that stand in an option's line

FORCE_FILES = Option("Replace files that gpmetric did not write; never one that is read.", names=("--force",))


@dataclass(frozen=True)
class Described:
    """A field of a request with its option: name, type without None, whether None is accepted, and the default."""

    name: str
    kind: Any
    optional: bool
    option: Option
    default: Any = MISSING

    @property
    def help(self) -> str:
        """The option's sentence, with choices and bounds."""
        option = self.option
        bounds = (("at least", option.least), ("above", option.above), ("below", option.below))
        told = " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None and bound < 2**63)
        sentence = option.help.replace("{choices}", ", ".join(option.choices or ()))
        return f"{sentence} {told.capitalize()}." if told else sentence

    @property
    def spelled(self) -> str:
        """The option as messages call it."""
        long = next((name for name in self.option.names if name.startswith("--")), None)
        return (long or f"--{self.name.replace('_', '-')}").split("/")[0]

    @property
    def several(self) -> bool:
        """Whether it takes several texts."""
        return get_origin(self.kind) is tuple

    @property
    def spellings(self) -> tuple[str, ...]:
        """All that a command line calls it by, the shown ones first; a flag's two are one, `--a/--b`."""
        return (*(self.option.names or (self.spelled,)), *self.option.accepted)

    @property
    def metavar(self) -> str:
        """What stands for the value in the help."""
        option = self.option
        choices = "|".join(option.choices or ())
        if option.metavar is not None or (choices and len(choices) <= _SHORT and not option.listed):
            return option.metavar or choices
        return "A,B" if option.listed else {int: "N", float: "X", Path: "FILE"}.get(self.kind, "TEXT")


@dataclass(frozen=True, kw_only=True)
class Request:
    """Base of all requests."""

    unused: ClassVar[frozenset[str]] = frozenset()  # inherited fields that a command has no use for

    formula_files: tuple[str, ...] = ()  # no option: the files that metrics were read from, which must not be written

    def __post_init__(self) -> None:
        """Makes tuples of what is given as one for a field of several, `target="0.5"`: texts would be taken apart."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, tuple) and not isinstance(value, tuple):
                described_field = next(one for one in described(type(self)) if one.name == field.name)
                object.__setattr__(self, field.name, _converted(described_field, value))

    def check(self) -> None:
        """Refuses what is wrong whatever the model.

        Raises:
            InputError: naming option, value and what is accepted.
        """
        for field in described(type(self)):
            value = getattr(self, field.name)
            for one in value if isinstance(value, tuple) else (value,):
                if one is not None:
                    _check(field, one)

    @property
    def beside(self) -> dict[str, tuple[Path, str]]:
        """What is written that no option names: by its name, where, and what, as of `check_outputs`."""
        return {}

    @classmethod
    def filled(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The values given, by field, with those that one of them stands for."""
        return given

    def completed(self) -> Self:
        """The request with what is filled in when it runs, the name of a new file for instance."""
        return self


@dataclass(frozen=True, kw_only=True)
class Common(Request):
    """What every command accepts; one that has a use for it, and so offers it, has a field of its own."""

    seed: Annotated[int, Option("Not used.", least=0, below=2**63, hidden=True)] = 0
    device: Annotated[str, Option("Not used.", choices=("auto", "cpu", "cuda"), hidden=True)] = "auto"


def _check(field: Described, value: Any) -> None:
    option = field.option
    if option.choices is not None:
        one_of(field.spelled, value, option.choices)
    if option.least is not None and not value >= option.least:  # nor NaN
        raise InputError(f"{field.spelled} must be at least {option.least}, but got {value}")
    if option.writes == "picture":
        check_picture(field.spelled, value)
    low, high = option.above, option.below
    if (low is not None and not low < value < math.inf) or (high is not None and not value < high):
        bounds = [f"{word} {bound}" for word, bound in (("above", low), ("below", high)) if bound is not None]
        raise InputError(f"{field.spelled} must be {' and '.join(bounds)}, but got {value}")


def check_request(
    request: Request, json: Path | None = None, *, config: Path | None = None, force: bool = False
) -> None:
    """Refuses a request that is wrong whatever the model, or whose results could not be written, or not there.

    Args:
        request: what is asked for.
        json: where the command line writes the result.
        config: what the command line reads options from.
        force: whether files that gpmetric did not write are replaced, of a request that does not say it itself.

    Raises:
        InputError: naming option, value and what is accepted, or what is in the way.
    """
    request.check()
    written = {} if json is None else {"--json": (json, "json")}
    read = [(name, Path(name)) for name in request.formula_files]
    read += [] if config is None else [(str(config), config)]
    _check_home("--json", json)
    for field in described(type(request)):
        value = getattr(request, field.name)
        if field.option.reads or field.option.writes is not None:
            for one in value if isinstance(value, tuple) else (value,):
                _check_home(field.spelled, one)
        if field.option.writes is not None and value is not None:
            written[field.spelled] = (value, field.option.writes)
        if field.option.reads:
            read += _places(value)
    check_outputs(written | request.beside, read, force=getattr(request, "force", force))


def _check_home(option: str, value: Any) -> None:
    """Refuses a path that begins with ~, which a shell has not expanded: it was quoted, or stands behind `=`."""
    if re.match(r"~(/|$)", str(value)):
        raise InputError(
            f"{option} {str(value)!r}: ~ stands for the home folder only where a shell expands it; "
            f"write {os.path.expanduser(str(value))!r}"
        )


def _places(value: Any) -> Iterator[tuple[str, Path]]:
    """What a field names, and where it is: a file or folder here, also of a part of a text, `c.txt#search`.

    Of what is not here, the place among the files of the Hub.
    """
    for one in () if value is None else value if isinstance(value, tuple) else (value,):
        here = False
        for name in (str(one), str(one).rpartition("#")[0]):
            with suppress(OSError, ValueError):  # a formula that no file could be called
                if name and Path(name).exists():
                    here = True
                    yield name, Path(name)
        if not here:
            yield from ((str(one), place) for place in hub_folders(str(one)))


def described(request: type[Request]) -> tuple[Described, ...]:
    """The options of a request, in order: the model, then its own fields, then those that it inherits.

    A field that is not annotated with an option is none. Of a field that takes one text or several, an option is
    several, and an argument is one.
    """
    hints = get_type_hints(request, include_extras=True)
    own = {name for name in request.__annotations__ if name != "unused"}
    found = []
    for field in fields(request):
        if field.name in request.unused or get_origin(hints[field.name]) is not Annotated:
            continue
        plain, option = get_args(hints[field.name])[:2]
        parts = get_args(plain) if isinstance(plain, UnionType) else (plain,)
        several = [part for part in parts if get_origin(part) is tuple and not option.argument]
        kind = (several or [part for part in parts if part is not NoneType])[0]
        found.append(Described(field.name, kind, NoneType in parts, option, field.default))
    return tuple(sorted(found, key=lambda one: 0 if one.name == "model" else 2 - (one.name in own)))


def settings_of(request: Request) -> dict[str, Any]:
    """Every option that a request offers, by name, with its value."""
    shown = (field.name for field in described(type(request)) if not field.option.hidden)
    return {name: getattr(request, name) for name in shown}


def read_by(request: Request) -> str:
    """What a request names, in words: its models, or its argument; nothing where it names none."""
    field = next((one for one in described(type(request)) if one.name == "model" or one.option.argument), None)
    value = None if field is None else getattr(request, field.name)
    return ", ".join(map(str, value if isinstance(value, tuple) else () if value is None else (value,)))


def command_line(command: str, request: Request) -> str:
    """What asks a shell for the same request; options that are at their defaults are left out."""
    words, filled = ["gpmetric", *command.split()], type(request).filled({})
    for field in described(type(request)):
        value, option = getattr(request, field.name), field.option
        if value == filled.get(field.name, field.default):
            continue
        if isinstance(value, bool):
            words.append(field.spelled if value else option.names[0].split("/")[-1])
            continue
        texts = [f"{one:g}" if isinstance(one, float) else str(one) for one in (value if field.several else (value,))]
        for text in [",".join(texts)] if option.listed else texts:
            words += [text] if option.argument else [field.spelled, text]
    return shlex.join(words)


Kind = TypeVar("Kind", bound=Request)


def make_request(kind: type[Kind], options: dict[str, Any]) -> Kind:
    """The request of keywords, in the types of its fields: a text for a path or for one of several is taken, too.

    Raises:
        InputError: a keyword that is no option, or several values for one that takes one.
    """
    known = {field.name: field for field in described(kind)}
    older = {name[2:].replace("-", "_"): field.name for field in known.values() for name in field.spellings}
    given: dict[str, Any] = {}
    for name, value in options.items():
        field = known.get(name) or known.get(older.get(name, ""))
        if field is None:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            accepted = ", ".join(one.name for one in known.values() if not one.option.hidden)
            raise InputError(f"unknown option {name!r}: {hint}accepted are {accepted}")
        if value is not None or field.optional:
            given[field.name] = _converted(field, value)
    given, files = named_formulas(given, [field.name for field in known.values() if field.option.formula], known)
    return kind(**kind.filled(given) | {"formula_files": files})


def _converted(field: Described, value: Any) -> Any:
    if value is None:
        return None
    if field.several:
        texts = value.split(",") if field.option.listed and isinstance(value, str) else value
        several = isinstance(texts, Iterable) and not isinstance(texts, str | Path | Mapping)
        items = (sorted(texts, key=str) if isinstance(texts, Set) else list(texts)) if several else [texts]
        return tuple(dict.fromkeys(_single(field, item).strip() if field.option.listed else _single(field, item)
                                   for item in items))  # fmt: skip
    return _single(field, value)


def _single(field: Described, value: Any) -> Any:
    """One value in the type of a field; texts are made of numbers and paths, and paths of texts."""
    kind = str if field.several else field.kind
    if isinstance(value, Real) and not isinstance(value, bool):  # also of numpy
        value = int(value) if isinstance(value, Integral) else float(str(value))
    accepted = {str: (str, Path, int, float), Path: (str, Path), int: (int,), float: (int, float), bool: (bool,)}[kind]
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        wanted = {str: "text", Path: "a path", int: "a whole number", float: "a number", bool: "True or False"}[kind]
        raise InputError(f"{field.spelled} must be {wanted}, but got {value!r:.60}")
    if "\0" in str(value):
        raise InputError(f"{field.spelled} {str(value)!r:.60} holds a null byte")
    if field.name == "target":  # which results are keyed by
        value = str(value).strip()
    return kind(value) if kind in (str, Path) else value
