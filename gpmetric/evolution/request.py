"""What `gpmetric discover` is asked for, checked before torch is imported."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Self

from gpmetric.errors import InputError, one_of
from gpmetric.evaluation.objectives import OBJECTIVES
from gpmetric.evolution.beside import note_file
from gpmetric.evolution.grammar import FORBIDDEN, Nesting, foreign_to
from gpmetric.expression import PRIMITIVES
from gpmetric.metrics import BASELINES, Metric, resolve_metric
from gpmetric.operands import OPERANDS, is_regional, needs_gradients
from gpmetric.options import Option
from gpmetric.plugins import names_of
from gpmetric.pruning.requests import FIT, MODELS, UPDATE, check_fit, target_option
from gpmetric.pruning.updaters import UPDATERS
from gpmetric.session.inputs import Inputs, Staff, Texts
from gpmetric.targets import parse_target, plain_granularities
from gpmetric.tracking.table import TRACK, check_trackers, folders_of

__all__ = ["SPLITS", "DiscoverRequest", "parse_nesting"]

SPLITS = ("calibration", "search", "validation", "test")  # disjoint; test is read once, at the end
_EVALUATIONS = 300  # of a campaign without a budget
_TARGETS = ("0.5", "0.6", "0.7", "2:4")
# Where time is short: the best that only mask first. Others come after them, and what never was the best comes last.
_IMPORTANCE = ("wanda", "gblm_l1", "ria", "pruner_zero", "gblm_l2", "sparsegpt", "magnitude_row", "magnitude")
# R takes as long as all gradients together, and that again wherever a formula with it is measured block by block.
_OPERANDS = tuple(name for name in OPERANDS if not is_regional([name]))
_PRIMITIVES = tuple(PRIMITIVES)
_EVOLVED = "search"  # the comparison group that is evolved with the formula


@dataclass(frozen=True, kw_only=True)
class DiscoverRequest(Inputs, Staff):
    """Everything `gpmetric discover` can be asked for."""

    model: Annotated[str | tuple[str, ...] | None, MODELS] = None
    search: Annotated[str | None, Option("Text every candidate is evaluated on.", reads=True)] = None
    validation: Annotated[str | None, Option("Text the winner is chosen on.", reads=True)] = None
    test: Annotated[str | None, Option("Text read once, at the end.", reads=True)] = None
    text: Annotated[str | None, Option("One text to cut into the four splits instead.", reads=True)] = None
    target: Annotated[
        tuple[str, ...], target_option(f"may be repeated. By default {', '.join(_TARGETS[:-1])} and {_TARGETS[-1]}.")
    ] = _TARGETS
    operands: Annotated[
        tuple[str, ...],
        Option("What formulas may use; W,X needs no gradients. By default all but R, with a plug-in's.", listed=True),
    ] = _OPERANDS
    primitives: Annotated[tuple[str, ...], Option("Operations formulas may use.", listed=True)] = _PRIMITIVES
    start: Annotated[
        tuple[str, ...],
        Option(
            "Formula or baseline to start from, layer: or block: before it or not; may be repeated.",
            metavar="METRIC",
            formula=True,
        ),
    ] = ()
    forbid: Annotated[
        tuple[str, ...], Option("Nesting no formula may have; may be repeated.", metavar="OUTER(INNER)")
    ] = ()
    update: Annotated[str, UPDATE] = "none"
    fit: Annotated[str, FIT] = "own"
    objective: Annotated[
        str, Option("What candidates are compared by; kl is the divergence from the dense model.",
                    choices=OBJECTIVES)
    ] = "kl"  # fmt: skip
    group: Annotated[
        str,
        Option(
            f"Where plain-number targets compete: {', '.join(plain_granularities())}, or search, which evolves it.",
            metavar="GROUP",
        ),
    ] = _EVOLVED
    population: Annotated[int, Option("Formulas per generation.", least=4)] = 40
    generations: Annotated[int | None, Option("Generations at most.", least=1)] = None
    evaluations: Annotated[
        int | None, Option(f"Evaluations paid for at most; {_EVALUATIONS} if no budget.", least=1)
    ] = None
    max_nodes: Annotated[int, Option("Size of a formula at most.", least=3)] = 30
    ledger: Annotated[
        Path | None,
        Option(
            "The campaign's SQLite file; campaign-DATE.sqlite by default. A file FILE.stop beside it, or SIGUSR1, ends "
            "the search after its generation; the result follows, and --resume searches further.",
            metavar="FILE",
            writes="ledger",
        ),
    ] = None
    resume: Annotated[bool, Option("Go on with the ledger if it is there.", names=("--resume",))] = False
    fork: Annotated[
        Path | None,
        Option(
            "Begin a new campaign, in its own --ledger, with the last population of this one; it is measured anew, and "
            "model, texts and options may be others.", metavar="LEDGER", reads=True,
        ),
    ] = None  # fmt: skip
    reseed: Annotated[
        bool,
        Option(
            "With --resume, draw from another --seed from the next generation on; a new campaign or --fork always "
            "draws from its own.", names=("--reseed",),
        ),
    ] = False  # fmt: skip
    on_generation: Annotated[
        str | None,
        Option(
            "Started after each generation, without a shell and not waited for; GPMETRIC_GENERATION, _LEDGER, "
            "_EVALUATIONS, _FORMULA and _MEAN_EXCESS are in its environment, the front is its input, as JSON.",
            metavar="COMMAND",
        ),
    ] = None
    track: Annotated[tuple[str, ...], TRACK] = ()
    live: Annotated[
        int | None,
        Option(
            "Serve the campaign's page while it runs, at this port of 127.0.0.1 alone; 0 for any that is free.",
            metavar="PORT", least=0, below=65536,
        ),
    ] = None  # fmt: skip
    cache: Annotated[
        Path | None, Option("Statistics cache; ~/.cache/gpmetric by default.", metavar="DIR", writes="cache")
    ] = None
    search_windows: Annotated[
        int,
        Option("Windows of the search text: an eighth for every candidate, half and all for the better ones.", least=1),
    ] = 32
    windows: Annotated[int | None, Option("Windows of validation and of test.", least=1)] = 128
    calibration_seeds: Annotated[
        int, Option("Draws of calibration windows for the confidence interval of the winner's gain.", least=0)
    ] = 3

    @classmethod
    def filled(cls, given: dict[str, Any]) -> dict[str, Any]:
        """With what plug-ins add, where no operands or primitives are named."""
        found = super().filled(given)
        added = {"operands": _OPERANDS + names_of("operand"), "primitives": _PRIMITIVES + names_of("primitive")}
        return added | found

    def check(self) -> None:
        super().check()
        if not self.target:
            raise InputError("--target is needed at least once")
        for text in self.target:
            parse_target(text)
        _check_names("--operands", self.operands, OPERANDS)
        _check_names("--primitives", self.primitives, PRIMITIVES)
        if "W" not in self.operands:
            raise InputError(f"--operands must hold W, but got {','.join(self.operands)}")
        check_fit(self.fit, [resolve_metric("W")], self.update)
        one_of("--group", self.group, (*plain_granularities(), _EVOLVED))
        if self.group not in ("row", _EVOLVED) and UPDATERS[self.update].granularity is not None:
            raise InputError(f"--group {self.group}: {self.update} has a threshold of its own per block of columns")
        for nesting in self.forbid:
            parse_nesting(nesting)
        for formula in self.start:
            self._check_start(formula)
        if self.on_generation is not None:
            _check_command("--on-generation", self.on_generation)
        check_trackers(self.track)
        named = [f"--{split}" for split in SPLITS if getattr(self, split) is not None]
        if self.reseed and not self.resume and self.fork is None:
            raise InputError("--reseed needs --resume: a new campaign draws from its own --seed")
        if self.text is not None and named:
            raise InputError(f"--text is cut into all four splits; it cannot stand beside {', '.join(named)}")

    def _check_start(self, formula: str) -> None:
        metric = resolve_metric(formula)
        reason = foreign_to(self, metric.expression)
        if reason:
            raise InputError(f"--start {formula!r} {reason}")
        if ":" in formula and self.group not in (_EVOLVED, metric.granularity):
            raise InputError(f"--start {formula!r} names another comparison group than --group {self.group}")

    @property
    def limits(self) -> dict[str, Any]:
        """Its budget by option, None being no limit; there is a limit of evaluations where none is asked for."""
        found = {name: getattr(self, name) for name in ("generations", "evaluations", "minutes")}
        return found | ({"evaluations": _EVALUATIONS} if set(found.values()) == {None} else {})

    def prolonged(self) -> Self:
        """The request that goes on with this campaign, with twice its budget."""
        return replace(self, resume=True, **{name: 2 * limit for name, limit in self.limits.items() if limit})

    @property
    def beside(self) -> dict[str, tuple[Path, str]]:
        note = {"the note of a ledger's progress": (note_file(self.ledger), "json")} if self.ledger else {}
        return note | folders_of(self.track)

    def completed(self) -> Self:
        return self if self.ledger else replace(self, ledger=Path(f"campaign-{datetime.now():%Y%m%d-%H%M%S}.sqlite"))

    @property
    def texts(self) -> Texts:
        counts = dict.fromkeys(SPLITS, self.windows) | {"calibration": self.samples, "search": self.search_windows}
        return Texts({split: getattr(self, split) for split in SPLITS}, counts, cut=self.text, disjoint=True)

    @property
    def calibration_draws(self) -> tuple[str, ...]:
        """Names of the bootstrap draws of the calibration windows."""
        return tuple(f"calibration-{number}" for number in range(self.calibration_seeds))

    @property
    def baselines(self) -> list[Metric]:
        """Those to compare with: all of them, but for those of gradients, or of R, where none are collected."""
        gradients, solves = needs_gradients(self.operands), UPDATERS[self.update].changes
        rows = [one for one in map(resolve_metric, BASELINES) if gradients or not one.needs_gradients]
        rows = [one for one in rows if is_regional(self.operands) or not is_regional(one.operands)]
        return [one for one in rows if solves or one.update != "admm"]  # which takes long and is no rival of masks

    @property
    def baselines_by_importance(self) -> list[Metric]:
        """Those to compare with where there may be no time for all: a cheap rival, then those of the same update."""
        order = {name: place for place, name in enumerate(_IMPORTANCE)}

        def importance(baseline: Metric) -> tuple[bool, int, int]:
            kind = 0 if baseline.update == self.update else 1 if baseline.update is None else 2
            return baseline.name != _IMPORTANCE[0], kind, order.get(baseline.name, len(order))

        return sorted(self.baselines, key=importance)

    @property
    def forbidden(self) -> tuple[Nesting, ...]:
        return (*FORBIDDEN, *map(parse_nesting, self.forbid))

    @property
    def groups_matter(self) -> bool:
        """Whether a formula's comparison group makes a difference: a plain-number target leaves it open."""
        is_open = any(parse_target(text).granularity is None for text in self.target)
        return is_open and UPDATERS[self.update].granularity is None

    @property
    def groups(self) -> tuple[str, ...]:
        """The comparison groups that formulas may have."""
        evolved = plain_granularities() if self.groups_matter else ("row",)
        return evolved if self.group == _EVOLVED else (self.group,)


def parse_nesting(text: str) -> Nesting:
    """The (outer, inner) primitives of a nesting such as "exp(log)".

    Raises:
        InputError: another form, or an unknown primitive.
    """
    found = re.fullmatch(r"\s*(\w+)\s*\(\s*(\w+)\s*\)\s*", text)
    if found is None:
        raise InputError(f"--forbid must be like exp(log), outer(inner), but got {text!r:.60}")
    _check_names("--forbid", found.groups(), PRIMITIVES)
    return found[1], found[2]


def _check_command(option: str, command: str) -> None:
    """Refuses what cannot be taken apart, or names no program."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(f"{option} {command!r:.60} is no command: {error}") from error
    if not words or shutil.which(words[0]) is None:
        raise InputError(f"{option} {command!r:.60}: there is no program {words[0] if words else ''!r}")


def _check_names(option: str, names: Iterable[str], known: Iterable[str]) -> None:
    accepted = tuple(known)
    for name in names:
        if name not in accepted:
            close = get_close_matches(name, accepted, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise InputError(f"{option}: unknown name {name!r}; {hint}accepted: {', '.join(accepted)}")
