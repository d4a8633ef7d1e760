"""A stand-in for the evaluator, for tests/test_campaign.py and the workers it spawns: every figure is made by hash."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Any

from gpmetric.errors import MaskError
from gpmetric.evolution.tasks import ExcessTask, MaskFingerprint, NoMasks, ProbeTask, Task

TARGETS = ("0.5", "2:4")
KILLER = "abs(W)*tanh(X)"  # kills its worker


def number(*words: object) -> float:
    """A number in [0, 1) that depends on the words alone."""
    return int(hashlib.sha256(repr(words).encode()).hexdigest()[:12], 16) / 16**12


def mask(text: str) -> int:
    """One of 300 masks."""
    return int(300 * number("mask", text))


def figure(text: str, kind: str, target: str, window: int) -> float:
    """What one search window says of a mask: its own worth, told apart by window and kind."""
    return 1 + number(mask(text)) + 0.2 * number(mask(text), kind, target, window)


def fails(text: str) -> bool:
    return number("fails", text) < 1 / 16


def collapses(text: str) -> bool:
    """On the last windows only."""
    return not fails(text) and number("collapses", mask(text)) < 1 / 8


def evaluate(task: Task) -> Any:
    """Answers the tasks of a search."""
    if isinstance(task, ProbeTask):
        return [probe(metric.name) for metric in task.metrics]
    assert isinstance(task, ExcessTask)
    assert task.last is not None
    text, windows = task.metric.name, range(task.first, task.last)
    if collapses(text) and 7 in windows:
        raise MaskError("the scores ran away")
    return {
        kind: {target: sum(figure(text, kind, target, at) for at in windows) / len(windows) for target in TARGETS}
        for kind in ("loss", "kl")
    }


def probe(text: str) -> MaskFingerprint | NoMasks:
    if fails(text):
        return NoMasks("3 of 8 scores are NaN or infinite")
    return MaskFingerprint(
        str(mask(text)), "ff", {target: 0.1 * figure(text, "probe", target, -1) for target in TARGETS}
    )


def make_evaluator() -> Callable[[Task], Any]:
    return evaluate


def make_deadly() -> Callable[[Task], Any]:
    """The same, but one formula ends the process it is probed in."""

    def answer(task: Task) -> Any:
        if isinstance(task, ProbeTask) and KILLER in [metric.name for metric in task.metrics]:
            os._exit(7)
        return evaluate(task)

    return answer
