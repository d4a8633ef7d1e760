"""What a campaign is asked for, and the checks that need no model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, get_args

from gpmetric.errors import InputError, one_of
from gpmetric.evolution.grammar import FORBIDDEN, Nesting, foreign_to, nests
from gpmetric.evolution.objectives import SEARCHED, Searched
from gpmetric.expression import PRIMITIVES
from gpmetric.operands import OPERANDS
from gpmetric.pruning.metrics import GROUPS, Update, check_update, resolve_metric
from gpmetric.pruning.target import Granularity, parse_target

__all__ = ["Group", "Request", "check_group", "check_objective", "check_request", "parse_nesting"]


Group = Literal["row", "layer", "block", "search"]


@dataclass(frozen=True)
class Request:
    """Everything `gpmetric discover` can be asked for; names and defaults are those of the command line.

    Attributes:
        model: a directory or Hub name, or several, for one metric that serves all; None is the demo model.
        text: one text cut into all four splits, instead of naming them.
        samples: calibration windows; `search_windows`: windows every candidate is evaluated on; `windows`: windows of
            validation and of test.
        target: sparsities, `layer:` sparsities or N:M; candidates are evaluated at all of them.
        operands, primitives: what formulas may be made of.
        objective: what candidates are compared by on the search text, "kl" or "loss".
        group: where plain-number targets make scores compete: row, layer, block, or "search" to evolve it. Of no effect
            under obs-blockwise, which has its own.
        start: formulas or baseline names to start from, besides the baselines.
        forbid: nestings such as "exp(log)" that no formula may have, besides those of `grammar.FORBIDDEN`.
        generations, evaluations, minutes: budgets; the first one spent ends the search. `minutes` is wall time of the
            whole call. With none, 300 evaluations.
        calibration_seeds: bootstrap draws of the calibration windows on which winner and best baseline are compared
            again, for a confidence interval; fewer where `minutes` are over.
        cache: folder of the statistics cache.
        workers: processes; by default one per core for models under 50 million parameters on a CPU.
    """

    model: str | tuple[str, ...] | None = None
    calibration: str | None = None
    search: str | None = None
    validation: str | None = None
    test: str | None = None
    text: str | None = None
    target: tuple[str, ...] = ("0.5", "0.6", "0.7", "2:4")
    update: str = "none"
    objective: Searched = "kl"
    group: Group = "search"
    operands: tuple[str, ...] = tuple(OPERANDS)
    primitives: tuple[str, ...] = tuple(PRIMITIVES)
    start: tuple[str, ...] = ()
    forbid: tuple[str, ...] = ()
    population: int = 40
    generations: int | None = None
    evaluations: int | None = None
    minutes: float | None = None
    max_nodes: int = 30
    samples: int = 128
    sequence_length: int | None = None
    search_windows: int = 32
    windows: int | None = 128
    calibration_seeds: int = 3
    shuffle: bool = False
    seed: int = 0
    device: str = "auto"
    dtype: str | None = None
    include: str | None = None
    exclude: str | None = None
    chunk_layers: int | None = None
    cache: Path | None = None
    workers: int | None = None

    @property
    def groups_matter(self) -> bool:
        """Whether a formula's comparison group makes a difference: a plain-number target leaves it open."""
        return self.update != "obs-blockwise" and any(parse_target(text).granularity == "row" for text in self.target)

    @property
    def groups(self) -> tuple[Granularity, ...]:
        """The comparison groups that formulas may have."""
        if self.group == "search":
            return GROUPS if self.groups_matter else ("row",)
        return (self.group,)

    @property
    def models(self) -> tuple[str | None, ...]:
        """Every model asked for, once; (None,) is the demo model."""
        names = (self.model,) if isinstance(self.model, str) else self.model or (None,)
        return tuple(dict.fromkeys(names))


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
    check_objective(request.objective)
    check_group(request.group)
    if request.group in ("layer", "block") and request.update == "obs-blockwise":
        raise InputError(f"--group {request.group}: obs-blockwise has a threshold of its own per block of columns")
    for nesting in request.forbid:
        parse_nesting(nesting)
    minima = {"calibration_seeds": 0, "population": 4, "max_nodes": 3}
    for name in ("samples", "search_windows", "windows", "generations", "evaluations", "workers", "chunk_layers"):
        minima[name] = 1
    for name, least in minima.items():
        value = getattr(request, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, but got {value}")
    if request.minutes is not None and not request.minutes > 0:
        raise InputError(f"--minutes must be above 0, but got {request.minutes}")
    return check_update(request.update)


def parse_nesting(text: str) -> Nesting:
    """The (outer, inner) primitives of a nesting such as "exp(log)".

    Raises:
        InputError: another form, or an unknown primitive.
    """
    found = re.fullmatch(r"\s*(\w+)\s*\(\s*(\w+)\s*\)\s*", text)
    if found is None:
        raise InputError(f"--forbid must be like exp(log), outer(inner), but got {text!r:.60}")
    _check_names("--forbid", found.groups(), tuple(PRIMITIVES))
    return found[1], found[2]


def check_objective(text: str) -> Searched:
    """The objective of that name.

    Raises:
        InputError: no such objective.
    """
    return one_of("--objective", text, SEARCHED)


def check_group(text: str) -> Group:
    """The comparison group of that name, or "search".

    Raises:
        InputError: no such group.
    """
    return one_of("--group", text, get_args(Group))


def _check_names(option: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise InputError(f"{option}: unknown name {name!r}; {hint}accepted: {', '.join(known)}")


def _check_start(formula: str, request: Request) -> None:
    metric = resolve_metric(formula)
    reason = foreign_to(request, metric.expression)
    if reason:
        raise InputError(f"--start {formula!r} {reason}")
    if ":" in formula and request.group not in ("search", metric.granularity):
        raise InputError(f"--start {formula!r} names another comparison group than --group {request.group}")
    for outer, inner in (*FORBIDDEN, *map(parse_nesting, request.forbid)):
        if nests(metric.expression, outer, inner):
            raise InputError(f"--start {formula!r} nests {inner} in {outer}, which no formula may")
