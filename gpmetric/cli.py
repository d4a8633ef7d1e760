"""The command line, made of the table of commands: each option is a field of a command's request.

Options and formulas are checked before torch is imported; the work is in the functions that `import gpmetric` offers.
"""

from __future__ import annotations

import inspect
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import MISSING, replace
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, get_origin

import typer
from rich.console import Console

from gpmetric.command_help import GroupedCommand, GroupedCommands
from gpmetric.commands import COMMANDS, GROUPS, Command
from gpmetric.config import load_config
from gpmetric.errors import GpmetricError, InputError
from gpmetric.files import STDOUT, write_json
from gpmetric.interrupts import check_stop, watch_signals
from gpmetric.lazy import lazy
from gpmetric.options import FORCE_FILES, Described, Option, check_request, described, make_request, read_by
from gpmetric.plain import log_plainly, one_line, plain
from gpmetric.provenance import gpmetric_version
from gpmetric.results import marked
from gpmetric.terminal.bars import opening

__all__ = ["app", "main", "resume_command"]

plan_command = lazy("gpmetric.session.session:plan_command")
after_plan = lazy("gpmetric.terminal.next_steps:after_plan")
is_out_of_memory = lazy("gpmetric.session.memory:is_out_of_memory")
out_of_memory = lazy("gpmetric.session.memory:out_of_memory")
app = typer.Typer(
    name="gpmetric",
    cls=GroupedCommands,
    help="Discovers pruning metrics for language models by genetic programming, benchmarks, exports and applies them.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},  # --sequence_length
)

_planned = typer.Typer(
    cls=GroupedCommands, help="Says what a command would take of memory, disk and time, and runs nothing."
)
_PLANNED: dict[str, Any] = {
    "show": lazy("gpmetric.terminal.tables:print_plan"),
    "listener": None,
    "timed": False,
    "write": lambda document, request: None,
}

_PLACED = "placed"  # the parameter of what stands behind a command without a name
_NAMED = ("model", "ledger")  # what is also offered by its name
_OTHERS = {  # options of Wanda's and SparseGPT's scripts that have another form here
    "--sparsity-type": "here --target 0.5 is unstructured, --target 2:4 a pattern",
    "--prunen": "here --target 2:4 is a pattern, 2 kept of each 4",
    "--prunem": "here --target 2:4 is a pattern, 2 kept of each 4",
    "--use-variant": "here --metric says what ranks weights",
    "--eval-zero-shot": "here gpmetric evaluate MODEL --tasks measures tasks",
    "--cache-dir": "here HF_HOME in the environment says where models are kept",
    "--save": "here --json FILE keeps the figures, and -o DIR the model",
}
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]  # typer carries its own copy of click, or does not
_JSON = typer.Option("--json", metavar="FILE", help="Write the full result as JSON; - for standard output.")
_FORCE = typer.Option("--force", help=FORCE_FILES.help)
_CONFIG = typer.Option(
    "--config", metavar="FILE.toml", is_eager=True, callback=load_config, help="Option values by long name."
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"gpmetric {gpmetric_version()}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and leave.")
    ] = False,
) -> None:
    """Shared by every command."""


def _add(place: typer.Typer, name: str, command: Command) -> None:
    """Makes a command's function, whose parameters are the options of its request, known to typer."""

    fields = described(command.request)
    own = any(field.name == "force" for field in fields)
    placed = _placed(fields)

    def call(context: typer.Context, json: Path | None, config: Path | None, **options: Any) -> None:
        force = own or options.pop("force")
        _run(command, _called(context), _given(context, placed, options), json, config, force=force)

    shared: list[tuple[str, Any, Any, Any]] = [
        ("json", Path | None, _JSON, None),
        ("config", Path | None, _CONFIG, None),
    ]
    shared += [] if own else [("force", bool, _FORCE, False)]
    parameters = [_keyword("context", typer.Context, inspect.Parameter.empty)]
    parameters += [] if placed is None else [_argument(placed)]
    parameters += [_parameter(field, hidden=field is placed and field.name not in _NAMED) for field in fields]
    parameters += [_keyword(field, Annotated[kind, option], default) for field, kind, option, default in shared]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    place.command(name, cls=_styled(command, fields), help=command.help, no_args_is_help=False)(call)


def _called(context: Any) -> str:
    """The command's words, with those of its group."""
    above = context.parent
    return " ".join([_called(above) if above.parent else "", str(context.info_name)]).strip() if above else ""


def _styled(command: Command, fields: Sequence[Described]) -> type[GroupedCommand]:
    """The command's class, which knows its examples and what its help does not show."""
    hidden = frozenset(name for field in fields for name in field.option.accepted)
    return type("StyledCommand", (GroupedCommand,), {"hidden_names": hidden, "examples": command.examples})


def _placed(fields: Sequence[Described]) -> Described | None:
    """The option that stands behind the command without a name: its argument, or else the model."""
    arguments = [field for field in fields if field.option.argument]
    models = [field for field in fields if field.name == "model"]
    return next(iter(arguments or models), None)


def _one_place(placed: Described, words: Any, named: Any) -> dict[str, Any]:
    """What is asked for by an argument, by the option of its name, or by both where it takes several.

    Raises:
        InputError: it is there twice, or not at all where it must be.
    """
    given = list(words or ())
    more = list(named) if isinstance(named, (list, tuple)) else [] if named is None else [named]
    several = placed.several or get_origin(placed.kind) is tuple
    if not several and len(given) + len(more) > 1:
        raise InputError(f"{placed.metavar} is one, but got {' and '.join(repr(str(one)) for one in given + more)}")
    if placed.default is MISSING and not given + more:
        raise InputError(f"{placed.metavar} is missing: {placed.help}")
    if not given + more:
        return {}
    return {placed.name: given + more if several else (given + more)[0]}


def _given(context: typer.Context, placed: Described | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that stand on the command line or in a --config file; what stands there without a name has its own.

    Raises:
        InputError: that is there twice, or not at all where it must be.
    """
    sources = {name: context.get_parameter_source(name) for name in options}
    given = {name: options[name] for name, source in sources.items() if source and source.name != "DEFAULT"}
    if placed is None:
        return given
    words, named = given.pop(_PLACED, None), given.get(placed.name)
    if words and (source := sources[placed.name]) and source.name == "DEFAULT_MAP":  # what is typed wins
        named = None
    return given | _one_place(placed, words, named)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _argument(field: Described) -> inspect.Parameter:
    """What stands behind the command without a name; words too many are told by `_one_place`."""
    several = "..." if field.several or get_origin(field.kind) is tuple else ""
    name = field.metavar.removesuffix("...") + several
    shown = f"[{name}]" if field.default is not MISSING else name
    place = typer.Argument(metavar=shown, help=field.help, autocompletion=_completion(field.option))
    return _keyword(_PLACED, Annotated[list[str] | None, place], None)


def _parameter(field: Described, *, hidden: bool) -> inspect.Parameter:
    """A field of a request as typer reads it."""
    option, default, kind = field.option, field.default, field.kind
    if default is MISSING:
        default = None
    if field.several and option.listed:
        kind, default = str, ",".join(default)
    elif field.several:
        kind, default = list[str] | None, None  # so that the help shows no default: the sentence says it
    elif field.optional:
        kind = kind | None
    place = typer.Option(
        *field.spellings, metavar=field.metavar, help=field.help, hidden=option.hidden or hidden,
        autocompletion=_completion(option),
    )  # fmt: skip
    return _keyword(field.name, Annotated[kind, place], default)


def _completion(option: Option) -> Callable[[str], list[str]] | None:
    """What the shell asks for the choices of an option, where it has them."""
    choices = option.choices
    return None if choices is None else lambda incomplete: _beginning(incomplete, choices, option.listed)


def _beginning(typed: str, choices: Iterable[str], listed: bool) -> list[str]:
    """The choices that begin as what is typed, of a list its last item, for the shell."""
    before, comma, last = typed.rpartition(",") if listed else ("", "", typed)
    return [f"{before}{comma}{name}" for name in choices if name.startswith(last)]


def _run(
    command: Command, name: str, options: Mapping[str, Any], json: Path | None, config: Path | None, *, force: bool
) -> None:
    """Checks, runs, writes the result, shows it and the command that may come next.

    Args:
        name: of the command.
        force: whether files that gpmetric did not write are replaced, of a request that does not say it itself.

    Raises:
        GpmetricError: the work failed; whatever there is of it has been written and shown.
    """
    started, errors = time.monotonic(), Console(stderr=True)
    plugins = options.get("plugin") or ()
    with opening(errors, f"gpmetric {gpmetric_version()}: loading {', '.join(plugins)}") if plugins else nullcontext():
        request = make_request(command.request, dict(options)).completed()  # plug-ins import torch, for seconds
    check_request(request, json, config=config, force=force)
    keywords = {"started": started} if command.timed else {}
    tables = Console(stderr=json == STDOUT)  # standard output is the JSON's own then
    told = tables if command.live else errors
    try:
        with ExitStack() as stack:
            loading = stack.enter_context(
                opening(errors, f"gpmetric {gpmetric_version()}: {name} {read_by(request)}".rstrip())
            )
            listeners = []
            if command.listener is not None:
                listener = command.listener(told)  # which may take seconds, where torch is imported
                loading.stop()
                listeners.append(stack.enter_context(listener))
            document = command.run(request, *listeners, **keywords)
            check_stop()
    except KeyboardInterrupt:
        ledger = getattr(request, "ledger", None) if hasattr(request, "resume") else None
        if ledger is not None:
            print(plain(f"stopped; go on with: {resume_command(ledger)}"), file=sys.stderr)
        raise
    write_json(json, marked(document))
    command.write(document, request)
    command.show(tables, document, request)
    for line in command.next(document, request) if json != STDOUT else ():
        errors.print(f"next: {plain(line)}", markup=False, highlight=False, soft_wrap=True)
    if failure := command.failure(document):
        raise GpmetricError(failure)


def resume_command(ledger: Path) -> str:
    """The present command line with the ledger named and --resume, quoted for a shell."""
    words = ["gpmetric", *sys.argv[1:]]
    if not any(word.partition("=")[0] in ("--ledger", "--archive") for word in words):
        words += ["--ledger", str(ledger)]
    return shlex.join(words if "--resume" in words else [*words, "--resume"])


_groups = {name: typer.Typer(help=told) for name, told in GROUPS.items()}
for _name, _command in COMMANDS.items():
    _group, _, _own = _name.rpartition(" ")
    _add(_groups[_group] if _group else app, _own, _command)
    if _command.work is not None:
        _run_plan, _after = partial(plan_command, work=_command.work), partial(after_plan, name=_name)
        _add(_planned, _name, replace(_command, run=_run_plan, next=_after, **_PLANNED))
for _name, _group_app in ({"plan": _planned} | _groups).items():
    app.add_typer(_group_app, name=_name)


def main() -> None:
    """Runs the command line; exit status 0 done, 1 the work failed, 2 bad input or usage, 130 interrupted."""
    log_plainly()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error does with what a terminal cannot show
    watch_signals()
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="gpmetric", standalone_mode=False)
    except _ClickException as error:
        code = _fail(_usage(error), 2)
    except GpmetricError as error:
        code = _fail(str(error.args[0]), 2 if isinstance(error, InputError) else 1, error.details)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        code = _fail(str(out_of_memory(error)), 1)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:  # some versions of typer answer Ctrl-C themselves, without a word
        watch_signals()  # this one is answered
        _fail("interrupted", code)
    sys.exit(code if isinstance(code, int) else 0)


def _usage(error: Any) -> str:
    """What is wrong with a command line; of an option of the published scripts, what it is called here."""
    told: str = error.format_message()
    name = getattr(error, "option_name", None)
    return f"{name} is another script's: {_OTHERS[name]}" if name in _OTHERS else told


def _fail(message: str, code: int, details: Sequence[str] = ()) -> int:
    for lead, text in (("gpmetric: error: ", message), *(("  ", one) for one in details)):
        print(lead + one_line(text), file=sys.stderr)
    return code
