"""The generation loop: draw, remove what is equivalent, evaluate, survive, commit.

All randomness is in the driver and results are applied in candidate order, so the ledger does not depend on the number
of workers, nor on how often the campaign was stopped and resumed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from gpmetric.errors import GpmetricError, LedgerError
from gpmetric.evolution.executors import Executor, Outcome
from gpmetric.evolution.ledger import Candidate, Evaluation, Ledger
from gpmetric.evolution.selection import Individual, pareto_individuals, select_survivors, tournament
from gpmetric.evolution.variation import Variation
from gpmetric.expression import Expression, parse
from gpmetric.expression.canonical import canonical

__all__ = ["Campaign", "Plan"]

_DRAWS_PER_PLACE = 20  # draws before a place in the generation stays empty: the neighbourhood is exhausted


@dataclass(frozen=True)
class Plan:
    """What a search consists of; together with model, texts and calibration it determines every evaluation.

    `generations` and `evaluations` end it, whichever is reached first; None is no limit.
    """

    targets: tuple[str, ...]
    operands: tuple[str, ...]
    primitives: tuple[str, ...]
    start: tuple[str, ...]
    population: int
    max_nodes: int
    seed: int
    generations: int | None
    evaluations: int | None


@dataclass(frozen=True)
class _Draw:
    """One drawn formula; `form` is what is evaluated and bred from, `canonical` what equals are known by."""

    expression: Expression
    form: Expression
    canonical: str


class Campaign:
    """A search that can be stopped anywhere: what is in the ledger is never computed again.

    Args:
        plan: what to search for.
        ledger: opened for this campaign.
        executor: applies an Evaluator to tasks.
        dense_loss: mean loss of the dense model on the search windows, in nats.
        out_of_time: asked between two evaluations; when true, the search ends without finishing its generation.
        on_generation: called after every generation with its number and the campaign.
    """

    def __init__(
        self,
        plan: Plan,
        ledger: Ledger,
        executor: Executor,
        dense_loss: float,
        *,
        out_of_time: Callable[[], bool] = lambda: False,
        on_generation: Callable[[int, Campaign], None] = lambda number, campaign: None,
    ) -> None:
        self._plan = plan
        self._ledger = ledger
        self._executor = executor
        self._dense_loss = dense_loss
        self._out_of_time = out_of_time
        self._on_generation = on_generation
        self._rng = random.Random(plan.seed)
        self._variation = Variation(plan.operands, plan.primitives, plan.max_nodes, self._rng)
        self._population: list[Individual] = []
        self._number = 0
        self._exhausted = False
        # what was seen: canonical form -> evaluation (None where no mask could be made), and by mask
        self._by_form: dict[str, int | None] = {}
        self._by_mask: dict[str, int] = {}

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
        """Every formula evaluated so far, in the ledger's order."""
        return [self._individual(row) for row in self._ledger.evaluations("done")]

    def front(self) -> list[Individual]:
        """The Pareto front over everything evaluated, by rising mean excess."""
        return pareto_individuals(self.individuals())

    def _wants_more(self) -> bool:
        plan = self._plan
        generations_spent = plan.generations is not None and self._number >= plan.generations
        evaluations_spent = plan.evaluations is not None and self._spent() >= plan.evaluations
        return not (self._exhausted or generations_spent or evaluations_spent)

    def _spent(self) -> int:
        """Evaluations paid for in finished generations."""
        return sum(row.generation < self._number for row in self._ledger.evaluations())

    def _individual(self, row: Evaluation) -> Individual:
        return Individual(parse(row.formula), {target: row.losses[target] for target in self._plan.targets})

    def _restore(self) -> None:
        """Takes population, random state and what was seen from the last finished generation."""
        last = self._ledger.last_generation()
        if last is None:
            return
        self._number = last.number + 1
        self._rng.setstate(last.rng_state)
        for candidate in self._ledger.candidates():
            if candidate.generation <= last.number and candidate.canonical is not None:
                self._by_form.setdefault(candidate.canonical, candidate.evaluation)
        rows = [row for row in self._ledger.evaluations() if row.generation <= last.number]
        self._exhausted = all(row.generation < last.number for row in rows)
        self._by_mask = {row.fingerprint: row.id for row in rows if row.fingerprint is not None and row.id is not None}
        by_formula = {row.formula: row for row in rows}
        self._population = [self._individual(by_formula[formula]) for formula in last.population]

    def _generation(self) -> bool:
        """One generation; false when time or the budget of evaluations ended inside it: it is not committed then.

        What it recorded stays, and a campaign that goes on begins with the same draws.
        """
        draws = self._draw()
        fresh = self._first_of_their_form(draws)
        masks = self._masks(draws, fresh)
        if masks is None:
            return False
        wanted = self._first_of_their_mask(fresh, masks)
        draws, paid = self._within_budget(draws, wanted)
        evaluated: list[int] = []
        with closing(self._losses(draws, paid)) as losses:
            for position, draw in enumerate(draws):
                if position in paid and not self._recorded(position) and self._out_of_time():
                    return False
                evaluation = self._apply(position, draw, masks.get(position), losses if position in paid else None)
                if position in paid and evaluation is not None:
                    evaluated.append(evaluation)
        if len(paid) < len(wanted):
            return False
        self._exhausted = not paid
        self._survive(evaluated)
        return True

    def _draw(self) -> list[_Draw]:
        """Draws until the generation has `population` forms never seen before, or far too many draws were needed."""
        draws: list[_Draw] = []
        new: set[str] = set()
        for expression in self._sources():
            draw = self._simplified(expression)
            draws.append(draw)
            if draw.canonical not in self._by_form:
                new.add(draw.canonical)
            if len(new) >= self._plan.population or len(draws) >= _DRAWS_PER_PLACE * self._plan.population:
                break
        return draws

    def _sources(self) -> Iterator[Expression]:
        """The start formulas and random ones at first, children of the population afterwards."""
        if self._number == 0:
            yield from (parse(formula) for formula in self._plan.start)
        while True:
            if self._number == 0 or not self._population:
                yield self._variation.random_expression()
            else:
                first, second = (tournament(self._population, self._rng) for _ in range(2))
                yield self._variation.vary(first.expression, second.expression)

    def _simplified(self, expression: Expression) -> _Draw:
        """Simplification shortens what is bred from, unless it needs a primitive outside the campaign's set."""
        simple = canonical(expression)
        known = {*self._plan.operands, *self._plan.primitives}
        usable = all(isinstance(token, float) or token in known for token in simple.tokens)
        return _Draw(expression, simple if usable and "W" in simple.operands else expression, str(simple))

    def _first_of_their_form(self, draws: Sequence[_Draw]) -> list[int]:
        seen = set(self._by_form)
        fresh = []
        for position, draw in enumerate(draws):
            if draw.canonical not in seen:
                seen.add(draw.canonical)
                fresh.append(position)
        return fresh

    def _masks(self, draws: Sequence[_Draw], fresh: Sequence[int]) -> dict[int, Outcome] | None:
        """Mask fingerprints of the fresh forms, by position, or None when time is out.

        They are cheap beside losses, so they are computed again after a resume.
        """
        tasks = [{"kind": "masks", "formula": str(draws[position].form)} for position in fresh]
        masks: dict[int, Outcome] = {}
        for position, outcome in zip(fresh, self._executor.map_ordered(tasks), strict=True):
            masks[position] = outcome
            if self._out_of_time():
                return None
        return masks

    def _first_of_their_mask(self, fresh: Sequence[int], masks: Mapping[int, Outcome]) -> set[int]:
        seen = set(self._by_mask)
        paid = set()
        for position in fresh:
            if masks[position].error is None and masks[position].value["fingerprint"] not in seen:
                seen.add(masks[position].value["fingerprint"])
                paid.add(position)
        return paid

    def _within_budget(self, draws: list[_Draw], paid: set[int]) -> tuple[list[_Draw], set[int]]:
        """Cuts the generation where the budget of evaluations ends."""
        if self._plan.evaluations is None:
            return draws, paid
        allowed = sorted(paid)[: self._plan.evaluations - self._spent()]
        if len(allowed) == len(paid):
            return draws, paid
        return draws[: (allowed[-1] + 1 if allowed else 0)], set(allowed)

    def _losses(self, draws: Sequence[_Draw], paid: set[int]) -> Generator[Outcome, None, None]:
        """Outcomes of the evaluations to be paid for, but for those already in the ledger, in order."""
        unpaid = [position for position in sorted(paid) if not self._recorded(position)]
        best = min(self._population, key=lambda individual: individual.mean, default=None)
        reference = None if best is None else str(best.expression)
        yield from self._executor.map_ordered(
            {"kind": "losses", "formula": str(draws[at].form), "reference": reference} for at in unpaid
        )

    def _recorded(self, position: int) -> bool:
        return self._ledger.candidate(self._number, position) is not None

    def _apply(self, position: int, draw: _Draw, masks: Outcome | None, losses: Iterator[Outcome] | None) -> int | None:
        """Writes one candidate, with its evaluation where it is paid for; returns the evaluation it amounts to."""
        recorded = self._ledger.candidate(self._number, position)
        if recorded is not None and recorded.formula != str(draw.expression):
            raise LedgerError(
                f"ledger {self._ledger.path}: candidate {position} of generation {self._number} is "
                f"{recorded.formula:.60}, but this campaign draws {draw.expression!s:.60}; were versions changed?"
            )
        if recorded is not None:
            self._remember(draw, masks, recorded.evaluation)
            return recorded.evaluation
        candidate = Candidate(self._number, position, str(draw.expression), draw.canonical, "duplicate")
        evaluation = None
        if masks is None:
            known = self._by_form[draw.canonical]
            if known is None:
                candidate = replace(candidate, status="failed", reason="equal to a formula that failed")
            else:
                candidate = replace(candidate, evaluation=known)
        elif masks.error is not None:
            candidate = replace(candidate, status="failed", reason=masks.error)
        elif losses is None:
            candidate = replace(candidate, evaluation=self._by_mask[masks.value["fingerprint"]])
        else:
            evaluation = self._evaluation(draw, masks, next(losses))
            candidate = replace(
                candidate, status="evaluated" if evaluation.status == "done" else "failed", reason=evaluation.reason
            )
        index = self._ledger.record(candidate, evaluation)
        self._remember(draw, masks, index)
        return index

    def _remember(self, draw: _Draw, masks: Outcome | None, evaluation: int | None) -> None:
        self._by_form.setdefault(draw.canonical, evaluation)
        if masks is not None and masks.error is None and evaluation is not None:
            self._by_mask.setdefault(masks.value["fingerprint"], evaluation)

    def _evaluation(self, draw: _Draw, masks: Outcome, outcome: Outcome) -> Evaluation:
        reason = outcome.error
        excess: dict[str, float] = {}
        if reason is None:
            excess = {target: loss - self._dense_loss for target, loss in outcome.value["losses"].items()}
            if outcome.value["screened"] is not None:
                reason = f"screened out: mean excess {outcome.value['screened']:.4f} on the first windows"
            collapsed = [target for target, value in excess.items() if not math.isfinite(value)]
            if collapsed:
                reason = f"the loss is not finite at {', '.join(collapsed)}"
        return Evaluation(
            formula=str(draw.form),
            canonical=draw.canonical,
            generation=self._number,
            status="done" if reason is None else "failed",
            fingerprint=masks.value["fingerprint"],
            reason=reason,
            losses=excess if reason is None else {},
            nodes=len(draw.form),
            operands=",".join(draw.form.operands),
            seconds_score=masks.value["seconds_score"],
            seconds_loss=outcome.value["seconds_loss"] if outcome.error is None else None,
            process=outcome.process,
            attempt=outcome.attempt,
        )

    def _survive(self, evaluated: Sequence[int]) -> None:
        """Survivors of parents and children, committed with the random state the next generation starts from."""
        rows = {row.id: row for row in self._ledger.evaluations("done")}
        children = [self._individual(rows[index]) for index in evaluated if index in rows]
        self._population = select_survivors([*self._population, *children], self._plan.population)
        formulas = [str(individual.expression) for individual in self._population]
        self._ledger.commit_generation(self._number, formulas, self._rng.getstate())
        self._number += 1
