"""`gpmetric allocate --update`: candidates have the weights of the updater that the allocation will be used with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from gpmetric.allocation import allocate as allocate_module
from gpmetric.allocation import in_use
from gpmetric.allocation.allocate import allocate
from gpmetric.allocation.allocators import Problem, dlp, one_threshold, owl, uniform
from gpmetric.allocation.candidate_losses import candidate_losses
from gpmetric.allocation.candidate_objective import CandidateObjective
from gpmetric.allocation.evaluation_log import EvaluationLog
from gpmetric.allocation.exact_budget import allocated, exact_allocation
from gpmetric.allocation.level_weights import SolvedModel, database_bytes, solved_levels
from gpmetric.allocation.levels import level_table, within_reach
from gpmetric.allocation.pareto_pick import at_sparsity, rules_beside
from gpmetric.allocation.prepare import CalibratedModel, calibrate
from gpmetric.allocation.request import AllocateRequest
from gpmetric.allocation.time_plan import TimePlan
from gpmetric.calibration.collect import collect
from gpmetric.errors import InputError, TimeOverError
from gpmetric.evaluation.perplexity import mean_loss
from gpmetric.loading import load_model
from gpmetric.metrics import resolve_metric
from gpmetric.models import Model
from gpmetric.pruning.allocation import Allocation, layer_target, read_allocation
from gpmetric.pruning.listeners import PruneListener
from gpmetric.pruning.prune import prune, run_prune
from gpmetric.pruning.requests import PruneRequest
from gpmetric.pruning.updaters import prune_weights
from gpmetric.session import plan
from gpmetric.session.plan import make_plan
from gpmetric.session.work import Work

SMALL: dict[str, Any] = {
    "samples": 4, "search_windows": 8, "windows": 4, "sequence_length": 32, "device": "cpu", "evaluations": 30,
    "levels": 10,
}  # fmt: skip
ADMM: dict[str, Any] = {"metric": "alps", "update": "admm", "fit": "dense"}
KINDS: dict[str, dict[str, Any]] = {
    "obs": {"update": "obs", "metric": "wanda"},
    "blockwise": {"update": "obs-blockwise", "metric": "W*W*D"},
    "admm of gradients": {"update": "admm", "metric": "layer:abs(W)*sqrt(F)"},
    "the metric's own": {"update": "obs", "metric": "sparsegpt"},
    "patterns": {"update": "admm", "metric": "alps", "granularity": "n:m", "levels": None, "exclude": "down_proj"},
}


def request(model: Path, text: Path, **options: Any) -> AllocateRequest:
    made = AllocateRequest(model=str(model), calibration=str(text), **SMALL | options)
    made.check()
    return made


def prepared(model: Path, text: Path, **options: Any) -> CalibratedModel:
    return calibrate(request(model, text, **options), lambda *told: None)


def by_hand(calibrated: CalibratedModel, allocation: Allocation) -> Model:
    """The dense model read again, each layer pruned alone on the dense model's statistics."""
    session, made = calibrated.session, calibrated.request
    model = load_model(str(made.model), device="cpu", exclude=made.exclude)
    metric = resolve_metric(made.metric, *session.tokens.shape)
    statistics = collect(model, session.tokens, {"X", "D", "gram", *metric.operands})
    pruned = []
    for layer in model.layers:
        target = allocation.targets[layer.name]
        ((solved,),) = prune_weights([layer.weight], metric, [target], [statistics.layers[layer.name]], made.update)
        pruned.append(solved if target.sparsity else layer.weight.clone())
    for layer, weight in zip(model.layers, pruned, strict=True):
        layer.weight.copy_(weight)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_candidate_is_a_model_put_together_by_hand(kind: str, tiny_llama: Path, tiny_text: Path) -> None:
    """Its loss, and what it costs on a search text; and that of an allocation between its levels."""
    calibrated = prepared(tiny_llama, tiny_text, **KINDS[kind])
    table, tokens = calibrated.table, calibrated.session.windows["search"].tokens
    levels = table.nearest([0.3 + 0.5 * gene / len(table.genes) for gene in range(len(table.genes))])
    levels = (0, *levels[1:])
    model = by_hand(calibrated, table.allocation(levels))
    expected = mean_loss(model, tokens)
    assert list(candidate_losses(calibrated.pruned, [levels], tokens)) == pytest.approx([expected], abs=2e-5)
    dense = mean_loss(load_model(str(tiny_llama), device="cpu"), tokens)
    objective = CandidateObjective(calibrated.pruned, tokens, "loss")
    values = objective.measure(levels, 0, len(objective))
    assert sum(values) / len(values) == pytest.approx(expected - dense, abs=2e-5)
    between = exact_allocation(table, levels, table.removes(levels) + 40)
    assert (allocated(table, between) == table.removes(levels)) == (not table.nested)
    with calibrated.exactly(between) as at_hand:
        found = mean_loss(calibrated.session.model, tokens, at_hand)
    assert found == pytest.approx(mean_loss(by_hand(calibrated, between), tokens), abs=2e-5)


def test_what_the_slopes_are_made_of(tiny_gpt2: Path, tiny_text: Path) -> None:
    """At each level, the product of its weights with a gradient, whatever level the layer is at."""
    calibrated = prepared(tiny_gpt2, tiny_text, metric="wanda", update="obs")
    pruned, table = calibrated.pruned, calibrated.table
    assert isinstance(pruned, SolvedModel)
    layers = calibrated.session.model.layers
    gradient = torch.randn(layers[3].weight.shape, generator=torch.Generator().manual_seed(0))
    found = pruned.by_level(3, gradient)
    gene = table.gene_of[3]
    for level in range(len(table.targets[3])):
        pruned.set(tuple(level if one == gene else 0 for one in range(len(table.genes))))
        assert found[level].item() == pytest.approx((layers[3].weight * gradient).sum().item(), abs=1e-4)
        assert int((layers[3].weight == 0).sum()) == table.targets[3][level].removes(layers[3].weight.shape)
    pruned.dense()


def test_levels_within_reach(tiny_llama: Path) -> None:
    """Steps of a fifth of the largest matrix, those in the range, and nothing; bytes counted by hand."""
    model = load_model(str(tiny_llama), device="cpu")
    assert within_reach(0.4, 0.7) == (pytest.approx(0.1), pytest.approx(0.9))
    assert within_reach(0.1, 0.9) == (0.0, 1.0)
    table = level_table(model, "layer", steps=5, within=(0.3, 0.9))
    largest = max(layer.weight.numel() for layer in model.layers)
    kept = 0
    for layer, targets in zip(model.layers, table.targets, strict=True):
        size = layer.weight.numel()
        steps = [-(-largest // 5) * step / size for step in range(1, 6)]
        expected = [0.0, *(step for step in steps if 0.3 <= step <= 0.9)]
        assert [target.sparsity for target in targets] == pytest.approx(expected, abs=1.5 / size)
        kept += 4 * size * (len(expected) - 1)
    assert database_bytes(table, 4) == kept
    assert [table.scaled(step) for step in (1, 50, 100)] == [1, 1, 2]
    levels = table.nearest([0.1, 0.4, 0.8] * 7)
    assert table.removes(levels) == allocated(table, table.allocation(levels))


def test_levels_are_solved_some_at_a_time(tiny_llama: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights, however many there is room for."""
    model = load_model(str(tiny_llama), device="cpu")
    tokens = prepared(tiny_llama, tiny_text).session.tokens
    layer, metric = model.layers[0], resolve_metric("alps")
    statistics = collect(model, tokens, {"X", "gram"}).layers[layer.name]
    targets = level_table(model, "layer", steps=10).targets[0]
    found = []
    for room in (2**25, 1):
        monkeypatch.setattr("gpmetric.allocation.level_weights._TOGETHER", room)
        found.append(dict(solved_levels(layer.weight, metric, targets, statistics, "admm")))
    assert found[0].keys() == found[1].keys() == set(range(1, len(targets)))
    for level, solved in found[0].items():
        torch.testing.assert_close(solved, found[1][level], atol=1e-4, rtol=1e-3)


# The plan


def test_where_pruned_weights_are_kept(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory where it has room beside all else, else in files, and refused where neither has any."""
    model = load_model(str(tiny_llama), device="cpu")
    monkeypatch.setattr(plan, "_speed", lambda device, dtype: 1e12)
    monkeypatch.setattr(plan, "resident_bytes", lambda device=None: 0)
    work = Work(block=frozenset({"X", "gram"}), length=32, calibration=320, texts=320)
    size = 10**8
    bare = make_plan(model, work, 10**9)
    held = make_plan(model, replace(work, database=size), 10**9)
    assert (held.memory_bytes, held.disk_bytes) == (bare.memory_bytes + size, bare.disk_bytes)
    assert not held.aside
    tight = int((bare.memory_bytes + size) / (1 - plan._MARGIN)) - 10**6
    filed = make_plan(model, replace(work, database=size), tight)
    assert (filed.memory_bytes, filed.disk_bytes) == (bare.memory_bytes, bare.disk_bytes + size)
    assert filed.aside
    monkeypatch.setattr(plan, "free_disk", lambda folder: size - 1)
    with pytest.raises(InputError, match=r"pruned weights of .* are 0\.1 GB; .*: take fewer --levels, --lowest"):
        make_plan(model, replace(work, database=size), tight)


def test_files_give_the_same_figures(tiny_llama: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = prepared(tiny_llama, tiny_text, **ADMM)
    with_database = plan._Sizes.with_database
    monkeypatch.setattr(plan._Sizes, "with_database", lambda *told: replace(with_database(*told), aside=True))
    filed = prepared(tiny_llama, tiny_text, **ADMM)
    assert filed.session.plan.aside
    assert not held.session.plan.aside
    table, tokens = held.table, held.session.windows["validation"].tokens
    asked = [table.nearest([share] * len(table.genes)) for share in (0.4, 0.7)]
    found = [list(candidate_losses(one.pruned, asked, tokens)) for one in (held, filed)]
    assert found[0] == found[1]
    kept = sum(one["weight"].nbytes for one in held.pruned._codes._kept.values())
    assert kept == database_bytes(table, 4)  # what the plan counts
    assert not filed.pruned._codes._kept


# The whole command


@pytest.fixture(scope="module")
def texts(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three that share nothing."""
    folder, lines = tmp_path_factory.mktemp("texts"), tiny_text.read_text().splitlines(keepends=True)
    for index, name in enumerate(("calibration", "search", "validation")):
        (folder / f"{name}.txt").write_text("".join(lines[index::3]))
    return {name: str(folder / f"{name}.txt") for name in ("calibration", "search", "validation")}


@pytest.fixture(scope="module")
def found(tiny_llama: Path, texts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The document of a search, and where its ledger is."""
    folder = tmp_path_factory.mktemp("search")
    document = allocate(
        str(tiny_llama), sparsity=0.6, ledger=folder / "a.jsonl", output=folder / "a.json", **texts, **SMALL, **ADMM
    )
    return document | {"folder": folder}


def test_the_best_in_use_is_written(found: dict[str, Any]) -> None:
    """On validation text it is never worse than the uniform mask or a rule that measures nothing, used alike."""
    picked = found["picked"]
    named = {"nsga2", "0.75 of it", "0.5 of it", "uniform", "owl", "dlp", "global"}
    assert named <= picked["in_use"].keys()
    assert len(picked["in_use"]) <= len(named) + 1
    losses = {name: point["loss"] for name, point in picked["in_use"].items()}
    assert losses[picked["written"]] == min(losses.values())
    assert (found["update"], found["fit"]) == ("admm", "dense")
    assert found["baselines"].keys() >= {"uniform", "owl", "dlp", "global"}


@pytest.mark.parametrize("allocator", ["nsga2", "evopress"])
def test_what_is_picked_is_not_worse_than_a_rule_on_the_search_text(
    allocator: str, tiny_llama: Path, tiny_text: Path
) -> None:
    """However little the search found; a rule that is asked for by name stays."""
    calibrated = prepared(tiny_llama, tiny_text, allocator=allocator, sparsity=0.6, **ADMM)
    table, tokens = calibrated.table, calibrated.session.windows["search"].tokens
    objective = CandidateObjective(calibrated.pruned, tokens, "loss")
    told: Any = lambda *told: None  # noqa: E731
    problem = Problem(table, calibrated.blocks, calibrated.evidence, EvaluationLog(table, objective), told, solves=True)
    rivals = rules_beside(calibrated.request, problem, 0.6)
    rules = [one_threshold(problem, 0.6), dlp(problem, 0.6), owl(problem, 0.6), uniform(problem, 0.6)]
    assert set(rivals) == set(rules)
    losses = dict(zip(rules, candidate_losses(calibrated.pruned, rules, tokens), strict=True))
    best, poor = (which(losses, key=losses.__getitem__) for which in (min, max))
    assert at_sparsity(problem, [poor], 0.6)[1] == poor
    assert at_sparsity(problem, [poor], 0.6, rivals)[1] == best
    assert not rules_beside(replace(calibrated.request, allocator="owl"), problem, 0.6)
    assert not rules_beside(replace(calibrated.request, update="none", fit="own", metric="wanda"), problem, 0.6)


def test_a_front_is_not_lost_where_time_ends_in_use(
    tiny_llama: Path, texts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def over(*_: Any) -> Any:
        raise TimeOverError("--minutes 1 are too few")

    monkeypatch.setattr(allocate_module, "settled", over)
    options = {"metric": "wanda", "update": "obs", "sparsity": 0.6, **texts, **SMALL}
    document = allocate(str(tiny_llama), output=tmp_path / "a.json", **options)
    assert document["cut"] == ["what was picked, in use: --minutes 1 are too few"]
    assert read_allocation(tmp_path / "a.json").document() == document["allocation"]


def test_time_is_kept_for_what_is_measured_in_use(
    found: dict[str, Any], tiny_llama: Path, texts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The uniform mask first, by which the others are planned, with the figure that it has without a limit."""
    measured, plans, steps = in_use._measured_in_use, list[TimePlan](), list[Any]()
    searched = allocate_module.CandidateObjective

    def noted(calibrated: CalibratedModel, asked: Any, plan: TimePlan | None) -> Any:
        steps.append([*asked])
        plans.extend([] if plan is None else [plan])
        return measured(calibrated, asked, plan)

    monkeypatch.setattr(in_use, "_measured_in_use", noted)
    monkeypatch.setattr(allocate_module, "CandidateObjective", lambda *told: steps.append("search") or searched(*told))
    document = allocate(str(tiny_llama), sparsity=0.6, minutes=5, **texts, **SMALL, **ADMM)
    assert steps[:2] == [["uniform"], "search"]
    (others,) = steps[2:]
    assert {"nsga2", "0.75 of it", "0.5 of it", "owl", "dlp", "global"} <= set(others)
    assert "uniform" not in others
    assert document["picked"]["in_use"].keys() == {"uniform", *others}
    assert document["picked"]["in_use"]["uniform"] == pytest.approx(found["picked"]["in_use"]["uniform"])
    assert document["cut"] == []
    assert len(others) <= plans[0].uses <= len(others) + 1
    assert plans[0].use > 0


def test_what_there_is_no_time_for_in_use_is_said(
    tiny_llama: Path, texts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"metric": "wanda", "update": "obs", "sparsity": 0.6, **texts, **SMALL}
    allowed = iter([1, 1, 0])
    with monkeypatch.context() as patch:
        patch.setattr(TimePlan, "affordable_uses", property(lambda plan: next(allowed)))
        document = allocate(str(tiny_llama), **options)
    used = document["picked"]["in_use"]
    assert [*used] == ["nsga2", "0.75 of it"]
    assert document["picked"]["written"] == min(used, key=lambda name: used[name]["loss"])
    (told,) = document["cut"]
    assert told.startswith("allocations in use: 2 of ")
    assert ", without 0.5 of it, " in told

    def slow(*_: Any) -> Any:
        raise TimeOverError("--minutes 0.5 are too few")

    monkeypatch.setattr(allocate_module, "uniform_in_use", slow)
    document = allocate(str(tiny_llama), minutes=5, **options)
    assert document["cut"] == ["what was picked, in use: no time was left"]
    assert "in_use" not in document["picked"]


def test_prune_gives_the_figure_that_allocate_told(
    found: dict[str, Any], tiny_llama: Path, texts: dict[str, str], tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "calibration": texts["calibration"], "text": texts["validation"], "samples": 4, "windows": 4,
        "sequence_length": 32, "metric": "alps", "allocation": found["folder"] / "a.json", "device": "cpu",
    }  # fmt: skip
    pruned = prune(str(tiny_llama), output=tmp_path / "a", target="0.6", fit="dense", **options)
    told = found["picked"]["in_use"][found["picked"]["written"]]
    assert pruned["perplexity"] == pytest.approx(told["perplexity"], rel=1e-4)
    assert pruned["allocation"]["made_for"] == {"formula": "abs(W)*X", "update": "admm", "fit": "dense"}

    said = []

    class Told(PruneListener):
        def other_use(self, *told: Any) -> None:
            said.append(told)

    asked = PruneRequest(model=str(tiny_llama), output=tmp_path / "b", **options | {"metric": "layer:abs(W)*X"})
    run_prune(asked, Told())
    assert said == [({"update": "admm", "fit": "dense"}, {"update": "none", "fit": "own"})]


def test_a_search_is_gone_on_with(
    found: dict[str, Any], tiny_llama: Path, texts: dict[str, str], tmp_path: Path
) -> None:
    """From the middle of its ledger, to the same end; not with another update or fit."""
    content = (found["folder"] / "a.jsonl").read_bytes()
    ledger = tmp_path / "a.jsonl"
    ledger.write_bytes(content[: len(content) // 2])
    options = {"sparsity": 0.6, "ledger": ledger, "resume": True, **texts, **SMALL}
    again = allocate(str(tiny_llama), **options, **ADMM)
    same = ("front", "picked", "allocation", "baselines", "evaluations")
    assert {name: again[name] for name in same} == {name: found[name] for name in same}
    for other, told in (
        ({"fit": "own"}, "fit is 'dense' there, 'own' here"),
        ({"update": "none", "fit": "own"}, "fit is 'dense' there, None here"),
        ({"levels": 11}, "levels is 10 there, 11 here"),
    ):
        with pytest.raises(InputError, match=told):
            allocate(str(tiny_llama), **options | ADMM | other)


def test_a_rule_that_is_asked_for_is_written(tiny_llama: Path, texts: dict[str, str]) -> None:
    """To the weight, with the figures of others beside it; at the knee, too."""
    options: dict[str, Any] = {"allocator": "owl", "metric": "wanda", "update": "obs", **texts, **SMALL}
    one = allocate(str(tiny_llama), sparsity=0.6, **options)
    assert one["picked"]["written"] == "owl"
    masks = allocate(str(tiny_llama), sparsity=0.6, **options | {"update": "none", "levels": None})
    shares = [doc["allocation"]["sparsity"].values() for doc in (one, masks)]
    assert list(shares[0]) == pytest.approx(list(shares[1]))
    assert "made_for" not in masks["allocation"]
    assert "in_use" not in masks["picked"]
    knee = allocate(str(tiny_llama), **options)
    assert knee["picked"]["written"] == "owl"


@pytest.mark.parametrize("kind", ["own", "dense", "block", "patterns"])
def test_a_rule_at_one_sparsity_measures_nothing_but_its_use(
    kind: str, tiny_llama: Path, texts: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No level is solved and no candidate measured; the figures are those that prune finds with what is written."""
    asked: dict[str, Any] = {
        "own": {"allocator": "dlp", "metric": "wanda", "update": "obs"},
        "dense": {"allocator": "global", **ADMM},
        "block": {"allocator": "owl", "metric": "wanda", "update": "block"},
        "patterns": {"allocator": "uniform", **ADMM, "granularity": "n:m", "exclude": "down_proj", "levels": None},
    }[kind]
    for name in ("solved_levels", "level_codes"):
        monkeypatch.setattr(f"gpmetric.allocation.prepare.{name}", None)
    monkeypatch.setattr("gpmetric.allocation.allocate.CandidateObjective", None)
    written, sparsity = tmp_path / "a.json", 0.5
    found = allocate(str(tiny_llama), sparsity=sparsity, output=written, **{**texts, **SMALL, **asked})
    assert found["evaluations"] == 0
    assert found["front"] == [found["picked"]]
    assert found["baselines"].keys() == {asked["allocator"], "uniform"} == found["picked"]["in_use"].keys()
    assert abs(found["picked"]["sparsity"] - sparsity) < 0.01
    used = {name: asked[name] for name in ("metric", "update", "fit", "exclude") if name in asked}
    pruned = prune(
        str(tiny_llama), output=tmp_path / "m", allocation=written, calibration=texts["calibration"],
        text=texts["validation"], samples=4, windows=4, sequence_length=32, device="cpu", **used,
    )  # fmt: skip
    assert pruned["perplexity"] == pytest.approx(found["picked"]["perplexity"], rel=1e-6)
    with pytest.raises(InputError, match="--ledger keeps the candidates of a search"):
        allocate(str(tiny_llama), sparsity=0.5, ledger=tmp_path / "l", **{**texts, **SMALL, **asked})


def test_a_part_of_the_way_from_uniform(tiny_llama: Path, tiny_text: Path) -> None:
    """Every matrix half as far from the mean as it was, at the uniform budget."""
    calibrated = prepared(tiny_llama, tiny_text, **ADMM)
    table = calibrated.table
    problem = Problem(
        calibrated.table, calibrated.blocks, calibrated.evidence, cast(EvaluationLog, None), lambda *told: None
    )
    shares = np.array([0.3 + 0.6 * gene / 20 for gene in range(21)])
    pairs = zip(table.layers, table.shapes, shares, strict=True)
    allocation = Allocation("layer", {
        name: layer_target("layer", shape, round(share * shape[0] * shape[1])) for name, shape, share in pairs
    })  # fmt: skip
    mean = allocated(table, allocation) / table.entries
    halved = in_use._part(calibrated, problem, allocation, 0.5, mean)
    expected = mean + 0.5 * (shares - mean)
    assert [halved.targets[name].sparsity for name in table.layers] == pytest.approx(expected.tolist(), abs=0.02)
    uniform = sum(int(mean * rows * columns) for rows, columns in table.shapes)
    assert abs(allocated(table, halved) - uniform) <= 1


def test_what_does_not_go_together(tiny_llama: Path, tiny_text: Path) -> None:
    for options, told in (
        ({"fit": "dense"}, "--fit dense is of weights that change: take --update obs, "),
        ({"levels": 251}, "--levels must be at most 250, but got 251"),
        ({"levels": 1}, "--levels must be at least 2"),
        ({"levels": 10, "granularity": "n:m"}, "are its --patterns"),
        ({"granularity": "row", "update": "obs-blockwise"}, "--granularity row: the updater has its own .*, block"),
    ):
        with pytest.raises(InputError, match=told):
            request(tiny_llama, tiny_text, **options)


def test_what_a_file_says_that_it_is_made_for(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    document = {"version": 1, "granularity": "row", "sparsity": {"a": 0.5}, "made_for": {"update": "admm"}}
    path.write_text(json.dumps(document))
    allocation = read_allocation(path)
    assert allocation.made_for == {"update": "admm"}
    assert allocation.document() == document
    path.write_text(json.dumps(document | {"made_for": {"update": 3}}))
    with pytest.raises(InputError, match="made_for"):
        read_allocation(path)
