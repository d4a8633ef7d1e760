"""Commands as functions of keywords, made of their requests: `gpmetric.bench("DIR", metric=["wanda"])`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import MISSING
from typing import Any, TypeVar, get_type_hints

from gpmetric.lazy import lazy
from gpmetric.notebook import progress_console, shown
from gpmetric.options import Request, check_request, described, make_request
from gpmetric.results import Result

__all__ = ["as_function"]

Kind = TypeVar("Kind", bound=Request)

_listener_of = lazy("gpmetric.commands:listener_of")  # only once there is something to show


def as_function(
    name: str,
    kind: type[Kind],
    run: Callable[..., dict[str, Any]],
    *positional: str,
    result: Callable[[dict[str, Any]], Any] = Result,
    write: Callable[[dict[str, Any], Kind], None] = lambda document, request: None,
) -> Callable[..., Any]:
    """A function of keywords, `bench("DIR", metric=["wanda"])`, that checks them and runs the request they make.

    Args:
        name: that it is known by.
        kind: of the request.
        run: called with the request, and with `listener` where one is given.
        positional: fields that may be given without their names.
        result: class of what is made of what `run` gives; `gpmetric/__init__.pyi` tells type checkers.
        write: called with what `run` gives, and the request.
    """

    def call(*arguments: Any, listener: Any = None, progress: bool | None = None, **options: Any) -> Any:
        if len(arguments) > len(positional):
            raise TypeError(f"at most {len(positional)} arguments without a name, but got {len(arguments)}")
        placed = dict(zip(positional, arguments, strict=False))
        if twice := placed.keys() & options.keys():
            raise TypeError(f"two values for the argument {min(twice)!r}")
        request = make_request(kind, placed | options).completed()
        check_request(request)
        with nullcontext(listener) if listener is not None else _shown(kind, progress) as told:
            document = run(request) if told is None else run(request, told)
        write(document, request)
        return result(document)

    parameters = list(_parameters(kind, positional))
    if tells := "listener" in inspect.signature(run).parameters:
        parameters += [_keyword("listener", None), _keyword("progress", None, bool | None)]
    parameters.sort(key=lambda one: one.kind)
    call.__signature__ = inspect.Signature(parameters, return_annotation=result)  # type: ignore[attr-defined]
    call.__wrapped__, call.request = run, kind  # type: ignore[attr-defined]  # which the stub is made of
    call.__name__ = call.__qualname__ = name
    call.__module__, call.__doc__ = run.__module__, _documented(kind, inspect.getdoc(run) or "", tells)
    return call


def _shown(kind: type[Request], progress: bool | None) -> AbstractContextManager[Any]:
    """The listener of the command line, where progress is to be shown and the command has one; else None."""
    console = progress_console(progress)
    listener = None if console is None else _listener_of(kind)
    return nullcontext() if console is None or listener is None else shown(listener, console)


def _documented(kind: type[Request], told: str, tells: bool) -> str:
    """The docstring of a function that runs a request, with the options in place of the request among its arguments."""
    offered = (field for field in described(kind) if not field.option.hidden)
    options = "".join(f"\n    {field.name}: {field.help}" for field in offered)
    options += "\n    progress: whether it is shown: None in a notebook, True on standard error elsewhere." * tells
    told = re.sub(r"\n    started: [^\n]*(\n        [^\n]*)*", "", told)  # which is now, as the function is called
    return re.sub(r"(?<=\nArgs:)\n    request: [^\n]*(\n        [^\n]*)*", lambda _: options, told)


def _parameters(kind: type[Request], positional: Collection[str]) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(kind)
    for field in described(kind):
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        one = _keyword(field.name, default, hints[field.name])
        yield one.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) if field.name in positional else one


def _keyword(name: str, default: Any, annotation: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
