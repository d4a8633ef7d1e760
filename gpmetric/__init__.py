"""Discovers pruning metrics for language models by genetic programming.

`discover`, `bench`, `allocate`, `prune`, `slim`, `verify`, `evaluate` and `analyse` are the commands of the command
line; `load` opens what they write; `Metric` and `select_mask` score and choose. Importing the package imports neither
torch nor transformers; using a name does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpmetric.allocation.allocate import allocate
    from gpmetric.analysis.analyse import analyse
    from gpmetric.errors import GpmetricError
    from gpmetric.evaluation.evaluate import evaluate_model as evaluate
    from gpmetric.evolution.discover import discover
    from gpmetric.models import load, load_model
    from gpmetric.pruning.bench import bench
    from gpmetric.pruning.mask import select_mask
    from gpmetric.pruning.metrics import BASELINES, Metric
    from gpmetric.pruning.prune_model import prune_model as prune
    from gpmetric.pruning.target import parse_target
    from gpmetric.pruning.verify import verify
    from gpmetric.structured.slim import slim

_HOMES = {
    "BASELINES": ("pruning.metrics", "BASELINES"),
    "GpmetricError": ("errors", "GpmetricError"),
    "Metric": ("pruning.metrics", "Metric"),
    "allocate": ("allocation.allocate", "allocate"),
    "analyse": ("analysis.analyse", "analyse"),
    "bench": ("pruning.bench", "bench"),
    "discover": ("evolution.discover", "discover"),
    "evaluate": ("evaluation.evaluate", "evaluate_model"),
    "load": ("models", "load"),
    "load_model": ("models", "load_model"),
    "parse_target": ("pruning.target", "parse_target"),
    "prune": ("pruning.prune_model", "prune_model"),
    "select_mask": ("pruning.mask", "select_mask"),
    "slim": ("structured.slim", "slim"),
    "verify": ("pruning.verify", "verify"),
}

__all__ = [
    "BASELINES",
    "GpmetricError",
    "Metric",
    "allocate",
    "analyse",
    "bench",
    "discover",
    "evaluate",
    "load",
    "load_model",
    "parse_target",
    "prune",
    "select_mask",
    "slim",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gpmetric' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(f"gpmetric.{module}"), attribute)


def __dir__() -> list[str]:
    return __all__
