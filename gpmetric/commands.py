"""The commands that write and re-read checkpoints: `gpmetric prune | verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gpmetric.errors import GpmetricError, InputError
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
    tables,
)
from gpmetric.provenance import check_output, write_json
from gpmetric.pruning.metrics import BASELINES, check_update, resolve_metric
from gpmetric.pruning.target import parse_target

__all__ = ["prune", "verify"]

ModelArgument = Annotated[str | None, typer.Argument(help="Hugging Face directory or name; the demo model if none.")]


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
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint that `gpmetric prune` wrote.")],
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
    print(f"{folder}: ok, {result['sparsity']:.4f} of {result['layers']} layers zero, {measured}", file=tables(json))
