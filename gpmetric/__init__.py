"""Discovers pruning metrics for language models by genetic programming.

`discover`, `bench`, `allocate`, `tune`, `prune`, `slim`, `verify`, `evaluate`, `calibrate`, `analyse`, `report` and the
others are the commands of the command line, and `check_ledger`, `repair_ledger`, `export_ledger`, `merge_ledgers` and
`free_ledger` those of `gpmetric ledger`. What they give is a `Result`, which `load_result` reads from a file; `load`
opens the models that they write; `Metric`, `statistics` and `select_mask` score and choose; `load_plugin` takes
operands, primitives and the like from a file of yours. Importing the package imports neither torch nor transformers;
using a name does. Type checkers read `__init__.pyi`, which `make stubs` makes of the functions.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# name -> the module it is in
_HOMES = {
    "BASELINES": "metrics",
    "DiscoverListener": "evolution.listener",
    "GpmetricError": "errors",
    "Metric": "metrics",
    "Result": "results",
    "allocate": "allocation.allocate",
    "analyse": "analysis.analyse",
    "bench": "pruning.bench",
    "calibrate": "session.calibrate",
    "catalogue": "pruning.transfer",
    "check_ledger": "evolution.ledger_check",
    "discover": "evolution.discover",
    "evaluate": "session.evaluate",
    "export": "evolution.export",
    "export_ledger": "evolution.ledger_export",
    "free_ledger": "evolution.ledger_check",
    "layers": "session.layers",
    "list_names": "listing",
    "load": "loading",
    "load_model": "loading",
    "load_plugin": "plugins",
    "load_result": "results",
    "merge_ledgers": "evolution.ledger_merge",
    "pack": "packing.pack",
    "parse_target": "targets",
    "prune": "pruning.prune",
    "repair_ledger": "evolution.ledger_repair",
    "report": "reporting.report",
    "reproduce": "pruning.reproduce",
    "select_mask": "pruning.mask",
    "slim": "structured.slim",
    "statistics": "session.calibrate",
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
    "Result",
    "allocate",
    "analyse",
    "bench",
    "calibrate",
    "catalogue",
    "check_ledger",
    "discover",
    "evaluate",
    "export",
    "export_ledger",
    "free_ledger",
    "layers",
    "list_names",
    "load",
    "load_model",
    "load_plugin",
    "load_result",
    "merge_ledgers",
    "pack",
    "parse_target",
    "prune",
    "repair_ledger",
    "report",
    "reproduce",
    "select_mask",
    "slim",
    "statistics",
    "status",
    "tune",
    "unpack",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("gpmetric.provenance").gpmetric_version()
    if name not in _HOMES:
        raise AttributeError(f"module 'gpmetric' has no attribute {name!r}")
    return getattr(import_module(f"gpmetric.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
