"""The commands that allocate sparsity, and write and re-read checkpoints: `gpmetric allocate | prune | verify`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gpmetric.allocation.request import ALLOCATORS, GENES, OBJECTIVES, Request, check_request
from gpmetric.errors import GpmetricError, InputError, one_of
from gpmetric.options import (
    CalibrationOption,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    ExcludeOption,
    IncludeOption,
    JsonOption,
    LengthOption,
    SamplesOption,
    SeedOption,
    ShuffleOption,
    UpdateOption,
    WindowsOption,
    resume_command,
    tables,
)
from gpmetric.provenance import STDOUT, check_output, check_picture, write_json
from gpmetric.pruning.metrics import BASELINES, check_update, resolve_metric
from gpmetric.pruning.target import GRANULARITIES, parse_target
from gpmetric.structured.request import BUDGETS, COSTS, ESTIMATORS, FORMATS, REPAIRS, STARTS, SlimRequest
from gpmetric.structured.request import GRANULARITIES as SLIM_GRANULARITIES
from gpmetric.structured.request import OBJECTIVES as SLIM_OBJECTIVES
from gpmetric.structured.request import check_request as check_slim

__all__ = ["allocate", "prune", "slim", "verify"]


def _told(table: Mapping[str, str]) -> str:
    """A table of choices as an option's help."""
    return "; ".join(f"{name}: {what}" for name, what in table.items()) + "."


ModelArgument = Annotated[str | None, typer.Argument(help="Hugging Face directory or name; the demo model if none.")]


def allocate(
    model: Annotated[str | None, typer.Option(help="Hugging Face directory or name; the demo model if none.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Allocation to write, for prune --allocation.")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text of the statistics; cut into three where --search is not named.")
    ] = None,
    search: Annotated[str | None, typer.Option(help="Text every candidate is measured on.")] = None,
    validation: Annotated[str | None, typer.Option(help="Text the front is reported on.")] = None,
    metric: Annotated[str, typer.Option(help=f"What ranks weights: {', '.join(BASELINES)}, or a formula.")] = "wanda",
    sparsity: Annotated[float | None, typer.Option(help="Mean sparsity of the allocation that is written.")] = None,
    max_loss_ratio: Annotated[
        float | None, typer.Option(help="Or the sparsest whose validation loss is at most so many times the dense one.")
    ] = None,
    granularity: Annotated[
        str | None, typer.Option(help=f"{', '.join(GRANULARITIES)}; the metric's own by default.")
    ] = None,
    patterns: Annotated[str, typer.Option(help="Levels under --granularity n:m.")] = ",".join(Request.patterns),
    genes: Annotated[str, typer.Option(help=f"What shares a sparsity: {', '.join(GENES)}.")] = "matrix",
    allocator: Annotated[str, typer.Option(help=f"{', '.join(ALLOCATORS)}.")] = "nsga2",
    objective: Annotated[str, typer.Option(help=f"What candidates are compared by: {', '.join(OBJECTIVES)}.")] = "kl",
    lowest: Annotated[float, typer.Option(help="Lowest sparsity of the front.")] = Request.lowest,
    highest: Annotated[float, typer.Option(help="Highest sparsity of the front.")] = Request.highest,
    init: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Allocation to begin with too; may be repeated.")
    ] = None,
    population: Annotated[int, typer.Option(help="Survivors of a generation.")] = Request.population,
    evaluations: Annotated[int | None, typer.Option(help="Candidates measured at most; 800 if no budget.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of the search at most.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Minutes of the search at most; calibration and validation come on top.")
    ] = None,
    archive: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON Lines file that keeps everything measured.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the archive if it is there.")] = False,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Front and baselines as a table.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Front and heat map: .png or .pdf.")] = None,
    chunk_layers: Annotated[
        int | None, typer.Option(help="Layers whose statistics are in memory at once, to save memory.")
    ] = None,
    samples: SamplesOption = Request.samples,
    sequence_length: LengthOption = None,
    search_windows: Annotated[int, typer.Option(help="Windows of the search text.")] = Request.search_windows,
    windows: Annotated[int, typer.Option(help="Windows of the validation text.")] = Request.windows,
    shuffle: ShuffleOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    json: JsonOption = None,
    config: ConfigOption = None,
) -> None:
    """Searches how sparse each layer should be: the front between sparsity and loss, and one allocation of it."""
    request = Request(
        model=model,
        calibration=calibration,
        search=search,
        validation=validation,
        metric=metric,
        sparsity=sparsity,
        max_loss_ratio=max_loss_ratio,
        granularity=granularity,
        patterns=tuple(dict.fromkeys(text.strip() for text in patterns.split(","))),
        genes=one_of("--genes", genes, GENES),
        allocator=one_of("--allocator", allocator, ALLOCATORS),
        objective=one_of("--objective", objective, OBJECTIVES),
        lowest=lowest,
        highest=highest,
        init=tuple(init or ()),
        population=population,
        evaluations=evaluations,
        tokens=tokens,
        minutes=minutes,
        samples=samples,
        search_windows=search_windows,
        windows=windows,
        sequence_length=sequence_length,
        shuffle=shuffle,
        seed=seed,
        device=device,
        dtype=dtype,
        include=include,
        exclude=exclude,
        chunk_layers=chunk_layers,
        archive=archive,
        resume=resume,
    )
    check_request(request)
    outputs = {"--output": output, "--csv": csv, "--plot": plot, "--archive": archive, "--json": json}
    _check_different(outputs, [*(init or ()), *(text for text in (calibration, search, validation) if text)])
    if plot is not None:
        check_picture("--plot", plot)
    from gpmetric import terminal
    from gpmetric.allocation.allocate import run_allocation
    from gpmetric.allocation.plot import draw_front, write_csv

    with terminal.AllocateReport(Console(stderr=True)) as listener:
        result = run_allocation(request, listener)
    if result["allocation"] is not None:
        write_json(output, result["allocation"])
    write_json(json, result)
    if csv is not None:
        write_csv(result, csv)
    if plot is not None:
        draw_front(result, plot)
    if result["error"] is not None:
        raise GpmetricError(result["error"])
    terminal.print_allocation(Console(file=tables(json)), result)


def _check_different(outputs: Mapping[str, Path | None], inputs: Sequence[str]) -> None:
    """Refuses outputs that cannot be written, are an input, or of which two are one file."""
    read = {Path(name).resolve() for name in inputs}
    seen: dict[Path, str] = {}
    for option, path in outputs.items():
        check_output(option, path)
        if path == STDOUT and option != "--json":
            raise InputError(f"{option} -: only --json goes to standard output")
        if path is not None and path != STDOUT:
            if path.resolve() in read:
                raise InputError(f"{option} {str(path)!r} is also read")
            other = seen.setdefault(path.resolve(), option)
            if other != option:
                raise InputError(f"{other} and {option} are the same file {str(path)!r}")


def prune(
    model: ModelArgument = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.")] = None,
    calibration: CalibrationOption = None,
    text: Annotated[
        str | None, typer.Option(help="Text the perplexity is measured on; the calibration text by default.")
    ] = None,
    metric: Annotated[str, typer.Option(help=f"{', '.join(BASELINES)}, or a formula.")] = "wanda",
    target: Annotated[
        str | None,
        typer.Option(
            help="0.5 (within rows), layer:0.5, block:0.5 or 2:4; 0.5 by default. --allocation must meet it if given."
        ),
    ] = None,
    allocation: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON with the sparsity of each layer; see gpmetric allocate.")
    ] = None,
    update: UpdateOption = "none",
    one_shot: Annotated[
        bool, typer.Option("--one-shot/--sequential", help="Dense statistics everywhere, or block after pruned block.")
    ] = False,
    save_masks: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Safetensors file of what is kept, boolean [out, in] by layer.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that this command wrote.")] = False,
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
    """Prunes a model, writes it as a standard Hugging Face checkpoint, and verifies what was written."""
    check_output("--json", json)
    if output is None:
        raise InputError("--output (-o) DIR is needed")
    if json is not None and json.absolute() in (output.absolute(), save_masks and save_masks.absolute()):
        raise InputError(f"--json {str(json)!r} is also what --output or --save-masks names")
    resolve_metric(metric)
    if target is not None:
        parse_target(target)
    check_update(update)
    from gpmetric import terminal
    from gpmetric.pruning.prune_model import prune_model

    with terminal.BenchReport(Console(stderr=True)) as listener:
        result = prune_model(
            model,
            output=output,
            calibration=calibration,
            text=text,
            metric=metric,
            target=target,
            allocation=allocation,
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
            save_masks=save_masks,
            force=force,
            listener=listener,
        )
    write_json(json, result)
    perplexities = f"perplexity {result['perplexity']:.4f}, dense {result['dense']:.4f}, on {result['text']['text']}"
    sparsity = f"{result['sparsity']:.4f} of {len(result['layers'])} layers zero"
    if result["allocation"]:
        sparsity += f", allocated by {result['allocation']['file']}"
    print(f"{output}: {sparsity}; {perplexities}; verified", file=tables(json))


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint that `gpmetric prune` or `slim` wrote.")],
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The dense model: what was not pruned must be as it was there.")
    ] = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    json: JsonOption = None,
    config: ConfigOption = None,
) -> None:
    """Re-reads a checkpoint: files, finite values, sparsity, pattern, untouched tensors, perplexity."""
    check_output("--json", json)
    from gpmetric.pruning.verify import verify as run

    result = run(folder, against=against, device=device, seed=seed)
    write_json(json, result)
    for problem in result["problems"]:
        print(problem, file=tables(json))
    if not result["ok"]:
        raise GpmetricError(f"{str(folder)!r} has {len(result['problems'])} problems, first: {result['problems'][0]}")
    measured = "no text at hand" if result["perplexity"] is None else f"perplexity {result['perplexity']:.4f}"
    share = f"{result['layers']} layers zero" if result["layers"] else "the parameters inside the blocks gone"
    print(f"{folder}: ok, {result['sparsity']:.4f} of {share}, {measured}", file=tables(json))


def slim(
    model: ModelArgument = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text of the statistics; cut into three where --search is not named.")
    ] = None,
    search: Annotated[str | None, typer.Option(help="Text the drawn models are measured on.")] = None,
    validation: Annotated[str | None, typer.Option(help="Text the perplexity is reported on.")] = None,
    sparsity: Annotated[
        float, typer.Option(help="Share of the parameters inside the blocks that is removed.")
    ] = SlimRequest.sparsity,
    granularity: Annotated[str, typer.Option(help=f"What goes as one: {', '.join(SLIM_GRANULARITIES)}.")] = ",".join(
        SlimRequest.granularity
    ),
    form: Annotated[str, typer.Option("--format", help=_told(FORMATS))] = SlimRequest.format,
    budget: Annotated[str, typer.Option(help=_told(BUDGETS))] = SlimRequest.budget,
    cost: Annotated[str, typer.Option(help=f"What the budget counts: {', '.join(COSTS)}.")] = SlimRequest.cost,
    estimator: Annotated[str, typer.Option(help=_told(ESTIMATORS))] = SlimRequest.estimator,
    objective: Annotated[
        str, typer.Option(help=f"What drawn models are compared by: {', '.join(SLIM_OBJECTIVES)}.")
    ] = SlimRequest.objective,
    start: Annotated[
        str, typer.Option(help=f"What the probabilities begin from: {', '.join(STARTS)}, a metric or a formula.")
    ] = SlimRequest.start,
    repair: Annotated[str, typer.Option(help=_told(REPAIRS))] = SlimRequest.repair,
    add_bias: Annotated[
        bool, typer.Option("--add-bias/--no-add-bias", help="Give a bias to outputs that have none, for the repair.")
    ] = SlimRequest.add_bias,
    steps: Annotated[int | None, typer.Option(help="Steps of the search at most; 6 minutes if no limit.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Minutes of the search at most.")] = None,
    draws: Annotated[int, typer.Option(help="Models drawn per step.")] = SlimRequest.draws,
    batch: Annotated[int, typer.Option(help="Windows that the draws of a step are measured on.")] = SlimRequest.batch,
    rate: Annotated[float | None, typer.Option(help="Of the first step; the estimator's own by default.")] = None,
    ledger: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON Lines file of the search's progress.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the ledger if it is there.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that gpmetric wrote.")] = False,
    samples: SamplesOption = SlimRequest.samples,
    sequence_length: LengthOption = None,
    search_windows: Annotated[int, typer.Option(help="Windows of the search text.")] = SlimRequest.search_windows,
    windows: Annotated[int, typer.Option(help="Windows of the validation text.")] = SlimRequest.windows,
    shuffle: ShuffleOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    json: JsonOption = None,
    config: ConfigOption = None,
) -> None:
    """Removes channels, heads and layers for good, chosen by a policy gradient that needs forward passes only."""
    if output is None:
        raise InputError("--output (-o) DIR is needed")
    request = SlimRequest(
        model=model,
        calibration=calibration,
        search=search,
        validation=validation,
        sparsity=sparsity,
        granularity=tuple(dict.fromkeys(text.strip() for text in granularity.split(","))),
        format=form,
        budget=budget,
        cost=cost,
        estimator=one_of("--estimator", estimator, ESTIMATORS),
        objective=one_of("--objective", objective, SLIM_OBJECTIVES),
        start=start,
        repair=repair,
        add_bias=add_bias,
        steps=steps,
        minutes=minutes,
        draws=draws,
        batch=batch,
        rate=rate,
        samples=samples,
        search_windows=search_windows,
        windows=windows,
        sequence_length=sequence_length,
        shuffle=shuffle,
        seed=seed,
        device=device,
        dtype=dtype,
        ledger=ledger,
        resume=resume,
    )
    check_slim(request)
    _check_different({"--json": json, "--ledger": ledger}, [text for text in (calibration, search, validation) if text])
    from gpmetric import terminal
    from gpmetric.structured.slim import run_slim

    try:
        with terminal.SlimReport(Console(stderr=True)) as listener:
            result = run_slim(request, output, force=force, listener=listener)
    except KeyboardInterrupt:
        if ledger is not None:
            print(f"stopped; go on with: {resume_command(ledger)}", file=sys.stderr)
        raise
    write_json(json, result)
    terminal.print_slim(Console(file=tables(json)), result)
