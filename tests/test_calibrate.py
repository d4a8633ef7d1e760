"""`gpmetric calibrate` and `gpmetric.statistics`: what an exported score needs, measured as every command does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import gpmetric
from gpmetric import cli
from gpmetric.calibration.collect import collect
from gpmetric.errors import GpmetricError, InputError
from gpmetric.loading import load_model
from gpmetric.modules import load_module
from gpmetric.operands import OPERANDS, shape_of
from gpmetric.options import make_request
from gpmetric.results import StatisticsResult, load_result
from gpmetric.session.plan import Plan
from gpmetric.session.requests import StatisticsRequest
from gpmetric.session.session import Session, open_session
from tests.mixtures import save_mixture

ALL = [name for name in OPERANDS if name != "W"]
SMALL: dict[str, Any] = {"samples": 2, "sequence_length": 32, "include": r"layers\.1\."}


@pytest.fixture(scope="module")
def session() -> Session:
    return open_session(make_request(StatisticsRequest, SMALL))


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, torch.Tensor]]:
    return gpmetric.statistics(operands=ALL, **SMALL)


def test_statistics_are_those_that_metrics_are_scored_with(
    session: Session, found: dict[str, dict[str, torch.Tensor]]
) -> None:
    expected = collect(session.model, session.tokens, ALL).layers
    assert list(found) == [layer.name for layer in session.model.layers]
    for layer in session.model.layers:
        assert list(found[layer.name]) == ALL
        for name, value in found[layer.name].items():
            assert value.shape == shape_of(name, layer.weight.shape)
            torch.testing.assert_close(value, expected[layer.name][name])


def test_the_file_holds_the_same_under_plain_names(
    found: dict[str, dict[str, torch.Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.safetensors"
    result = gpmetric.calibrate(operands="X,G,D", output=path, **SMALL)
    tensors = load_file(path)
    assert tensors.keys() == {f"{layer}.{name}" for layer in found for name in ("X", "G", "D")}
    for name, value in tensors.items():
        layer, _, operand = name.rpartition(".")
        assert torch.equal(value, found[layer][operand])
    assert type(result) is StatisticsResult
    assert result["operands"] == ["X", "G", "D"]
    assert result["bytes"] == sum(value.nbytes for value in tensors.values())
    assert {row["tensor"] for row in result.table()} == tensors.keys()
    assert [one["name"] for one in result["layers"]] == list(found)


def test_the_file_says_what_it_is_of(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    result = gpmetric.calibrate(output=path, **SMALL)
    with safe_open(path, framework="pt") as file:
        told = json.loads(file.metadata()["gpmetric"])
    assert told == json.loads(json.dumps({key: result[key] for key in told}))
    assert told["calibration"]["windows"] == 2
    assert told["calibration"]["sha256"] == result["calibration"]["sha256"]
    assert {
        "model",
        "model_sha256",
        "operands",
        "sequence_length",
        "dtype",
        "statistics_dtype",
        "versions",
    } <= told.keys()


def test_an_exported_score_works_with_what_is_read_back(session: Session, tmp_path: Path) -> None:
    """The demo of use: every operand by its own name, the weight from the model."""
    metric = gpmetric.Metric.parse("abs(W)*X + sqrt(G)*D")
    metric.export(path=tmp_path / "metric.py")
    gpmetric.calibrate(operands=metric.operands, output=tmp_path / "x.safetensors", **SMALL)
    score, tensors = load_module(tmp_path / "metric.py").score, load_file(tmp_path / "x.safetensors")
    for layer in session.model.layers:
        operands = {name: tensors[f"{layer.name}.{name}"] for name in metric.operands}
        torch.testing.assert_close(score(layer.weight, **operands), metric(layer.weight, **operands))


def test_matrices_may_be_kept_in_bfloat16(found: dict[str, dict[str, torch.Tensor]]) -> None:
    halved = gpmetric.statistics(operands="X,G", statistics_dtype="bfloat16", **SMALL)
    for layer, operands in halved.items():
        assert (operands["X"].dtype, operands["G"].dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(operands["G"], found[layer]["G"].bfloat16())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"operands": "W,X"}, "--operands W is the weight itself"),
        ({"operands": "Y"}, "--operands must be one of W, X, G"),
        ({"operands": ()}, "--operands names nothing"),
        ({"output": None}, r"--output \(-o\) FILE is needed"),
        ({"output": "none/x"}, "does not exist"),
        ({"windows": 3}, "unknown option 'windows'"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_runs(options: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        gpmetric.calibrate(**{"output": "x.safetensors", **options})


def test_only_a_file_of_its_own_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    gpmetric.calibrate(output=path, **SMALL)
    gpmetric.calibrate(output=path, **SMALL)
    save_file({"weight": torch.zeros(2, 2)}, path)
    with pytest.raises(InputError, match="gpmetric did not write it"):
        gpmetric.calibrate(output=path, **SMALL)
    gpmetric.calibrate(output=path, force=True, **SMALL)
    assert len(load_file(path)) == 7


def test_what_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model()
    weight = next(layer for layer in model.layers if "layers.1." in layer.name).weight
    monkeypatch.setattr("gpmetric.session.calibrate.as_stored", _broken)
    with pytest.raises(GpmetricError, match="not finite"):
        gpmetric.calibrate(output=tmp_path / "x.safetensors", **SMALL)
    assert list(tmp_path.iterdir()) == []
    assert weight.isfinite().all()


def _broken(*_: Any) -> torch.Tensor:
    raise GpmetricError("statistic X of layer a is not finite")


def test_the_command_and_its_plan(tmp_path: Path) -> None:
    path, told = tmp_path / "x.safetensors", tmp_path / "x.json"
    words = ["--operands", "X,H", "--samples", "2", "--sequence-length", "32", "-o", str(path)]
    planned = CliRunner().invoke(cli.app, ["plan", "calibrate", *words, "--json", "-"], catch_exceptions=False)
    assert not path.exists()
    plan = json.loads(planned.stdout)
    done = CliRunner().invoke(cli.app, ["calibrate", *words, "--json", str(told)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "X, H of 28 layers" in " ".join(done.stdout.split())
    found = load_result(told)
    assert type(found) is StatisticsResult
    assert plan["disk_bytes"] == found["bytes"] <= path.stat().st_size
    assert plan["memory_bytes"] > found["bytes"]


def test_block_by_block_gives_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neither weights nor statistics have room together."""
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    gpmetric.calibrate(operands=ALL, output=whole, **SMALL)
    plan = Plan(resident=False, kept=False, room=0, states=False, inputs=False)
    monkeypatch.setattr("gpmetric.session.session.make_plan", lambda *_: plan)
    gpmetric.calibrate(operands=ALL, output=parts, **SMALL)
    expected, found = load_file(whole), load_file(parts)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])


def test_each_expert_is_a_layer(save_model: Callable[..., Path], tiny_text: Path, tmp_path: Path) -> None:
    """One that read too little has its siblings' statistics, and is named."""
    source, path = save_mixture(save_model, "mixtral"), tmp_path / "x.safetensors"
    asked: dict[str, Any] = {"calibration": tiny_text, "samples": 1, "sequence_length": 4}
    result = gpmetric.calibrate(source, operands="X,G", output=path, **asked)
    names = {one["name"] for one in result["layers"]}
    assert {f"{name}.{operand}" for name in names for operand in ("X", "G")} == load_file(path).keys()
    assert result["experts"]["tokens"].keys() < names
    assert set(result["experts"]["starved"]) < names
    assert result["experts"]["starved"]
    found = gpmetric.statistics(source, operands="X", **asked)
    assert found.keys() == names
