"""What recipes are made of, and what a recipe is without one of its parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from gpmetric.catalogue import CATALOGUE, PREFIX
from gpmetric.metrics import BASELINES, resolve_metric
from gpmetric.pruning.recipe import Recipe
from gpmetric.pruning.updaters import UPDATERS
from gpmetric.session.session import Session
from gpmetric.tuning.request import TuneRequest

__all__ = ["SOLVER", "first_recipe", "methods", "rivals", "spelled_out", "without"]

SOLVER = ("admm", "dense")  # update and fit that formulas are evolved for, and that one of no other use is tried with
_PUBLISHED = {"none": "wanda", "obs": "wanda", "obs-blockwise": "sparsegpt", "admm": "alps"}  # saliency by update


def first_recipe(request: TuneRequest, session: Session) -> Recipe:
    """A recipe of the request's target and windows, of the simplest metric."""
    samples, length = session.tokens.shape
    return Recipe(
        "wanda", request.target, samples=samples, sequence_length=length, shuffle=request.shuffle, seed=request.seed,
        include=request.include, exclude=request.exclude,
    )  # fmt: skip


def rivals(plain: Recipe) -> list[Recipe]:
    """What the recipe that is chosen must not be worse than: Wanda and SparseGPT as they are published."""
    return [plain, replace(plain, metric="sparsegpt", update=str(BASELINES["sparsegpt"].update))]


def methods(plain: Recipe, names: Sequence[str]) -> list[Recipe]:
    """Metrics with the update and fit that each is for: published ones, those of the catalogue, and others by name.

    One that stands there twice under other names is taken once.
    """
    update, fit = SOLVER
    published = [
        replace(plain, metric=name, update=str(BASELINES[name].update), fit=one)
        for name, one in (("sparsegpt", "dense"), ("alps", "own"), ("alps", "dense"))
    ]
    found = [replace(plain, metric=entry.formula, update=entry.update, fit=entry.fit) for entry in CATALOGUE.values()]
    named = [spelled_out(replace(plain, metric=name, update=update, fit=fit)) for name in names]
    alike: dict[tuple[str, ...], Recipe] = {}
    for one in (*published, *found, *named):
        metric = resolve_metric(one.metric)
        alike.setdefault((str(metric.expression), metric.granularity, one.update, one.fit), one)
    return list(alike.values())


def spelled_out(recipe: Recipe) -> Recipe:
    """The recipe with the update and fit that its metric brings, and a formula in place of a name of the catalogue."""
    metric = resolve_metric(recipe.metric)
    update = metric.update or recipe.update
    fit = (metric.fit or recipe.fit) if UPDATERS[update].changes else "own"
    group, _, name = recipe.metric.rpartition(":")
    named = group.rpartition(":")[2] == PREFIX
    return replace(recipe, metric=CATALOGUE[name].formula if named else recipe.metric, update=update, fit=fit)


def without(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """By part, the recipe without it; a part that it does not have is left out."""
    published = _PUBLISHED[recipe.update]
    mine, theirs = resolve_metric(recipe.metric), resolve_metric(published)
    if (mine.expression, mine.granularity) != (theirs.expression, theirs.granularity):
        yield f"metric ({published} in its place)", replace(recipe, metric=published)
    if recipe.allocation is not None:
        yield "allocation (all alike)", replace(recipe, allocation=None)
    if recipe.fit == "dense":
        yield "fit to the dense model (to a layer's own outputs)", replace(recipe, fit="own")
    if UPDATERS[recipe.update].changes:
        plain = mine.name if mine.update is None else f"{mine.granularity}:{mine.expression}"
        yield "update (masked only)", replace(recipe, metric=plain, update="none", fit="own")
