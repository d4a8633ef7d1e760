"""What commands give: the document of --json, which also says itself as a table, draws itself, and is saved and loaded.

`gpmetric.bench(...)` is a `BenchResult`; `load_result(path)` is what a file of --json holds, in its own class.
"""

from __future__ import annotations

from gpmetric.results.kinds import (
    AllocateResult,
    AnalyseResult,
    BenchResult,
    CatalogueResult,
    DiscoverResult,
    EvaluateResult,
    LayersResult,
    PruneResult,
    ReproduceResult,
    SlimResult,
    StatisticsResult,
    TuneResult,
    VerifyResult,
)
from gpmetric.results.load import RESULTS, load_result
from gpmetric.results.result import Result, marked

__all__ = [
    "RESULTS",
    "AllocateResult",
    "AnalyseResult",
    "BenchResult",
    "CatalogueResult",
    "DiscoverResult",
    "EvaluateResult",
    "LayersResult",
    "PruneResult",
    "ReproduceResult",
    "Result",
    "SlimResult",
    "StatisticsResult",
    "TuneResult",
    "VerifyResult",
    "load_result",
    "marked",
]
