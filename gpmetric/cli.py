"""The command line: `gpmetric discover | bench | export | evaluate`, each with complete `--help`.

Options and formulas are checked here, before torch is imported; the work is in the functions of the same names that
`import gpmetric` offers.
"""

from __future__ import annotations

import logging
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from os.path import isfile
from pathlib import Path
from typing import Annotated, TextIO

import typer
from rich.console import Console

from gpmetric.errors import GpmetricError, InputError, LedgerError
from gpmetric.evolution.request import Request, check_request
from gpmetric.expression import PRIMITIVES, Expression, parse
from gpmetric.operands import OPERANDS
from gpmetric.options import (
    CalibrationOption,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    ExcludeOption,
    IncludeOption,
    JsonOption,
    LengthOption,
    ModelOption,
    SamplesOption,
    SeedOption,
    ShuffleOption,
    TargetOption,
    TextOption,
    UpdateOption,
    WindowsOption,
)
from gpmetric.provenance import STDOUT, check_output, gpmetric_version, write_json
from gpmetric.pruning.metrics import BASELINES, check_update, resolve_metric
from gpmetric.pruning.target import parse_target

__all__ = ["app", "bench", "discover", "evaluate", "export", "main"]

app = typer.Typer(
    name="gpmetric",
    help="Discovers pruning metrics for language models by genetic programming, and benchmarks and exports them.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_ClickException: type[Exception] = typer.BadParameter.__mro__[2]  # typer carries its own copy of click, or does not


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


@app.command()
def evaluate(
    model: Annotated[str | None, typer.Argument(help="Hugging Face directory or name; the demo model if none.")] = None,
    text: TextOption = None,
    sequence_length: LengthOption = None,
    windows: WindowsOption = None,
    shuffle: ShuffleOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    json: JsonOption = None,
    config: ConfigOption = None,
) -> None:
    """Perplexity of a model on texts."""
    check_output("--json", json)
    from gpmetric.evaluation.evaluate import evaluate_model

    result = evaluate_model(
        model,
        text=text or (),
        sequence_length=sequence_length,
        windows=windows,
        shuffle=shuffle,
        seed=seed,
        device=device,
        dtype=dtype,
        on_text=lambda name, ppl: print(f"{name}: perplexity {ppl:.4f}", flush=True, file=_tables(json)),
    )
    write_json(json, result)
    size = f"{result['windows']} windows of {result['sequence_length']} tokens"
    print(f"{size}, {result['dtype']}, {result['device']}", file=_tables(json))


@app.command()
def discover(
    model: ModelOption = None,
    calibration: CalibrationOption = None,
    search: Annotated[str | None, typer.Option(help="Text every candidate is evaluated on.")] = None,
    validation: Annotated[str | None, typer.Option(help="Text the winner is chosen on.")] = None,
    test: Annotated[str | None, typer.Option(help="Text read once, at the end.")] = None,
    text: Annotated[str | None, typer.Option(help="One text to cut into the four splits instead.")] = None,
    target: TargetOption = None,
    operands: Annotated[str, typer.Option(help="What formulas may use; W,X needs no gradients.")] = ",".join(OPERANDS),
    primitives: Annotated[str, typer.Option(help="Operations formulas may use.")] = ",".join(PRIMITIVES),
    start: Annotated[
        list[str] | None, typer.Option(metavar="FORMULA", help="Formula to start from; may be repeated.")
    ] = None,
    update: UpdateOption = "none",
    population: Annotated[int, typer.Option(help="Formulas per generation.")] = 40,
    generations: Annotated[int | None, typer.Option(help="Generations at most.")] = None,
    evaluations: Annotated[int | None, typer.Option(help="Evaluations paid for at most; 300 if no budget.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Wall time of the whole command.")] = None,
    max_nodes: Annotated[int, typer.Option(help="Size of a formula at most.")] = 25,
    ledger: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The campaign's SQLite file; campaign-DATE.sqlite by default.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the ledger if it is there.")] = False,
    workers: Annotated[
        int | None, typer.Option(help="Worker processes; one per core for small models on a CPU by default.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Statistics cache; ~/.cache/gpmetric by default.")
    ] = None,
    chunk_layers: Annotated[
        int | None, typer.Option(help="Layers whose gradients are accumulated at once, to save memory.")
    ] = None,
    samples: SamplesOption = 128,
    sequence_length: LengthOption = None,
    search_windows: Annotated[int, typer.Option(help="Windows every candidate is evaluated on.")] = 64,
    windows: Annotated[int | None, typer.Option(min=1, help="Windows of validation and of test.")] = 64,
    shuffle: ShuffleOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    json: JsonOption = None,
    config: ConfigOption = None,
) -> None:
    """Evolves metrics for a model and puts the winner beside every baseline."""
    started = time.monotonic()
    request = Request(
        model=model,
        calibration=calibration,
        search=search,
        validation=validation,
        test=test,
        text=text,
        target=tuple(dict.fromkeys(target or Request.target)),
        update=update,
        operands=_names(operands),
        primitives=_names(primitives),
        start=tuple(start or ()),
        population=population,
        generations=generations,
        evaluations=evaluations,
        minutes=minutes,
        max_nodes=max_nodes,
        samples=samples,
        sequence_length=sequence_length,
        search_windows=search_windows,
        windows=windows,
        shuffle=shuffle,
        seed=seed,
        device=device,
        dtype=dtype,
        include=include,
        exclude=exclude,
        chunk_layers=chunk_layers,
        cache=cache,
        workers=workers,
    )
    check_request(request)
    path = ledger or Path(f"campaign-{datetime.now():%Y%m%d-%H%M%S}.sqlite")
    _check_outputs(json, "--ledger", path)
    from gpmetric import terminal
    from gpmetric.evolution.discover import run_campaign

    try:
        with terminal.DiscoverReport(Console(stderr=True), request.target) as listener:
            result = run_campaign(request, path, resume=resume, listener=listener, started=started)
    except KeyboardInterrupt:
        print(f"stopped; go on with: {_resume_command(path)}", file=sys.stderr)
        raise
    write_json(json, result)
    terminal.print_discover(Console(file=_tables(json)), result, path)


@app.command()
def bench(
    model: ModelOption = None,
    calibration: CalibrationOption = None,
    text: TextOption = None,
    metric: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(BASELINES)}, or a formula; may be repeated. All by default.")
    ] = None,
    target: TargetOption = None,
    update: UpdateOption = "none",
    one_shot: Annotated[
        bool, typer.Option("--one-shot/--sequential", help="Dense statistics everywhere, or block after pruned block.")
    ] = False,
    samples: SamplesOption = 128,
    sequence_length: LengthOption = None,
    windows: WindowsOption = None,
    shuffle: ShuffleOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    json: JsonOption = None,
    config: ConfigOption = None,
) -> None:
    """Benchmarks metrics: perplexity of the model pruned by each metric to each target.

    A metric that fails costs the others nothing: it has a row with the reason, and the exit status is 1.
    """
    targets = _check_request(metric or (), target or ("0.5",), update, json)
    from gpmetric import terminal
    from gpmetric.pruning.bench import bench as run

    with terminal.BenchReport(Console(stderr=True)) as listener:
        result = run(
            model,
            calibration=calibration,
            text=text or (),
            metric=metric or (),
            target=targets,
            update=update,
            one_shot=one_shot,
            samples=samples,
            sequence_length=sequence_length,
            windows=windows,
            shuffle=shuffle,
            seed=seed,
            device=device,
            dtype=dtype,
            include=include,
            exclude=exclude,
            listener=listener,
        )
    write_json(json, result)
    terminal.print_bench(Console(file=_tables(json)), result)
    failures = [row["error"] for row in result["results"] if row["error"]]
    if failures:
        raise GpmetricError(failures[0])


@app.command()
def export(
    formula: Annotated[str, typer.Argument(metavar="FORMULA|LEDGER", help="A formula, a metric's name, or a ledger.")],
    format: Annotated[str, typer.Option("--format", help="python, latex, sympy or json.")] = "python",
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="File to write.")] = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    json: JsonOption = None,
    config: ConfigOption = None,
) -> None:
    """Writes a formula, or the winner of a campaign, as a self-contained file."""
    if output is None:
        raise InputError("--output (-o) FILE is needed")
    _check_outputs(json, "--output", output)
    # GBLM's balance depends on the sample; here that of its paper, 128 sequences of 2048 tokens
    is_ledger = formula.endswith(".sqlite") or _is_sqlite(formula)
    expression = _winner(Path(formula)) if is_ledger else resolve_metric(formula, 128, 2048).expression
    from gpmetric.export import export_expression

    write_json(json, export_expression(expression, format, output, gpmetric_version()))


def _is_sqlite(name: str) -> bool:
    """Whether a file of that name holds a SQLite database; a formula may be the name of a file, too."""
    if not isfile(name):
        return False
    with open(name, "rb") as file:
        return file.read(16) == b"SQLite format 3\0"


def _winner(path: Path) -> Expression:
    """The winner of a finished campaign."""
    from gpmetric.evolution.ledger import Ledger

    with Ledger.read(path) as ledger:
        result = ledger.result()
    if result is None:
        raise LedgerError(f"the campaign in {str(path)!r} is not finished; go on with gpmetric discover --resume")
    return parse(result["winner"]["formula"])


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",")))


def _resume_command(ledger: Path) -> str:
    """The present command line with the ledger named and --resume, quoted for a shell."""
    words = ["gpmetric", *sys.argv[1:]]
    if "--ledger" not in words and not any(word.startswith("--ledger=") for word in words):
        words += ["--ledger", str(ledger)]
    return shlex.join(words if "--resume" in words else [*words, "--resume"])


def _check_request(metrics: Sequence[str], targets: Sequence[str], update: str, json: Path | None) -> list[str]:
    """Refuses what is wrong on the face of it; returns the targets without repetitions."""
    check_output("--json", json)
    check_update(update)
    for name in metrics:
        resolve_metric(name)
    for text in targets:
        parse_target(text)
    return list(dict.fromkeys(targets))


def _check_outputs(json: Path | None, option: str, path: Path) -> None:
    check_output("--json", json)
    check_output(option, path)
    if json is not None and json.absolute() == path.absolute():
        raise InputError(f"--json and {option} are the same file {str(path)!r}")


def _tables(json: Path | None) -> TextIO:
    """Where tables go: standard output, unless the JSON has it for itself."""
    return sys.stderr if json == STDOUT else sys.stdout


def main() -> None:
    """Runs the command line; exit status 0 done, 1 the work failed, 2 bad input or usage, 130 interrupted."""
    logging.basicConfig(format="gpmetric: %(message)s", level=logging.WARNING, stream=sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's time limit stops as cleanly as Ctrl-C
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except _ClickException as error:
        code = _fail(error.format_message(), 2)  # type: ignore[attr-defined]
    except InputError as error:
        code = _fail(str(error), 2)
    except GpmetricError as error:
        code = _fail(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:  # some versions of typer answer Ctrl-C themselves, without a word
        _fail("interrupted", code)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> int:
    print(f"gpmetric: error: {' '.join(message.split())}", file=sys.stderr)
    return code
