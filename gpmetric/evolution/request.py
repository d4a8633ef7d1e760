"""What a campaign is asked for, and the checks that need no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from gpmetric.errors import InputError
from gpmetric.expression import PRIMITIVES, Expression
from gpmetric.operands import OPERANDS
from gpmetric.pruning.metrics import Update, check_update, resolve_metric
from gpmetric.pruning.target import parse_target

__all__ = ["Request", "check_request", "foreign_to"]


@dataclass(frozen=True)
class Request:
    """Everything `gpmetric discover` can be asked for; names and defaults are those of the command line.

    Attributes:
        model: a directory or Hub name; None is the demo model.
        text: one text cut into all four splits, instead of naming them.
        samples: calibration windows; `search_windows`: windows every candidate is evaluated on; `windows`: windows of
            validation and of test.
        target: sparsities, `layer:` sparsities or N:M; candidates are evaluated at all of them.
        operands, primitives: what formulas may be made of.
        start: formulas or baseline names to start from, besides the mask-only baselines.
        generations, evaluations, minutes: budgets; the first one spent ends the search. `minutes` is wall time of the
            whole call. With none, 300 evaluations.
        cache: folder of the statistics cache.
        workers: processes; by default one per core for models under 50 million parameters on a CPU.
    """

    model: str | None = None
    calibration: str | None = None
    search: str | None = None
    validation: str | None = None
    test: str | None = None
    text: str | None = None
    target: tuple[str, ...] = ("0.5", "0.6", "0.7", "2:4")
    update: str = "none"
    operands: tuple[str, ...] = tuple(OPERANDS)
    primitives: tuple[str, ...] = tuple(PRIMITIVES)
    start: tuple[str, ...] = ()
    population: int = 40
    generations: int | None = None
    evaluations: int | None = None
    minutes: float | None = None
    max_nodes: int = 25
    samples: int = 128
    sequence_length: int | None = None
    search_windows: int = 64
    windows: int | None = 64
    shuffle: bool = False
    seed: int = 0
    device: str = "auto"
    dtype: str | None = None
    include: str | None = None
    exclude: str | None = None
    chunk_layers: int | None = None
    cache: Path | None = None
    workers: int | None = None


def check_request(request: Request) -> Update:
    """Refuses what is wrong whatever the model; returns the update.

    Raises:
        InputError: naming option, value and what is accepted.
    """
    if not request.target:
        raise InputError("--target is needed at least once")
    for text in request.target:
        parse_target(text)
    _check_names("--operands", request.operands, tuple(OPERANDS))
    _check_names("--primitives", request.primitives, tuple(PRIMITIVES))
    if "W" not in request.operands:
        raise InputError(f"--operands must hold W, but got {','.join(request.operands)}")
    for formula in request.start:
        _check_start(formula, request)
    minima = {"population": 4, "max_nodes": 3, "samples": 1, "search_windows": 1, "generations": 1, "evaluations": 1}
    for name, least in (minima | {"windows": 1, "workers": 1, "chunk_layers": 1}).items():
        value = getattr(request, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, but got {value}")
    if request.minutes is not None and not request.minutes > 0:
        raise InputError(f"--minutes must be above 0, but got {request.minutes}")
    return check_update(request.update)


def _check_names(option: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise InputError(f"{option}: unknown name {name!r}; {hint}accepted: {', '.join(known)}")


def _check_start(formula: str, request: Request) -> None:
    reason = foreign_to(request, resolve_metric(formula).expression)
    if reason:
        raise InputError(f"--start {formula!r} {reason}")


def foreign_to(request: Request, expression: Expression) -> str:
    """Why a formula is outside the space the request searches, "" when it is inside."""
    known = {*request.operands, *request.primitives}
    foreign = [token for token in expression.tokens if isinstance(token, str) and token not in known]
    if foreign:
        return f"uses {foreign[0]!r}, which --operands or --primitives leaves out"
    if len(expression) > request.max_nodes:
        return f"has {len(expression)} nodes, more than --max-nodes {request.max_nodes}"
    return ""
