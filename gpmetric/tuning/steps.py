"""Steps towards a recipe: what they measure is told, the best is kept, and what there is no time for is said."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic

from torch import Tensor

from gpmetric.errors import GpmetricError, OutOfMemoryError, TimeOverError
from gpmetric.session.caveats import few_tokens
from gpmetric.session.deadline import Deadline
from gpmetric.tuning.halving import halve
from gpmetric.tuning.listener import TuneListener
from gpmetric.tuning.request import TuneRequest
from gpmetric.tuning.trial_log import Asked, Measurement, TrialLog

__all__ = ["Steps"]


@dataclass
class Steps(Generic[Asked]):
    """What the steps to a recipe share.

    Attributes:
        cuts: what was left out for want of time.
        table: once the best is known: what stands beside it.
    """

    request: TuneRequest
    trials: TrialLog[Asked]
    told: TuneListener
    deadline: Deadline
    cuts: list[str] = field(default_factory=list)
    table: dict[str, Measurement[Asked]] = field(default_factory=dict)

    @property
    def best(self) -> Measurement[Asked] | None:
        """Of those measured on all windows."""
        return self.trials.best

    def describe(self, best: Measurement[Asked]) -> dict[str, Any]:
        """The JSON document, but for what pruning adds."""
        session, trials = self.trials.session, self.trials
        whole = sorted((one for one in trials.found if one.share == 1 and one.error is None), key=lambda one: one.loss)
        table = [{"what": name} | trials.describe(trial) for name, trial in self.table.items()]
        tested = next((row.get("text_excess") for row in table if row["what"] == "recipe"), None)
        dense = {"validation": math.exp(trials.dense())} | {
            one.text.name: math.exp(trials.dense_on(one.tokens)) for one in session.evaluated
        }
        return session.describe() | {
            "digest": session.model.digest,
            "target": self.request.target,
            "recipe": best.recipe.document(),
            "excess": trials.excess(best),
            "test_excess": tested[0] if tested else None,
            "dense": dense,
            "recipes": [{"recipe": one.recipe.document(), "validation_excess": trials.excess(one)} for one in whole],
            "ablation": [row for row in table if row["what"].startswith("without ")],
            "table": table,
            "trials": [trials.describe(trial) for trial in trials.found],
            "cut": self.cuts,
            "warnings": few_tokens(session) + self._contradictions(),
            "splits": {name: windows.describe() for name, windows in session.windows.items()},
            "texts": [one.describe() for one in session.evaluated],
        }

    def _contradictions(self) -> list[str]:
        """Texts read once on which another row of the table is better than the recipe that validation chose."""
        found = []
        for place, one in enumerate(self.trials.session.evaluated):
            losses = {name: trial.others[place] for name, trial in self.table.items() if len(trial.others) > place}
            if "recipe" in losses and losses[(best := min(losses, key=losses.__getitem__))] < losses["recipe"]:
                dense = self.trials.dense_on(one.tokens)
                excess = f"excess {losses[best] - dense:.4f}, the recipe {losses['recipe'] - dense:.4f}"
                found.append(f"{one.text.name} contradicts validation: there, {best!r} has {excess}")
        return found

    def nothing(self) -> GpmetricError:
        """Why there is no best recipe."""
        failures = [trial.error for trial in self.trials.found if trial.error is not None]
        if failures and all(math.isinf(trial.loss) for trial in self.trials.found):
            return GpmetricError(f"no recipe could be used: {failures[-1]}")
        minutes = f"--minutes {self.request.minutes or 0:g} were over before a recipe was measured"
        return GpmetricError(f"{minutes}: allow more, or take fewer --samples or --windows")

    @contextmanager
    def lasting(self, what: str) -> Iterator[None]:
        """A step that there may be no time or no memory for; what is known before it is not lost."""
        try:
            yield
        except (TimeOverError, OutOfMemoryError) as error:
            self.cut(f"{what}: {error}")

    def halve(self, what: str, recipes: Sequence[Asked], until: float) -> None:
        """Successive halving, after which what is left may be the best."""
        self.told.step(what)
        before = len(self.trials.found)
        found = halve(self.trials, recipes, until)
        self._tell(before)
        known = {self.trials.key(trial.recipe) for trial in self.trials.found}
        if not found:
            self.cut(f"{what}: none could be measured on all windows")
        elif missing := [one for one in recipes if self.trials.key(one) not in known]:
            self.cut(f"{what}: {len(missing)} of {len(recipes)} were not measured")

    def compare(self, rows: Mapping[str, Asked], until: float) -> bool:
        """The table, of recipes by what they are, on the texts that are read once, too; whether there is a better best.

        Args:
            rows: beside the best.
            until: when to be done, by the deadline's clock.
        """
        best = self.best
        assert best is not None
        self.told.step("what each part is worth")
        texts = [one.tokens for one in self.trials.session.evaluated]
        self.table = {"recipe": best}
        for name, recipe in {"recipe": best.recipe, **rows}.items():
            if found := self.measure([recipe], 1.0, until, texts):
                self.table[name] = found[0]
            else:
                self.cut(f"what each part is worth: {name}")
        return self.trials.key((self.best or best).recipe) != self.trials.key(best.recipe)

    def measure(
        self, recipes: Sequence[Asked], share: float = 1.0, until: float | None = None, texts: Sequence[Tensor] = ()
    ) -> list[Measurement[Asked]]:
        """Trials of recipes, which are told."""
        before = len(self.trials.found)
        found = self.trials.measure(recipes, share, self.deadline.end if until is None else until, texts)
        self._tell(before)
        return found

    def cut(self, what: str) -> None:
        """Says what is left out, once."""
        if what not in self.cuts:
            self.cuts.append(what)
            self.told.cut(what)

    def _tell(self, first: int) -> None:
        for trial in self.trials.found[first:]:
            self.told.trial(trial, self.trials.excess(trial))
