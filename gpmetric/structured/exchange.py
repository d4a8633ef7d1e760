"""Units exchanged for others of the same cost, kept where that is better on the same windows.

A policy's step compares models that differ in a hundred units, and each unit's part in the difference is lost in that
of the others: of a step's expected square, 0.002 is that of its mean (llama-05m at 0.3), however many windows it reads.
Here two models differ in a sublayer or two, and on common windows an effect of 0.005 to 0.015 nats has a standard error
of 0.001 after 32 of them.

Source: Sieberling et al. 2024 (EvoPress), section 3, whose mutation switches levels between layers, here with a test of
each gain; giving up early what falls behind is that of races (Maron and Moore 1994).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpmetric.executors import Executor
from gpmetric.structured.draw_objective import DrawObjective
from gpmetric.structured.draws import Draw
from gpmetric.structured.fewer_experts import experts_left
from gpmetric.structured.groups import Groups
from gpmetric.structured.repair import Repairer
from gpmetric.structured.search import Schedule, Search
from gpmetric.structured.search_log import SearchLog, State
from gpmetric.structured.shrink import Shrinker
from gpmetric.structured.unit_space import Pool, UnitSpace

__all__ = ["PIECES", "Exchange", "ExchangeSearch", "exchanged", "is_better"]

_FIRST = 8  # steps' windows after which a change that does no good yet is given up,
# and those that it is kept or not by, and the standard errors that a gain has to be. With 8 and 1, 25 of 600 exchanges
# were kept, and the divergence of llama-05m at 0.3 rose from 0.0888 to 0.0921; with 32 and 2, two, and it fell to
# 0.0871.
PIECES, _ERRORS = 32, 2.0
# of what units are worth, in their standard deviations, as logarithms: who goes and comes is not always the same
_NOISE = (math.log(0.03), 0.0)
_TRIES = 20  # to find an exchange that changes something
_CEILING = 50.0  # of a loss that is not finite, or as good as


@dataclass(frozen=True)
class Exchange:
    """Who gives and who takes, as indices of atoms, how many go, and what each atom is worth, once for each way."""

    giver: Tensor
    taker: Tensor
    count: int
    going: Tensor  # [atoms]
    coming: Tensor  # [atoms]


def exchanged(kept: Tensor, cost: Tensor, asked: Exchange, room: float) -> Tensor:
    """Atoms [atoms], bool, that stay after some of one group went and as much of another's came.

    Args:
        kept: [atoms], bool, before.
        cost: [atoms].
        asked: its `count` atoms of the giver that are worth least go. The taker's that are worth most come, as far as
            there is room, then the giver's own again.
        room: cost that was left over before.
    """
    found = kept.clone()
    there = asked.giver[kept[asked.giver]]
    gone = there[torch.argsort(asked.going[there], stable=True)[: asked.count]]
    found[gone] = False
    room += float(cost[gone].sum())
    for group in (asked.taker, asked.giver):
        missing = group[~found[group]]
        missing = missing[torch.argsort(asked.coming[missing], descending=True, stable=True)]
        for atom, price in zip(missing.tolist(), cost[missing].tolist(), strict=True):
            if price <= room + 1e-6:
                found[atom] = True
                room -= price
    return found


def is_better(gaps: Sequence[float]) -> bool:
    """Whether the mean of differences is below 0 by two standard errors; of a single one, whether it is below."""
    mean = sum(gaps) / len(gaps)
    error = float(np.std(gaps, ddof=1)) / math.sqrt(len(gaps)) if len(gaps) > 1 else 0.0
    return mean < -_ERRORS * error


@dataclass
class ExchangeSearch(Search):
    """Exchanges atoms one step at a time.

    Args:
        groups: whose sublayers give and take.
        space, pools: atoms and their budgets; atoms are exchanged within a pool.
        worth: of each atom, [atoms], standardised: who of a sublayer is likely to go or come.
        kept: atoms [atoms], bool, to begin with. No step keeps more than they cost.
    """

    groups: Groups
    space: UnitSpace
    pools: Sequence[Pool]
    worth: Tensor
    kept: Tensor
    shrinker: Shrinker
    repairer: Repairer
    objective: DrawObjective
    schedule: Schedule
    log: SearchLog
    executor: Executor | None = None

    def __post_init__(self) -> None:
        self._allowed = [self._cost(self.kept, pool) for pool in self.pools]
        self._begin(self.kept.double())
        self.kept = self.state.probabilities.bool()
        self._units = self.space.kept(self.kept)
        self._known: dict[int, float] = {}  # objective of what stays, by a step's windows
        self._changes = 0  # since the last report

    @cached_property
    def _parts(self) -> list[list[Tensor]]:
        """By pool, indices of the atoms of each sublayer; of each block, where blocks are atoms."""
        owner = torch.full((len(self.space.cost),), len(self.groups.parts))
        free = self.space.atom >= 0
        owner.scatter_reduce_(0, self.space.atom[free], self.groups.sublayer_of[free], "amin")
        found = []
        for pool in self.pools:
            owners: Tensor = torch.unique(owner[pool.atoms])
            found.append([pool.atoms[owner[pool.atoms] == one] for one in owners])
        return found

    @torch.no_grad()
    def _step(self, done: float, start: float) -> None:
        """Tries one exchange; a report's loss is that of what stays, on the windows of the step."""
        generator = np.random.default_rng([self.schedule.seed, 3, self.state.step])
        kept, read, late = self._proposed(generator), 0, False
        self._finite = self._finite or kept is None
        if kept is not None:
            units = self.space.kept(kept)
            pieces = len(self.objective)
            first, gaps, losses = int(generator.integers(pieces)), list[float](), dict[int, float]()
            waiting = [(first + place) % pieces for place in range(min(PIECES, pieces))]
            while waiting and not late and not (len(gaps) >= _FIRST and sum(gaps) >= 0):
                known, new = self._compared(units, waiting[: self._at_once(len(gaps))])
                for piece in new:
                    waiting.remove(piece)
                    read += self.objective.tokens(piece) * (1 + (piece in known))
                    self._known |= {piece: known[piece]} if piece in known else {}
                    losses[piece] = new[piece]
                    gaps.append(losses[piece] - self._known[piece])
                    if len(gaps) >= _FIRST and sum(gaps) >= 0:
                        break
                late = self.schedule.late(time.monotonic() - start)
            if not late and is_better(gaps):
                self.kept, self._units, self._known = kept, units, losses
                self._changes += 1
            self._losses.append(math.fsum(self._known[piece] for piece in losses) / len(losses))
        tokens = self.state.tokens + read
        self.state = State(self.state.step + 1, self.kept.double(), None, time.monotonic() - start, tokens)

    def _proposed(self, generator: np.random.Generator) -> Tensor | None:
        """Atoms that stay after an exchange, None where none that changes anything was found."""
        sizes = [len(pool.atoms) for pool in self.pools]
        for _ in range(_TRIES):
            number = int(generator.choice(len(sizes), p=np.array(sizes) / sum(sizes)))
            parts = self._parts[number]
            giver, taker = (parts[int(generator.integers(len(parts)))] for _ in range(2))
            there = int(self.kept[giver].sum())
            if not there:
                continue
            count = int(math.exp(generator.uniform(0, math.log(there + 1))))  # 1 to all, as likely as their logarithm
            noise = math.exp(generator.uniform(*_NOISE))
            going, coming = (
                self.worth + noise * torch.from_numpy(generator.standard_normal(len(self.worth))) for _ in range(2)
            )
            room = self._allowed[number] - self._cost(self.kept, self.pools[number])
            found = exchanged(self.kept, self.space.cost, Exchange(giver, taker, count, going, coming), room)
            if not torch.equal(found, self.kept):
                return found
        return None

    def _at_once(self, done: int) -> int:
        """Pieces that are measured before it is asked whether to go on, after so many: what no answer could save."""
        assert self.executor is not None
        workers = self.executor.workers
        return max(workers, _FIRST - done) if workers > 1 else 1

    def _compared(self, units: Tensor, pieces: Sequence[int]) -> tuple[dict[int, float], dict[int, float]]:
        """By piece, the objective of what stays now, where it is not known, and of what may."""
        unknown = [piece for piece in pieces if piece not in self._known]
        draws = [*(Draw(piece, self._units) for piece in unknown), *(Draw(piece, units) for piece in pieces)]
        losses = [min(loss, _CEILING) for loss in self._measured(draws)]
        return dict(zip(unknown, losses, strict=False)), dict(zip(pieces, losses[len(unknown) :], strict=True))

    def _cost(self, kept: Tensor, pool: Pool) -> float:
        return float(self.space.cost[pool.atoms][kept[pool.atoms]].sum())

    def _told(self) -> dict[str, Any]:
        changes, self._changes = self._changes, 0
        kept = float(self.space.cost[self.kept].sum() / self.space.cost.sum())
        experts = experts_left(self.groups, self.space.kept(self.kept)) if self.groups.mixtures else []
        return {"changes": changes, "kept": kept} | ({"experts": experts} if experts else {})
