"""The catalogue: every formula with its evidence, metrics by name, and the table measured anew."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import gpmetric
from gpmetric.cli import app
from gpmetric.discovered import CATALOGUE, EVIDENCE
from gpmetric.errors import ExpressionError, InputError
from gpmetric.metrics import resolve_metric
from gpmetric.options import make_request
from gpmetric.pruning.requests import CatalogueRequest
from gpmetric.pruning.transfer import run_catalogue
from gpmetric.pruning.updaters import FITS, UPDATERS, fit_of

QUICK = {"samples": 4, "windows": 4, "sequence_length": 32, "device": "cpu"}


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_formula_has_its_evidence(name: str) -> None:
    entry = CATALOGUE[name]
    metric = resolve_metric(f"catalogue:{name}")
    assert (metric.update, metric.fit, metric.granularity) == (entry.update, entry.fit, entry.group)
    assert entry.update in UPDATERS
    assert entry.fit in FITS
    assert entry.found
    models = json.loads(EVIDENCE.read_text(encoding="utf-8"))["models"]
    assert len(models) >= 4
    for model in models:
        row, base = model["metrics"][f"catalogue:{name}"], model["metrics"]["sparsegpt"]
        assert row["ratio"] == pytest.approx(row["mean"] / base["mean"])
        assert row["ratio"] < 1
        assert row["excess"].keys() == base["excess"].keys() >= {"0.5", "0.6", "0.7", "2:4"}
        assert "/" not in model["model"]
        assert "/" not in model["text"]["text"]


def test_names() -> None:
    metric = resolve_metric("catalogue:alps_dense")
    plain = resolve_metric("layer:abs(W)*X")
    assert (metric.expression, metric.granularity) == (plain.expression, plain.granularity)
    assert fit_of(metric, "none", "own") == "dense"
    assert fit_of(plain, "none", "dense") == "own"
    assert resolve_metric("row:catalogue:alps_dense").granularity == "row"
    for text, told in (
        ("catalogue:alps_dens", "did you mean 'alps_dense'"),
        ("catalogue:", "unknown formula"),
        ("rows:catalogue:alps_dense", "unknown comparison group 'rows'"),
    ):
        with pytest.raises(ExpressionError, match=told):
            resolve_metric(text)


def test_a_name_brings_update_and_fit(tiny_text: Path) -> None:
    options = {"calibration": str(tiny_text), "text": [str(tiny_text)], "target": ["0.5"], **QUICK}
    named = gpmetric.bench(None, metric=["wanda", "catalogue:alps_dense"], **options)["results"]
    asked = gpmetric.bench(None, metric=["alps"], fit="dense", **options)["results"]
    assert [(row["update"], row["fit"]) for row in named] == [("none", "own"), ("admm", "dense")]
    assert named[1]["ppl"] == asked[0]["ppl"]
    (shot,) = gpmetric.bench(None, metric=["catalogue:alps_dense"], one_shot=True, **options)["results"]
    assert shot["fit"] == "own"


def test_measured_anew(tiny_text: Path, tiny_llama: Path, tmp_path: Path) -> None:
    options = {"calibration": str(tiny_text), "text": str(tiny_text), "model": str(tiny_llama), **QUICK}
    found = run_catalogue(make_request(CatalogueRequest, {"name": "alps_dense", **options}))
    (model,) = found["models"]
    assert model["model"] == tiny_llama.name
    assert set(found["entries"]) == {"alps_dense"}
    rows: dict[str, Any] = model["metrics"]
    assert set(rows) == {"wanda", "sparsegpt", "catalogue:alps_dense"}
    bench = gpmetric.bench(str(tiny_llama), calibration=str(tiny_text), text=[str(tiny_text)], metric=["wanda"],
                           target=["2:4"], **QUICK)  # fmt: skip
    (row,) = bench["results"]
    expected = math.log(next(iter(row["ppl"].values())) / next(iter(bench["dense"].values())))
    assert rows["wanda"]["excess"]["2:4"] == pytest.approx(expected, abs=1e-9)


def test_shown() -> None:
    done = CliRunner().invoke(app, ["catalogue", "--json", "-"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["models"] == json.loads(EVIDENCE.read_text(encoding="utf-8"))["models"]
    table = CliRunner().invoke(app, ["catalogue", "alps_dense"])
    assert table.exit_code == 0
    assert "at 2:4" in table.output
    assert "Meng et al. 2024" in table.output
    for arguments, told in ((["nothing"], "NAME"), (["--text", "t.txt"], "--model says on what")):
        refused = CliRunner().invoke(app, ["catalogue", *arguments])
        assert isinstance(refused.exception, InputError)
        assert told in str(refused.exception)
