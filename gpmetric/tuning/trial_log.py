"""Recipes measured on a share of the windows or on all, each once; what a file keeps is not lost.

What a recipe is made of, and how it is measured, is told by who extends `TrialLog`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from gpmetric.files import finite
from gpmetric.journal import Journal
from gpmetric.session.deadline import Deadline
from gpmetric.session.evaluate import text_loss
from gpmetric.session.listeners import Progress
from gpmetric.session.session import Session

__all__ = ["SHARES", "Asked", "Measurement", "Recorded", "TrialLog"]

SHARES = (0.25, 0.5, 1.0)  # of the windows, rung by rung
_SCALE = 0.75  # power of the share that seconds are thought to go with, where it is not known which part of them does


class Recorded(Protocol):
    """A recipe, as far as a file of trials knows it."""

    def document(self) -> dict[str, Any]:
        """As JSON, the same for the same recipe."""


Asked = TypeVar("Asked", bound=Recorded)


@dataclass(frozen=True)
class Measurement(Generic[Asked]):
    """A recipe measured on a share of the windows.

    Attributes:
        loss: on validation, nats per token; infinite where it failed.
        seconds: that pruning and measuring took.
        error: why it failed.
        others: loss on other texts that it was measured on.
    """

    recipe: Asked
    share: float
    loss: float
    seconds: float
    error: str | None = None
    others: tuple[float, ...] = ()


class TrialLog(Journal, Generic[Asked]):
    """Measures recipes.

    Args:
        session: dense, with windows of validation.
        deadline: of the command.
        progress: told of what takes long.
        path, settings, resume: as of `Journal`.
        keep_best: called with every recipe that is better on all windows than those before it.

    Attributes:
        best: of those measured on all windows.
        found: every trial so far, in the order measured.
        searched: what searches came to, by what was searched.
        ends: when the trials that are being measured have to be done, by the deadline's clock.
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
        keep_best: Callable[[Asked], object] = lambda recipe: None,
    ) -> None:
        self.session, self.deadline, self.progress = session, deadline, progress
        self.best: Measurement[Asked] | None = None
        self._keep_best = keep_best
        self.found: list[Measurement[Asked]] = []
        self.searched: dict[str, Any] = {}
        self.ends = math.inf
        self._known: dict[tuple[str, float, int], Measurement[Asked]] = {}  # by recipe, share and how many other texts
        self._kept: dict[tuple[str, float, int], dict[str, Any]] = {}
        self._kept_of_search: dict[tuple[str, float, int], dict[str, Any]] = {}
        self._dense: dict[int, float] = {}
        self._seconds: dict[Any, dict[float, float]] = {}
        super().__init__(path, "tune", {"format": 2} | dict(settings), resume=resume)

    def take(self, record: dict[str, Any]) -> bool:
        """A trial of the file, by the recipe's text, or what a search came to."""
        if "searched" in record:
            self.searched |= dict(record["searched"])
            return True
        losses = [math.inf if loss is None else float(loss) for loss in record["losses"]]
        kept = {"loss": losses[0], "seconds": float(record["seconds"]), "error": record["error"]}
        kept["document"] = record["document"]
        place = str(record["recipe"]), float(record["share"]), len(losses) - 1
        of = self._kept_of_search if record.get("split") == "search" else self._kept
        of[place] = kept | {"others": tuple(losses[1:])}
        return True

    @staticmethod
    def key(recipe: Asked) -> str:
        """The same text for the same recipe."""
        return json.dumps(recipe.document(), sort_keys=True)

    @property
    def begun(self) -> bool:
        """Whether there are trials that need not be measured: found here, or in the file."""
        return bool(self.found or self._kept)

    def measure(
        self, recipes: Sequence[Asked], share: float, until: float = math.inf, texts: Sequence[Tensor] = ()
    ) -> list[Measurement[Asked]]:
        """Trials of recipes; those that would not end by `until`, on the deadline's clock, are left out.

        Args:
            recipes: measured in their order.
            share: of the windows.
            until: infinite for all.
            texts: other windows [windows, length] to be measured on.
        """
        asked = {self.key(recipe): recipe for recipe in recipes}
        for key, recipe in asked.items():
            if (kept := self._kept.pop((key, share, len(texts)), None)) is not None:
                self._known_again(recipe, share, kept)
        missing = [recipe for key, recipe in asked.items() if (key, share, len(texts)) not in self._known]
        self.ends, size = until, self.together
        for first in range(0, len(missing), size):
            group = missing[first : first + size]
            expected = sum(self.expected(recipe, share) for recipe in group)
            if self.deadline.now() + expected > until:
                continue
            for trial in self._measured(group, share, texts):
                self._note(trial)
                losses = finite([trial.loss, *trial.others])
                told = {"recipe": self.key(trial.recipe), "share": share, "losses": losses}
                told["document"] = trial.recipe.document()
                self.write(told | {"seconds": trial.seconds, "error": trial.error})
        found = ((recipe, self._known.get((key, share, len(texts)))) for key, recipe in asked.items())
        return [replace(trial, recipe=recipe) for recipe, trial in found if trial is not None]

    def recall(self) -> None:
        """Trials of the file on all windows that nobody asked for again: with other time, other recipes come so far."""
        for place in [one for one in self._kept if one[1:] == (1.0, 0)]:
            kept = self._kept.pop(place)
            self._known_again(self._recipe(kept["document"]), 1.0, kept)

    def _known_again(self, recipe: Asked, share: float, kept: Mapping[str, Any]) -> None:
        self._note(Measurement(recipe, share, **{name: value for name, value in kept.items() if name != "document"}))

    def _recipe(self, document: Mapping[str, Any]) -> Asked:
        """The recipe of a document."""
        raise NotImplementedError

    def keep(self, what: str, found: Any) -> None:
        """Keeps what a search came to, as JSON."""
        self.searched[what] = found
        self.write({"searched": {what: found}})

    def expected(self, recipe: Asked, share: float) -> float:
        """Seconds that a recipe is thought to take, by others of its kind; 0 before the first of all."""
        kind = self._kind(recipe)
        if kind in self._seconds:
            return self._scaled(kind, share)
        return self._unknown(recipe) * max((self._scaled(one, share) for one in self._seconds), default=0.0)

    def _scaled(self, kind: Any, share: float) -> float:
        """Seconds of a known kind on a share of the windows, by the nearest one that was measured."""
        known, windows = self._seconds[kind], self._of_windows(kind)
        nearest = min(known, key=lambda one: abs(math.log(one / share)))
        seconds = known[nearest]
        if windows is None:
            return float(seconds * (share / nearest) ** _SCALE)
        return float(max(0.0, seconds - nearest * windows) + share * min(windows, seconds / nearest))

    def _of_windows(self, kind: Any) -> float | None:
        """Seconds of a kind that go with the share of the windows, on all of them; None where it is not known."""
        return None

    def dense(self, share: float = 1.0) -> float:
        """Loss of the dense model on a share of the validation windows, nats per token."""
        raise NotImplementedError

    def excess(self, trial: Measurement[Asked]) -> float:
        """Loss above the dense model's on the same windows, nats per token."""
        return trial.loss - self.dense(trial.share)

    def dense_on(self, tokens: Tensor) -> float:
        """Loss of the dense model on other windows [windows, length], measured once."""
        if id(tokens) not in self._dense:
            self._dense[id(tokens)] = text_loss(self.session.model, tokens, self.progress)
        return self._dense[id(tokens)]

    def describe(self, trial: Measurement[Asked]) -> dict[str, Any]:
        """A trial as results tell it; `text_excess` is on the texts that are read once."""
        told = {"recipe": trial.recipe.document(), "share": trial.share, "excess": self.excess(trial)}
        told |= {"seconds": trial.seconds, "error": trial.error}
        others = [
            loss - self.dense_on(one.tokens) for loss, one in zip(trial.others, self.session.evaluated, strict=False)
        ]
        return told | ({"text_excess": others} if others else {})

    @property
    def together(self) -> int:
        """How many recipes are measured at a time."""
        return 1

    def _note(self, trial: Measurement[Asked]) -> None:
        self.found.append(trial)
        self._known[self.key(trial.recipe), trial.share, len(trial.others)] = trial
        if trial.share == 1 and trial.loss < (math.inf if self.best is None else self.best.loss):
            self.best = trial
            if all(trial.loss <= one["loss"] for place, one in self._kept.items() if place[1:] == (1.0, 0)):
                self._keep_best(trial.recipe)  # unless the file has a better one, which is there by now
        if trial.error is None:
            self._seconds.setdefault(self._kind(trial.recipe), {})[trial.share] = trial.seconds

    def _kind(self, recipe: Asked) -> Any:
        """Recipes of one kind take about the same time."""
        raise NotImplementedError

    def _unknown(self, recipe: Asked) -> float:
        """Times the slowest kind known, what a recipe is thought to take before one of its kind was measured."""
        return 1.0

    def _measured(
        self, recipes: Sequence[Asked], share: float, texts: Sequence[Tensor]
    ) -> Iterator[Measurement[Asked]]:
        """Trials of as many recipes as are measured together, in their order."""
        raise NotImplementedError
