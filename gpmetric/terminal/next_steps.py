"""The command that may come next, for each command: quoted for a shell, with the model and the texts at hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from gpmetric.allocation.request import AllocateRequest
from gpmetric.analysis.request import AnalyseRequest
from gpmetric.evolution.ledger_requests import (
    LedgerExportRequest,
    LedgerMergeRequest,
    LedgerRepairRequest,
    LedgerRequest,
)
from gpmetric.evolution.request import DiscoverRequest
from gpmetric.evolution.status_request import StatusRequest
from gpmetric.extensible import Extensible
from gpmetric.files import STDOUT
from gpmetric.formats.request import ExportRequest
from gpmetric.listing import ListRequest
from gpmetric.options import Request, command_line, described
from gpmetric.outputs import MANIFEST
from gpmetric.packing.requests import PackRequest, UnpackRequest
from gpmetric.pruning.requests import BenchRequest, CatalogueRequest, PruneRequest, ReproduceRequest, VerifyRequest
from gpmetric.reporting.request import ReportRequest
from gpmetric.session.inputs import Inputs
from gpmetric.session.requests import CalibrateRequest, EvaluateRequest, LayersRequest
from gpmetric.structured.request import SlimRequest
from gpmetric.tuning.request import TuneRequest

__all__ = [
    "after_allocate",
    "after_analyse",
    "after_bench",
    "after_calibrate",
    "after_catalogue",
    "after_discover",
    "after_evaluate",
    "after_export",
    "after_layers",
    "after_ledger_check",
    "after_ledger_export",
    "after_ledger_free",
    "after_ledger_merge",
    "after_ledger_repair",
    "after_list",
    "after_pack",
    "after_plan",
    "after_prune",
    "after_report",
    "after_reproduce",
    "after_slim",
    "after_status",
    "after_tune",
    "after_unpack",
    "after_verify",
]  # fmt: skip

Document = Mapping[str, Any]
Kind = TypeVar("Kind", bound=Inputs)

_PRUNED, _METRIC = Path("pruned"), Path("metric.py")
_WATCHED = 10.0  # seconds between two looks


def _with(kind: type[Kind], request: Inputs, **chosen: Any) -> Kind:
    """A request of another kind that reads the same model and calibration in the same way, with its own options."""
    shared = {one.name for one in fields(Inputs)} & {one.name for one in described(kind)} - {"minutes"}
    values = {name: getattr(request, name) for name in shared} | {"model": request.models[0]}
    return kind(**values | chosen)


def _packed(folder: Path) -> str:
    return command_line("pack", PackRequest(folder=folder, output=folder.with_name(f"{folder.name}.pack")))


def _exported(formula: str, request: Extensible) -> str:
    """Writes a formula, or the winner of a ledger, which may use what the request's plug-ins added."""
    return command_line("export", ExportRequest(formula=formula, output=_METRIC, plugin=request.plugin))


def _evaluated(folder: Path, request: Inputs, text: str | None) -> str:
    """Perplexity of what was written, on a text of the request; on the demo's where it names none."""
    size = {name: getattr(request, name) for name in ("sequence_length", "windows", "text_column", "device", "bos")}
    return command_line("evaluate", EvaluateRequest(model=str(folder), text=(text or "demo:test",), **size))


def after_discover(result: Document, request: DiscoverRequest) -> list[str]:
    """Exports the winner of a finished campaign, and prunes by it."""
    calibration = request.calibration or request.text
    pruning = _with(
        PruneRequest, request, metric=result["winner"]["formula"], target=request.target[0], output=_PRUNED,
        calibration=calibration, text=request.test, update=request.update, fit=request.fit,
    )  # fmt: skip
    lines = [command_line("prune", pruning)]
    if result.get("better", True):
        lines.insert(0, _exported(str(request.ledger), request))
    return lines


def after_bench(result: Document, request: BenchRequest) -> list[str]:
    """Prunes by the metric that is best at the first target."""
    document = next((one for one in result.get("models", [result]) if one.get("results")), None)
    rows = [] if document is None else [row for row in document["results"] if not row["error"]]
    rows = [row for row in rows if row["target"] == rows[0]["target"] and all(map(math.isfinite, row["ppl"].values()))]
    if not rows:
        return []
    best = min(rows, key=lambda row: fmean(math.log(ppl) for ppl in row["ppl"].values()))
    pruning = _with(
        PruneRequest, request, metric=best["metric"], target=best["target"], output=_PRUNED,
        text=next(iter(request.text), None), update=request.update, one_shot=request.one_shot,
        fit=best["fit"], permute=request.permute and ":" in best["target"],
    )  # fmt: skip
    return [command_line("prune", pruning)]


def after_catalogue(result: Document, request: CatalogueRequest) -> list[str]:
    """Prunes by a formula of the catalogue as it is meant to be used: the one that was asked for, or the first."""
    entry = next(iter(result["entries"].values()))
    pruning = _with(
        PruneRequest, request, metric=entry["formula"], text=request.text, update=entry["update"], fit=entry["fit"],
        output=_PRUNED,
    )  # fmt: skip
    return [command_line("prune", pruning)]


def after_reproduce(result: Document, request: ReproduceRequest) -> list[str]:
    """Measures the first study of a list."""
    if not request.list or not result["studies"]:
        return []
    return [command_line("reproduce", replace(request, name=result["studies"][0]["name"], list=False))]


def after_allocate(result: Document, request: AllocateRequest) -> list[str]:
    """Prunes by the allocation, or writes it."""
    if result["allocation"] is None:
        return []
    if request.output is None:
        return [command_line("allocate", replace(request, output=Path("allocation.json")))]
    pruning = _with(
        PruneRequest, request, metric=request.metric, allocation=request.output, update=request.update,
        fit=request.fit, text=request.validation, output=_PRUNED,
    )  # fmt: skip
    return [command_line("prune", pruning)]


def after_tune(result: Document, request: TuneRequest) -> list[str]:
    """Packs what was pruned; measures a model that is smaller as it is."""
    assert request.output is not None
    if request.structured:
        return [_evaluated(request.output, request, request.text or request.validation or request.calibration)]
    return [_packed(request.output)]


def after_prune(result: Document, request: PruneRequest) -> list[str]:
    """Measures what was pruned, and packs it."""
    assert request.output is not None
    return [_evaluated(request.output, request, request.text or request.calibration), _packed(request.output)]


def after_slim(result: Document, request: SlimRequest) -> list[str]:
    """Measures the smaller model."""
    assert request.output is not None
    return [_evaluated(request.output, request, request.validation or request.calibration)]


def after_verify(result: Document, request: VerifyRequest) -> list[str]:
    """Packs a checkpoint that is as it should be and holds zeros."""
    return [_packed(Path(request.folder))] if result["ok"] and result["kind"] == "prune" else []


def after_evaluate(result: Document, request: EvaluateRequest) -> list[str]:
    """Shows what of the model can be pruned."""
    return [command_line("layers", _with(LayersRequest, request))]


def after_layers(result: Document, request: LayersRequest) -> list[str]:
    """Benchmarks on the demo's texts, which are at hand for every model."""
    texts = {} if request.model is None else {"calibration": "demo:calibration", "text": ("demo:test",)}
    small: Any = {"samples": 16, "windows": 16, "sequence_length": 256}
    return [command_line("bench", _with(BenchRequest, request, metric=("magnitude", "wanda"), **texts | small))]


def after_pack(result: Document, request: PackRequest) -> list[str]:
    """Restores the folder under another name."""
    assert request.output is not None
    folder = request.output.with_name(f"{request.output.stem}-unpacked")
    return [command_line("unpack", UnpackRequest(archive=request.output, output=folder))]


def after_unpack(result: Document, request: UnpackRequest) -> list[str]:
    """Verifies a checkpoint of ours."""
    assert request.output is not None
    ours = (request.output / MANIFEST).is_file()
    return [command_line("verify", VerifyRequest(folder=str(request.output)))] if ours else []


def after_export(result: Document, request: ExportRequest) -> list[str]:
    """Benchmarks the formula beside Wanda, on the demo model."""
    formula = result["formula"] if result["group"] == "row" else f"{result['group']}:{result['formula']}"
    bench = BenchRequest(metric=("wanda", formula), samples=16, windows=16, plugin=request.plugin)
    return [command_line("bench", bench)]


def after_calibrate(result: Document, request: CalibrateRequest) -> list[str]:
    """Writes a function that reads what was collected."""
    operands = [name for name in result["operands"] if name != "W"]
    formula = "*".join(["abs(W)", *operands[:1]])
    return [_exported(formula, request)]


def after_report(result: Document, request: ReportRequest) -> list[str]:
    """Exports the winner of a campaign, or looks again at the benchmark that a result is of."""
    if request.source.suffix == ".sqlite":
        return [_exported(str(request.source), request)]
    return [command_line("list", ListRequest(kind="metrics"))]


def after_list(result: Document, request: ListRequest) -> list[str]:
    """Benchmarks two of the metrics, on the demo model."""
    return [command_line("bench", BenchRequest(metric=("wanda", "sparsegpt"), samples=16, windows=16))]


def after_status(result: Document, request: StatusRequest) -> list[str]:
    """Watches a campaign that runs; exports the winner of one that has ended, and checks what a killed one left."""
    if result["state"] in ("running", "elsewhere"):
        return [command_line("status", replace(request, watch=_WATCHED))]
    if result["result"] is not None:
        return [_exported(str(request.ledger), request)]
    return [command_line("ledger check", LedgerRequest(ledger=request.ledger))]


def after_analyse(result: Document, request: AnalyseRequest) -> list[str]:
    """Draws the page, or says where the campaign stands."""
    if request.output is None:
        return [command_line("analyse", replace(request, output=Path("analysis.png")))]
    return [command_line("status", StatusRequest(ledger=request.ledger, plugin=request.plugin))]


def after_ledger_check(result: Document, request: LedgerRequest) -> list[str]:
    """Says where a sound campaign stands; saves what is sound of another."""
    if result["ok"]:
        return [command_line("status", StatusRequest(ledger=request.ledger))]
    output = request.ledger.with_name(f"{request.ledger.stem}-repaired.sqlite")
    return [command_line("ledger repair", LedgerRepairRequest(ledger=request.ledger, output=output))]


def after_ledger_repair(result: Document, request: LedgerRepairRequest) -> list[str]:
    """Checks what was saved."""
    assert request.output is not None
    return [command_line("ledger check", LedgerRequest(ledger=request.output))]


def after_ledger_export(result: Document, request: LedgerExportRequest) -> list[str]:
    """Says what the campaign found out."""
    if request.output == STDOUT:
        return []
    return [command_line("analyse", AnalyseRequest(ledger=request.ledger))]


def after_ledger_merge(result: Document, request: LedgerMergeRequest) -> list[str]:
    """Says what the campaigns found out together."""
    assert request.output is not None
    return [command_line("analyse", AnalyseRequest(ledger=request.output))]


def after_ledger_free(result: Document, request: LedgerRequest) -> list[str]:
    """Says where the campaign stands."""
    return [command_line("status", StatusRequest(ledger=request.ledger))]


def after_plan(result: Document, request: Request, name: str) -> list[str]:
    """Runs what was planned."""
    return [command_line(name, request)]
