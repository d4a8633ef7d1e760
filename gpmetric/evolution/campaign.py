"""The generation loop: draw, remove what is equivalent, screen, evaluate, survive, commit.

All randomness is in the driver and results are applied in candidate order, so the ledger does not depend on the number
of workers, nor on how often the campaign was stopped and resumed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from gpmetric.errors import GpmetricError, LedgerError
from gpmetric.evolution.breeding import Breeder, Draw
from gpmetric.evolution.executors import Executor
from gpmetric.evolution.ledger import Candidate, Evaluation, Ledger, Measurement
from gpmetric.evolution.objectives import best_of
from gpmetric.evolution.plan import Plan
from gpmetric.evolution.screening import PROBE, Ladder, OutOfTime
from gpmetric.evolution.selection import Individual, pareto_individuals, select_survivors
from gpmetric.pruning.metrics import resolve_metric

__all__ = ["Campaign"]

_PATIENCE = 5  # generations in a row without an evaluation before nothing new is expected


class Campaign:
    """A search that can be stopped anywhere: what is in the ledger is never computed again.

    Args:
        plan: what to search for.
        ledger: opened for this campaign.
        executor: applies an Evaluator to tasks.
        out_of_time: asked between two measurements; when true, the search ends without finishing its generation.
        on_generation: called after every generation with its number and the campaign.
    """

    def __init__(
        self,
        plan: Plan,
        ledger: Ledger,
        executor: Executor,
        *,
        out_of_time: Callable[[], bool] = lambda: False,
        on_generation: Callable[[int, Campaign], None] = lambda number, campaign: None,
    ) -> None:
        self._plan = plan
        self._ledger = ledger
        self._executor = executor
        self._out_of_time = out_of_time
        self._on_generation = on_generation
        self._rng = random.Random(plan.seed)
        self._breeder = Breeder(plan, self._rng)
        self._population: list[Individual] = []
        self._bars: tuple[dict[str, float], dict[str, float]] = {}, {}
        self._number = 0
        self._barren = 0  # generations in a row that found nothing worth evaluating
        # what was seen: ranked form -> evaluation, and masks -> evaluation; None where it did not come to one
        self._by_form: dict[str, int | None] = {}
        self._by_mask: dict[str, int | None] = {}

    def run(self) -> None:
        """Runs, or goes on, until the plan's budget is spent, time is out, or nothing new is found.

        Raises:
            GpmetricError: no formula at all could be evaluated.
            LedgerError: the ledger holds other draws than this campaign makes.
        """
        self._restore()
        while self._wants_more() and not self._out_of_time() and self._generation():
            self._on_generation(self._number - 1, self)
        if not self._ledger.evaluations("done"):
            raise GpmetricError("no formula could be evaluated; the ledger holds the reasons")

    def individuals(self) -> list[Individual]:
        """Every metric evaluated so far, in the ledger's order."""
        return [self._individual(row) for row in self._ledger.evaluations("done")]

    def front(self) -> list[Individual]:
        """The Pareto front over everything evaluated, the best by merit first."""
        return pareto_individuals(self.individuals())

    def _wants_more(self) -> bool:
        plan = self._plan
        generations_spent = plan.generations is not None and self._number >= plan.generations
        evaluations_spent = plan.evaluations is not None and self._spent() >= plan.evaluations
        return not (self._barren >= _PATIENCE or generations_spent or evaluations_spent)

    def _spent(self) -> int:
        """Evaluations paid for in finished generations."""
        return sum(row.generation < self._number for row in self._ledger.evaluations())

    def _individual(self, row: Evaluation) -> Individual:
        searched = row.divergences if self._plan.objective == "kl" else row.losses
        excess, searched = (
            {target: found[target] for target in self._plan.targets} for found in (row.losses, searched)
        )
        return Individual(row.formula, searched, excess, *self._bars)

    def _raise_bars(self) -> None:
        """Takes the lowest of a rival's figures at each target, once the first generation is recorded."""
        rivals = {
            row.evaluation
            for row in self._ledger.candidates()
            if self._is_start(row.generation, row.position) and row.formula in self._plan.rivals
        }
        found = [self._individual(row) for row in self._ledger.evaluations("done") if row.id in rivals]
        divergence = [one.searched for one in found if self._plan.divergence_bar]
        self._bars = best_of(divergence), best_of(one.excess for one in found)

    def _is_start(self, generation: int, position: int) -> bool:
        return generation == 0 and position < len(self._plan.start)

    def _restore(self) -> None:
        """Takes population, random state and what was seen from the last finished generation."""
        last = self._ledger.last_generation()
        if last is None:
            return
        self._raise_bars()
        self._number = last.number + 1
        self._rng.setstate(last.rng_state)
        for candidate in self._ledger.candidates():
            if candidate.generation <= last.number:
                self._remember(candidate)
        rows = [row for row in self._ledger.evaluations() if row.generation <= last.number]
        self._barren = last.number - max((row.generation for row in rows), default=-1)
        by_formula = {row.formula: row for row in rows}
        self._population = [self._individual(by_formula[formula]) for formula in last.population]

    def _generation(self) -> bool:
        """One generation; false when time or the budget of evaluations ended inside it: it is not committed then.

        What it measured stays in the ledger, and a campaign that goes on begins with the same draws.
        """
        draws = self._breeder.draw(self._number, self._population, self._by_form.keys())
        plan = self._plan
        ladder = Ladder(plan.rungs, plan.objective, self._ledger, self._executor, self._number, self._out_of_time)
        fresh = self._first_of_their_form(draws)
        try:
            masks = ladder.probe({position: draws[position].form for position in fresh})
            distinct = self._first_of_their_mask(masks)
            wanted = ladder.screen({position: draws[position].form for position in distinct}, self._started(distinct))
        except OutOfTime:
            return False
        paid = wanted if plan.evaluations is None else wanted[: plan.evaluations - self._spent()]
        decided = len(draws) if len(paid) == len(wanted) else paid[-1] + 1 if paid else 0
        try:
            ladder.finish({position: draws[position].form for position in paid})
        except OutOfTime:
            last = plan.rungs[-1].name
            decided = next(position for position in paid if ladder.measurement(position, last) is None)
        evaluated = [self._apply(position, draws[position], ladder, position in paid) for position in range(decided)]
        if decided < len(draws):
            return False
        self._barren = 0 if paid else self._barren + 1
        self._survive([evaluated[position] for position in paid])
        return True

    def _first_of_their_form(self, draws: Sequence[Draw]) -> list[int]:
        seen = set(self._by_form)
        fresh = []
        for position, draw in enumerate(draws):
            if draw.ranked not in seen:
                seen.add(draw.ranked)
                fresh.append(position)
        return fresh

    def _first_of_their_mask(self, masks: Mapping[int, Measurement]) -> list[int]:
        seen = set(self._by_mask)
        distinct = []
        for position, measured in masks.items():
            fingerprint = None if measured.error else measured.value["fingerprint"]
            if fingerprint is not None and (fingerprint not in seen or not self._plan.fingerprints):
                seen.add(fingerprint)
                distinct.append(position)
        return distinct

    def _started(self, positions: Sequence[int]) -> frozenset[int]:
        """Those that stand for a start formula, which is never screened out; they are drawn first."""
        return frozenset(position for position in positions if self._is_start(self._number, position))

    def _apply(self, position: int, draw: Draw, ladder: Ladder, is_paid: bool) -> int | None:
        """Writes one candidate, with its evaluation where it is paid for; returns the evaluation it amounts to."""
        recorded = self._ledger.candidate(self._number, position)
        if recorded is not None and recorded.formula != draw.text:
            raise LedgerError(
                f"ledger {self._ledger.path}: candidate {position} of generation {self._number} is "
                f"{recorded.formula:.60}, but this campaign draws {draw.text:.60}; were versions changed?"
            )
        if recorded is None:
            candidate, evaluation = self._fate(position, draw, ladder, is_paid)
            recorded = replace(candidate, evaluation=self._ledger.record(candidate, evaluation))
        self._remember(recorded)
        return recorded.evaluation

    def _fate(self, position: int, draw: Draw, ladder: Ladder, is_paid: bool) -> tuple[Candidate, Evaluation | None]:
        """What became of a candidate: a duplicate, failed or screened out on some rung, or evaluated."""
        probed = ladder.measurement(position, PROBE)
        fingerprint = None if probed is None or probed.error else probed.value["fingerprint"]
        candidate = Candidate(
            self._number, position, draw.text, draw.canonical, "failed", opposites=draw.opposites, ranked=draw.ranked,
            fingerprint=fingerprint,
        )  # fmt: skip
        if probed is not None and probed.error:
            return replace(candidate, reason=probed.error), None
        if is_paid:
            evaluation = self._evaluation(position, draw, ladder)
            candidate = replace(candidate, reason=evaluation.reason)
            return replace(candidate, status="evaluated") if evaluation.status == "done" else candidate, evaluation
        if probed is None or fingerprint in self._by_mask:
            known = self._by_form[draw.ranked] if probed is None else self._by_mask[str(fingerprint)]
            if known is None:
                return replace(candidate, reason="equal to a formula that failed or was screened out"), None
            return replace(candidate, status="duplicate", evaluation=known), None
        reached = [rung.name for rung in self._plan.rungs if ladder.measurement(position, rung.name)]
        failed = ladder.measurement(position, reached[-1]) if reached else None
        reason = failed.error if failed and failed.error else f"screened out after {(PROBE, *reached)[-1]}"
        return replace(candidate, reason=reason), None

    def _evaluation(self, position: int, draw: Draw, ladder: Ladder) -> Evaluation:
        probed = ladder.measurement(position, PROBE)
        climbed = [ladder.measurement(position, rung.name) for rung in self._plan.rungs]
        last = climbed[-1]
        assert probed is not None
        assert last is not None
        done = last.error is None
        expression = resolve_metric(draw.form).expression
        return Evaluation(
            formula=draw.form,
            canonical=draw.canonical,
            generation=self._number,
            status="done" if done else "failed",
            fingerprint=probed.value["fingerprint"] if self._plan.fingerprints else None,
            sketch=probed.value["sketch"],
            reason=last.error,
            losses=ladder.figures(position, "loss") if done else {},
            divergences=ladder.figures(position, "kl") if done else {},
            nodes=len(expression),
            operands=",".join(expression.operands),
            seconds_score=probed.duration,
            seconds_loss=sum(measured.duration for measured in climbed if measured is not None),
            process=last.process,
            attempt=last.attempt,
        )

    def _remember(self, candidate: Candidate) -> None:
        if candidate.ranked is not None:
            self._by_form.setdefault(candidate.ranked, candidate.evaluation)
        if candidate.fingerprint is not None:
            self._by_mask.setdefault(candidate.fingerprint, candidate.evaluation)

    def _survive(self, evaluated: Sequence[int | None]) -> None:
        """Survivors of parents and children, committed with the random state the next generation starts from."""
        if self._number == 0:
            self._raise_bars()
        rows = {row.id: row for row in self._ledger.evaluations("done")}
        children = [self._individual(rows[index]) for index in evaluated if index in rows]
        self._population = select_survivors([*self._population, *children], self._plan.population)
        formulas = [individual.text for individual in self._population]
        self._ledger.commit_generation(self._number, formulas, self._rng.getstate())
        self._number += 1
