"""The generation loop: draw, remove what is equivalent, screen, evaluate, survive, commit.

All randomness is in the driver and results are applied in candidate order, so the ledger does not depend on the number
of workers, nor on how often the campaign was stopped and resumed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from gpmetric.errors import GpmetricError
from gpmetric.evolution.breeding import Breeder, Draw
from gpmetric.evolution.fitness import best_of
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.records import Evaluation
from gpmetric.evolution.screening import Seen, SuccessiveHalving
from gpmetric.evolution.search_config import SearchConfig
from gpmetric.evolution.selection import Individual, by_merit, pareto, select_survivors
from gpmetric.executors import Executor
from gpmetric.metrics import Metric, resolve_metric

__all__ = ["Campaign"]

_PATIENCE = 5  # generations in a row without an evaluation before nothing new is expected


@dataclass
class Campaign:
    """A search that can be stopped anywhere: what is in the ledger is never computed again.

    Attributes:
        executor: whose clock may end the search inside a generation.
        on_generation: called after every generation with its number and the campaign.
        is_asked_to_end: asked after that, while it would go on.
        progress: told of measurements inside a generation.
        ended: whether it ended because it was asked to.
    """

    config: SearchConfig
    ledger: Ledger
    executor: Executor
    on_generation: Callable[[int, Campaign], None] = lambda number, campaign: None
    is_asked_to_end: Callable[[], bool] = lambda: False
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    ended: bool = False

    def __post_init__(self) -> None:
        self._rng = random.Random(self.config.seed)
        self._breeder = Breeder(self.config, self._rng)
        self._population: list[Individual] = []
        self._metrics: dict[str, Metric] = {}  # parsed, by name; `_drawn` are those of the generation
        self._drawn: dict[str, Metric] = {}
        self._bars: tuple[dict[str, float], dict[str, float]] = ({}, {})
        self._seen = Seen()
        self._best: list[Individual] = []  # the front of the evaluations until the one with the id `_fronted`
        self._fronted = 0
        self._seeds = self.ledger.seeds
        self._number = 0
        self._barren = 0  # generations in a row that found nothing worth evaluating

    def run(self) -> None:
        """Runs, or goes on, until the budget is spent, time is out, nothing new is found, or it is asked to end.

        Raises:
            GpmetricError: no formula at all could be evaluated, though there was time.
            LedgerError: the ledger holds other draws than this campaign makes.
        """
        self._restore()
        while not self.ended and self.wants_more() and self._generation():
            self.on_generation(self._number - 1, self)
            self.ended = self.is_asked_to_end() and self.wants_more()
        if not self.executor.clock.limited and not self.front():
            raise GpmetricError("no formula could be evaluated; the ledger holds the reasons")

    def individuals(self) -> list[Individual]:
        """Every metric evaluated so far, in the ledger's order."""
        return [self._individual(row) for row in self.ledger.evaluations("done")]

    def front(self) -> list[Individual]:
        """The Pareto front over everything evaluated, the best by merit first."""
        rows = self.ledger.evaluations("done", after=self._fronted)
        if rows:
            self._best = pareto([*self._best, *map(self._individual, rows)])
            self._fronted = rows[-1].id or 0
        return by_merit(self._best)

    def started(self) -> list[tuple[str, Individual]]:
        """The metrics that the first generation began with, by their formulas, as far as they were evaluated."""
        rows = [
            (row.formula, self.ledger.evaluation(row.evaluation))
            for row in self.ledger.candidates(0)[: len(self.config.start)]
            if row.evaluation is not None
        ]
        return [(name, self._individual(row)) for name, row in rows if row is not None and row.status == "done"]

    @property
    def last_generation(self) -> int | None:
        """The number of the last finished one."""
        return self._number - 1 if self._number else None

    def wants_more(self) -> bool:
        """Whether it would go on: neither is its budget spent, nor is nothing new to be expected."""
        config = self.config
        generations_spent = config.generations is not None and self._number >= config.generations
        return not (self._barren >= _PATIENCE or generations_spent or self._affordable() == 0)

    def _affordable(self) -> int | None:
        """Evaluations that the finished generations have left of the budget; None is no limit."""
        if self.config.evaluations is None:
            return None
        last = self.ledger.last_generation()
        return max(0, self.config.evaluations - (last.evaluations if last else 0))

    def _restore(self) -> None:
        """Takes population, random state and what was seen from the last finished generation."""
        last = self.ledger.last_generation()
        if last is None:
            return
        self._raise_bars()
        self._number = last.number + 1
        self._rng.setstate(last.rng_state)
        for ranked, fingerprint, evaluation in self.ledger.drawn(last.number):
            self._seen.remember(ranked, fingerprint, evaluation)
        newest = self.ledger.evaluation(last.evaluations)  # ids are in the order paid for
        self._barren = last.number - (newest.generation if newest else -1)
        rows = self.ledger.evaluations_of(last.population)
        by_formula = {row.formula: row for row in rows if row.generation <= last.number}
        self._population = [self._individual(by_formula[formula]) for formula in last.population]

    def _generation(self) -> bool:
        """One generation; false when time or the budget of evaluations ended inside it: it is not committed then.

        What it measured stays in the ledger, and a campaign that goes on begins with the same draws.
        """
        if self._number in self._seeds:
            self._rng.seed(self._seeds[self._number])
        self._drawn = {}
        draws = self._remembered(self._breeder.draw(self._number, self._population, self._seen.forms.keys()))
        halving = SuccessiveHalving(self.config, self.ledger, self.executor, self._seen, self._number, self.progress)
        paid = halving.run(draws, self._affordable())
        if paid is None:
            return False
        self._barren = 0 if paid else self._barren + 1
        self._survive(paid)
        return True

    def _remembered(self, draws: Iterable[Draw]) -> Iterator[Draw]:
        for draw in draws:
            self._drawn[draw.form.name] = draw.form
            yield draw

    def _survive(self, paid: Sequence[int | None]) -> None:
        """Survivors of parents and children, committed with the random state the next generation starts from."""
        if self._number == 0:
            self._raise_bars()
        rows = (self.ledger.evaluation(index) for index in paid if index is not None)
        children = [self._individual(row) for row in rows if row is not None and row.status == "done"]
        self._population = select_survivors([*self._population, *children], self.config.population)
        self.ledger.commit_generation(self._number, [one.text for one in self._population], self._rng.getstate())
        self._number += 1

    def _individual(self, row: Evaluation) -> Individual:
        """What a ledger does not hold of it are its parsed metric and the bars."""
        if row.formula not in self._metrics:  # what is not of this generation is of an earlier run
            self._metrics[row.formula] = self._drawn.get(row.formula) or resolve_metric(row.formula)
        searched, excess = (
            {target: row.figures[name][target] for target in self.config.targets}
            for name in (self.config.objective, "loss")
        )
        return Individual(self._metrics[row.formula], searched, excess, *self._bars)

    def _raise_bars(self) -> None:
        """Takes the lowest of a rival's figures at each target, once the first generation is recorded."""
        names = {rival.name for rival in self.config.rivals}
        found = [one for name, one in self.started() if name in names]
        searched = [one.searched for one in found if self.config.objective_bar]
        self._bars = best_of(searched), best_of(one.excess for one in found)
        self._best, self._fronted = [], 0  # whose merit was told without bars
