"""Cheap measurements first: the draws of one generation are told apart by their masks, and the better ones climb.

After the grammar come finiteness, ties and the mask fingerprint, then the layer reconstruction error from cached Gram
matrices, the loss on few search windows, and the loss on all of them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from gpmetric.evolution.breeding import Draw
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.records import Candidate, Evaluation, Measurement
from gpmetric.evolution.rungs import PROBE, Rung, figures_at, mean_at, promote
from gpmetric.evolution.search_config import SearchConfig
from gpmetric.evolution.tasks import Figures, MaskFingerprint, NoMasks, Task
from gpmetric.executors import Executor, Outcome, OutOfTime
from gpmetric.metrics import Metric

__all__ = ["Seen", "SuccessiveHalving"]


@dataclass
class Seen:
    """What was drawn: ranked form -> evaluation, and masks -> evaluation; None where it did not come to one."""

    forms: dict[str, int | None] = field(default_factory=dict)
    masks: dict[str, int | None] = field(default_factory=dict)

    def remember(self, ranked: str | None, fingerprint: str | None, evaluation: int | None) -> None:
        """Takes up a candidate whose fate is in the ledger."""
        if ranked is not None:
            self.forms.setdefault(ranked, evaluation)
        if fingerprint is not None:
            self.masks.setdefault(fingerprint, evaluation)


@dataclass
class SuccessiveHalving:
    """Measures the draws of one generation rung by rung and records what became of each.

    What the ledger has already is not measured again.

    Attributes:
        ledger: takes every measurement as soon as it is there.
        seen: what was drawn in the generations before.
        progress: told of the measurements on a rung.
    """

    config: SearchConfig
    ledger: Ledger
    executor: Executor
    seen: Seen
    generation: int
    progress: Callable[[str, int, int], None] = lambda what, done, total: None

    def __post_init__(self) -> None:
        self._known = {(row.position, row.rung): row for row in self.ledger.measurements(self.generation)}

    def run(self, source: Iterable[Draw], affordable: int | None = None) -> list[int | None] | None:
        """Ids of the evaluations paid for; None where time or what is affordable ended before all draws were decided.

        The executor's clock tells the time: what it has measured until then is in the ledger.

        Args:
            source: of the draws, which are taken while workers probe those before them.
            affordable: evaluations at most; None is no limit.

        Raises:
            LedgerError: the ledger holds other draws.
        """
        draws: list[Draw] = []
        *early, last = self.config.rungs
        try:
            fresh = self._probe(source, draws)
            metrics = [draw.form for draw in draws]
            alive = self._promoted(self._first_of_their_masks(fresh), [])
            for count, rung in enumerate(early, start=1):
                self._measure(metrics, alive, rung)
                alive = self._promoted(alive, early[:count])
        except OutOfTime:
            return None
        paid = alive[:affordable]
        decided = len(draws) if paid == alive else paid[-1] + 1 if paid else 0
        try:
            self._measure(metrics, paid, last)
        except OutOfTime:
            decided = next(position for position in paid if (position, last.name) not in self._known)
        with self.ledger.together():  # what it is made of has been stored, one measurement after the other
            found = [self._record(position, draws[position], position in paid) for position in range(decided)]
        return [found[position] for position in paid] if decided == len(draws) else None

    def _probe(self, source: Iterable[Draw], draws: list[Draw]) -> list[int]:
        """Positions of draws whose form is a new one, in order, probed; all that is drawn is added to the list."""
        fresh: dict[str, int] = {}
        probing: deque[list[int]] = deque()

        def batches() -> Iterator[Task]:
            missing: list[int] = []
            for position, draw in enumerate(source):
                draws.append(draw)
                if draw.key in self.seen.forms or fresh.setdefault(draw.key, position) != position:
                    continue
                missing += [position] * ((position, PROBE.name) not in self._known)
                if len(missing) == PROBE.together:
                    yield from self._asked(missing, draws, probing)
                    missing = []
            yield from self._asked(missing, draws, probing)

        lost, done = list[int](), 0
        self.progress(f"generation {self.generation}, {PROBE.name}", 0, self.config.population)
        for outcome in self.executor.map_ordered(batches()):
            batch = probing.popleft()
            if outcome.error is not None and len(batch) > 1:
                lost += batch  # with their worker: again one by one
            else:
                self._store(PROBE.name, batch, outcome)
            done += len(batch)
            self.progress(f"generation {self.generation}, {PROBE.name}", done, max(done, self.config.population))
        self._measure([draw.form for draw in draws], lost, PROBE)
        return list(fresh.values())

    @staticmethod
    def _asked(positions: list[int], draws: Sequence[Draw], asked: deque[list[int]]) -> Iterator[Task]:
        if positions:
            asked.append(positions)
            yield PROBE.task([draws[position].form for position in positions])

    def _first_of_their_masks(self, positions: Sequence[int]) -> list[int]:
        """Those of the probed whose masks are new ones."""
        masks = [(position, mask) for position in positions if (mask := self._fingerprint(position)) is not None]
        return _new(masks, self.seen.masks) if self.config.fingerprints else [position for position, _ in masks]

    def _promoted(self, positions: Sequence[int], climbed: Sequence[Rung]) -> list[int]:
        """Those that go on after the probe and these rungs; start metrics do, whatever they are measured at.

        Where the last rung is in use, a probe alone holds none back: of 30 formulas on llama-05m, by admm with the
        dense fit, its rank correlation with the last rung was -0.2, that of 3 of 24 windows 0.9.
        """
        means = {position: mean_at(self._known, position, climbed, self.config.objective) for position in positions}
        blind = all(math.isnan(mean) for mean in means.values())  # without Gram matrices there is nothing to go by
        if not climbed and (blind or self.config.rungs[-1].in_use):
            return list(positions)
        always = frozenset(one for one in positions if self.generation == 0 and one < len(self.config.start))
        return promote(means, (climbed[-1] if climbed else PROBE).keep, always)

    def _measure(self, metrics: Sequence[Metric], positions: Sequence[int], rung: Rung) -> None:
        """Stores what is missing on a rung, of one metric a task."""
        missing = [position for position in positions if (position, rung.name) not in self._known]
        if missing:
            self.progress(f"generation {self.generation}, {rung.name}", 0, len(missing))
        outcomes = self.executor.map_ordered(rung.task([metrics[position]]) for position in missing)
        for done, (position, outcome) in enumerate(zip(missing, outcomes, strict=True), start=1):
            self._store(rung.name, [position], outcome)
            self.progress(f"generation {self.generation}, {rung.name}", done, len(missing))

    def _store(self, rung: str, batch: Sequence[int], outcome: Outcome) -> None:
        answers = outcome.value if isinstance(outcome.value, list) else [outcome.value]
        told = [_to_json(answer) if outcome.error is None else (None, outcome.error) for answer in answers]
        seconds = outcome.seconds / len(batch)
        rows = [
            Measurement(self.generation, position, rung, value, error, seconds, outcome.process, outcome.attempt)
            for position, (value, error) in zip(batch, told, strict=True)
        ]
        self.ledger.measure(rows)
        self._known |= {(row.position, row.rung): row for row in rows}

    def _fingerprint(self, position: int) -> str | None:
        """Of the masks; None where there are none, or the draw was not probed."""
        probed = self._known.get((position, PROBE.name))
        return None if probed is None or probed.error else str(probed.value["fingerprint"])

    def _record(self, position: int, draw: Draw, is_paid: bool) -> int | None:
        """Writes one candidate, with its evaluation where it is paid for; returns the evaluation it amounts to."""
        candidate, evaluation = self._fate(position, draw, is_paid)
        given = self.ledger.record(candidate, evaluation)
        self.seen.remember(candidate.ranked, candidate.fingerprint, given)
        return given

    def _fate(self, position: int, draw: Draw, is_paid: bool) -> tuple[Candidate, Evaluation | None]:
        """What became of a candidate: a duplicate, failed or screened out on some rung, or evaluated."""
        probed, fingerprint = self._known.get((position, PROBE.name)), self._fingerprint(position)
        candidate = Candidate(
            self.generation, position, draw.metric.name, draw.spelled(draw.canonical), "failed",
            opposites=draw.spelled(draw.opposites), ranked=draw.key, fingerprint=fingerprint,
        )  # fmt: skip
        if probed is not None and probed.error:
            return replace(candidate, reason=probed.error), None
        if is_paid:
            evaluation = self._evaluation(position, draw)
            candidate = replace(candidate, reason=evaluation.reason)
            return replace(candidate, status="evaluated") if evaluation.status == "done" else candidate, evaluation
        if probed is None or fingerprint in self.seen.masks:
            known = self.seen.forms[draw.key] if probed is None else self.seen.masks[str(fingerprint)]
            if known is None:
                return replace(candidate, reason="equal to a formula that failed or was screened out"), None
            return replace(candidate, status="duplicate", evaluation=known), None
        reached = [rung.name for rung in self.config.rungs if (position, rung.name) in self._known]
        error = self._known[position, reached[-1]].error if reached else None
        if error:
            return replace(candidate, reason=error), None
        return replace(candidate, status="screened", reason=f"screened out after {(PROBE.name, *reached)[-1]}"), None

    def _evaluation(self, position: int, draw: Draw) -> Evaluation:
        probed = self._known[position, PROBE.name]
        climbed = [self._known[position, rung.name] for rung in self.config.rungs]
        last, done = climbed[-1], climbed[-1].error is None
        return Evaluation(
            draw.form.name, draw.spelled(draw.canonical), self.generation, "done" if done else "failed",
            fingerprint=probed.value["fingerprint"] if self.config.fingerprints else None,
            sketch=probed.value["sketch"], reason=last.error,
            figures=figures_at(self._known, position, self.config.rungs) if done else {},
            nodes=len(draw.form.expression), operands=",".join(draw.form.expression.operands),
            seconds_score=probed.duration, seconds_loss=sum(measured.duration for measured in climbed),
            process=last.process, attempt=last.attempt,
        )  # fmt: skip


def _new(keyed: Iterable[tuple[int, str]], seen: Collection[str]) -> list[int]:
    """Positions whose key neither was seen nor belongs to one before."""
    first: dict[str, int] = {}
    for position, key in keyed:
        first.setdefault(key, position)
    return [position for key, position in first.items() if key not in seen]


def _to_json(answer: MaskFingerprint | NoMasks | Figures) -> tuple[Any, str | None]:
    """What a worker says of one metric, as a value of JSON or an error."""
    if isinstance(answer, NoMasks):
        return None, answer.error
    if isinstance(answer, MaskFingerprint):
        return asdict(answer), None
    figures = [item for by_target in answer.values() for item in by_target.items()]
    collapsed = dict.fromkeys(target for target, figure in figures if not math.isfinite(figure))
    return (None, f"loss or divergence is not finite at {', '.join(collapsed)}") if collapsed else (answer, None)
