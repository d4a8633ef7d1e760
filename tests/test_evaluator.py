"""The evaluator's figures against a model pruned here, naively, and a model that is dense again after every task."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from gpmetric.calibration.collect import Statistics, collect_statistics
from gpmetric.errors import GpmetricError, MaskError
from gpmetric.evaluation.windows import read_windows
from gpmetric.evolution import evaluator as module
from gpmetric.evolution.evaluator import Evaluator
from gpmetric.models import Model, load_model

TARGETS = ("0.5", "layer:0.3", "2:4")
BAD = "exp(abs(W)*50)*1e29"  # overflows for the largest weights


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_gpt2"])
def model(request: pytest.FixtureRequest) -> Model:
    return load_model(str(request.getfixturevalue(request.param)))


@pytest.fixture(scope="module")
def tokens(model: Model, tiny_text: Path) -> dict[str, Tensor]:
    windows = read_windows(model, str(tiny_text), 32, 30).tokens
    names = ("calibration", "search", "validation", "test", "calibration-0")
    return {name: windows[6 * place : 6 * place + 6] for place, name in enumerate(names)}


@pytest.fixture(scope="module")
def statistics(model: Model, tokens: dict[str, Tensor]) -> Statistics:
    return collect_statistics(model, tokens["calibration"])


@pytest.fixture
def evaluator(model: Model, statistics: Statistics, tokens: dict[str, Tensor]) -> Evaluator:
    return Evaluator(model, statistics, tokens, TARGETS, "none")


@pytest.fixture(autouse=True)
def _dense_afterwards(model: Model) -> Iterator[None]:
    """Whatever a test does: every bit of the model is as before, at the same address."""
    before = [(layer.parameter.data_ptr(), layer.parameter.clone()) for layer in model.layers]
    yield
    for layer, (place, bits) in zip(model.layers, before, strict=True):
        assert layer.parameter.data_ptr() == place
        assert torch.equal(layer.parameter.view(torch.int32), bits.view(torch.int32))


def naive(model: Model, statistics: Statistics, target: str, group: str = "row") -> Any:
    """A pruned copy of the module: abs(W)*X sorted in Python, the lowest share of each group set to zero."""
    pruned = copy.deepcopy(model.module)
    for layer in model.layers:
        stored = pruned.get_submodule(layer.name).weight.data
        weight = stored.t() if isinstance(layer.module, Conv1D) else stored
        score = (weight.abs() * statistics.layers[layer.name].X).tolist()
        places = [(row, column) for row in range(len(score)) for column in range(len(score[0]))]
        kind = {"0.5": group, "layer:0.3": "layer", "2:4": "2:4"}[target]
        groups: dict[Any, list[tuple[int, int]]] = {}
        for row, column in places:
            key = {"row": row, "layer": 0, "2:4": (row, column // 4)}[kind]
            groups.setdefault(key, []).append((row, column))
        share = {"0.5": 0.5, "layer:0.3": 0.3, "2:4": 0.5}[target]
        for members in groups.values():
            worst = sorted(members, key=lambda place: score[place[0]][place[1]])
            for row, column in worst[: int(len(members) * share)]:
                weight[row, column] = 0
    return pruned


@torch.no_grad()
def losses(module: Any, windows: Tensor) -> float:
    return sum(module(input_ids=row[None], labels=row[None]).loss.item() for row in windows) / len(windows)


@torch.no_grad()
def divergence(dense: Any, pruned: Any, windows: Tensor) -> float:
    """KL(dense || pruned), sum of p (ln p - ln q), mean over predictions, in double precision."""
    p, q = (one(input_ids=windows).logits[:, :-1].double().log_softmax(dim=-1) for one in (dense, pruned))
    return float((p.exp() * (p - q)).sum(dim=-1).mean())


@pytest.mark.parametrize("target", TARGETS)
def test_excess_and_divergence_are_those_of_a_model_pruned_naively(
    evaluator: Evaluator, model: Model, statistics: Statistics, tokens: dict[str, Tensor], target: str
) -> None:
    pruned, windows = naive(model, statistics, target), tokens["search"][1:5]
    found = evaluator({"kind": "excess", "metric": "abs(W)*X", "first": 1, "last": 5})
    assert set(found) == {"loss", "kl"}
    assert set(found["loss"]) == set(found["kl"]) == set(TARGETS)
    excess = losses(pruned, windows) - losses(model.module, windows)
    assert found["loss"][target] == pytest.approx(excess, abs=1e-5)
    # log-probabilities of the dense model are kept in fp16: 2**-11 of about 6
    assert found["kl"][target] == pytest.approx(divergence(model.module, pruned, windows), rel=2e-3)


def test_a_group_before_a_metric_holds_for_plain_numbers(
    evaluator: Evaluator, model: Model, statistics: Statistics, tokens: dict[str, Tensor]
) -> None:
    rows, layer = (
        evaluator({"kind": "excess", "metric": metric, "first": 0, "last": 6})
        for metric in ("abs(W)*X", "layer:abs(W)*X")
    )
    excess = losses(naive(model, statistics, "0.5", "layer"), tokens["search"]) - losses(model.module, tokens["search"])
    assert layer["loss"]["0.5"] == pytest.approx(excess, abs=1e-5)
    assert layer["loss"]["0.5"] != rows["loss"]["0.5"]
    for target in TARGETS[1:]:
        assert layer["loss"][target] == rows["loss"][target]


def test_nothing_removed_is_nothing_lost(model: Model, statistics: Statistics, tokens: dict[str, Tensor]) -> None:
    found = Evaluator(model, statistics, tokens, ("0",), "none")(
        {"kind": "excess", "metric": "abs(W)", "first": 0, "last": 6}
    )
    assert found["loss"]["0"] == 0
    assert abs(found["kl"]["0"]) < 1e-4  # fp16


def test_windows_add_up(evaluator: Evaluator) -> None:
    parts = [evaluator({"kind": "excess", "metric": "abs(W)*G", "first": a, "last": b}) for a, b in ((0, 2), (2, 6))]
    (whole,) = (evaluator({"kind": "excess", "metric": "abs(W)*G", "first": 0, "last": last}) for last in (None,))
    for kind in ("loss", "kl"):
        for target in TARGETS:
            mean = (2 * parts[0][kind][target] + 4 * parts[1][kind][target]) / 6
            assert whole[kind][target] == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize("update", ["none", "obs", "obs-blockwise"])
def test_kept_and_remade_predictions_give_the_same_figures(
    model: Model,
    statistics: Statistics,
    tokens: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    update: Any,
) -> None:
    tasks = [{"kind": "excess", "metric": metric, "first": 0, "last": 6} for metric in ("abs(W)*X", "W*W*D", "abs(W)")]
    kept, remade = (Evaluator(model, statistics, tokens, TARGETS, update) for _ in range(2))
    expected = [kept(task) for task in tasks]
    monkeypatch.setattr(module, "_TEACHER_BYTES", 0)
    made: list[int] = []
    teacher = module.Teacher
    monkeypatch.setattr(module, "Teacher", lambda *arguments: made.append(1) or teacher(*arguments))
    assert [remade(task) for task in tasks] == expected
    assert len(made) == len(tasks)
    assert [kept(task) for task in tasks] == expected
    assert len(made) == len(tasks)  # made once, before


def test_no_more_predictions_are_held_than_are_kept(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a large vocabulary would not fit into memory together."""
    monkeypatch.setattr(module, "batches", lambda model, windows: iter(windows.split(1)))
    (size,) = {teacher.bytes for teacher in evaluator._taught(0, 6)}
    evaluator._teachers.clear()
    monkeypatch.setattr(module, "_TEACHER_BYTES", 2.5 * size)
    alive: list[int] = []
    teacher = module.Teacher

    class Counted(teacher):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            alive.append(1)

        def __del__(self) -> None:
            alive.pop()

    monkeypatch.setattr(module, "Teacher", Counted)
    assert max(len(alive) for _ in evaluator._taught(0, 6)) <= 4  # two kept, the present one and the next
    assert not evaluator._teachers
    assert not alive


@pytest.mark.parametrize("update", ["none", "obs", "obs-blockwise"])
def test_errors_leave_the_model_dense(
    model: Model, statistics: Statistics, tokens: dict[str, Tensor], update: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = Evaluator(model, statistics, tokens, TARGETS, update)
    (probed,) = evaluator({"kind": "probe", "metrics": [BAD]})
    assert "NaN or infinite" in probed["error"]
    for task in (
        {"kind": "excess", "metric": BAD, "first": 0, "last": 2},
        {
            "kind": "sequential",
            "metric": BAD,
            "target": "0.5",
            "split": "test",
            "calibration": "calibration",
            "update": update,
        },
    ):
        with pytest.raises(MaskError):
            evaluator(task)
    monkeypatch.setattr(module.Teacher, "compare", lambda *arguments: (_ for _ in ()).throw(RuntimeError("died")))
    with pytest.raises(RuntimeError, match="died"):
        evaluator({"kind": "excess", "metric": "abs(W)", "first": 0, "last": 2})


def test_a_formula_that_cannot_be_read_is_an_error_of_its_own(evaluator: Evaluator) -> None:
    with pytest.raises(GpmetricError):
        evaluator({"kind": "probe", "metrics": ["abs(W)", "abs(W)*Q"]})


def test_a_probe_answers_for_every_metric_in_order(evaluator: Evaluator) -> None:
    answers = evaluator({"kind": "probe", "metrics": ["abs(W)*X", BAD, "2*abs(W)*X", "layer:abs(W)*X"]})
    assert [one["error"] is None for one in answers] == [True, False, True, True]
    first, _, same, layer = answers
    assert first["fingerprint"] == same["fingerprint"] != layer["fingerprint"]
    assert set(first["reconstruction"]) == set(TARGETS)


@pytest.mark.parametrize("metric", ["abs(W)*X", "wanda", "magnitude", "gblm_l1", "sparsegpt", "layer:abs(W)*H"])
def test_sequential_is_relative_to_the_dense_loss(evaluator: Evaluator, tokens: dict[str, Tensor], metric: str) -> None:
    task = {"kind": "sequential", "metric": metric, "target": "0.5", "split": "validation", "update": "none"}
    found = evaluator(task | {"calibration": "calibration"})
    (dense,) = evaluator({"kind": "dense", "split": "validation"}).values()
    assert found["loss"] - found["excess"] == pytest.approx(dense)
    assert dense == pytest.approx(losses(evaluator._model.module, tokens["validation"]), rel=1e-5)
    other = evaluator(task | {"calibration": "calibration-0"})
    assert (other == found) == (metric == "magnitude")  # which reads no statistics
    assert evaluator(task | {"calibration": "calibration"}) == found


def test_dense_is_by_model(evaluator: Evaluator, model: Model) -> None:
    found = evaluator({"kind": "dense", "split": "test"})
    assert list(found) == [model.name]
    assert math.isfinite(found[model.name])
