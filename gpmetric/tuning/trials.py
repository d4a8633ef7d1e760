"""Recipes measured on validation text, on a share of the windows or on all, each once; what a file keeps is not lost.

A recipe is measured as it will be used: block after pruned block, with its update and fit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from gpmetric.data import Windows
from gpmetric.errors import OutOfMemoryError, TimeOverError
from gpmetric.files import finite
from gpmetric.journal import Journal
from gpmetric.metrics import resolve_metric
from gpmetric.operands import needs_gradients
from gpmetric.pruning.protocol import Measured, Protocol, Rule
from gpmetric.pruning.recipe import Recipe
from gpmetric.pruning.updaters import UPDATERS, fit_of, needed_statistics, resolve_target
from gpmetric.session.deadline import Deadline
from gpmetric.session.evaluate import text_loss
from gpmetric.session.memory import retried
from gpmetric.session.session import Progress, Session
from gpmetric.targets import parse_target

__all__ = ["SHARES", "Trial", "Trials", "key_of", "rule_of"]

SHARES = (0.25, 0.5, 1.0)  # of the windows of calibration and validation, rung by rung
_SCALE = 0.75  # power of the share that seconds are thought to go with: solving a layer does not depend on it
_UNKNOWN = 8.0  # times the slowest kind known, what rounds over blocks are thought to take before they were measured


@dataclass(frozen=True)
class Trial:
    """A recipe measured on a share of the windows.

    Attributes:
        loss: on validation, nats per token; infinite where it failed.
        seconds: that pruning and measuring took.
        error: why it failed.
        others: loss on other texts that it was measured on.
    """

    recipe: Recipe
    share: float
    loss: float
    seconds: float
    error: str | None = None
    others: tuple[float, ...] = ()


def key_of(recipe: Recipe) -> str:
    """The same text for recipes that prune alike: a metric's group counts only where nothing else settles it."""
    metric = resolve_metric(recipe.metric, recipe.samples, recipe.sequence_length or 1)
    asked, allocation = parse_target(recipe.target), recipe.allocation
    asked = asked if allocation is None else asked.within(allocation.granularity)
    settled = resolve_target(asked, metric, recipe.update)
    alike = {
        "metric": str(metric.expression),
        "target": [settled.granularity, settled.sparsity, settled.keep, settled.group],
        "update": metric.update or recipe.update,
        "fit": fit_of(metric, recipe.update, recipe.fit),
    }
    return json.dumps(recipe.document() | alike, sort_keys=True)


def rule_of(session: Session, recipe: Recipe) -> Rule:
    """How a session's model is pruned by it."""
    plan = recipe.allocation or parse_target(recipe.target)
    return Rule(session.metric(recipe.metric), plan, recipe.update, recipe.fit, recipe.permute)


@dataclass
class _Part:
    """A session on a share of its windows, with the gradients of all of them."""

    session: Session
    protocol: Protocol
    tokens: Tensor
    dense: float


class Trials(Journal):
    """Measures recipes.

    Args:
        session: dense, with windows of calibration and validation.
        deadline: of the command.
        progress: told of calibrating.
        path, settings, resume: as of `Journal`.
        keep_best: called with every recipe that is better on all windows than those before it.

    Attributes:
        best: of those measured on all windows.
        found: every trial so far, in the order measured.
        searched: what searches came to, by what was searched.
    """

    def __init__(
        self,
        session: Session,
        deadline: Deadline,
        progress: Progress,
        path: Path | None = None,
        settings: Mapping[str, Any] = {},
        *,
        resume: bool = False,
        keep_best: Callable[[Recipe], object] = lambda recipe: None,
    ) -> None:
        self.session, self.deadline, self.progress = session, deadline, progress
        self.best: Trial | None = None
        self._keep_best = keep_best
        self.found: list[Trial] = []
        self.searched: dict[str, Any] = {}
        self._known: dict[tuple[str, float, int], Trial] = {}  # by recipe, share and how many other texts
        self._kept: dict[tuple[str, float, int], dict[str, Any]] = {}
        self._kept_of_search: dict[tuple[str, float, int], dict[str, Any]] = {}
        self._dense: dict[int, float] = {}
        self._seconds: dict[tuple[str, str], dict[float, float]] = {}
        self._parts: dict[float, _Part] = {}
        super().__init__(path, "tune", {"format": 2} | dict(settings), resume=resume)

    def take(self, record: dict[str, Any]) -> bool:
        """A trial of the file, by the recipe's text, or what a search came to."""
        if "searched" in record:
            self.searched |= dict(record["searched"])
            return True
        losses = [math.inf if loss is None else float(loss) for loss in record["losses"]]
        kept = {"loss": losses[0], "seconds": float(record["seconds"]), "error": record["error"]}
        place = str(record["recipe"]), float(record["share"]), len(losses) - 1
        of = self._kept_of_search if record.get("split") == "search" else self._kept
        of[place] = kept | {"others": tuple(losses[1:])}
        return True

    def on_search_text(self) -> Trials:
        """Trials on the search text in place of validation's, in the same file."""
        return _OnSearchText(self)

    @property
    def begun(self) -> bool:
        """Whether there are trials that need not be measured: found here, or in the file."""
        return bool(self.found or self._kept)

    def forget(self) -> None:
        """Lets go of what is held to measure with, which is made again when it is needed."""
        for part in self._parts.values():
            part.session.forget_calls()

    def measure(
        self, recipes: Sequence[Recipe], share: float, until: float = math.inf, texts: Sequence[Tensor] = ()
    ) -> list[Trial]:
        """Trials of recipes; those that would not end by `until`, on the deadline's clock, are left out.

        Args:
            recipes: measured in their order.
            share: of the windows.
            until: infinite for all.
            texts: other windows [windows, length] to be measured on.
        """
        asked = {key_of(recipe): recipe for recipe in recipes}
        for key, recipe in asked.items():
            if (kept := self._kept.pop((key, share, len(texts)), None)) is not None:
                self._note(Trial(recipe, share, **kept))
        missing = [recipe for key, recipe in asked.items() if (key, share, len(texts)) not in self._known]
        size = self.session.plan.together
        for first in range(0, len(missing), size):
            group = missing[first : first + size]
            expected = sum(self.expected(recipe, share) for recipe in group)
            if self.deadline.now() + expected > until:
                continue
            for trial in self._measured(group, share, texts):
                self._note(trial)
                losses = finite([trial.loss, *trial.others])
                told = {"recipe": key_of(trial.recipe), "share": share, "losses": losses}
                self.write(told | {"seconds": trial.seconds, "error": trial.error})
        found = ((recipe, self._known.get((key, share, len(texts)))) for key, recipe in asked.items())
        return [replace(trial, recipe=recipe) for recipe, trial in found if trial is not None]

    def keep(self, what: str, found: Any) -> None:
        """Keeps what a search came to, as JSON."""
        self.searched[what] = found
        self.write({"searched": {what: found}})

    def expected(self, recipe: Recipe, share: float) -> float:
        """Seconds that a recipe is thought to take, by others of its update and fit; 0 before the first of all."""
        kind = self._kind(recipe)
        if kind in self._seconds:
            return self._scaled(kind, share)
        slowest = max((self._scaled(one, share) for one in self._seconds), default=0.0)
        return (_UNKNOWN if UPDATERS[kind[0]].fits_blocks else 1.0) * slowest

    def _scaled(self, kind: tuple[str, str], share: float) -> float:
        """Seconds of a known kind on a share of the windows, by the nearest one that was measured."""
        known = self._seconds[kind]
        nearest = min(known, key=lambda one: abs(math.log(one / share)))
        return float(known[nearest] * (share / nearest) ** _SCALE)

    def dense(self, share: float = 1.0) -> float:
        """Loss of the dense model on a share of the validation windows, nats per token."""
        return self._part(share).dense

    def excess(self, trial: Trial) -> float:
        """Loss above the dense model's on the same windows, nats per token."""
        return trial.loss - self.dense(trial.share)

    def dense_on(self, tokens: Tensor) -> float:
        """Loss of the dense model on other windows [windows, length], measured once."""
        if id(tokens) not in self._dense:
            self._dense[id(tokens)] = text_loss(self.session.model, tokens, self.progress)
        return self._dense[id(tokens)]

    def describe(self, trial: Trial) -> dict[str, Any]:
        """A trial as results tell it; `text_excess` is on the texts that are read once."""
        told = {"recipe": trial.recipe.document(), "share": trial.share, "excess": self.excess(trial)}
        told |= {"seconds": trial.seconds, "error": trial.error}
        others = [
            loss - self.dense_on(one.tokens) for loss, one in zip(trial.others, self.session.evaluated, strict=False)
        ]
        return told | ({"text_excess": others} if others else {})

    def _note(self, trial: Trial) -> None:
        self.found.append(trial)
        self._known[key_of(trial.recipe), trial.share, len(trial.others)] = trial
        if trial.share == 1 and trial.loss < (math.inf if self.best is None else self.best.loss):
            self.best = trial
            self._keep_best(trial.recipe)
        if trial.error is None:
            self._seconds.setdefault(self._kind(trial.recipe), {})[trial.share] = trial.seconds

    def _kind(self, recipe: Recipe) -> tuple[str, str]:
        metric = self.session.metric(recipe.metric)
        return metric.update or recipe.update, fit_of(metric, recipe.update, recipe.fit)

    def _measured(self, recipes: Sequence[Recipe], share: float, texts: Sequence[Tensor]) -> Iterator[Trial]:
        part = self._part(share)
        before = self.deadline.now()
        try:
            found = self._run(recipes, part, [part.tokens, *texts])
        except OutOfMemoryError as failure:
            found = [Measured([math.inf] * (1 + len(texts)), math.nan, math.nan, failure)] * len(recipes)
        except TimeOverError:  # of statistics that a metric needs: as if it had not been begun
            return
        spent = (self.deadline.now() - before) / len(recipes)
        for recipe, one in zip(recipes, found, strict=True):
            error = None if one.error is None else str(one.error)
            losses = [loss if math.isfinite(loss) else math.inf for loss in one.losses]
            yield Trial(recipe, share, losses[0], spent, error, tuple(losses[1:]))

    def _run(self, recipes: Sequence[Recipe], part: _Part, texts: Sequence[Tensor]) -> list[Measured]:
        rules = [rule_of(part.session, recipe) for recipe in recipes]
        names = frozenset[str]().union(*(needed_statistics([rule.metric], rule.update) for rule in rules))
        gradients = [name for name in names if needs_gradients([name])]
        if gradients:
            collect = partial(self.session.statistics, gradients, self.progress)
            part.session.dense = retried(self.session.model, collect, self.session.forget_calls)
        return retried(self.session.model, lambda: part.protocol.measure(rules, texts), part.session.forget_calls)

    def _part(self, share: float) -> _Part:
        """The session on a share of the windows; what the others read is let go of, as it may fill the device."""
        for other, part in self._parts.items():
            if other != share:
                part.session.forget_calls()
        if share not in self._parts:
            windows = {name: _first(one, share) for name, one in self.session.windows.items()}
            session = self.session if share == 1 else replace(self.session, windows=windows)
            tokens = windows["validation"].tokens
            dense = text_loss(session.model, tokens, self.progress)
            self._parts[share] = _Part(
                session, Protocol(session, one_shot=False, progress=self.progress), tokens, dense
            )
        return self._parts[share]


class _OnSearchText(Trials):
    """Trials on the search text, which those on validation keep in their file."""

    def __init__(self, above: Trials) -> None:
        windows = {name: above.session.windows[name] for name in ("calibration", "search")}
        windows["validation"] = windows.pop("search")
        super().__init__(replace(above.session, windows=windows), above.deadline, above.progress)
        self._kept, self._above = above._kept_of_search, above

    def write(self, record: Mapping[str, Any]) -> None:
        self._above.write({**record, "split": "search"})


def _first(windows: Windows, share: float) -> Windows:
    """The first of the windows; at least one."""
    return Windows(windows.text, windows.tokens[: max(1, round(share * len(windows.tokens)))])
