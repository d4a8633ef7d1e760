"""The command line: `gpmetric discover | bench | export | allocate | prune | slim | verify | evaluate | analyse`.

Options and formulas are checked before torch is imported; the work is in the functions that `import gpmetric` offers.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gpmetric.commands import allocate, prune, slim, verify
from gpmetric.errors import GpmetricError, InputError
from gpmetric.evolution.ledger import is_ledger, winner_of
from gpmetric.evolution.request import Request, check_group, check_objective, check_request
from gpmetric.expression import PRIMITIVES
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
    ModelsOption,
    SamplesOption,
    SearchTargetOption,
    SeedOption,
    ShuffleOption,
    TargetOption,
    TextOption,
    UpdateOption,
    WindowsOption,
    resume_command,
    tables,
)
from gpmetric.provenance import check_output, check_picture, gpmetric_version, write_json
from gpmetric.pruning.metrics import BASELINES, check_update, resolve_metric
from gpmetric.pruning.target import parse_target

__all__ = ["analyse", "app", "bench", "discover", "evaluate", "export", "main"]

app = typer.Typer(
    name="gpmetric",
    help="Discovers pruning metrics for language models by genetic programming, benchmarks, exports and applies them.",
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
        on_text=lambda name, ppl: print(f"{name}: perplexity {ppl:.4f}", flush=True, file=tables(json)),
    )
    write_json(json, result)
    size = f"{result['windows']} windows of {result['sequence_length']} tokens"
    print(f"{size}, {result['dtype']}, {result['device']}", file=tables(json))


@app.command()
def discover(
    model: ModelsOption = None,
    calibration: CalibrationOption = None,
    search: Annotated[str | None, typer.Option(help="Text every candidate is evaluated on.")] = None,
    validation: Annotated[str | None, typer.Option(help="Text the winner is chosen on.")] = None,
    test: Annotated[str | None, typer.Option(help="Text read once, at the end.")] = None,
    text: Annotated[str | None, typer.Option(help="One text to cut into the four splits instead.")] = None,
    target: SearchTargetOption = None,
    operands: Annotated[str, typer.Option(help="What formulas may use; W,X needs no gradients.")] = ",".join(OPERANDS),
    primitives: Annotated[str, typer.Option(help="Operations formulas may use.")] = ",".join(PRIMITIVES),
    start: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FORMULA",
            help="Formula or baseline to start from, layer: or block: before it or not; may be repeated.",
        ),
    ] = None,
    forbid: Annotated[
        list[str] | None, typer.Option(metavar="OUTER(INNER)", help="Nesting no formula may have; may be repeated.")
    ] = None,
    update: UpdateOption = "none",
    objective: Annotated[
        str, typer.Option(help="What candidates are compared by: kl (divergence from the dense model) or loss.")
    ] = "kl",
    group: Annotated[
        str, typer.Option(help="Where plain-number targets compete: row, layer, block, or search, which evolves it.")
    ] = "search",
    population: Annotated[int, typer.Option(help="Formulas per generation.")] = 40,
    generations: Annotated[int | None, typer.Option(help="Generations at most.")] = None,
    evaluations: Annotated[int | None, typer.Option(help="Evaluations paid for at most; 300 if no budget.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Wall time of the whole command.")] = None,
    max_nodes: Annotated[int, typer.Option(help="Size of a formula at most.")] = 30,
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
    search_windows: Annotated[
        int,
        typer.Option(
            help="Windows of the search text: an eighth for every candidate, half and all for the better ones."
        ),
    ] = 32,
    windows: Annotated[int | None, typer.Option(min=1, help="Windows of validation and of test.")] = 128,
    calibration_seeds: Annotated[
        int, typer.Option(help="Draws of calibration windows for the confidence interval of the winner's gain.")
    ] = 3,
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
        model=tuple(model) if model else None,
        calibration=calibration,
        search=search,
        validation=validation,
        test=test,
        text=text,
        target=tuple(dict.fromkeys(target or Request.target)),
        update=update,
        objective=check_objective(objective),
        group=check_group(group),
        operands=_names(operands),
        primitives=_names(primitives),
        start=tuple(start or ()),
        forbid=tuple(forbid or ()),
        population=population,
        generations=generations,
        evaluations=evaluations,
        minutes=minutes,
        max_nodes=max_nodes,
        samples=samples,
        sequence_length=sequence_length,
        search_windows=search_windows,
        windows=windows,
        calibration_seeds=calibration_seeds,
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
        with terminal.DiscoverReport(Console(stderr=True)) as listener:
            result = run_campaign(request, path, resume=resume, listener=listener, started=started)
    except KeyboardInterrupt:
        print(f"stopped; go on with: {resume_command(path)}", file=sys.stderr)
        raise
    write_json(json, result)
    terminal.print_discover(Console(file=tables(json)), result, path)


@app.command()
def bench(
    model: ModelsOption = None,
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

    With several models, a last table says where each metric wins and loses against Wanda. A metric or model that fails
    costs the others nothing: the result holds the reason, and the exit status is 1.
    """
    targets = _check_request(metric or (), target or ("0.5",), update, json)
    from gpmetric import terminal
    from gpmetric.pruning.bench import bench as run
    from gpmetric.pruning.bench import bench_failures

    with terminal.BenchReport(Console(stderr=True)) as listener:
        result = run(
            model or (),
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
    terminal.print_bench(Console(file=tables(json)), result)
    if failures := bench_failures(result):
        raise GpmetricError(failures[0])


@app.command()
def export(
    formula: Annotated[str, typer.Argument(metavar="FORMULA|LEDGER", help="A formula, a metric's name, or a ledger.")],
    format: Annotated[str, typer.Option("--format", help="python, triton, latex, sympy or json.")] = "python",
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
    named = winner_of(Path(formula)) if is_ledger(formula) else formula
    metric = resolve_metric(named, 128, 2048)
    from gpmetric.export import export_expression

    record = export_expression(metric.expression, format, output, gpmetric_version(), metric.granularity)
    write_json(json, record)


for _command in (allocate, prune, slim, verify):
    app.command()(_command)


@app.command()
def analyse(
    ledger: Annotated[Path, typer.Argument(metavar="LEDGER", help="A campaign's ledger, finished or not.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Page of plots to write: .png or .pdf.")
    ] = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    json: JsonOption = None,
    config: ConfigOption = None,
) -> None:
    """Shows which operands, operations, sub-expressions and masks go with good fitness in a campaign."""
    check_output("--json", json)
    if output is not None:
        _check_outputs(json, "--output", output)
    from gpmetric.analysis.analyse import analyse as run
    from gpmetric.analysis.plot import draw_page

    if output is not None:
        check_picture("--output", output)
    result = run(ledger, seed=seed)
    if output is not None:
        draw_page(result, output)
    write_json(json, result)
    from gpmetric import terminal

    terminal.print_analysis(Console(file=tables(json)), result)


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",")))


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
