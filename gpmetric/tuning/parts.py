"""What recipes are made of, and what a recipe is without one of its parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from gpmetric.discovered import CATALOGUE
from gpmetric.metrics import BASELINES, Metric, resolve_metric
from gpmetric.pruning.recipe import Recipe
from gpmetric.pruning.updaters import UPDATERS, fit_of
from gpmetric.session.session import Session
from gpmetric.tuning.request import TuneRequest
from gpmetric.tuning.trials import key_of

__all__ = ["SOLVER", "first_recipe", "methods", "rivals", "spelled_out", "with_rounds", "without"]

SOLVER = ("admm", "dense")  # update and fit that formulas are evolved for, and that one of no other use is tried with
_PUBLISHED = {"none": "wanda", "obs": "wanda", "obs-blockwise": "sparsegpt", "admm": "alps"}  # saliency by update


def first_recipe(request: TuneRequest, session: Session) -> Recipe:
    """A recipe of the request's target and windows, of the simplest metric."""
    samples, length = session.tokens.shape
    return Recipe(
        "wanda", request.target, samples=samples, sequence_length=length, sampling=request.sampling, bos=request.bos,
        text_column=request.text_column, shuffle=request.shuffle, seed=request.seed,
        include=request.include, exclude=request.exclude, dtype=session.model.dtype,
        statistics_dtype=request.statistics_dtype, calibration_digest=session.windows["calibration"].tokens_digest,
    )  # fmt: skip


def rivals(plain: Recipe) -> list[Recipe]:
    """What the recipe that is chosen must not be worse than: Wanda and SparseGPT as they are published."""
    return [plain, replace(plain, metric="sparsegpt", update=str(BASELINES["sparsegpt"].update))]


def methods(plain: Recipe, names: Sequence[str]) -> list[Recipe]:
    """Metrics with the update and fit that each is for: the strongest published one, the catalogue, names, the others.

    One that stands there twice under other names is taken once.
    """
    update, fit = SOLVER
    published = [
        replace(plain, metric=name, update=str(BASELINES[name].update), fit=one)
        for name, one in (("alps", "dense"), ("alps", "own"), ("sparsegpt", "dense"))
    ]
    found = [replace(plain, metric=entry.formula, update=entry.update, fit=entry.fit) for entry in CATALOGUE.values()]
    named = [spelled_out(replace(plain, metric=name, update=update, fit=fit)) for name in names]
    alike: dict[str, Recipe] = {}
    for one in (published[0], *found, *named, *published[1:]):
        alike.setdefault(key_of(one), one)
    return list(alike.values())


def spelled_out(recipe: Recipe) -> Recipe:
    """The recipe with the update and fit that its metric brings, and a formula in place of a name that brings any."""
    metric = resolve_metric(recipe.metric)
    update = metric.update or recipe.update
    fit = fit_of(metric, recipe.update, recipe.fit)
    return replace(recipe, metric=recipe.metric if metric.update is None else _formula(metric), update=update, fit=fit)


def with_rounds(recipe: Recipe) -> Recipe:
    """The recipe with rounds over whole blocks behind its update."""
    recipe = spelled_out(recipe)
    name = "block" if recipe.update == "none" else f"{recipe.update}+block"
    return replace(recipe, update=name) if name in UPDATERS else recipe  # it has them


def without(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """By part, the recipe without it; a part that it does not have is left out."""
    recipe = spelled_out(recipe)
    base, _, rounds = ("none", "", "block") if recipe.update == "block" else recipe.update.partition("+")
    published = resolve_metric(_PUBLISHED[base])
    if key_of(other := replace(recipe, metric=_formula(published))) != key_of(recipe):
        yield f"metric ({published.name} in its place)", other
    if recipe.allocation is not None:
        yield "allocation (all alike)", replace(recipe, allocation=None)
    if recipe.permute:
        yield "channels in another order", replace(recipe, permute=False)
    if recipe.fit == "dense":
        yield "fit to the dense model (to own outputs)", replace(recipe, fit="own")
    if rounds:
        yield "rounds over whole blocks", spelled_out(replace(recipe, update=base))
    if base != "none":
        yield "update (masked only)", replace(recipe, update="none", fit="own")


def _formula(metric: Metric) -> str:
    """A metric without its name; what it is used with is said elsewhere."""
    return f"{metric.granularity}:{metric.expression}"
