"""What a run of `gpmetric allocate` is asked for, and the tables of its choices, read before torch is imported."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, ClassVar

from gpmetric.allocation.search_budget import Budget
from gpmetric.errors import InputError
from gpmetric.evaluation.objectives import OBJECTIVES
from gpmetric.lazy import lazy
from gpmetric.metrics import Metric, resolve_metric
from gpmetric.operands import OPERANDS
from gpmetric.options import FORCE_FILES, Option
from gpmetric.plugins import open_table
from gpmetric.pruning.requests import metric_option
from gpmetric.pruning.updaters import FITS, UPDATERS, updater_of
from gpmetric.session.inputs import Staff
from gpmetric.session.search_inputs import SearchInputs
from gpmetric.targets import GRANULARITIES, Target, parse_target
from gpmetric.tracking.table import TRACK, check_trackers, folders_of

__all__ = [
    "ALLOCATORS", "GENES", "MOST_LEVELS", "PATTERNS", "AllocateRequest", "Allocator", "Genes", "parse_pattern", "rules",
]  # fmt: skip

MOST_LEVELS = 250  # of the largest gene; a byte tells at which one a weight goes

_RULE = ("problem", "sparsity")  # what a rule, and what a search is called with
_SEARCH = ("problem", "request", "profiles", "on_generation")
_SOLVED_LEVELS = 32  # where every level is a copy of the weights
_EVALUATIONS = 800  # of a search without a budget


@dataclass(frozen=True)
class Allocator:
    """A way to the level of every gene.

    By a rule, (Problem, mean sparsity) -> levels, which is a baseline beside the front, too; or by a search, (Problem,
    AllocateRequest, profiles to begin with, on_generation) -> the levels that it found.
    """

    meaning: str
    rule: Callable[..., tuple[int, ...]] | None = None
    search: Callable[..., list[tuple[int, ...]]] | None = None
    measures: str = "nothing"  # or `candidates` at every sparsity, or `genes`: each alone, once for all
    one_sparsity: bool = False  # whether a search is of --sparsity alone, and not of a front
    begins: bool = False  # whether a search begins with allocations that are there already
    needs: tuple[str, ...] = ()  # operands that a rule goes by besides X
    starts_masks: bool = True  # whether nsga2 begins with a rule also where weights stay; ledgers begin as they did


ALLOCATORS: dict[str, Allocator] = {
    "nsga2": Allocator(
        "searches the whole front between sparsity and loss",
        search=lazy("gpmetric.allocation.nsga2:search_front"),
        begins=True,
    ),
    "evopress": Allocator(
        "searches one sparsity by level switches",
        search=lazy("gpmetric.allocation.evopress:search_sparsity"),
        one_sparsity=True,
    ),
    "sensitivity": Allocator(
        "greedy, by what each gene alone costs", lazy("gpmetric.allocation.allocators:sensitivity"), measures="genes"
    ),
    "arithmetic": Allocator(
        "an arithmetic progression over the blocks",
        lazy("gpmetric.allocation.allocators:arithmetic"),
        measures="candidates",
    ),
    "global": Allocator(
        "half of the way from uniform to one threshold over all weights on W*W*F",
        lazy("gpmetric.allocation.allocators:one_threshold"),
        needs=("F",),
        starts_masks=False,
    ),
    "dlp": Allocator(
        "blocks with lower median scores keep more", lazy("gpmetric.allocation.allocators:dlp"), starts_masks=False
    ),
    "owl": Allocator("blocks with more outliers keep more", lazy("gpmetric.allocation.allocators:owl")),
    "uniform": Allocator("every gene alike", lazy("gpmetric.allocation.allocators:uniform")),
}


def _check_allocator(name: str, row: Allocator, fellows: Mapping[str, Any]) -> None:
    """Refuses the row of a plug-in whose function could not be called."""
    if re.fullmatch(r"[a-z][a-z0-9_-]*", name) is None:
        raise InputError(f"an allocator is called in small letters, but by {name!r}")
    if (row.rule is None) == (row.search is None):
        raise InputError("it must have either a rule or a search")
    if row.measures not in ("nothing", "candidates", "genes") or not set(row.needs) <= set(OPERANDS):
        raise InputError(f"measures {row.measures!r}, needs {list(row.needs)}: there is no such")
    function, takes = (row.rule, _RULE) if row.rule is not None else (row.search, _SEARCH)
    assert function is not None
    try:
        signature(function).bind(*takes)
    except (TypeError, ValueError) as error:
        raise InputError(f"it is called with {', '.join(takes)}: {error}") from error


open_table("allocator", ALLOCATORS, Allocator, _check_allocator)


def rules() -> dict[str, Allocator]:
    """The allocators that do not search, the simplest first."""
    return {name: row for name, row in reversed(ALLOCATORS.items()) if row.rule is not None}


@dataclass(frozen=True)
class Genes:
    """Which layers share a level."""

    meaning: str
    key: Callable[[str], str]  # of a layer's name; the layers of a block that have the same are one gene


GENES: dict[str, Genes] = {
    "matrix": Genes("every matrix has its own level", lambda name: name),
    "module": Genes(
        "the matrices of one sub-module of a block (its attention, its MLP) share one",
        lambda name: name.rpartition(".")[0],
    ),
    "block": Genes("the matrices of one block share one", lambda name: ""),
}

PATTERNS = ("dense", "4:8", "2:4", "1:4")  # levels of an N:M mix


@dataclass(frozen=True, kw_only=True)
class AllocateRequest(SearchInputs, Staff):
    """Everything `gpmetric allocate` can be asked for.

    Of evaluations, tokens and minutes, the first one spent ends the search. A token of a backward pass counts for
    three. The first candidates are measured in any case. Minutes are the whole command's: the search has what
    calibration and validation leave of them.
    """

    unused: ClassVar[frozenset[str]] = frozenset({"statistics_dtype"})  # none are kept

    model: Annotated[
        str | None, Option("Hugging Face directory or name; the demo model if none.", metavar="MODEL", reads=True)
    ] = None
    output: Annotated[
        Path | None,
        Option(
            "Allocation to write, for prune --allocation.",
            metavar="FILE",
            names=("--output", "-o"),
            writes="allocation",
        ),
    ] = None
    search: Annotated[str | None, Option("Text every candidate is measured on.", reads=True)] = None
    validation: Annotated[str | None, Option("Text the front is reported on.", reads=True)] = None
    metric: Annotated[str, metric_option("What ranks weights")] = "wanda"
    sparsity: Annotated[
        float | None,
        Option("Mean sparsity of the allocation that is written.", accepted=("--sparsity-ratio",), above=0, below=1),
    ] = None
    max_loss_ratio: Annotated[
        float | None, Option("Or the sparsest whose validation loss is at most so many times the dense one.", above=1)
    ] = None
    granularity: Annotated[
        str | None, Option("Where scores compete; the metric's own by default.", choices=GRANULARITIES)
    ] = None
    patterns: Annotated[tuple[str, ...], Option("Levels under --granularity n:m.", listed=True)] = PATTERNS
    update: Annotated[
        str,
        Option(
            "What the allocation will be used with; candidates have its weights. {choices}.",
            metavar="UPDATE",
            choices=UPDATERS,
        ),
    ] = "none"
    fit: Annotated[
        str,
        Option("What kept weights will be fitted to there: a layer's own outputs, or the dense model's.", choices=FITS),
    ] = "own"
    levels: Annotated[
        int | None,
        Option(
            f"Sparsities of the largest gene, {MOST_LEVELS} at most and by default, {_SOLVED_LEVELS} with --update.",
            least=2,
        ),
    ] = None
    genes: Annotated[str, Option("What shares a sparsity.", choices=GENES)] = "matrix"
    allocator: Annotated[str, Option("What finds the allocation: {choices}.", metavar="NAME", choices=ALLOCATORS)] = (
        "nsga2"
    )
    objective: Annotated[
        str, Option("What candidates are compared by; kl is the divergence from the dense model.", choices=OBJECTIVES)
    ] = "kl"
    lowest: Annotated[float, Option("Lowest sparsity of the front.", above=0, below=1)] = 0.4
    highest: Annotated[float, Option("Highest sparsity of the front.", above=0, below=1)] = 0.8
    init: Annotated[
        tuple[str, ...], Option("Allocation to begin with too; may be repeated.", metavar="FILE", reads=True)
    ] = ()
    population: Annotated[int, Option("Survivors of a generation.", least=4)] = 24
    evaluations: Annotated[
        int | None, Option(f"Candidates measured at most; {_EVALUATIONS} if no budget.", least=1)
    ] = None
    tokens: Annotated[int | None, Option("Tokens of the search at most.", least=1)] = None
    ledger: Annotated[
        Path | None,
        Option("JSON Lines file that keeps everything measured.", "FILE", accepted=("--archive",), writes="ledger"),
    ] = None
    csv: Annotated[Path | None, Option("Front and baselines as a table.", metavar="FILE", writes="table")] = None
    plot: Annotated[Path | None, Option("Front and heat map: .png or .pdf.", metavar="FILE", writes="picture")] = None
    track: Annotated[tuple[str, ...], TRACK] = ()
    force: Annotated[bool, FORCE_FILES] = False

    @property
    def beside(self) -> dict[str, tuple[Path, str]]:
        return folders_of(self.track)

    def check(self) -> None:
        metric = resolve_metric(self.metric)
        super().check()
        check_trackers(self.track)
        self._check_update(metric)
        for text in self.patterns:
            parse_pattern(text)
        if self.patterns != PATTERNS and not (self.granularity and GRANULARITIES[self.granularity].counted):
            raise InputError("--patterns are the levels of --granularity n:m, which is not asked for")
        if self.lowest >= self.highest:
            raise InputError(f"--lowest {self.lowest} must be below --highest {self.highest}")
        if self.sparsity is not None and self.max_loss_ratio is not None:
            raise InputError("--sparsity and --max-loss-ratio both pick an allocation; give one of them")
        if self.by_rule and self.ledger is not None:
            raise InputError(
                f"--ledger keeps the candidates of a search, and --allocator {self.allocator} measures none"
            )
        if self.init and not ALLOCATORS[self.allocator].begins:
            names = (name for name, row in ALLOCATORS.items() if row.begins)
            raise InputError(f"--init needs --allocator {' or '.join(names)}")
        if self.sparsity is None and ALLOCATORS[self.allocator].one_sparsity:
            raise InputError(f"--allocator {self.allocator} searches one sparsity: --sparsity is needed")

    def _check_update(self, metric: Metric) -> None:
        if not self.changes:
            if self.fit != "own":
                changing = ", ".join(name for name, row in UPDATERS.items() if row.changes)
                raise InputError(f"--fit {self.fit} is of weights that change: take --update {changing}")
        elif self.granularity is not None and not GRANULARITIES[self.granularity].counted:
            own = updater_of(metric, self.update).granularity
            if own not in (None, self.granularity):
                raise InputError(f"--granularity {self.granularity}: the updater has its own threshold, {own}")
        if self.levels is None:
            return
        if self.levels > MOST_LEVELS:
            raise InputError(f"--levels must be at most {MOST_LEVELS}, but got {self.levels}")
        if self.granularity is not None and GRANULARITIES[self.granularity].counted:
            raise InputError(f"--levels {self.levels}: those of --granularity {self.granularity} are its --patterns")

    @property
    def changes(self) -> bool:
        """Whether kept weights change in use, so that what is picked is measured there, too."""
        return UPDATERS[self.update].changes

    @property
    def by_rule(self) -> bool:
        """Whether all that is asked for is one rule's allocation, which no candidate is measured for, and its use."""
        row = ALLOCATORS[self.allocator]
        return self.changes and self.sparsity is not None and row.rule is not None and row.measures == "nothing"

    @property
    def solves(self) -> bool:
        """Whether kept weights of candidates are updated."""
        return UPDATERS[self.update].solves and not self.by_rule

    @property
    def steps(self) -> int:
        """Levels of the largest gene."""
        return self.levels or (_SOLVED_LEVELS if self.solves else MOST_LEVELS)

    @property
    def evidence(self) -> frozenset[str]:
        """Operands that are measured for rules besides X: for the one asked for, or for all where that is cheap."""
        asked = rules().values() if self.solves else [ALLOCATORS[self.allocator]]
        return frozenset(name for row in asked for name in row.needs)

    @property
    def budget(self) -> Budget:
        """When the search ends, if it had all of the time."""
        budget = Budget(self.evaluations, self.tokens, self.minutes)
        return Budget(evaluations=_EVALUATIONS) if budget == Budget() else budget


def parse_pattern(text: str) -> Target:
    """A level of an N:M mix.

    Raises:
        InputError: neither `dense` nor N:M.
    """
    if text == "dense":
        return Target("0.0", "row", 0.0)
    refused = InputError(f"--patterns {text!r:.60}: accepted are dense, 2:4, 4:8, 1:4 and the like")
    try:
        target = parse_target(text)
    except InputError as error:
        raise refused from error
    if not target.group:
        raise refused
    return target
