"""Recipes measured on validation text as they will be used: block after pruned block, with their update and fit."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from gpmetric.data import Windows
from gpmetric.errors import OutOfMemoryError, TimeOverError
from gpmetric.metrics import resolve_metric
from gpmetric.operands import needs_gradients
from gpmetric.pruning.protocol import Measured, Protocol, Rule
from gpmetric.pruning.recipe import Recipe, recipe_of
from gpmetric.pruning.updaters import UPDATERS, fit_of, needed_statistics, resolve_target
from gpmetric.session.evaluate import text_loss
from gpmetric.session.listeners import Progress
from gpmetric.session.memory import retried
from gpmetric.session.session import Session
from gpmetric.targets import parse_target
from gpmetric.tuning.trial_log import Measurement, TrialLog

__all__ = ["Trial", "Trials", "key_of", "rule_of"]

# What goes with the windows of a fit to the dense model, in what masks take: on SmolLM2-135M 101 s on a quarter and
# 153 on all, Wanda 40 to 74.
_MASKED, _PASSES = ("none", "own"), 1.5
# Times the slowest kind known, what rounds over blocks are thought to take before any was measured: as on SmolLM2-135M;
# 7 on a Llama of 0.5 million. They are given up as soon as it is seen that they take longer than there is.
_UNKNOWN = 3.0

Trial = Measurement[Recipe]


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


class Trials(TrialLog[Recipe]):
    """Measures recipes on shares of the windows of calibration and validation; arguments as of `TrialLog`."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self._parts: dict[float, _Part] = {}
        self._watching: Progress = lambda *told: None
        super().__init__(*arguments, **keywords)

    def _recipe(self, document: Mapping[str, Any]) -> Recipe:
        return recipe_of(document, "--ledger")

    @staticmethod
    def key(recipe: Recipe) -> str:
        return key_of(recipe)

    def on_search_text(self) -> Trials:
        """Trials on the search text in place of validation's, in the same file."""
        return _OnSearchText(self)

    def forget(self) -> None:
        """Lets go of what is held to measure with, which is made again when it is needed."""
        for part in self._parts.values():
            part.session.forget_calls()

    def dense(self, share: float = 1.0) -> float:
        """Loss of the dense model on a share of the validation windows, nats per token."""
        return self._part(share).dense

    @property
    def together(self) -> int:
        return self.session.plan.together

    def _kind(self, recipe: Recipe) -> tuple[str, str]:
        metric = self.session.metric(recipe.metric)
        return metric.update or recipe.update, fit_of(metric, recipe.update, recipe.fit)

    def _unknown(self, recipe: Recipe) -> float:
        return _UNKNOWN if UPDATERS[self._kind(recipe)[0]].fits_blocks else 1.0

    def _of_windows(self, kind: tuple[str, str]) -> float | None:
        """Masks alone are little else than passes over the windows; a fit to the dense model takes more of them."""
        masked = self._seconds.get(_MASKED, {}).get(1.0)
        return masked and masked * (_PASSES if kind[1] == "dense" else 1)

    def _measured(self, recipes: Sequence[Recipe], share: float, texts: Sequence[Tensor]) -> Iterator[Trial]:
        part = self._part(share)
        before = self.deadline.now()
        self._watching = self.deadline.until(self.ends).watching(self.progress)
        try:
            found = self._run(recipes, part, [part.tokens, *texts])
        except OutOfMemoryError as failure:
            found = [Measured([math.inf] * (1 + len(texts)), math.nan, math.nan, failure)] * len(recipes)
        except TimeOverError:  # as if it had not been begun
            part.session.forget_calls()
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
            collect = partial(self.session.statistics, gradients, self._watched)
            part.session.dense = retried(self.session.model, collect, self.session.forget_calls)
        return retried(self.session.model, lambda: part.protocol.measure(rules, texts), part.session.forget_calls)

    def _watched(self, what: str, done: int, total: int) -> None:
        """Tells of a step of a measurement, which is given up where it cannot end in time."""
        self._watching(what, done, total)

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
                session, Protocol(session, one_shot=False, progress=self._watched, passed=self._watched), tokens, dense
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
    return replace(windows, tokens=windows.tokens[: max(1, round(share * len(windows.tokens)))])
