"""How a recipe is chosen: published ones, formulas, allocations, each step beginning with the best so far."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from gpmetric.allocation.by_rule import directions_of
from gpmetric.discovered import CATALOGUE
from gpmetric.evolution.evolve import evolve
from gpmetric.evolution.request import DiscoverRequest
from gpmetric.evolution.workplace import campaign_work
from gpmetric.executors import TaskClock
from gpmetric.pruning.recipe import Recipe
from gpmetric.pruning.updaters import resolve_target
from gpmetric.session.inputs import Inputs
from gpmetric.session.session import Session
from gpmetric.session.work import Work
from gpmetric.targets import parse_target
from gpmetric.tuning.allocations import Shares, climb, mixtures
from gpmetric.tuning.parts import SOLVER, first_recipe, methods, rivals, with_rounds, without
from gpmetric.tuning.request import TuneRequest
from gpmetric.tuning.steps import Steps
from gpmetric.tuning.trial_log import SHARES
from gpmetric.tuning.trials import Trial, Trials

__all__ = ["Choice", "search_work"]

_EVOLVED = 5  # formulas of a search that are tried on validation
_FEWEST = 24  # candidates that a search is worth while for
_EVALUATIONS = 200  # of a search that no --minutes end
_ENDS = {"formulas": 0.5, "methods": 0.65, "allocations": 0.9}  # of the time for choosing, when each must have ended
_CLIMBED = 12  # candidates that a search of allocations is worth while for
_CLIMBING = 0.5  # of the windows that it measures on
_RUNGS = 0.75  # of what measuring on all windows takes, that a recipe takes in successive halving
_PRUNING = 1.5  # times what the solver takes on all windows, to prune and verify
_TABLE = 5.0  # and for the table of parts, at most a share of the time, and nothing if that is less than two of them
_TABLE_SHARE = 0.15
_SOLVING = 4.0  # times what the slowest published rival takes, that the strongest method is thought to take
_BEGINNING = 0.38  # of the time that is left, that it may take; otherwise it is measured on a few windows


@dataclass
class Choice(Steps[Recipe]):
    """The steps to a recipe.

    Attributes:
        evolved: what a search of formulas came to; None where there was none.
    """

    trials: Trials
    evolved: dict[str, Any] | None = None

    def run(self) -> Trial:
        """The best recipe on validation.

        Raises:
            GpmetricError: time was over before one was measured.
        """
        session = self.trials.session
        plain = first_recipe(self.request, session)
        self.told.dense({"validation": math.exp(self.trials.dense())})
        self.told.step("published recipes")
        compared = [trial.recipe for trial in self.measure(rivals(plain))]
        for one in rivals(plain):
            if one not in compared:
                self.cut(f"{one.metric}, which the choice was not compared with")
        if self.best is None:
            raise self.nothing()
        each = self._begin(methods(plain, ())[0])
        table = min(_TABLE * each, _TABLE_SHARE * self.deadline.seconds)
        begun, end = self.deadline.now(), self.deadline.end - (table >= 2 * each) * table - _PRUNING * each
        ends = self._ends(begun, end, each)
        tried = methods(plain, self.request.metric)
        until = min(ends["formulas"], ends["methods"] - _RUNGS * each * (len(tried) + _EVOLVED))
        with self.lasting("evolving formulas"):
            self._evolve(each, until)
        formulas = self.evolved["formulas"] if self.evolved else ()
        self.halve("metrics and updates", methods(plain, [*self.request.metric, *formulas]), ends["methods"])
        if parse_target(self.request.target).group:  # patterns are the same everywhere, but channels can change places
            self._try("channels in another order", replace(self.best.recipe, permute=True), ends["allocations"])
        else:
            with self.lasting("allocations"):
                self._allocate(each, ends["allocations"])
        self._try("rounds over whole blocks", with_rounds(self.best.recipe))
        self.trials.recall()
        while self._compare(plain):  # a part that does harm is left out, and the others are looked at again
            self.told.step("without a part that does harm")
        return self.best

    def _begin(self, strongest: Recipe) -> float:
        """Measures the strongest known method, on a few windows if all may take too long; seconds on all of them."""
        longest = max(trial.seconds for trial in self.trials.found)
        whole = _SOLVING * longest <= _BEGINNING * self.deadline.left
        found = self.measure([strongest], 1.0 if whole else SHARES[0])
        return self.trials.expected(strongest, 1.0) if found else math.inf

    def _ends(self, begun: float, end: float, each: float) -> dict[str, float]:
        """When steps must have ended: with a share of the time, or before, so that an allocation and rounds still fit.

        These two are worth more than another metric; rounds take their time when the model is pruned, too.
        """
        assert self.best is not None
        rounds = (1 + _PRUNING) * self.trials.expected(with_rounds(self.best.recipe), 1.0) - _PRUNING * each
        rounds = rounds if begun + rounds <= end else 0.0
        allocation = each if begun + rounds + each <= end else 0.0
        latest = {"allocations": end - rounds, "methods": end - rounds - allocation}
        return {step: min(begun + share * (end - begun), latest.get(step, end)) for step, share in _ENDS.items()}

    def describe(self, best: Trial) -> dict[str, Any]:
        return super().describe(best) | {"evolved": self.evolved}

    def _evolve(self, each: float, until: float) -> None:
        """Evolves formulas for the solver, if there is time for enough candidates of so many seconds.

        A search that a file keeps is gone on with where time had cut it.
        """
        if not self.request.evolves:
            return
        if (known := self.trials.searched.get("formulas")) is not None:
            self.evolved = dict(known)
            if not known["cut"]:
                return
        affordable = max(0.0, until - self.deadline.now()) / max(each, 1e-9)
        if affordable < _FEWEST:
            self.cut(f"evolving formulas, of which {int(affordable)} could be tried")
            return
        self.told.step("formulas")
        self.trials.forget()
        request, clock = _search_request(self.request), TaskClock(self.deadline.now, until, until)
        found, paid, cut = evolve(
            request, self.trials.session, _EVOLVED, clock, self.trials.progress, self.told.generation
        )
        self.evolved = {"evaluations": paid, "formulas": found, "cut": cut}
        self.trials.keep("formulas", self.evolved)

    def _allocate(self, each: float, until: float) -> None:
        """Allocations by rules, then a search in use that begins at the best of them on the search text."""
        assert self.best is not None
        self.told.step("allocations")
        session, recipe = self.trials.session, self.best.recipe
        target = parse_target(recipe.target)
        settled = resolve_target(target, session.metric(recipe.metric), recipe.update)
        # named, so that what replaces the metric or the update keeps to the group that the allocation has
        recipe = replace(recipe, target=f"{settled.granularity}:{target.sparsity!r}")
        directions = directions_of(session, settled.granularity or "row", target.sparsity, self.trials.progress)
        pairs = mixtures(directions, recipe)
        left = (until - self.deadline.now()) / max(each, 1e-9)
        climbing = _CLIMBED * each if left >= _CLIMBED + _RUNGS * len(pairs) else 0.0
        self.halve("allocations by rule", [recipe for _, recipe in pairs], until - climbing)
        searching = self.trials.on_search_text()
        if not searching.begun and (until - self.deadline.now()) / max(each, 1e-9) < _CLIMBED:
            self.cut("searching an allocation")
            return
        self.told.step("a search of allocations")
        self.trials.forget()
        starts = [Shares(), *(shares for shares, _ in pairs)]
        here, whole = climb(searching, directions, recipe, starts, _CLIMBING, until - each)
        if not whole:
            self.cut("the rest of the search of allocations")
        if here:
            self.measure([replace(recipe, allocation=directions.allocation(here))])

    def _try(self, what: str, recipe: Recipe, until: float = math.inf) -> None:
        """One recipe on all windows, if there is time to measure it and then to prune by it."""
        self.told.step(what)
        last = self.deadline.end - _PRUNING * self.trials.expected(recipe, 1.0)
        if not self.measure([recipe], 1.0, min(until, last)):
            self.cut(what)

    def _compare(self, plain: Recipe) -> bool:
        """The table: the best, without each of its parts, and the rivals; whether one of them is better."""
        assert self.best is not None
        rows = {one.metric: one for one in rivals(plain)}
        rows |= {f"without {part}": recipe for part, recipe in without(self.best.recipe)}
        return self.compare(rows, self.deadline.end - _PRUNING * self.trials.expected(self.best.recipe, 1.0))


def search_work(request: TuneRequest, session: Session) -> Work | None:
    """What the search of formulas takes; None where there is none."""
    if not request.evolves:
        return None
    return campaign_work(replace(session, inputs=_search_request(request)))


def _search_request(request: TuneRequest) -> DiscoverRequest:
    """The campaign whose search is a step of tuning."""
    update, fit = SOLVER
    start = dict.fromkeys(entry.formula for entry in CATALOGUE.values() if entry.update == update)
    shared = {one.name: getattr(request, one.name) for one in fields(Inputs)}
    return DiscoverRequest(
        **shared | {"windows": request.windows}, target=(request.target,), update=update, fit=fit, start=tuple(start),
        search_windows=request.search_windows, calibration_seeds=0, ledger=request.formulas_ledger,
        resume=request.resume, evaluations=None if request.minutes else _EVALUATIONS,
    )  # fmt: skip
