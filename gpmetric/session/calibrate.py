"""What an exported score reads besides the weight: `gpmetric calibrate MODEL --operands X,G -o FILE`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from gpmetric.calibration.cache import as_stored, estimate_bytes, stored_dtype
from gpmetric.files import write_text
from gpmetric.functions import as_function
from gpmetric.operands import needs_gradients, shape_of
from gpmetric.results import StatisticsResult
from gpmetric.session.deadline import Deadline
from gpmetric.session.listeners import Listener, Progress
from gpmetric.session.memory import retried
from gpmetric.session.requests import CalibrateRequest, StatisticsRequest
from gpmetric.session.session import Session, check_disk, open_session
from gpmetric.session.work import Work
from gpmetric.tensor_file import create_file

__all__ = ["calibrate", "calibrate_work", "run_calibrate", "run_statistics", "statistics"]

Gathered = TypeVar("Gathered")


def calibrate_work(session: Session) -> Work:
    """What collecting statistics does with a session's model."""
    request, tokens = session.inputs, session.tokens.numel()
    assert isinstance(request, StatisticsRequest)
    gradients = needs_gradients(request.operands)
    return Work(
        dense=frozenset({"X", *request.operands}),
        length=session.tokens.shape[1],
        calibration=tokens,
        cached=isinstance(request, CalibrateRequest),
        forward=0 if gradients else tokens,
        backward=tokens if gradients else 0,
        dtype=request.kept_dtype,
    )


def run_statistics(
    request: StatisticsRequest, listener: Listener | None = None, started: float | None = None
) -> dict[str, dict[str, Tensor]]:
    """The statistics of every prunable layer of a dense model, as an exported `score` reads them.

    All of them are in memory; `calibrate` writes them to a file, which takes no more than a block's at a time.

    Args:
        request: of which model, on which text.
        listener: told of the progress.
        started: time.monotonic() at which `minutes` began; now by default.

    Returns:
        By layer, in the model's order, and operand: [out, in] or [in] as `OPERANDS` says, on the CPU, fp32 or of
        `statistics_dtype`; of a Conv1D (GPT-2), whose file holds [in, out], for the weight as [out, in].

    Raises:
        InputError: before the model runs, for anything that cannot be used.
        GpmetricError: a statistic is not finite.
    """

    def gather(session: Session, progress: Progress) -> dict[str, dict[str, Tensor]]:
        found: dict[str, dict[str, Tensor]] = {layer.name: {} for layer in session.model.layers}
        for layer, name, value in _collected(session, progress):
            found[layer][name] = value
        return found

    return _opened(request, listener, started, gather)


def run_calibrate(
    request: CalibrateRequest, listener: Listener | None = None, started: float | None = None
) -> dict[str, Any]:
    """Writes the statistics of every prunable layer of a dense model, as an exported `score` reads them.

    The file is in the format of safetensors. Its tensors are called LAYER.OPERAND, `model.layers.0.mlp.up_proj.X`, and
    are what `gpmetric.statistics` gives; its metadata tells under `gpmetric`, as JSON, what they were measured on.

    Args:
        request: of which model, on which text, and where to.
        listener: told of the progress.
        started: time.monotonic() at which `minutes` began; now by default.

    Returns:
        The JSON document of `gpmetric calibrate`: `layers`, each with the shapes of its `operands`, and `output`.

    Raises:
        InputError: before the model runs, for anything that cannot be used.
        GpmetricError: a statistic is not finite, or the file cannot be written; none is left then.
    """
    output, names, dtype = request.output, request.operands, request.kept_dtype
    assert output is not None

    def write(session: Session, progress: Progress) -> dict[str, Any]:
        layers, size = session.model.layers, estimate_bytes(session.model.layers, names, dtype)
        check_disk("--output", output.absolute().parent, size)
        shapes = {layer.name: {name: shape_of(name, layer.weight.shape) for name in names} for layer in layers}
        kinds = {
            f"{layer}.{name}": (stored_dtype(name, dtype), shape)
            for layer, one in shapes.items()
            for name, shape in one.items()
        }
        told = session.describe() | {
            "model_sha256": session.model.digest,
            "operands": list(names),
            "sequence_length": session.tokens.shape[1],
            "calibration": session.windows["calibration"].describe(),
        }

        def fill(partial: Path) -> None:
            file = create_file(partial, kinds, {"format": "pt", "gpmetric": json.dumps(told)})
            for layer, name, value in _collected(session, progress):
                file.write(f"{layer}.{name}", value)

        write_text(output, "", fill)  # which moves the file into its place once it is filled
        described = [
            {"name": layer, "operands": {name: list(shape) for name, shape in one.items()}}
            for layer, one in shapes.items()
        ]
        return told | session.experts(pruned=False) | {"layers": described, "output": str(output), "bytes": size}

    return _opened(request, listener, started, write)


def _opened(
    request: StatisticsRequest,
    listener: Listener | None,
    started: float | None,
    work: Callable[[Session, Progress], Gathered],
) -> Gathered:
    """What is made of the session of a request, again with smaller batches where there is no memory for larger ones."""
    told, deadline = listener or Listener(), Deadline.starting(request.minutes, started)
    session = open_session(request, work=calibrate_work, listener=told)
    return retried(session.model, lambda: work(session, deadline.watching(told.progress)))


def _collected(session: Session, progress: Progress) -> Iterator[tuple[str, str, Tensor]]:
    """Layer, operand and statistic as it is kept, those of a block after the other; of a block nothing is kept here."""
    request = session.inputs
    assert isinstance(request, StatisticsRequest)
    for block in session.blocks(request.operands, progress):
        for layer in list(block):
            found = block.pop(layer)
            session.starved |= {layer} if found.borrowed else set()
            for name in request.operands:
                yield layer, name, as_stored(layer, name, found[name], request.kept_dtype)


calibrate = as_function("calibrate", CalibrateRequest, run_calibrate, "model", result=StatisticsResult)
statistics = as_function("statistics", StatisticsRequest, run_statistics, "model", result=dict)
