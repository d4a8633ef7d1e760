"""What is known of a campaign, from its ledger or from its result alone, as a page needs it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from gpmetric.evolution.fitness import mean_excess
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.records import Candidate, Evaluation, HeldOutMeasurement
from gpmetric.evolution.selection import Individual
from gpmetric.evolution.status import ranked, state_of
from gpmetric.metrics import BASELINES, masks_only

__all__ = ["Campaign", "Entry", "best_entry", "best_formula", "entries_of", "of_ledger", "of_result"]

_RUNNING = ("running", "elsewhere")


@dataclass(frozen=True)
class Entry:
    """A formula or baseline with its excess by target and split, and what it was searched by; None where not known.

    `kind` is winner, formula, baseline, or solver: a baseline that updates weights where the campaign does not.
    """

    name: str
    kind: str
    searched: Mapping[str, float] | None = None
    search: Mapping[str, float] | None = None
    validation: Mapping[str, float] | None = None
    test: Mapping[str, float] | None = None

    def mean(self, split: str) -> float:
        """Mean of one of these; NaN where it is not known or not finite."""
        figures = getattr(self, split)
        if not figures or not all(isinstance(one, (int, float)) for one in figures.values()):
            return math.nan
        return mean_excess(figures)


@dataclass(frozen=True)
class Campaign:
    """A campaign; of one that is known by its result alone, the lists are empty.

    Attributes:
        ledger: its file.
        state: running, elsewhere, killed, stopped or finished, as `gpmetric status` has it.
        result: its final document; of one that has none, {}.
        settings: as the ledger holds them.
        rungs: how often each was measured, and mean seconds.
        front, named: of the search, and baselines by name.
    """

    ledger: Path | None
    state: str
    result: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    history: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    generations: int = 0
    candidates: Sequence[Candidate] = ()
    evaluations: Sequence[Evaluation] = ()
    held_out: Sequence[HeldOutMeasurement] = ()
    rungs: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    front: Sequence[Individual] = ()
    named: Mapping[str, Individual] = field(default_factory=dict)

    @property
    def is_running(self) -> bool:
        return self.state in _RUNNING

    @property
    def targets(self) -> list[str]:
        """Labels of the targets, of whatever there are figures for."""
        if "targets" in self.result:
            return list(map(str, self.result["targets"]))
        found = (target for row in self.evaluations for target in row.losses)
        return list(dict.fromkeys(found))

    @property
    def objective(self) -> str:
        """What candidates are compared by, a key of OBJECTIVES."""
        return str(self.result.get("objective", self.settings.get("objective", "kl")))

    @property
    def measure(self) -> str:
        """The objective in words."""
        return {"kl": "mean divergence", "loss": "mean excess"}.get(
            self.objective, f"mean {self.objective}"
        ) + self.unit

    @property
    def unit(self) -> str:
        """Of excess and divergence, behind a comma."""
        several = len(self.settings.get("models", ())) > 1 or not isinstance(self.result.get("model", ""), str)
        return " over wanda's" if several else ", nats per token"

    @property
    def update(self) -> str:
        return str(self.result.get("update", self.settings.get("update", "none")))


def of_ledger(path: Path) -> Campaign:
    """A campaign as its ledger holds it now, in use or not.

    Raises:
        LedgerError: it cannot be used, or is of plug-ins that are not there.
    """
    with Ledger.read(path) as book:
        book.check_plugins()
        settings, history, owner = book.settings, book.history, book.owner()
        result, counts, generations = book.result(), book.counts(), len(book.generations())
        candidates, evaluations, held_out = book.candidates(), book.evaluations(), book.held_out()
        durations: dict[str, list[float]] = {}
        for row in book.measurements():
            durations.setdefault(row.rung, []).append(row.duration or 0.0)
    front, named = ranked(evaluations, candidates, settings)
    rungs = {name: (len(found), fmean(found)) for name, found in durations.items()}
    return Campaign(
        path, state_of(owner, result), result or {}, settings, history, counts, generations, candidates, evaluations,
        held_out, rungs, front, named,
    )  # fmt: skip


def of_result(document: Mapping[str, Any]) -> Campaign:
    """A campaign as --json holds it."""
    seconds = document["seconds"]["per_evaluation"]["rungs"]
    rungs = {str(row["rung"]): (int(row["measured"]), float(seconds.get(row["rung"], 0.0)))
             for row in document["screening"]}  # fmt: skip
    state = "finished" if document.get("stopped") is None else "stopped"
    return Campaign(None, state, document, counts=document["counts"], rungs=rungs)


def entries_of(campaign: Campaign) -> list[Entry]:
    """The winner, the front and the baselines, each once, the winner first."""
    result, update = campaign.result, campaign.update
    found = {one.text: one for one in campaign.front} | dict(campaign.named)
    excess: dict[str, Any] = {name: one.excess for name, one in found.items()}
    searched: dict[str, Any] = {name: one.searched for name, one in found.items()}
    validation: dict[str, Any] = dict(_on("validation", campaign.held_out))
    tested: dict[str, Any] = {}
    for row in result.get("front", ()):
        excess[row["formula"]], searched[row["formula"]] = row["excess"], row[campaign.objective]
        if row["validation"] is not None:
            validation[row["formula"]] = row["validation"]
    for name, row in result.get("baselines", {}).items():
        tested[name], validation[name] = row["excess"], row["validation"]
    winner = result["winner"]["formula"] if "winner" in result else None
    if winner is not None:
        tested[winner], validation[winner] = result["winner"]["excess"], result["winner"]["validation"]
    same = {one.text for one in campaign.named.values()}  # of the front, baselines by their formulas
    names = dict.fromkeys([*([winner] if winner else []), *excess, *validation, *tested])
    return [
        Entry(
            name, _kind(name, winner, update), searched.get(name), excess.get(name), validation.get(name),
            tested.get(name),
        )
        for name in names
        if name == winner or name not in same or name in BASELINES
    ]  # fmt: skip


def _kind(name: str, winner: str | None, update: str) -> str:
    if name.rpartition(":")[2] in BASELINES:
        plain = name.rpartition(":")[2]
        return "baseline" if masks_only(plain) or update != "none" else "solver"
    return "winner" if name == winner else "formula"


def _on(split: str, rows: Sequence[HeldOutMeasurement]) -> dict[str, dict[str, float]]:
    """Excess by metric and target, on as many windows as were measured last, where there are figures of all targets."""
    rows = [row for row in rows if row.split.startswith(split) and row.calibration == "calibration"]
    rows = [row for row in rows if row.split == rows[-1].split]
    targets, found = {row.target for row in rows}, {}
    for metric in dict.fromkeys(row.metric for row in rows):
        excess = {row.target: row.excess for row in rows if row.metric == metric and row.excess is not None}
        if excess.keys() == targets:
            found[metric] = excess
    return found


def best_entry(entries: Sequence[Entry], kinds: Sequence[str], split: str) -> Entry | None:
    """The lowest of these kinds on a split, if one is known there."""
    found = [one for one in entries if one.kind in kinds and math.isfinite(one.mean(split))]
    return min(found, key=lambda one: one.mean(split), default=None)


def best_formula(entries: Sequence[Entry]) -> Entry | None:
    """The first of the front that was found, or the winner."""
    return next(
        (one for one in entries if one.kind in ("winner", "formula") and math.isfinite(one.mean("search"))), None
    )
