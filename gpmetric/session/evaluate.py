"""Perplexity of a model on texts: `gpmetric evaluate MODEL --text FILE`."""

from __future__ import annotations

from typing import Any

from gpmetric.evaluation.perplexity import mean_loss, perplexity
from gpmetric.options import as_function
from gpmetric.session.plan import Work
from gpmetric.session.requests import EvaluateRequest
from gpmetric.session.session import Listener, Session, open_session

__all__ = ["EvaluateListener", "evaluate", "evaluate_work", "run_evaluate"]


class EvaluateListener(Listener):
    """What an evaluation tells while it runs; every method may be overridden."""

    def text(self, name: str, ppl: float) -> None:
        """One text is measured."""


def evaluate_work(session: Session) -> Work:
    """What `evaluate` does with a session's model."""
    tokens = [part.tokens.numel() for part in session.evaluated]
    length = session.evaluated[0].tokens.shape[1]
    return Work(length=length, texts=max(tokens), forward=sum(tokens), resident=False)


def run_evaluate(request: EvaluateRequest, listener: EvaluateListener | None = None) -> dict[str, Any]:
    """Perplexity on each text, over non-overlapping windows, with everything needed to repeat it.

    Args:
        request: which model and texts.
        listener: told of each text as soon as it is measured.

    Returns:
        The JSON document of `gpmetric evaluate`.

    Raises:
        InputError: before the model runs, for anything that cannot be used.
    """
    told = listener or EvaluateListener()
    session = open_session(request, work=evaluate_work, listener=told)
    ppl: dict[str, float] = {}
    for done, part in enumerate(session.evaluated):
        told.progress("texts", done, len(session.evaluated))
        ppl[part.text.name] = perplexity(mean_loss(session.model, part.tokens))
        told.text(part.text.name, ppl[part.text.name])
    return session.describe() | {
        "sequence_length": session.evaluated[0].tokens.shape[1],
        "ppl": ppl,
        "windows": sum(len(part.tokens) for part in session.evaluated),
        "tokens": sum(part.tokens.numel() for part in session.evaluated),
        "texts": [part.describe() for part in session.evaluated],
    }


evaluate = as_function("evaluate", EvaluateRequest, run_evaluate, "model")
