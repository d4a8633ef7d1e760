"""Discovers pruning metrics for language models by genetic programming.

`discover`, `bench`, `allocate`, `tune`, `prune`, `slim`, `verify`, `evaluate`, `analyse`, `status`, `pack` and `unpack`
are the commands of the command line, and `check_ledger`, `repair_ledger`, `export_ledger`, `merge_ledgers` and
`free_ledger` those of `gpmetric ledger`; `load` opens what they write; `Metric` and `select_mask` score and choose;
`load_plugin` takes operands, primitives and the like from a file of yours.
Importing the package imports neither torch nor transformers; using a name does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpmetric.allocation.allocate import allocate
    from gpmetric.analysis.analyse import analyse
    from gpmetric.errors import GpmetricError
    from gpmetric.evolution.discover import discover
    from gpmetric.evolution.ledger_check import check_ledger, free_ledger
    from gpmetric.evolution.ledger_export import export_ledger
    from gpmetric.evolution.ledger_merge import merge_ledgers
    from gpmetric.evolution.ledger_repair import repair_ledger
    from gpmetric.evolution.listener import DiscoverListener
    from gpmetric.evolution.status import status
    from gpmetric.loading import load, load_model
    from gpmetric.metrics import BASELINES, Metric
    from gpmetric.packing.pack import pack
    from gpmetric.packing.unpack import unpack
    from gpmetric.plugins import load_plugin
    from gpmetric.pruning.bench import bench
    from gpmetric.pruning.mask import select_mask
    from gpmetric.pruning.prune import prune
    from gpmetric.pruning.reproduce import reproduce
    from gpmetric.pruning.verify import verify
    from gpmetric.session.evaluate import evaluate
    from gpmetric.session.layers import layers
    from gpmetric.structured.slim import slim
    from gpmetric.targets import parse_target
    from gpmetric.tuning.tune import tune

# name -> the module it is in
_HOMES = {
    "BASELINES": "metrics",
    "DiscoverListener": "evolution.listener",
    "GpmetricError": "errors",
    "Metric": "metrics",
    "allocate": "allocation.allocate",
    "analyse": "analysis.analyse",
    "bench": "pruning.bench",
    "check_ledger": "evolution.ledger_check",
    "discover": "evolution.discover",
    "evaluate": "session.evaluate",
    "export_ledger": "evolution.ledger_export",
    "free_ledger": "evolution.ledger_check",
    "layers": "session.layers",
    "load": "loading",
    "load_model": "loading",
    "load_plugin": "plugins",
    "merge_ledgers": "evolution.ledger_merge",
    "pack": "packing.pack",
    "parse_target": "targets",
    "prune": "pruning.prune",
    "repair_ledger": "evolution.ledger_repair",
    "reproduce": "pruning.reproduce",
    "select_mask": "pruning.mask",
    "slim": "structured.slim",
    "status": "evolution.status",
    "tune": "tuning.tune",
    "unpack": "packing.unpack",
    "verify": "pruning.verify",
}

__all__ = [
    "BASELINES",
    "DiscoverListener",
    "GpmetricError",
    "Metric",
    "allocate",
    "analyse",
    "bench",
    "check_ledger",
    "discover",
    "evaluate",
    "export_ledger",
    "free_ledger",
    "layers",
    "load",
    "load_model",
    "load_plugin",
    "merge_ledgers",
    "pack",
    "parse_target",
    "prune",
    "repair_ledger",
    "reproduce",
    "select_mask",
    "slim",
    "status",
    "tune",
    "unpack",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gpmetric' has no attribute {name!r}")
    return getattr(import_module(f"gpmetric.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
