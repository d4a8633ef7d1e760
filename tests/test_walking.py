"""Candidates that pass through the blocks together, and campaigns on models that are not resident: the same figures."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpmetric.errors import GpmetricError, MaskError, ModelError
from gpmetric.evolution import evaluator as evaluating
from gpmetric.evolution import workplace
from gpmetric.evolution.discover import run_campaign
from gpmetric.evolution.evaluator import Evaluator, alike
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.request import DiscoverRequest
from gpmetric.evolution.tasks import DenseTask, ExcessTask, ProbeTask, SequentialTask, Task
from gpmetric.evolution.workplace import campaign_work
from gpmetric.executors import LocalProcesses, OutOfTime, TaskClock, Together
from gpmetric.metrics import Metric, resolve_metric
from gpmetric.placement import Part, Placement
from gpmetric.session import session as sessions
from gpmetric.session import workers as workers_of
from gpmetric.session.plan import Plan, make_plan
from gpmetric.session.session import plan_session

BAD = "exp(abs(W)*50)*1e29"  # overflows for the largest weights
STREAMED = Plan(resident=False, kept=False, room=3000, together=3, states=False)  # most hidden states go to disk


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """Stored in half precision: what is at hand in fp32 is a copy."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path_factory.mktemp("half") / "llama"))
    tensors = {key: value.half() for key, value in load_file(tiny_llama / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tiny_llama / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def request_for(halved: Path, tiny_text: Path, cache: Path, tmp_path: Path) -> Callable[..., DiscoverRequest]:
    def make(ledger: str, **changes: Any) -> DiscoverRequest:
        values: dict[str, Any] = {
            "model": str(halved), "text": str(tiny_text), "target": ("0.5", "2:4"), "population": 5, "evaluations": 6,
            "samples": 4, "search_windows": 4, "windows": 2, "calibration_seeds": 1, "sequence_length": 32,
            "operands": ("W", "X"), "primitives": ("abs", "mul", "sqr", "sqrt"), "workers": 1, "device": "cpu",
            "include": "(k|down)_proj", "cache": cache, "ledger": tmp_path / ledger,
        }  # fmt: skip
        return DiscoverRequest(**(values | changes))

    return make


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Callable[[Plan], None]:
    """How sessions that are opened from now on hold their models."""
    return lambda plan: monkeypatch.setattr(sessions, "make_plan", lambda *_: plan)


@pytest.fixture
def arrivals(monkeypatch: pytest.MonkeyPatch) -> Counter[Part]:
    """How often each part was brought to the device."""
    found = Counter[Part]()
    at_hand = Placement.at_hand

    @contextmanager
    def watched(self: Placement, part: Part) -> Iterator[None]:
        if not self.resident:
            found[part] += 1
        with at_hand(self, part):
            yield

    monkeypatch.setattr(Placement, "at_hand", watched)
    return found


def outcome_of(request: DiscoverRequest) -> tuple[dict[str, Any], dict[str, Any]]:
    """The document without its times, and the ledger's tables."""
    document = {key: value for key, value in run_campaign(request).items() if key != "seconds"}
    assert request.ledger is not None
    with Ledger.read(request.ledger) as ledger:
        return document, ledger.comparable_tables()


# Campaigns


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("update", "together", "operands"),
    [
        ("none", 3, "WXH"),
        ("none", 3, "WXR"),
        ("obs", 1, "WX"),
        ("obs-blockwise", 3, "WX"),
        ("admm", 3, "WX"),
        ("block", 3, "WX"),
    ],
)
def test_a_streamed_campaign_is_that_of_a_resident_model(
    request_for: Callable[..., DiscoverRequest], planned: Callable[[Plan], None], arrivals: Counter[Part], update: str,
    together: int, operands: str,
) -> None:  # fmt: skip
    """The same ledger and document, several rules at a time or one."""
    changes: dict[str, Any] = {"update": update, "operands": tuple(operands)}
    if update in ("obs-blockwise", "admm", "block") or "R" in operands:  # the slowest
        changes |= {"target": ("0.5",), "evaluations": 4, "population": 4}
    planned(Plan())
    resident = outcome_of(request_for("a.sqlite", **changes))
    assert not arrivals
    planned(replace(STREAMED, together=together))
    assert outcome_of(request_for("b.sqlite", **changes)) == resident
    assert arrivals[0] > 0
    assert [row for row in resident[1]["judgements"] if row["split"] == "test"]


def test_a_streamed_campaign_that_is_killed_goes_on(
    request_for: Callable[..., DiscoverRequest], planned: Callable[[Plan], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among the baselines, in the search, and in the test."""
    planned(STREAMED)
    whole = outcome_of(request_for("a.sqlite", target=("0.5",)))
    together, calls = Evaluator.together, Counter[str]()

    def deadly(self: Evaluator, tasks: Sequence[Task]) -> list[Any]:
        calls["all"] += 1
        if calls["all"] in (4, 12, 24):
            raise KeyboardInterrupt
        return together(self, tasks)

    monkeypatch.setattr(Evaluator, "together", deadly)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run_campaign(request_for("b.sqlite", target=("0.5",), resume=True))
    assert outcome_of(request_for("b.sqlite", target=("0.5",), resume=True)) == whole


def test_memory_that_is_bounded_gives_the_same_campaign(
    request_for: Callable[..., DiscoverRequest], save_model: Callable[..., Path]
) -> None:
    """67 MB of weights, of which there is room for a half."""
    folder = save_model(
        "llama", hidden_size=256, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    few = {"model": str(folder), "target": ("0.5",), "evaluations": 2, "windows": 1, "samples": 2, "population": 4}
    few |= {"calibration_seeds": 0, "include": "k_proj", "operands": ("W", "X")}
    session = plan_session(request_for("a.sqlite", **few), work=campaign_work)
    assert session.plan.resident
    least = make_plan(session.model, replace(campaign_work(session), resident=False), None).memory_bytes
    request = request_for("b.sqlite", memory=str(int((least + 35 * 10**6) / 0.92)), **few)  # less the margin
    plan = plan_session(request, work=campaign_work).plan
    assert (plan.resident, plan.kept) == (False, False)
    assert plan.together > 1
    assert outcome_of(request) == outcome_of(request_for("a.sqlite", **few))


@pytest.mark.parametrize("workers", [1, 4])
def test_a_large_model_has_all_cores_where_candidates_walk_together(
    request_for: Callable[..., DiscoverRequest], planned: Callable[[Plan], None], monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:  # fmt: skip
    for module in (workplace, workers_of):
        monkeypatch.setattr(module, "cores", lambda: 3)
    monkeypatch.setattr(workers_of, "_SMALL", 0)
    planned(STREAMED)
    together, seen = Evaluator.together, set()

    def watched(self: Evaluator, tasks: Sequence[Task]) -> list[Any]:
        seen.add(torch.get_num_threads())
        return together(self, tasks)

    monkeypatch.setattr(Evaluator, "together", watched)
    before = torch.get_num_threads()
    run_campaign(request_for("a.sqlite", workers=workers, evaluations=2, calibration_seeds=0, operands=("W", "X")))
    assert seen == {3}
    assert torch.get_num_threads() == before != 3


def test_a_worker_holds_its_model_as_planned(
    request_for: Callable[..., DiscoverRequest], planned: Callable[[Plan], None], tmp_path: Path
) -> None:
    """Where one rule at a time is all there is room for, and several workers are asked for."""
    planned(plan := Plan(resident=False, kept=False, room=10**6, workers=2))
    request = request_for("a.sqlite", workers=2)
    opened = workplace.open_sessions(request)
    for session in opened.values():
        session.start()
    statistics = {name: workplace.collect_statistics(request, one, print) for name, one in opened.items()}
    with workplace.make_executor(request, opened, statistics) as executor:
        assert isinstance(executor, LocalProcesses)
        _, (places, *_) = executor._factory, executor._arguments
    (place,) = places.values()
    model = place.open()._model
    assert place.session.plan == plan
    assert not model.resident
    assert model.placement.room == plan.room


# Groups


@pytest.fixture
def evaluator(request_for: Callable[..., DiscoverRequest], planned: Callable[[Plan], None]) -> Evaluator:
    planned(STREAMED)
    request = request_for("a.sqlite", operands=("W", "X", "H"))
    (session,) = workplace.open_sessions(request).values()
    session.dense = session.statistics(workplace._statistics(request, session.model))
    return Evaluator(session, request.target, request.update)


def excess(text: str, first: int = 0, last: int = 4) -> ExcessTask:
    return ExcessTask(resolve_metric(text), first, last)


def sequential(text: str, target: str = "0.5", **changes: Any) -> SequentialTask:
    values = {"split": "test", "calibration": "calibration", "update": "none"}
    return SequentialTask(resolve_metric(text), target, **(values | changes))


@pytest.mark.parametrize("make", [excess, sequential])
def test_a_failing_candidate_costs_the_others_nothing(
    evaluator: Evaluator, arrivals: Counter[Part], monkeypatch: pytest.MonkeyPatch, make: Callable[[str], Task]
) -> None:
    """Each of three blocks is read once for all, and what fails in the first is not tried in another."""
    texts = ["abs(W)*X", BAD, "abs(W)*H"]
    alone = [evaluator(make(texts[place])) for place in (0, 2)]
    scored = Counter[str]()
    prune = evaluating.prune_weights

    def counted(weights: Any, metric: Metric, *rest: Any) -> Any:
        scored[metric.name] += 1
        return prune(weights, metric, *rest)

    monkeypatch.setattr(evaluating, "prune_weights", counted)
    arrivals.clear()
    executor = Together(evaluator.together, alike, 3)
    outcomes = list(executor.map_ordered(map(make, texts)))
    assert [arrivals[index] for index in range(3)] == [1, 1, 1]
    assert [outcome.value for outcome in outcomes] == [alone[0], None, alone[1]]
    assert [outcome.error is None for outcome in outcomes] == [True, False, True]
    assert "NaN or infinite" in str(outcomes[1].error)
    if make is excess:
        assert scored == {texts[0]: 3, BAD: 1, texts[2]: 3}


class Walker:
    """Answers groups of words with their lengths, and keeps them; two words are alike that begin alike."""

    def __init__(self, clock: TaskClock | None = None, seconds: float = 0.0) -> None:
        self.groups: list[list[str]] = []
        self.seconds, self.time = seconds, 0.0
        self.executor = Together(self, lambda first, second: bool(first[0] == second[0]), 3)
        self.executor.clock = clock or TaskClock()

    def __call__(self, group: Sequence[str]) -> list[Any]:
        self.groups.append(list(group))
        self.time += self.seconds * len(group)
        if "a whole" in group:
            raise ModelError("the group is refused")
        return [MaskError(f"{word} fails") if word.endswith("!") else len(word) for word in group]

    def run(self, *words: str) -> list[Any]:
        return [outcome.error or outcome.value for outcome in self.executor.map_ordered(words)]


def test_outcomes_are_in_order_and_groups_of_what_is_alike() -> None:
    walker = Walker()
    assert walker.run("a", "aa", "a!", "aaaa", "b!", "ccc", "a") == [1, 2, "a! fails", 4, "b! fails", 3, 1]
    assert walker.groups == [["a", "aa", "a!"], ["aaaa"], ["b!"], ["ccc"], ["a"]]
    assert walker.run() == []


def test_a_group_that_fails_as_a_whole_is_tried_one_by_one() -> None:
    walker = Walker()
    assert walker.run("a", "a whole", "a!") == [1, "the group is refused", "a! fails"]
    assert walker.groups == [["a", "a whole", "a!"], ["a"], ["a whole"], ["a!"]]


def test_what_is_no_error_of_ours_is_raised() -> None:
    executor = Together(lambda group: [len(one) for one in group], alike, 2)
    with pytest.raises(TypeError):
        list(executor.map_ordered([7]))


def test_a_group_is_taken_when_it_is_asked_for() -> None:
    taken: list[str] = []
    walker = Walker()
    outcomes = walker.executor.map_ordered(taken.append(word) or word for word in ("a", "aa", "b", "c"))  # type: ignore[func-returns-value]
    next(outcomes)
    assert (taken, walker.groups) == (["a", "aa", "b"], [["a", "aa"]])  # the next one's first word ends it


def timed(seconds: float, end: float) -> Walker:
    walker = Walker(seconds=seconds)
    walker.executor.clock = TaskClock(lambda: walker.time, end)
    return walker


def test_no_group_is_begun_that_would_end_late() -> None:
    """The first tells what one takes; then a group grows while there is three times what it takes so far."""
    walker = timed(1.0, 10.0)
    outcomes = walker.executor.map_ordered("aaaaaaaaaaaa")
    assert [next(outcomes).seconds for _ in range(9)] == [1.0] * 9
    with pytest.raises(OutOfTime):
        next(outcomes)
    assert [len(group) for group in walker.groups] == [1, 3, 3, 2]
    assert walker.time <= 10.0
    unlimited = Walker()
    unlimited.run(*"aaaaaa")
    assert [len(group) for group in unlimited.groups] == [3, 3]


def test_a_group_that_is_too_late_is_out_of_time() -> None:
    walker = timed(1.0, 1.2)
    walker.executor.clock.note("a", 1.0)
    with pytest.raises(OutOfTime):
        walker.run("a", "a")
    assert not walker.groups


def test_what_is_alike() -> None:
    """Candidates on the same windows; of the sequential protocol also with one calibration and one part."""
    one = sequential("abs(W)", part=2)
    assert alike(one, sequential("abs(W)*X", "2:4", part=2, update="obs"))
    for other in ({"split": "validation"}, {"calibration": "calibration-0"}, {"part": 1}):
        assert not alike(one, sequential("abs(W)", **{"part": 2, **other}))
    assert alike(excess("abs(W)"), excess("abs(W)*X"))
    for task in (excess("abs(W)", 1), excess("abs(W)", 0, 3), one):
        assert not alike(excess("abs(W)"), task)
    for alone in (DenseTask("test"), ProbeTask((resolve_metric("abs(W)"),))):
        assert not alike(alone, alone)


def test_errors_of_one_candidate_are_raised_alone(evaluator: Evaluator) -> None:
    with pytest.raises(GpmetricError, match="NaN or infinite"):
        evaluator(excess(BAD))
