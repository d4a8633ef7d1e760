"""Recipes of `unit_recipes` measured on validation text: the model without the units that they take out, repaired."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from gpmetric.errors import GpmetricError, TimeOverError
from gpmetric.session.evaluate import text_loss
from gpmetric.structured.export import Slimmed, check_format
from gpmetric.structured.listener import SlimListener
from gpmetric.structured.repair import Repairer
from gpmetric.structured.scores import UnitSession
from gpmetric.structured.search_log import SearchLog, State
from gpmetric.structured.shrink import Shrinker
from gpmetric.structured.slim import SearchStart, begin, explore, identify
from gpmetric.tuning.request import TuneRequest
from gpmetric.tuning.trial_log import Measurement, TrialLog
from gpmetric.tuning.unit_recipes import UnitRecipe, slim_request

__all__ = ["UnitTrials"]

_SHORT = 0.95  # of the sparsity that is asked for, below which a recipe is another bargain


class UnitTrials(TrialLog[UnitRecipe]):
    """Measures recipes on shares of the validation windows; arguments as of `TrialLog`, but for the first.

    Args:
        request: whose options recipes share.
        units: of the dense model, with moments of pairs of features.
    """

    def __init__(self, request: TuneRequest, units: UnitSession, *arguments: Any, **keywords: Any) -> None:
        self._request, self._units = request, units
        self._repairer: tuple[Any, Repairer] | None = None  # the last one, and what it is of
        self._shares: dict[float, Tensor] = {}
        self._ended: State | None = None  # of the search
        super().__init__(units.session, *arguments, **keywords)

    def dense(self, share: float = 1.0) -> float:
        return self.dense_on(self._tokens(share))

    def slimmed(self, recipe: UnitRecipe) -> Slimmed:
        """What stays of the model.

        Raises:
            InputError: it cannot be used with the model.
            GpmetricError: it removes less than is asked for.
        """
        begun = self._begun(recipe)
        if recipe.steps:
            assert self._ended is not None
            slimmed = begun.ended(self._ended)
        else:
            slimmed = begun.chosen(begun.start)
        groups, asked = slimmed.groups, float(self._request.target)
        removed = groups.removed(slimmed.kept) / groups.parameters
        if removed < _SHORT * asked:
            raise GpmetricError(f"it can remove {removed:.4f} only, where --sparsity {asked:g} is asked for")
        return slimmed

    def search(
        self, recipe: UnitRecipe, told: SlimListener, steps: int | None, minutes: float | None, path: Path | None
    ) -> int:
        """Steps of a search that begins from a recipe, after which recipes may end with what it found.

        Args:
            recipe: without a search.
            told: of its progress.
            steps, minutes: at most, one of them at least.
            path: of its ledger, which it goes on from if there is one.

        Raises:
            GpmetricError: no drawn model has a finite loss.
        """
        begun = self._begun(recipe)
        request = replace(begun.units.request, steps=steps, minutes=minutes)
        settings = identify(request, begun.units) | {"damping": recipe.damping}
        with SearchLog(path, settings, resume=True) as log:
            if minutes is not None and log.state is not None:  # which a search counts from its first step
                request = replace(request, minutes=minutes + log.state.seconds / 60)
            state, _ = explore(request, begun, log, told)
        self._ended = state
        return state.step

    def _recipe(self, document: Mapping[str, Any]) -> UnitRecipe:
        return UnitRecipe.of(document)

    def forget(self) -> None:
        """Lets go of the moments of features, and of what was made of them."""
        self._repairer = None
        vars(self._units).pop("features", None)

    def _begun(self, recipe: UnitRecipe) -> SearchStart:
        request = slim_request(self._request, recipe)
        units = self._units.asked(request)
        check_format(units.model, request.form, biases=request.add_bias, blocks=request.blocks)
        place = units.groups.kinds, request.mended, request.add_bias
        known = self._repairer[1] if self._repairer is not None and self._repairer[0] == place else None
        begun = begin(request, units, known)
        self._repairer = place, begun.repairer
        return begun if recipe.damping is None else replace(begun, repairer=begun.repairer.damped(recipe.damping))

    def _tokens(self, share: float) -> Tensor:
        """The first of the validation windows [windows, length]; the same tensor for the same share."""
        if share not in self._shares:
            tokens = self.session.windows["validation"].tokens
            self._shares[share] = tokens[: max(1, round(share * len(tokens)))]
        return self._shares[share]

    def _kind(self, recipe: UnitRecipe) -> str:
        return recipe.repair

    def _measured(
        self, recipes: Sequence[UnitRecipe], share: float, texts: Sequence[Tensor]
    ) -> Iterator[Measurement[UnitRecipe]]:
        read = [self._tokens(share), *texts]
        for recipe in recipes:
            before, error = self.deadline.now(), None
            try:
                self._begun(recipe)  # what recipes share, scores for instance, is measured once, and is not its time
                before = self.deadline.now()
                losses = self._losses(recipe, read)
            except TimeOverError:  # as if it had not been begun
                return
            except GpmetricError as failure:
                losses, error = [math.inf] * len(read), str(failure)
            spent = self.deadline.now() - before
            yield Measurement(recipe, share, losses[0], spent, error, tuple(losses[1:]))

    def _losses(self, recipe: UnitRecipe, texts: Sequence[Tensor]) -> list[float]:
        slimmed = self.slimmed(recipe)
        with Shrinker(self._units.model, slimmed.groups).keeping(slimmed.kept, slimmed.repairs):
            losses = [text_loss(self._units.model, tokens, self.progress) for tokens in texts]
        return [loss if math.isfinite(loss) else math.inf for loss in losses]
