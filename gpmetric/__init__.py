"""Discovers pruning metrics for language models by genetic programming.

`discover`, `bench` and `evaluate` are the commands of the command line; `parse`, `score` and `select_mask` their parts.
Importing the package imports neither torch nor transformers; using a name does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpmetric.errors import GpmetricError
    from gpmetric.evaluation.evaluate import evaluate_model as evaluate
    from gpmetric.evolution.discover import discover
    from gpmetric.evolution.request import Request
    from gpmetric.expression.evaluate import evaluate as score
    from gpmetric.expression.parse import parse
    from gpmetric.expression.tree import Expression
    from gpmetric.models import load_model
    from gpmetric.pruning.bench import bench
    from gpmetric.pruning.mask import select_mask
    from gpmetric.pruning.metrics import BASELINES
    from gpmetric.pruning.target import parse_target

_HOMES = {
    "BASELINES": ("pruning.metrics", "BASELINES"),
    "Expression": ("expression.tree", "Expression"),
    "GpmetricError": ("errors", "GpmetricError"),
    "Request": ("evolution.request", "Request"),
    "bench": ("pruning.bench", "bench"),
    "discover": ("evolution.discover", "discover"),
    "evaluate": ("evaluation.evaluate", "evaluate_model"),
    "load_model": ("models", "load_model"),
    "parse": ("expression.parse", "parse"),
    "parse_target": ("pruning.target", "parse_target"),
    "score": ("expression.evaluate", "evaluate"),
    "select_mask": ("pruning.mask", "select_mask"),
}

__all__ = [
    "BASELINES",
    "Expression",
    "GpmetricError",
    "Request",
    "bench",
    "discover",
    "evaluate",
    "load_model",
    "parse",
    "parse_target",
    "score",
    "select_mask",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gpmetric' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(f"gpmetric.{module}"), attribute)


def __dir__() -> list[str]:
    return __all__
