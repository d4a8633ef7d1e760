"""The result of each command: the table that it is, and its picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from gpmetric.lazy import lazy
from gpmetric.results.result import Result, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "AllocateResult",
    "AnalyseResult",
    "BenchResult",
    "CatalogueResult",
    "DiscoverResult",
    "EvaluateResult",
    "LayersResult",
    "PruneResult",
    "ReproduceResult",
    "SlimResult",
    "StatisticsResult",
    "TuneResult",
    "VerifyResult",
]


class BenchResult(Result):
    """Metrics at targets: a row for each model, target, metric and text.

    Columns: model, target, metric, update, formula, text, ppl, dense, excess (ln(ppl / dense), nats per token),
    sparsity, seconds, error. What failed has its reason and no figures.
    """

    command = "bench"
    marks = ({"protocol", "results", "dense"}, {"models", "transfer"})

    def _rows(self) -> Iterable[Row]:
        for document in self.get("models", [self]):
            for row in document.get("results", ()):
                told = {key: row[key] for key in ("target", "metric", "update", "formula")}
                for text, dense in document["dense"].items():
                    ppl = None if row["error"] else row["ppl"][text]
                    yield {"model": document["model"]} | told | {
                        "text": text, "ppl": ppl, "dense": dense, "excess": _excess(ppl, dense),
                        "sparsity": row["sparsity"], "seconds": row["seconds"], "error": row["error"],
                    }  # fmt: skip
            if document.get("error"):
                yield {"model": document["model"], "error": document["error"]}

    def plot(self) -> Figure:
        """Bars of the excess over the dense model, by target and metric: the mean over models and texts."""
        return _drawn("gpmetric.results.drawing:draw_bench", self._title, self.table())


class DiscoverResult(Result):
    """A campaign: a row for the winner and each metric that it was compared with on the test text, the best first.

    Columns: metric, formula, mean_excess, and for each target `excess TARGET` and `ppl TARGET`.
    """

    command = "discover"
    marks = ({"winner", "front", "baselines"},)

    def _rows(self) -> Iterable[Row]:
        rows = {"winner": self["winner"]} | {
            name: {"formula": name} | row for name, row in self["baselines"].items()
        }  # fmt: skip
        for name in ("best_gradient_free", "regrouped"):
            if self.get(name) is not None and self[name]["formula"] != self["winner"]["formula"]:
                rows[name.replace("_", " ")] = self[name]
        for name, row in sorted(rows.items(), key=lambda one: _number(one[1]["mean_excess"])):
            told = {"metric": name, "formula": row["formula"], "mean_excess": row["mean_excess"]}
            yield told | {
                f"{kind} {target}": (row.get(kind) or {}).get(target)
                for target in self["targets"]
                for kind in ("excess", "ppl")
            }

    def plot(self) -> Figure:
        """Mean excess on validation against the size of the formula: the front, the winner, and every baseline."""
        return _drawn("gpmetric.results.drawing:draw_front", self._title, self)


class AllocateResult(Result):
    """Allocations: a row for each point of the front and of each rule beside it, and for the one picked.

    Columns: method, sparsity, sparsity_total, loss, perplexity, excess.
    """

    command = "allocate"
    marks = ({"picked", "front", "hypervolume"},)

    def _rows(self) -> Iterable[Row]:
        picked = [] if self["picked"] is None else [self["picked"]]
        for method, points in {"picked": picked, self["allocator"]: self["front"], **self["baselines"]}.items():
            for point in points:
                told = ("sparsity", "sparsity_total", "loss", "perplexity", "excess")
                yield {"method": method} | {name: point[name] for name in told}

    def plot(self) -> Figure:
        """The page that --plot writes."""
        return _drawn("gpmetric.allocation.plot:front_figure", self)


class SlimResult(Result):
    """What stays of a model: a row for each block.

    Columns: block, heads (key/value groups) and channels, or experts and removed.
    """

    command = "slim"
    marks = ({"widths", "parameters_before", "begun"},)

    def _rows(self) -> Iterable[Row]:
        for block, width in enumerate(self["widths"]):
            kept = {name: width[name] for name in ("heads", "channels", "experts") if name in width}
            yield (
                {"block": block}
                | kept
                | ({"removed": " ".join(map(str, width["removed"]))} if "removed" in width else {})
            )

    def plot(self) -> Figure:
        """What stays of each block, as bars beside each other."""
        return _drawn("gpmetric.results.drawing:draw_blocks", self._title, self.table())


class TuneResult(Result):
    """Recipes: a row for the one that was chosen, for it without each of its parts, and for its rivals.

    Columns: what, the parts of the recipe by name, excess (on validation, nats per token), `excess TEXT`, seconds,
    error.
    """

    command = "tune"
    marks = ({"recipe", "table", "pruned"},)

    def _rows(self) -> Iterable[Row]:
        texts = [one["text"] for one in self["texts"]]
        for row in self["table"]:
            others = dict(zip(texts, row.get("text_excess", ()), strict=False))
            parts = {name: _flat(value) for name, value in row["recipe"].items()}
            yield (
                {"what": row["what"]}
                | parts
                | {"excess": row["excess"]}
                | {f"excess {text}": others.get(text) for text in texts}
                | {"seconds": row["seconds"], "error": row["error"]}
            )

    def plot(self) -> Figure:
        """Bars of the excess on validation: the recipe, it without each of its parts, and its rivals."""
        return _drawn("gpmetric.results.drawing:draw_recipes", self._title, self.table())


class PruneResult(Result):
    """A checkpoint: a row for each layer. Columns: name, sparsity, and what else the manifest says of it."""

    command = "prune"
    marks = ({"layers", "output", "perplexity", "target"},)

    def _rows(self) -> Iterable[Row]:
        for layer in self["layers"]:
            yield {name: _flat(value) for name, value in layer.items()}


class VerifyResult(Result):
    """What is wrong with a checkpoint, or was not looked at, a row each. Columns: kind (problem, unchecked), told."""

    command = "verify"
    marks = ({"checkpoint", "ok", "problems"},)

    def _rows(self) -> Iterable[Row]:
        for kind, lines in (("problem", self["problems"]), ("unchecked", self["unchecked"])):
            yield from ({"kind": kind, "told": line} for line in lines)


class EvaluateResult(Result):
    """Perplexities and figures of tasks, a row each. Columns: text (or task), figure (its name), value."""

    command = "evaluate"
    marks = ({"ppl", "windows_in_all"},)

    def _rows(self) -> Iterable[Row]:
        for text, ppl in self["ppl"].items():
            yield {"text": text, "figure": "ppl", "value": ppl}
        for task, figures in self.get("tasks", {}).items():
            yield from ({"text": task, "figure": name, "value": value} for name, value in figures.items())


class LayersResult(Result):
    """Every parameter of a model, a row each. Columns: name, shape, prunable, reason, block."""

    command = "layers"
    marks = ({"layers", "share", "weights"},)

    def _rows(self) -> Iterable[Row]:
        for layer in self["layers"]:
            yield layer | {"shape": _flat(layer["shape"])}


class StatisticsResult(Result):
    """A file of statistics, a row for each layer and operand. Columns: layer, operand, shape, tensor (its name)."""

    command = "calibrate"
    marks = ({"operands", "layers", "output", "calibration"},)

    def _rows(self) -> Iterable[Row]:
        for layer in self["layers"]:
            for operand, shape in layer["operands"].items():
                name = f"{layer['name']}.{operand}"
                yield {"layer": layer["name"], "operand": operand, "shape": _flat(shape), "tensor": name}


class CatalogueResult(Result):
    """Formulas that were found, and how they transfer: a row for each model and metric.

    Columns: model, metric, mean (excess over targets), ratio (to SparseGPT's), and `excess TARGET`.
    """

    command = "catalogue"
    marks = ({"entries", "models"},)

    def _rows(self) -> Iterable[Row]:
        for model in self["models"]:
            for name, row in model["metrics"].items():
                told = {"model": model["model"], "metric": name, "mean": row["mean"], "ratio": row["ratio"]}
                yield told | {f"excess {target}": value for target, value in row["excess"].items()}


class ReproduceResult(Result):
    """Published figures beside ours, a row each. Columns: study, metric, target, published, tolerance, ours, within."""

    command = "reproduce"
    marks = ({"studies"},)

    def _rows(self) -> Iterable[Row]:
        for study in self["studies"]:
            yield from ({"study": study["name"]} | row for row in study["rows"])


class AnalyseResult(Result):
    """What goes with good fitness: a row for each part of formulas, the strongest first.

    Columns: kind, name, with and without (formulas), effect (1 for always better), q.
    """

    command = "analyse"
    marks = ({"parts", "principles"},)

    def _rows(self) -> Iterable[Row]:
        for part in self["parts"]:
            yield {name: part[name] for name in ("kind", "name", "with", "without", "effect", "q")}

    def plot(self) -> Figure:
        """The page that -o writes."""
        return _drawn("gpmetric.analysis.plot:page_figure", self)


def _drawn(place: str, *given: Any) -> Figure:
    """What a function draws; matplotlib takes half a second to import."""
    figure: Figure = lazy(place)(*given)
    return figure


def _excess(ppl: float | None, dense: float | None) -> float | None:
    """ln(ppl / dense), None where a figure is missing or not finite."""
    if ppl is None or dense is None or not (0 < ppl < math.inf and 0 < dense < math.inf):
        return None
    return math.log(ppl / dense)


def _number(value: float | None) -> float:
    """A figure to sort by; what is missing comes last."""
    return math.inf if value is None or math.isnan(value) else value


def _flat(value: Any) -> Any:
    """What a list or a table of a document is in one cell."""
    if isinstance(value, Mapping):
        return " ".join(f"{name}={_flat(one)}" for name, one in value.items())
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else value
