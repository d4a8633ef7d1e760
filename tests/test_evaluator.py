"""The evaluator's figures against a model pruned here, naively, and a model that is dense again after every task."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from gpmetric.calibration.collect import Statistics, collect
from gpmetric.data import Text, Windows
from gpmetric.errors import MaskError
from gpmetric.evaluation import references
from gpmetric.evaluation.perplexity import Teacher
from gpmetric.evaluation.references import References
from gpmetric.evolution import evaluator as module
from gpmetric.evolution.evaluator import Evaluator, alike
from gpmetric.evolution.tasks import DenseTask, ExcessTask, MaskFingerprint, NoMasks, ProbeTask, SequentialTask, UseTask
from gpmetric.loading import load_model
from gpmetric.metrics import resolve_metric
from gpmetric.models import Model
from gpmetric.operands import GRAM
from gpmetric.session.inputs import Inputs
from gpmetric.session.session import Session
from gpmetric.session.splits import open_text, read_windows

TARGETS = ("0.5", "layer:0.3", "2:4")
BAD = "exp(abs(W)*50)*1e29"  # overflows for the largest weights


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_gpt2"])
def model(request: pytest.FixtureRequest) -> Model:
    return load_model(str(request.getfixturevalue(request.param)))


@pytest.fixture(scope="module")
def tokens(model: Model, tiny_text: Path) -> dict[str, Tensor]:
    windows = read_windows(model, open_text(str(tiny_text)), 32, 30).tokens
    names = ("calibration", "search", "validation", "test", "calibration-0")
    return {name: windows[6 * place : 6 * place + 6] for place, name in enumerate(names)}


@pytest.fixture(scope="module")
def statistics(model: Model, tokens: dict[str, Tensor]) -> Statistics:
    return collect(model, tokens["calibration"], {"G", "H", "D", GRAM})


@pytest.fixture
def evaluator(model: Model, statistics: Statistics, tokens: dict[str, Tensor]) -> Evaluator:
    return evaluator_of(model, statistics, tokens)


def evaluator_of(
    model: Model,
    statistics: Statistics,
    tokens: dict[str, Tensor],
    targets: Any = TARGETS,
    update: str = "none",
    fit: str = "own",
) -> Evaluator:
    windows = {split: Windows(Text(split, ""), part) for split, part in tokens.items()}
    return Evaluator(Session(Inputs(), model, windows, dense=statistics), targets, update, fit=fit)


def excess(text: str, first: int = 0, last: int | None = 6) -> ExcessTask:
    return ExcessTask(resolve_metric(text), first, last)


def probe(*texts: str) -> ProbeTask:
    return ProbeTask(tuple(resolve_metric(text) for text in texts))


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
        score = (weight.abs() * statistics.layers[layer.name]["X"]).tolist()
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
    found = evaluator(excess("abs(W)*X", 1, 5))
    assert set(found) == {"loss", "kl"}
    assert set(found["loss"]) == set(found["kl"]) == set(TARGETS)
    lost = losses(pruned, windows) - losses(model.module, windows)
    assert found["loss"][target] == pytest.approx(lost, abs=1e-5)
    # log-probabilities of the dense model are kept in fp16: 2**-11 of about 6
    assert found["kl"][target] == pytest.approx(divergence(model.module, pruned, windows), rel=2e-3)


def test_a_group_before_a_metric_holds_for_plain_numbers(
    evaluator: Evaluator, model: Model, statistics: Statistics, tokens: dict[str, Tensor]
) -> None:
    rows, layer = (evaluator(excess(metric)) for metric in ("abs(W)*X", "layer:abs(W)*X"))
    lost = losses(naive(model, statistics, "0.5", "layer"), tokens["search"]) - losses(model.module, tokens["search"])
    assert layer["loss"]["0.5"] == pytest.approx(lost, abs=1e-5)
    assert layer["loss"]["0.5"] != rows["loss"]["0.5"]
    for target in TARGETS[1:]:
        assert layer["loss"][target] == rows["loss"][target]


def test_nothing_removed_is_nothing_lost(model: Model, statistics: Statistics, tokens: dict[str, Tensor]) -> None:
    found = evaluator_of(model, statistics, tokens, ("0",))(excess("abs(W)"))
    assert found["loss"]["0"] == 0
    assert abs(found["kl"]["0"]) < 1e-4  # fp16


def test_windows_add_up(evaluator: Evaluator) -> None:
    parts = [evaluator(excess("abs(W)*G", *bounds)) for bounds in ((0, 2), (2, 6))]
    whole = evaluator(excess("abs(W)*G", 0, None))
    for kind in ("loss", "kl"):
        for target in TARGETS:
            mean = (2 * parts[0][kind][target] + 4 * parts[1][kind][target]) / 6
            assert whole[kind][target] == pytest.approx(mean, abs=1e-5)


@pytest.mark.every(3)
@pytest.mark.parametrize("update", ["none", "obs", "obs-blockwise", "admm"])
def test_kept_and_remade_predictions_give_the_same_figures(
    model: Model,
    statistics: Statistics,
    tokens: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    update: Any,
) -> None:
    tasks = [excess(metric) for metric in ("abs(W)*X", "W*W*D", "abs(W)")]
    kept = evaluator_of(model, statistics, tokens, TARGETS, update)
    expected = [kept(task) for task in tasks]
    monkeypatch.setattr(module, "TEACHER_BYTES", 0)
    remade = evaluator_of(model, statistics, tokens, TARGETS, update)
    made: list[int] = []
    teacher = module.Teacher
    monkeypatch.setattr(module, "Teacher", lambda *arguments: made.append(1) or teacher(*arguments))
    assert [remade(task) for task in tasks] == expected
    assert len(made) == len(tasks)
    assert [kept(task) for task in tasks] == expected
    assert len(made) == len(tasks)  # made once, before


def test_no_more_predictions_are_held_than_are_kept(
    model: Model, tokens: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a large vocabulary would not fit into memory together."""
    monkeypatch.setattr(references, "batches", lambda model, windows: iter(windows.split(1)))

    def dense() -> Iterator[tuple[Tensor, Tensor]]:
        return references.parts_of(model, tokens["search"][:6])

    (size,) = {one.bytes for one in References(Teacher, 2**30).of("all", dense)}
    alive: list[int] = []

    class Counted(Teacher):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            alive.append(1)

        def __del__(self) -> None:
            alive.pop()

    kept = References(Counted, int(2.5 * size))
    assert max(len(alive) for _ in kept.of("all", dense)) <= 4  # two kept, the present one and the next
    assert not alive
    assert "all" not in kept


@pytest.mark.parametrize("update", ["none", "obs", "obs-blockwise", "admm"])
def test_errors_leave_the_model_dense(
    model: Model, statistics: Statistics, tokens: dict[str, Tensor], update: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = evaluator_of(model, statistics, tokens, TARGETS, update)
    (probed,) = evaluator(probe(BAD))
    assert isinstance(probed, NoMasks)
    assert "NaN or infinite" in probed.error
    for task in (excess(BAD, 0, 2), SequentialTask(resolve_metric(BAD), "0.5", "test", "calibration", update)):
        with pytest.raises(MaskError):
            evaluator(task)
    monkeypatch.setattr(module.Teacher, "compare", lambda *arguments: (_ for _ in ()).throw(RuntimeError("died")))
    with pytest.raises(RuntimeError, match="died"):
        evaluator(excess("abs(W)", 0, 2))


def test_tasks_together_are_answered_as_each_alone(
    model: Model, statistics: Statistics, tokens: dict[str, Tensor]
) -> None:
    """To the bit, with the errors in their places; blocks that are read one by one change nothing."""
    formulas = ("abs(W)*X", BAD, "layer:abs(W)*G", "W*W*D")
    excesses = [excess(text, 1, 5) for text in formulas]
    sequences = [SequentialTask(resolve_metric(text), "0.5", "test", "calibration", "obs") for text in formulas]
    streamed = load_model(model.name, resident=False)
    one = evaluator_of(model, statistics, tokens)
    for tasks in (excesses, sequences):
        assert all(alike(tasks[0], task) for task in tasks)
        for evaluator in (one, evaluator_of(streamed, statistics, tokens)):
            for task, found in zip(tasks, evaluator.together(tasks), strict=True):
                if task.metric.name == BAD:
                    assert isinstance(found, MaskError)
                else:
                    assert found == one(task)
    assert not alike(excesses[0], excess("abs(W)", 1, 4))
    assert not alike(excesses[0], sequences[0])
    assert not alike(sequences[0], replace(sequences[0], calibration="calibration-0"))
    assert not alike(probe("abs(W)"), probe("abs(W)"))


def test_a_probe_answers_for_every_metric_in_order(evaluator: Evaluator) -> None:
    answers = evaluator(probe("abs(W)*X", BAD, "2*abs(W)*X", "layer:abs(W)*X"))
    assert [isinstance(one, MaskFingerprint) for one in answers] == [True, False, True, True]
    first, _, same, layer = answers
    assert first.fingerprint == same.fingerprint != layer.fingerprint
    assert set(first.reconstruction) == set(TARGETS)


@pytest.mark.parametrize("metric", ["abs(W)*X", "wanda", "magnitude", "gblm_l1", "sparsegpt", "alps", "layer:abs(W)*H"])
def test_sequential_is_relative_to_the_dense_loss(evaluator: Evaluator, tokens: dict[str, Tensor], metric: str) -> None:
    task = SequentialTask(resolve_metric(metric, 6, 32), "0.5", "validation", "calibration", "none")
    found = evaluator(task)
    (dense,) = evaluator(DenseTask("validation")).values()
    assert found.loss - found.excess == pytest.approx(dense)
    assert dense == pytest.approx(losses(evaluator._model.module, tokens["validation"]), rel=1e-5)
    other = evaluator(replace(task, calibration="calibration-0"))
    assert (other == found) == (metric == "magnitude")  # which reads no statistics
    assert evaluator(task) == found


def test_dense_is_by_model(evaluator: Evaluator, model: Model) -> None:
    found = evaluator(DenseTask("test"))
    assert list(found) == [model.name]
    assert math.isfinite(found[model.name])


def test_the_hardest_target_alone(evaluator: Evaluator) -> None:
    """What all targets tell of the one of the highest sparsity, the first of equal ones."""
    whole = evaluator(excess("abs(W)*X", 0, 2))
    alone = evaluator(replace(excess("abs(W)*X", 0, 2), hardest=True))
    assert TARGETS == ("0.5", "layer:0.3", "2:4")
    assert alone == {name: {"0.5": figures["0.5"]} for name, figures in whole.items()}
    assert not alike(excess("abs(W)*X", 0, 2), replace(excess("abs(W)*X", 0, 2), hardest=True))


@pytest.mark.every(3)
@pytest.mark.parametrize("update", ["obs-blockwise", "admm"])
def test_in_use_is_what_the_judge_says_of_the_search_text(
    model: Model, statistics: Statistics, tokens: dict[str, Tensor], update: str
) -> None:
    """Several together, one of which has no masks; on blocks that are read one by one, too."""
    tasks = [UseTask(resolve_metric(text)) for text in ("abs(W)*X", BAD, "W*W*G")]
    assert all(alike(tasks[0], one) for one in tasks)
    assert not alike(tasks[0], excess("abs(W)"))
    ours = evaluator_of(model, statistics, tokens, TARGETS, update, "dense")
    found = ours.together(tasks)
    assert isinstance(found[1], MaskError)
    for task, figures in zip(tasks[::2], found[::2], strict=True):
        assert figures.keys() == {"loss", "kl"}
        for target in TARGETS:
            asked = SequentialTask(task.metric, target, "search", "calibration", update, fit="dense")
            assert figures["loss"][target] == pytest.approx(ours(asked).excess, abs=1e-5)
        published = [SequentialTask(task.metric, target, "search", "calibration", update) for target in TARGETS]
        assert figures["loss"] != {one.target: ours(one).excess for one in published}
    assert ours(tasks[0]) == found[0]  # the references being there by now
    streamed = load_model(model.name, resident=False)
    apart = evaluator_of(streamed, statistics, tokens, TARGETS, update, "dense").together(tasks)
    assert apart[0] == found[0]
    assert apart[2] == found[2]
