"""How a recipe is chosen: published ones, formulas, allocations, each step beginning with the best so far."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor

from gpmetric.allocation.by_rule import directions_of
from gpmetric.catalogue import CATALOGUE
from gpmetric.errors import GpmetricError, OutOfMemoryError, TimeOverError
from gpmetric.evolution.evolve import evolve
from gpmetric.evolution.request import DiscoverRequest
from gpmetric.evolution.selection import Individual
from gpmetric.evolution.task_clock import TaskClock
from gpmetric.evolution.workplace import campaign_work
from gpmetric.pruning.prune import PruneListener
from gpmetric.pruning.recipe import Recipe
from gpmetric.pruning.updaters import resolve_target
from gpmetric.session.deadline import Deadline
from gpmetric.session.inputs import Inputs
from gpmetric.session.session import Session
from gpmetric.session.work import Work
from gpmetric.targets import parse_target
from gpmetric.tuning.allocations import Shares, climb, mixtures
from gpmetric.tuning.halving import halve
from gpmetric.tuning.parts import SOLVER, first_recipe, methods, rivals, with_rounds, without
from gpmetric.tuning.request import TuneRequest
from gpmetric.tuning.trials import SHARES, Trial, Trials, key_of

__all__ = ["Choice", "TuneListener", "search_work"]

_EVOLVED = 5  # formulas of a search that are tried on validation
_FEWEST = 24  # candidates that a search is worth while for
_EVALUATIONS = 200  # of a search that no --minutes end
_ENDS = {"formulas": 0.5, "methods": 0.65, "allocations": 0.9}  # of the time for choosing, when each must have ended
_CLIMBED = 12  # candidates that a search of allocations is worth while for
_CLIMBING = 0.5  # of the windows that it measures on
_RUNGS = 0.75  # of what measuring on all windows takes, that a recipe takes in successive halving
_PRUNING = 2.0  # times what the solver takes on all windows, to prune and verify
_TABLE = 5.0  # and for the table of parts, at most a share of the time
_TABLE_SHARE = 0.2


class TuneListener(PruneListener):
    """What tuning tells while it runs; every method may be overridden."""

    def step(self, name: str) -> None:
        """The next step is begun."""

    def trial(self, trial: Trial, excess: float) -> None:
        """A recipe is measured; excess log-loss in nats per token."""

    def generation(self, number: int, front: Sequence[Individual], evaluations: int) -> None:
        """A generation of formulas is finished."""

    def cut(self, what: str) -> None:
        """Something is left out for want of time."""


@dataclass
class Choice:
    """The steps to a recipe.

    Attributes:
        cuts: what was left out for want of time.
        evolved: what a search of formulas came to; None where there was none.
        table: once the best is known: what stands beside it.
    """

    request: TuneRequest
    trials: Trials
    told: TuneListener
    deadline: Deadline
    cuts: list[str] = field(default_factory=list)
    evolved: dict[str, Any] | None = None
    table: dict[str, Trial] = field(default_factory=dict)

    def run(self) -> Trial:
        """The best recipe on validation.

        Raises:
            GpmetricError: time was over before one was measured.
        """
        session = self.trials.session
        plain = first_recipe(self.request, session)
        self.told.dense({"validation": math.exp(self.trials.dense())})
        self.told.step("published recipes")
        published = methods(plain, ())
        solver = self._measure([one for one in published if (one.update, one.fit) == SOLVER][:1], SHARES[0])
        compared = [trial.recipe for trial in self._measure(rivals(plain))]
        for one in rivals(plain):
            if one not in compared:
                self._cut(f"{one.metric}, which the choice was not compared with")
        if self.trials.best is None:
            minutes = f"--minutes {self.request.minutes or 0:g} were over before a recipe was measured"
            raise GpmetricError(f"{minutes}: allow more, or take fewer --samples or --windows")
        each = self.trials.expected(solver[0].recipe, 1.0) if solver else math.inf
        table = min(_TABLE * each, _TABLE_SHARE * self.deadline.seconds)
        begun, end = self.deadline.now(), self.deadline.end - table - _PRUNING * each
        ends = {step: begun + share * (end - begun) for step, share in _ENDS.items()}
        tried = methods(plain, self.request.metric)
        until = min(ends["formulas"], ends["methods"] - _RUNGS * each * (len(tried) + _EVOLVED))
        with self._lasting("evolving formulas"):
            self._evolve(each, until)
        formulas = self.evolved["formulas"] if self.evolved else ()
        self._halve("metrics and updates", methods(plain, [*self.request.metric, *formulas]), ends["methods"])
        if parse_target(self.request.target).group:  # patterns are the same everywhere, but channels can change places
            moved = replace(self.trials.best.recipe, permute=True)
            self._try("channels in another order", moved, ends["allocations"])
        else:
            with self._lasting("allocations"):
                self._allocate(each, ends["allocations"])
        self._try("rounds over whole blocks", with_rounds(self.trials.best.recipe), end)
        while self._compare(plain):  # a part that does harm is left out, and the others are looked at again
            self.told.step("without a part that does harm")
        return self.trials.best

    def describe(self, best: Trial) -> dict[str, Any]:
        """The JSON document, but for what pruning adds."""
        session, trials = self.trials.session, self.trials
        dense = {"validation": math.exp(trials.dense())} | {
            one.text.name: math.exp(trials.dense_on(one.tokens)) for one in session.evaluated
        }
        return session.describe() | {
            "digest": session.model.digest,
            "target": self.request.target,
            "recipe": best.recipe.document(),
            "excess": trials.excess(best),
            "dense": dense,
            "table": [{"what": name} | trials.describe(trial) for name, trial in self.table.items()],
            "evolved": self.evolved,
            "trials": [trials.describe(trial) for trial in trials.found],
            "cut": self.cuts,
            "splits": {name: windows.describe() for name, windows in session.windows.items()},
            "texts": [one.describe() for one in session.evaluated],
        }

    def _evolve(self, each: float, until: float) -> None:
        """Evolves formulas for the solver, if there is time for enough candidates of so many seconds.

        A search that a file keeps is gone on with where time had cut it.
        """
        if not self.request.evolve:
            return
        if (known := self.trials.searched.get("formulas")) is not None:
            self.evolved = dict(known)
            if not known["cut"]:
                return
        affordable = (until - self.deadline.now()) / max(each, 1e-9)
        if affordable < _FEWEST:
            self._cut(f"evolving formulas, of which {max(0, int(affordable))} could be tried")
            return
        self.told.step("formulas")
        request, clock = _search_request(self.request), TaskClock(self.deadline.now, until, until)
        found, paid, cut = evolve(
            request, self.trials.session, _EVOLVED, clock, self.trials.progress, self.told.generation
        )
        self.evolved = {"evaluations": paid, "formulas": found, "cut": cut}
        self.trials.keep("formulas", self.evolved)

    @contextmanager
    def _lasting(self, what: str) -> Iterator[None]:
        """A step that there may be no time or no memory for; what is known before it is not lost."""
        self.trials.forget()
        try:
            yield
        except (TimeOverError, OutOfMemoryError) as error:
            self._cut(f"{what}: {error}")

    def _halve(self, what: str, recipes: Sequence[Recipe], until: float) -> None:
        """Successive halving, after which what is left may be the best."""
        self.told.step(what)
        before = len(self.trials.found)
        found = halve(self.trials, recipes, until)
        self._tell(before)
        if not found:
            self._cut(f"{what}: none could be measured on all windows")

    def _allocate(self, each: float, until: float) -> None:
        """Allocations by rules, then a search in use that begins at the best of them on the search text."""
        assert self.trials.best is not None
        self.told.step("allocations")
        session, recipe = self.trials.session, self.trials.best.recipe
        target = parse_target(recipe.target)
        settled = resolve_target(target, session.metric(recipe.metric), recipe.update)
        # named, so that what replaces the metric or the update keeps to the group that the allocation has
        recipe = replace(recipe, target=f"{settled.granularity}:{target.sparsity!r}")
        directions = directions_of(session, settled.granularity or "row", target.sparsity, self.trials.progress)
        pairs = mixtures(directions, recipe)
        self._halve("allocations by rule", [recipe for _, recipe in pairs], until - _CLIMBED * each)
        searching = self.trials.on_search_text()
        if not searching.begun and (until - self.deadline.now()) / max(each, 1e-9) < _CLIMBED:
            self._cut("searching an allocation")
            return
        self.told.step("a search of allocations")
        self.trials.forget()
        starts = [Shares(), *(shares for shares, _ in pairs)]
        here, whole = climb(searching, directions, recipe, starts, _CLIMBING, until - each)
        if not whole:
            self._cut("the rest of the search of allocations")
        if here:
            self._measure([replace(recipe, allocation=directions.allocation(here))])

    def _try(self, what: str, recipe: Recipe, until: float) -> None:
        """One recipe on all windows, if there is time to measure it and then to prune by it."""
        self.told.step(what)
        found = self._measure([recipe], SHARES[0], until)
        last = self.deadline.end - _PRUNING * self.trials.expected(recipe, 1.0)
        found = found and self._measure([recipe], 1.0, min(until, last))
        if not found:
            self._cut(what)

    def _compare(self, plain: Recipe) -> bool:
        """The table: the best, without each of its parts, and the rivals; whether one of them is better."""
        best = self.trials.best
        assert best is not None
        self.told.step("what each part is worth")
        rows = {"recipe": best.recipe, **{one.metric: one for one in rivals(plain)}}
        rows |= {f"without {part}": recipe for part, recipe in without(best.recipe)}
        texts = [one.tokens for one in self.trials.session.evaluated]
        until = self.deadline.end - _PRUNING * self.trials.expected(best.recipe, 1.0)
        self.table = {"recipe": best}
        for name, recipe in rows.items():
            if found := self._measure([recipe], 1.0, until, texts):
                self.table[name] = found[0]
            else:
                self._cut(f"what each part is worth: {name}")
        return key_of((self.trials.best or best).recipe) != key_of(best.recipe)

    def _measure(
        self, recipes: Sequence[Recipe], share: float = 1.0, until: float | None = None, texts: Sequence[Tensor] = ()
    ) -> list[Trial]:
        before = len(self.trials.found)
        found = self.trials.measure(recipes, share, self.deadline.end if until is None else until, texts)
        self._tell(before)
        return found

    def _tell(self, first: int) -> None:
        for trial in self.trials.found[first:]:
            self.told.trial(trial, self.trials.excess(trial))

    def _cut(self, what: str) -> None:
        if what not in self.cuts:
            self.cuts.append(what)
            self.told.cut(what)


def search_work(request: TuneRequest, session: Session) -> Work | None:
    """What the search of formulas takes; None where there is none."""
    if not request.evolve:
        return None
    return campaign_work(replace(session, inputs=_search_request(request)))


def _search_request(request: TuneRequest) -> DiscoverRequest:
    """The campaign whose search is a step of tuning."""
    update, fit = SOLVER
    start = dict.fromkeys(entry.formula for entry in CATALOGUE.values() if entry.update == update)
    shared = {one.name: getattr(request, one.name) for one in fields(Inputs)}
    ledger = request.formulas_ledger if request.ledger else None
    return DiscoverRequest(
        **shared | {"windows": request.windows}, target=(request.target,), update=update, fit=fit, start=tuple(start),
        search_windows=request.search_windows, calibration_seeds=0, ledger=ledger,
        resume=request.resume, evaluations=None if request.minutes else _EVALUATIONS,
    )  # fmt: skip
