"""What benchmarks of several cases share: processes that run them, and a document that every case goes to at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import torch
from results import cpu_name

from gpmetric.errors import GpmetricError, InputError
from gpmetric.files import write_text
from gpmetric.loading import pick_device
from gpmetric.provenance import versions

Case = tuple[Any, ...]
Run = Callable[..., dict[str, Any]]


def finished(
    run: Run, settings: Mapping[str, Any], cases: Sequence[Case], jobs: int
) -> Iterator[tuple[Case, dict[str, Any] | GpmetricError]]:
    """Each case with what `run(settings, *case)` gives, or the GpmetricError it failed with, as soon as it is there."""
    if jobs == 1:
        for case in cases:
            yield case, outcome(partial(run, settings, *case))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=begin_worker) as pool:
        try:
            futures = {pool.submit(run, settings, *case): case for case in cases}
            for one in as_completed(futures):
                yield futures[one], outcome(one.result)
        finally:
            pool.shutdown(cancel_futures=True)


def outcome(run: Callable[[], dict[str, Any]]) -> dict[str, Any] | GpmetricError:
    try:
        return run()
    except GpmetricError as error:
        return error


def told(failures: Sequence[tuple[str, GpmetricError]], cases: int) -> GpmetricError:
    """One error for cases that failed, by what they are called; the first as it is where all did."""
    if len(failures) == cases:
        return failures[0][1]
    whys = "; ".join(f"{case}: {error}" for case, error in failures)
    return GpmetricError(f"{len(failures)} of {cases} cases failed: {whys}")


def one_thread() -> None:
    """What every process of a benchmark begins with."""
    torch.set_num_threads(1)


def begin_worker() -> None:
    """One thread, and an end when the process that wants the figures has ended, however it did."""
    one_thread()
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()


def end_with(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)


def opened(path: Path | None, resume: bool, settings: Mapping[str, Any], lists: Sequence[str]) -> dict[str, Any]:
    """The document of raw results: the one to go on with, or a new one.

    Args:
        settings: JSON values that the results depend on, `device` among them.
        lists: names of what the document holds a list of.

    Raises:
        InputError: the file is there without --resume, cannot be read, or was made otherwise.
    """
    if path is not None and path.exists():
        if not resume:
            raise InputError(f"--json {str(path)!r} exists: go on with --resume, or name another")
        try:
            document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            made = dict(document["settings"])
            if not all(isinstance(document[name], list) for name in lists):
                raise TypeError(f"{' and '.join(lists)} are lists")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"--json {str(path)!r} is no document of this benchmark: {error}") from error
        for name, value in settings.items():
            if made.get(name) != value:
                raise InputError(f"--json {str(path)!r}: {name} is {made.get(name)!r} there, {value!r} here")
        return document
    where = pick_device(settings["device"])
    device = torch.cuda.get_device_name() if where.type == "cuda" else cpu_name()
    return {"settings": dict(settings), "versions": versions(), "device": device} | {name: [] for name in lists}


def save(document: Mapping[str, Any], path: Path | None) -> None:
    if path is not None:
        write_text(path, json.dumps(document, indent=1))
