"""Zero-shot and few-shot tasks of EleutherAI's lm-evaluation-harness, by that library, on a model that is open here."""

from __future__ import annotations

import logging
import os.path
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpmetric.errors import GpmetricError, InputError
from gpmetric.models import Model

__all__ = ["check_tasks", "task_figures"]

_NEEDED = "--tasks needs lm-eval: pip install 'gpmetric[lm-eval]'"


def check_tasks(names: Sequence[str], folder: Path | None) -> None:
    """Refuses tasks that could not be run, before any model is opened.

    Args:
        names: of tasks or groups of them.
        folder: with more tasks in YAML.

    Raises:
        InputError: lm-eval is not installed, a name is not known, or a file of the folder names code.
    """
    _manager(names, folder)


def task_figures(
    model: Model,
    names: Sequence[str],
    *,
    folder: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """By task or group, each of its figures under the harness's name (`acc`, `acc_norm`, `acc_stderr`, ...).

    Args:
        model: all of it on the device.
        names: of tasks or groups.
        folder: with more tasks in YAML, whose files must not name code.
        shots: examples before each question; the task's own by default.
        limit: questions of each task at most.

    Raises:
        InputError: as `check_tasks`; the model is not wholly on the device.
        GpmetricError: the harness fails; a dataset cannot be reached, for instance.
    """
    manager = _manager(names, folder)
    if not model.resident:
        raise InputError("--tasks needs the whole model in memory (--memory)")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        with _quiet():
            wrapped = HFLM(model.module, tokenizer=model.tokenizer, backend="causal", max_length=model.positions)
            found = simple_evaluate(
                wrapped, tasks=list(names), task_manager=manager, num_fewshot=shots, limit=limit, log_samples=False
            )
    except Exception as error:  # the harness's own, datasets', jinja's
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise GpmetricError(f"--tasks {','.join(names)}: the harness failed: {reason[0]:.200}") from error
    assert found is not None  # of the first process
    figures: dict[str, Any] = {**found["results"], **found.get("groups", {})}
    return {
        name: {key.removesuffix(",none"): float(value) for key, value in row.items() if isinstance(value, float)}
        for name, row in figures.items()
    }


def _manager(names: Sequence[str], folder: Path | None) -> Any:
    """The harness's list of tasks, with those of a folder."""
    if folder is not None:
        _check_folder(folder)
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(_NEEDED) from error
    with _quiet():
        manager = TaskManager(include_path=None if folder is None else str(folder))
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            near = sorted(one for one in known if name.lower() in one.lower())[:5]
            hint = f"; near are {', '.join(near)}" if near else ""
            raise InputError(f"--tasks {name!r:.60} is no task or group of lm-eval{hint}")
    return manager


def _check_folder(folder: Path) -> None:
    """Refuses files that name code, which the harness would run."""
    if not os.path.isdir(folder):
        raise InputError(f"--task-folder {str(folder)!r} is no folder")
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".yaml", ".yml") or not path.is_file():
            continue
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--task-folder: {str(path)!r} cannot be read: {error}") from error
        for mark in ("!function", "!!python", "class:", "unsafe_code", "custom_dataset"):
            if mark in content:
                raise InputError(
                    f"--task-folder: {str(path)!r} holds {mark!r}, which runs code; none of it is run here"
                )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's log; its bars stay."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
