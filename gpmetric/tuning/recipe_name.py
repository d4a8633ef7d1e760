"""A recipe in a few words, of its document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["recipe_name"]


def recipe_name(recipe: Mapping[str, Any]) -> str:
    """Metric, update and what is unusual; of a recipe of units, its start, shape, repair and search."""
    if "start" in recipe:
        return _units_name(recipe)
    fit = ", fit dense" if recipe["fit"] == "dense" else ""
    more = f"{', allocated' * ('allocation' in recipe)}{', permuted' * bool(recipe.get('permute'))}"
    return f"{recipe['metric']} ({recipe['update']}{fit}{more})"


def _units_name(recipe: Mapping[str, Any]) -> str:
    """A recipe of units in a few words; what is usual is left out."""
    shape = [",".join(recipe["granularity"]), *[f"budget {recipe['budget']}"] * (recipe["budget"] != "global")]
    shape += [recipe["format"]] * (recipe["format"] != "hetero")
    damping = "" if recipe["damping"] is None else f" {recipe['damping']:g}"
    repair = f"repair {recipe['repair']}{damping}{' with biases' * recipe['add_bias']}"
    search = [f"{recipe['steps']} steps"] * bool(recipe["steps"])
    return f"{recipe['start']} ({'; '.join([*shape, repair, *search])})"
