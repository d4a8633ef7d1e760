"""Perplexity of a model on texts: `gpmetric evaluate MODEL --text FILE`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from gpmetric.data import Windows
from gpmetric.evaluation.perplexity import batches, mean_loss, perplexity
from gpmetric.evaluation.tasks import check_tasks, task_figures
from gpmetric.functions import as_function
from gpmetric.models import Model
from gpmetric.results import EvaluateResult
from gpmetric.session.deadline import Deadline
from gpmetric.session.listeners import EvaluateListener, Listener, Progress
from gpmetric.session.memory import retried
from gpmetric.session.requests import EvaluateRequest
from gpmetric.session.session import Session, open_session
from gpmetric.session.work import Work

__all__ = ["evaluate", "evaluate_work", "run_evaluate", "text_loss"]


def evaluate_work(session: Session) -> Work:
    """What `evaluate` does with a session's model."""
    tokens = [part.tokens.numel() for part in session.evaluated]
    length = session.evaluated[0].tokens.shape[1] if tokens else session.model.context
    return Work(length=length, texts=max(tokens, default=0), forward=sum(tokens))


def run_evaluate(
    request: EvaluateRequest, listener: EvaluateListener | None = None, started: float | None = None
) -> dict[str, Any]:
    """Perplexity on each text, over non-overlapping windows, and tasks, with everything needed to repeat it.

    Args:
        request: which model and texts.
        listener: told of each text as soon as it is measured.
        started: time.monotonic() at which `minutes` began; now by default.

    Returns:
        The JSON document of `gpmetric evaluate`: `windows` are those that were measured, of `windows_in_all`; where
        tasks were asked for, `tasks` holds each one's figures under the harness's names.

    Raises:
        InputError: before the model runs, for anything that cannot be used.
    """
    told, deadline = listener or EvaluateListener(), Deadline.starting(request.minutes, started)
    if request.tasks:
        check_tasks(request.tasks, request.task_folder)
    session = open_session(request, work=evaluate_work, listener=told)
    ppl: dict[str, float] = {}
    measured: list[Windows] = []
    for place, part in enumerate(session.evaluated):
        until = deadline.now() + deadline.left / (len(session.evaluated) - place)
        loss, count = _measured(session.model, part.tokens, until, deadline, told)
        measured.append(replace(part, tokens=part.tokens[:count]))
        ppl[part.text.name] = perplexity(loss)
        told.text(part.text.name, ppl[part.text.name])
    tasks = {}
    if request.tasks:
        tasks["tasks"] = task_figures(
            session.model, request.tasks, folder=request.task_folder, shots=request.shots, limit=request.limit
        )
        told.tasks(tasks["tasks"])
    return (
        session.describe()
        | tasks
        | {
            "sequence_length": session.evaluated[0].tokens.shape[1] if measured else None,
            "ppl": ppl,
            "windows": sum(len(part.tokens) for part in measured),
            "windows_in_all": sum(len(part.tokens) for part in session.evaluated),
            "tokens": sum(part.tokens.numel() for part in measured),
            "texts": [part.describe() for part in measured],
        }
    )


def text_loss(model: Model, tokens: Tensor, progress: Progress) -> float:
    """What `mean_loss` says of windows [windows, length], in smaller batches where there is no memory for larger ones.

    Raises:
        OutOfMemoryError: there is none for the smallest ones either.
    """
    return retried(model, partial(mean_loss, model, tokens, told=partial(progress, "perplexity")))


def _measured(model: Model, tokens: Tensor, until: float, deadline: Deadline, told: Listener) -> tuple[float, int]:
    """Mean loss on the first windows, as many as can be read until a time but at least a batch, and their number."""
    if deadline.minutes is None:
        return text_loss(model, tokens, told.progress), len(tokens)
    total, count, longest = 0.0, 0, 0.0
    for batch in batches(model, tokens):
        start = deadline.now()
        if count and start + longest > until:
            break
        total += len(batch) * text_loss(model, batch, lambda *told: None)
        count += len(batch)
        told.progress("windows", count, len(tokens))
        longest = max(longest, deadline.now() - start)
    return total / count, count


evaluate = as_function("evaluate", EvaluateRequest, run_evaluate, "model", result=EvaluateResult)
