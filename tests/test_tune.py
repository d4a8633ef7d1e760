"""Tuning: halving, what a recipe is without its parts, the whole command on the demo model, killed and gone on with."""

from __future__ import annotations

import gc
import json
import math
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import gpmetric
from gpmetric.allocation.by_rule import directions_of
from gpmetric.blockwise.replay import BlockCalls
from gpmetric.cli import app
from gpmetric.data import Windows
from gpmetric.errors import GpmetricError, InputError, TimeOverError
from gpmetric.evolution.evolve import evolve
from gpmetric.evolution.request import DiscoverRequest
from gpmetric.executors import TaskClock
from gpmetric.loading import load_model
from gpmetric.metrics import resolve_metric
from gpmetric.models import Model
from gpmetric.pruning import unfinished
from gpmetric.pruning.allocation import Allocation, layer_target
from gpmetric.pruning.recipe import Recipe, read_recipe
from gpmetric.session.deadline import Deadline
from gpmetric.session.plan import Plan
from gpmetric.session.splits import open_text, read_windows
from gpmetric.tuning import choice
from gpmetric.tuning.allocations import climb
from gpmetric.tuning.halving import halve
from gpmetric.tuning.listener import TuneListener
from gpmetric.tuning.parts import methods, rivals, with_rounds, without
from gpmetric.tuning.request import TuneRequest
from gpmetric.tuning.trials import Trial, Trials, key_of
from tests.pruning_helpers import session_of, windows_of

QUICK = {"samples": 8, "windows": 8, "search_windows": 8, "sequence_length": 32, "device": "cpu"}
PLAIN = Recipe("wanda", "0.5", samples=8, sequence_length=32)


class Scripted(Trials):
    """Trials whose losses are given by the metric's name, and which take a second of a fake clock on all windows."""

    def __init__(self, losses: dict[str, Sequence[float]]) -> None:
        self.clock = 0.0
        self.deadline: Any = SimpleNamespace(now=lambda: self.clock)
        self.losses, self.asked = losses, list[tuple[str, float]]()
        self.found: list[Trial] = []

    def expected(self, recipe: Recipe, share: float) -> float:
        return share

    def measure(self, recipes: Any, share: float, until: float = math.inf, texts: Any = ()) -> list[Trial]:
        found = []
        for recipe in recipes:
            if self.clock + share <= until:
                self.clock += share
                self.asked.append((recipe.metric, share))
                loss = self.losses[recipe.metric][{0.25: 0, 0.5: 1, 1.0: 2}[share]]
                found.append(Trial(recipe, share, loss, share))
        return found


@pytest.fixture
def published_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the recipes of the catalogue, of which each takes its time."""
    monkeypatch.setattr("gpmetric.tuning.parts.CATALOGUE", {})


def demo_windows(model: Model) -> Windows:
    return read_windows(model, open_text("demo:calibration"), 32, 8)


def named(*names: str) -> list[Recipe]:
    return [replace(PLAIN, metric=name) for name in names]


def test_halving_keeps_the_better_half() -> None:
    losses = {
        "wanda": (4, 9, 9), "ria": (1, 3, 9), "magnitude": (2, 2, 5), "gblm_l1": (3, 9, 9), "gblm_l2": (math.inf, 9, 9),
    }  # fmt: skip
    trials = Scripted(losses)
    found = halve(trials, named(*losses), math.inf)
    assert [one.recipe.metric for one in found] == ["magnitude", "ria"]
    assert trials.asked == [(name, 0.25) for name in losses] + [
        (name, 0.5) for name in ("ria", "magnitude", "gblm_l1")
    ] + [("magnitude", 1.0), ("ria", 1.0)]  # fmt: skip


class Solving(Scripted):
    """Trials that take as long on a few windows as on all."""

    def expected(self, recipe: Recipe, share: float) -> float:
        return 1.0


def test_where_few_windows_save_nothing_there_are_no_rungs() -> None:
    losses = {name: (0, 0, place) for place, name in enumerate(("wanda", "ria", "magnitude"))}
    halve(unlimited := Solving(losses), named(*losses), math.inf)
    assert (unlimited.asked[0], unlimited.asked[-1]) == (("wanda", 0.25), ("wanda", 1.0))
    trials = Solving(losses)
    assert [one.loss for one in halve(trials, named("magnitude", "wanda", "ria"), 2.0)] == [0, 2]
    assert trials.asked == [("magnitude", 1.0), ("wanda", 1.0)]


def test_halving_ends_in_time() -> None:
    """A third of it for each rung: of 3 s, four of six are tried on a quarter, two on a half; one has 1 s."""
    trials = Scripted({"wanda": (1, 1, 1), "ria": (2, 2, 2)})
    assert halve(trials, named("wanda", "ria"), 1.0) == []
    assert trials.asked == [("wanda", 0.25)]
    six = ("wanda", "ria", "magnitude", "gblm_l1", "gblm_l2", "sparsegpt")
    trials = Scripted({name: (place, place, place) for place, name in enumerate(six)})
    assert [one.recipe.metric for one in halve(trials, named(*six), 3.0)] == ["wanda"]
    assert trials.asked == [(name, 0.25) for name in six[:4]] + [("wanda", 0.5), ("ria", 0.5), ("wanda", 1.0)]
    alike = Scripted({"wanda": (1, 1, 1), "abs(W)*X": (1, 1, 1)})
    assert [one.loss for one in halve(alike, named("wanda", "abs(W)*X"), 1.0)] == [1]


class Told(Trials):
    """Trials of a real file whose losses are given by the metric's name."""

    def __init__(self, path: Path, losses: dict[str, float], *, resume: bool = False) -> None:
        self.losses, self.measured, self.written = losses, list[str](), list[str]()
        deadline = Deadline.starting(None, None)
        super().__init__(
            SimpleNamespace(metric=resolve_metric, plan=Plan()), deadline, lambda *told: None, path, {},
            resume=resume, keep_best=lambda recipe: self.written.append(recipe.metric),
        )  # fmt: skip

    def _measured(self, recipes: Sequence[Recipe], share: float, texts: Sequence[Any]) -> Iterator[Trial]:
        for recipe in recipes:
            self.measured.append(recipe.metric)
            yield Trial(recipe, share, self.losses[recipe.metric], 1.0)


def test_what_the_file_knows_to_be_best_stays_so(tmp_path: Path) -> None:
    """Also where nobody asks for it again, as others come before it with more time; nothing worse replaces it."""
    path, losses = tmp_path / "a.jsonl", {"wanda": 3.0, "ria": 1.0, "magnitude": 2.0, "gblm_l1": 0.5}
    with Told(path, losses) as trials:
        trials.measure(named("wanda", "ria"), 1.0)
        trials.measure(named("gblm_l1"), 0.5)
        assert trials.written == ["wanda", "ria"]
    with Told(path, losses, resume=True) as trials:
        trials.measure(named("wanda", "magnitude"), 1.0)
        assert trials.measured == ["magnitude"]
        assert trials.best is not None
        assert (trials.best.recipe.metric, trials.written) == ("magnitude", [])
        trials.recall()
        assert (trials.best.recipe, trials.best.loss) == (named("ria")[0], 1.0)
        assert trials.written == ["ria"]
        trials.measure(named("gblm_l1"), 1.0)
        assert trials.written == ["ria", "gblm_l1"]


def test_methods_are_distinct() -> None:
    found = methods(PLAIN, ["layer:abs(W)*X", "W*W*F", "catalogue:alps_dense", "sparsegpt"])
    assert len({key_of(one) for one in found}) == len(found)
    kinds = [(one.metric, one.update, one.fit) for one in found]
    assert kinds.count(("alps", "admm", "dense")) == 1
    assert not any(metric.startswith("catalogue") for metric, _, _ in kinds)
    assert ("W*W*F", "admm", "dense") in kinds
    assert [(one.metric, one.update) for one in rivals(PLAIN)] == [("wanda", "none"), ("sparsegpt", "obs-blockwise")]


@pytest.mark.parametrize(("target", "update", "alike"), [
    ("0.6", "admm", False), ("0.6", "obs-blockwise", True), ("layer:0.6", "admm", True), ("2:4", "none", True),
])  # fmt: skip
def test_a_group_that_nothing_asks_for_makes_no_other_recipe(target: str, update: str, alike: bool) -> None:
    """Target or updater settle it: tried once, and told as what each was asked for as."""
    recipe = replace(PLAIN, target=target, update=update)
    pair = [replace(recipe, metric=metric) for metric in ("W*W*X", "layer:W*W*X")]
    assert (key_of(pair[0]) == key_of(pair[1])) == alike
    model = load_model(None, device="cpu")
    session = session_of(model, windows := demo_windows(model))
    session.windows = {"calibration": windows, "validation": windows}
    trials = Trials(session, Deadline.starting(None), lambda *told: None)
    found = [trial for one in pair for trial in trials.measure([one], 0.25)]
    assert [trial.recipe for trial in found] == pair
    assert len(trials.found) == (1 if alike else 2)
    assert (found[0].loss == found[1].loss) == alike


def test_what_settles_the_group() -> None:
    """An allocation does; the sparsity, the fit where weights change, and the rest are as they are."""
    targets = {"a": layer_target("layer", (4, 8), 3)}
    allocated = replace(PLAIN, update="admm", allocation=Allocation("layer", targets))
    assert key_of(allocated) == key_of(replace(allocated, metric="layer:abs(W)*X"))
    assert key_of(PLAIN) == key_of(replace(PLAIN, metric="abs(W)*X", target="row:0.5", fit="dense"))
    different: list[dict[str, Any]] = [{"target": "0.6"}, {"target": "layer:0.5"}, {"update": "obs"}, {"seed": 1}]
    assert len({key_of(one) for one in (PLAIN, *(replace(PLAIN, **other) for other in different))}) == 5
    pattern = replace(PLAIN, target="2:4", metric="layer:abs(W)*X", update="obs")
    assert not any(name.startswith("metric") for name, _ in without(pattern))
    assert key_of(replace(pattern, target="4:8")) != key_of(pattern)


def test_without_each_part() -> None:
    whole = replace(PLAIN, metric="layer:W*W*F", update="admm", fit="dense")
    parts = {name.partition(" ")[0]: recipe for name, recipe in without(whole)}
    assert {name: (one.metric, one.update, one.fit) for name, one in parts.items()} == {
        "metric": ("layer:abs(W)*X", "admm", "dense"),
        "fit": ("layer:W*W*F", "admm", "own"),
        "update": ("layer:W*W*F", "none", "own"),
    }
    assert not list(without(PLAIN))
    (moved,) = without(replace(PLAIN, target="2:4", permute=True))
    assert moved == ("channels in another order", replace(PLAIN, target="2:4"))
    (update,) = (one for name, one in without(rivals(PLAIN)[1]) if name.startswith("update"))
    assert (update.metric, update.update) == ("row:W*W*D", "none")


def test_a_trial_is_what_prune_gives(tiny_text: Path, tmp_path: Path) -> None:
    model = load_model(None, device="cpu")
    windows = windows_of(model, tiny_text, count=8)
    session = session_of(model, windows)
    session.windows = {"calibration": windows, "validation": windows}
    trials = Trials(session, Deadline.starting(None), lambda *told: None)
    recipe = replace(PLAIN, metric="alps", update="admm", fit="dense")
    (trial,) = trials.measure([recipe], 1.0)
    options = {"metric": "alps", "fit": "dense", "samples": 8, "windows": 8, "sequence_length": 32, "device": "cpu"}
    made = gpmetric.prune(calibration=str(tiny_text), output=tmp_path / "out", **options)
    assert math.exp(trial.loss) == pytest.approx(made["perplexity"], rel=1e-3)  # the file holds 16 bits
    assert trials.measure([recipe], 1.0) == [trial]
    (part,) = trials.measure([recipe], 0.25)
    few = replace(session, windows={name: windows_of(model, tiny_text, count=2) for name in session.windows})
    alone = Trials(few, Deadline.starting(None), lambda *told: None)
    (again,) = alone.measure([recipe], 1.0)
    assert part.loss == pytest.approx(again.loss, rel=1e-6)
    assert part.loss != trial.loss


def test_without_rounds_and_allocation() -> None:
    targets = {"a": layer_target("layer", (4, 8), 3)}
    best = with_rounds(replace(PLAIN, metric="alps", fit="dense", allocation=Allocation("layer", targets)))
    assert with_rounds(best) == best
    assert (best.metric, best.update, best.fit) == ("layer:abs(W)*X", "admm+block", "dense")
    parts = {name.partition(" ")[0]: (one.update, one.fit, one.allocation is None) for name, one in without(best)}
    assert parts == {
        "allocation": ("admm+block", "dense", True),
        "fit": ("admm+block", "own", False),
        "rounds": ("admm", "dense", False),
        "update": ("none", "own", False),
    }
    masked = with_rounds(PLAIN)
    assert masked.update == "block"
    assert {one.update for _, one in without(masked)} == {"none"}


def test_directions_keep_the_budget() -> None:
    session = session_of(model := load_model(None, device="cpu"), demo_windows(model))
    directions = directions_of(session, "layer", 0.6, lambda *told: None)
    assert {"global", "owl", "dlp", "depth", "mlp.down_proj"} <= directions.moves.keys()
    budget = sum(int(layer.weight.numel() * 0.6) for layer in model.layers)
    for shares in ({}, {"global": 1.0}, {"depth": 0.5, "mlp.down_proj": -1.0, "owl": 2.0}):
        targets = directions.allocation(shares).targets
        removed = sum(targets[layer.name].removes(layer.weight.shape) for layer in model.layers)
        assert abs(removed - budget) <= len(model.layers)
    far = directions.allocation({"depth": 1.0}).targets
    first, last = (far[layer.name].sparsity for layer in (model.layers[0], model.layers[-1]))
    assert 0.49 < first < 0.51
    assert 0.69 < last < 0.71


class Bowl(Scripted):
    """Loss of an allocation whose least is at a known place."""

    def __init__(self) -> None:
        super().__init__({})

    def measure(self, recipes: Any, share: float, until: float = math.inf, texts: Any = ()) -> list[Trial]:
        self.clock += 1
        if self.clock > until:
            return []
        (recipe,) = recipes
        shares = {} if recipe.allocation is None else recipe.allocation
        loss = (shares.get("a", 0.0) - 1.25) ** 2 + (shares.get("b", 0.0) + 0.5) ** 2
        return [Trial(recipe, share, loss, 1.0)]


def test_climbing_finds_the_least() -> None:
    directions: Any = SimpleNamespace(moves={"a": 0, "b": 0}, allocation=dict)
    assert climb(Bowl(), directions, PLAIN, [{}], 0.5, math.inf) == ({"a": 1.25, "b": -0.5}, True)
    assert climb(Bowl(), directions, PLAIN, [{"a": 1.0}], 0.5, 1.0) == ({"a": 1.0}, False)
    starts = [{}, {"a": -1.0}, {"a": 1.5}, {"b": -1.0}]  # of which the third is best
    assert climb(Bowl(), directions, PLAIN, starts, 0.5, 4.0) == ({"a": 1.5}, False)
    assert climb(Bowl(), directions, PLAIN, starts, 0.5, 2.0) == ({}, False)


class Watching(TuneListener):
    """Counts what is measured; stops everything at one trial."""

    def __init__(self, stop_at: int = 10**9) -> None:
        self.steps: list[str] = []
        self.trials: list[Trial] = []
        self.stop_at = stop_at

    def step(self, name: str) -> None:
        self.steps.append(name)

    def trial(self, trial: Trial, excess: float) -> None:
        self.trials.append(trial)
        if len(self.trials) == self.stop_at:
            raise KeyboardInterrupt


def untimed(line: str) -> dict[str, Any]:
    return {key: value for key, value in json.loads(line).items() if key not in ("seconds", "checksum")}


def test_the_whole_command(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    model, text = str(tiny_llama), str(tiny_text)
    ledger, options = tmp_path / "tune.jsonl", {**QUICK, "calibration": text, "target": "0.6"}
    options |= {"evolve": False, "metric": ["W*W*F"]}
    stopped = Watching(6)
    with pytest.raises(KeyboardInterrupt):
        gpmetric.tune(model, output=tmp_path / "a", ledger=ledger, listener=stopped, **options)
    lines = ledger.read_text().splitlines()
    measured_whole = [one for one in stopped.trials if one.share == 1]
    assert {one.recipe.metric for one in measured_whole} >= {"wanda", "sparsegpt", "alps"}
    least_of_all = min(measured_whole, key=lambda one: one.loss)
    assert read_recipe(tmp_path / "a.recipe.toml").document() == least_of_all.recipe.document()
    told = Watching()
    found = gpmetric.tune(model, output=tmp_path / "a", ledger=ledger, resume=True, listener=told, **options)
    whole = Watching()
    again = gpmetric.tune(model, output=tmp_path / "b", listener=whole, **options)
    measured = [(one.recipe.metric, one.share) for one in whole.trials]
    assert [(one.recipe.metric, one.share) for one in told.trials] == measured
    kept_lines = ledger.read_text().splitlines()
    assert kept_lines[: len(lines)] == lines
    searched = [line for line in kept_lines if '"split": "search"' in line]
    assert len(kept_lines) == len(set(kept_lines)) == 1 + len(measured) + len(searched)
    assert (found["recipe"], found["excess"]) == (again["recipe"], again["excess"])
    least = min(map(json.loads, searched), key=lambda record: record["losses"][0])
    assert least["recipe"] in [record["recipe"] for record in map(json.loads, kept_lines[1:]) if "split" not in record]
    assert not list(tmp_path.glob("*.recipe.toml"))
    middle = kept_lines.index(searched[len(searched) // 2])  # killed in the search of allocations
    (cut := tmp_path / "cut.jsonl").write_text("".join(f"{line}\n" for line in kept_lines[:middle]))
    third = gpmetric.tune(model, output=tmp_path / "a", ledger=cut, resume=True, force=True, **options)
    assert third["recipe"] == found["recipe"]
    gone_on = cut.read_text().splitlines()
    assert gone_on[:middle] == kept_lines[:middle]
    assert [untimed(line) for line in gone_on] == [untimed(line) for line in kept_lines]
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]

    text_of = found["pruned"]["text"]
    assert text_of["text"] == f"{text}#validation"
    assert found["splits"]["validation"] == text_of
    reached = math.log(found["pruned"]["perplexity"] / found["dense"]["validation"])
    assert reached == pytest.approx(found["excess"], abs=2e-3)  # the file holds 16 bits

    table = {row["what"]: row for row in found["table"]}
    assert found["excess"] == table["recipe"]["excess"] <= min(table[name]["excess"] for name in ("wanda", "sparsegpt"))
    complete = [trial["excess"] for trial in found["trials"] if trial["share"] == 1]
    assert found["excess"] <= min(complete)
    assert [one["validation_excess"] for one in found["recipes"]] == sorted(complete)
    assert found["recipes"][0]["recipe"] == found["recipe"]
    assert [one["what"] for one in found["ablation"]] == [name for name in table if name.startswith("without ")]
    assert found["test_excess"] == table["recipe"]["text_excess"][0] if found["texts"] else found["test_excess"] is None
    assert read_recipe(tmp_path / "a" / "recipe.toml").document() == found["recipe"]
    repeated = gpmetric.prune(
        model, calibration=text, recipe=tmp_path / "a" / "recipe.toml", output=tmp_path / "c", windows=8, device="cpu"
    )
    assert (tmp_path / "c" / "model.safetensors").read_bytes() == files[0]
    assert repeated["sparsity"] == found["pruned"]["sparsity"]
    assert gpmetric.verify(str(tmp_path / "a"), device="cpu")["ok"]


@pytest.mark.usefixtures("published_alone")
def test_formulas_are_evolved(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpmetric.tuning.choice._EVALUATIONS", 4)
    monkeypatch.setattr("gpmetric.session.workers.cores", lambda: 1)  # no process has to import torch
    ledger = tmp_path / "tune.jsonl"
    options = {**QUICK, "calibration": str(tiny_text), "target": "2:4", "ledger": ledger}
    found = gpmetric.tune(str(tiny_llama), output=tmp_path / "a", **options)
    assert found["evolved"]["evaluations"] == 4
    assert 1 <= len(found["evolved"]["formulas"]) <= 5
    tried = {resolve_metric(trial["recipe"]["metric"]).expression for trial in found["trials"]}
    assert {resolve_metric(formula).expression for formula in found["evolved"]["formulas"]} <= tried
    told = Watching()
    again = gpmetric.tune(str(tiny_llama), output=tmp_path / "b", resume=True, listener=told, **options)
    assert again["evolved"] == found["evolved"]
    assert "formulas" not in told.steps


@pytest.mark.usefixtures("published_alone")
def test_a_search_of_formulas_that_time_cut_is_gone_on_with(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --resume, until it is whole; what it found before is not lost where there is no time to go on."""
    options = {**QUICK, "calibration": str(tiny_text), "target": "2:4", "ledger": tmp_path / "tune.jsonl"}
    answers, asked = [(["W*W*F"], 7, True), (["abs(W)*F"], 9, False)], list[bool]()

    def evolved(request: Any, *_: Any) -> Any:
        asked.append(request.resume)
        return answers[len(asked) - 1]

    monkeypatch.setattr(choice, "evolve", evolved)
    first = gpmetric.tune(str(tiny_llama), output=tmp_path / "a", **options)
    assert first["evolved"] == {"evaluations": 7, "formulas": ["W*W*F"], "cut": True}
    monkeypatch.setattr(choice, "_FEWEST", math.inf)
    without_time = gpmetric.tune(str(tiny_llama), output=tmp_path / "b", resume=True, minutes=60, **options)
    assert without_time["evolved"] == first["evolved"]
    assert without_time["recipe"] == first["recipe"]
    monkeypatch.setattr(choice, "_FEWEST", 24)
    second = gpmetric.tune(str(tiny_llama), output=tmp_path / "c", resume=True, **options)
    assert second["evolved"] == {"evaluations": 9, "formulas": ["abs(W)*F"], "cut": False}
    assert gpmetric.tune(str(tiny_llama), output=tmp_path / "d", resume=True, **options)["evolved"] == second["evolved"]
    assert asked == [False, True]


def test_whether_time_cut_a_search_of_formulas() -> None:
    request = DiscoverRequest(**QUICK, target=("0.5",), evaluations=3, population=4)
    session = session_of(model := load_model(None, device="cpu"), windows := demo_windows(model))
    session.windows = {"calibration": windows, "search": Windows(windows.text, windows.tokens.clone())}
    told: Any = lambda *told: None  # noqa: E731
    assert evolve(request, session, 2, TaskClock(), told, told)[1:] == (3, False)
    over = TaskClock(lambda: 0.0, 0.0, 0.0)
    assert evolve(request, session, 2, over, told, told)[1:] == (0, True)


def test_one_share_of_the_windows_is_on_the_device_at_a_time() -> None:
    """What the first block reads of it, which is as large as the calibration."""
    session = session_of(model := load_model(None, device="cpu"), windows := demo_windows(model))
    session.windows = {"calibration": windows, "validation": windows, "search": windows}
    trials = Trials(session, Deadline.starting(None), lambda *told: None)

    def held() -> list[int]:
        """Windows of every set of calls."""
        gc.collect()
        calls = [one for one in gc.get_objects() if type(one) is BlockCalls]
        return [sum(map(len, one.batches)) for one in calls if one.model is model]

    for share, count in ((0.25, 2), (1.0, 8), (0.5, 4)):
        trials.measure([PLAIN], share)
        assert held() == [count]
    trials.forget()
    assert held() == []
    again = Trials(session, Deadline.starting(None), lambda *told: None)
    assert again.measure([PLAIN], 0.5)[0].loss == trials.measure([PLAIN], 0.5)[0].loss


@pytest.mark.usefixtures("published_alone")
def test_a_failure_behind_the_choice_leaves_the_recipe(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The dense model on the text that is read once, for instance."""
    options = {**QUICK, "calibration": str(tiny_text), "target": "2:4", "evolve": False}
    (text := tmp_path / "text.txt").write_text(tiny_text.read_text()[::-1])

    def over(self: Trials, tokens: Any) -> float:
        raise TimeOverError("--minutes 1 are too few")

    told = Watching()
    with monkeypatch.context() as patch:
        patch.setattr(Trials, "dense_on", over)
        with pytest.raises(TimeOverError, match="too few"):
            gpmetric.tune(str(tiny_llama), output=tmp_path / "a", text=str(text), listener=told, **options)
    best = min((trial for trial in told.trials if trial.share == 1), key=lambda trial: trial.loss)
    assert key_of(read_recipe(tmp_path / "a.recipe.toml")) == key_of(best.recipe)
    (line,) = (record.message for record in caplog.records if "the best recipe so far" in record.message)
    words = shlex.split(line.partition(": ")[2])
    done = CliRunner().invoke(app, words[1:])
    assert done.exit_code == 0, done.output
    whole = gpmetric.tune(str(tiny_llama), output=tmp_path / "b", text=str(text), **options)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    assert whole["pruned"]["text"]["text"] == str(text)


def test_a_disk_without_room_is_told_before_the_work(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))  # type: ignore[attr-defined]
    monkeypatch.setattr("gpmetric.tuning.tune.Trials", None)
    needed = (tiny_llama / "model.safetensors").stat().st_size / 1e9
    with pytest.raises(GpmetricError, match=f"^the checkpoint needs {needed:.3g} GB, '.*' has 1e-06 GB free$"):
        gpmetric.tune(str(tiny_llama), output=tmp_path / "a", **QUICK, calibration=str(tiny_text), target="0.5")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_tune_began_is_gone_on_with(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By the command that is told."""
    monkeypatch.setattr(unfinished, "_SECONDS", 0)
    monkeypatch.setattr(unfinished, "_SHARE", 0)

    class Stopping(Watching):
        def progress(self, what: str, done: int, total: int) -> None:
            if (what, done) == ("blocks", 3):
                raise KeyboardInterrupt

    options = {**QUICK, "calibration": str(tiny_text), "target": "2:4", "evolve": False}
    with pytest.raises(KeyboardInterrupt):
        gpmetric.tune(str(tiny_llama), output=tmp_path / "a", listener=Stopping(), **options)
    (line,) = (record.message for record in caplog.records if "the best recipe so far" in record.message)
    done = CliRunner().invoke(app, shlex.split(line.partition(": ")[2])[1:])
    assert done.exit_code == 0, done.output
    assert "going on at block 2 of 3" in done.output
    assert (tmp_path / "a" / "recipe.toml").read_text() == (tmp_path / "a.recipe.toml").read_text()


def test_expected_seconds() -> None:
    """Of a kind that was measured, by its nearest share; of another, the slowest; of rounds over blocks, a multiple."""
    trials = Trials(session_of(model := load_model(None, device="cpu"), demo_windows(model)), Deadline.starting(None),
                    lambda *told: None)  # fmt: skip
    admm = replace(PLAIN, metric="abs(W)*X", update="admm")
    assert trials.expected(PLAIN, 1.0) == 0
    trials._note(Trial(PLAIN, 1.0, 5.0, 3.0))
    trials._note(Trial(admm, 0.25, 5.0, 10.0))
    assert (trials.expected(PLAIN, 1.0), trials.expected(admm, 0.25)) == (3.0, 10.0)
    assert trials.expected(admm, 1.0) == 10 + 0.75 * 3  # but for passes over the windows it takes as long
    dense = replace(admm, fit="dense")
    trials._note(Trial(dense, 1.0, 5.0, 11.0))
    assert trials.expected(dense, 0.25) == (11 - 1.5 * 3) + 0.25 * 1.5 * 3
    trials._note(Trial(dense, 1.0, 5.0, 4.0))  # no more than passes
    assert trials.expected(dense, 0.5) == 2
    assert trials.expected(replace(PLAIN, update="obs"), 1.0) == trials.expected(admm, 1.0)
    assert trials.expected(replace(admm, update="admm+block"), 1.0) == pytest.approx(3 * trials.expected(admm, 1.0))


class Costly(Trials):
    """Trials of a model whose solver takes nearly all of the time, by a clock of their own; losses are made up."""

    def __init__(self, minutes: float, solver: float) -> None:
        self.clock, self.solver = 0.0, solver
        windows = SimpleNamespace(tokens_digest="")
        session: Any = SimpleNamespace(
            metric=resolve_metric, plan=Plan(), tokens=torch.zeros(8, 32), model=SimpleNamespace(dtype="float32"),
            windows={"calibration": windows}, evaluated=[],
        )  # fmt: skip
        super().__init__(session, Deadline(minutes, 0.0, lambda: self.clock), lambda *told: None)

    def seconds(self, recipe: Recipe, share: float) -> float:
        update, fit = self._kind(recipe)
        passes, solved = (3 if fit == "dense" else 1), update.partition("+")[0]
        fixed = {"none": 0, "obs-blockwise": 0.2, "admm": 1}[solved] + 2 * update.endswith("+block")
        return self.solver * (fixed + 0.1 * passes * share)

    def _measured(self, recipes: Sequence[Recipe], share: float, texts: Sequence[Any]) -> Iterator[Trial]:
        for recipe in recipes:
            seconds = self.seconds(recipe, share)
            self.clock += seconds
            update = self._kind(recipe)[0]
            gains = {"none": 0.0, "obs-blockwise": 0.5, "admm": 1.0, "admm+block": 1.2}[update]
            gains += 0.1 * (recipe.allocation is not None) + 0.2 * (recipe.fit == "dense")
            yield Trial(recipe, share, 3.0 - gains, seconds, others=(0.0,) * len(texts))

    def dense(self, share: float = 1.0) -> float:
        return 1.0

    def on_search_text(self) -> Any:
        return SimpleNamespace(begun=False)


@pytest.mark.parametrize(
    ("minutes", "solver", "parts"),
    [
        (8, 170, set()),
        (12, 170, {"solver"}),
        (20, 170, {"solver", "allocation"}),
        (40, 170, {"solver", "allocation", "rounds"}),
        (60, 170, {"solver", "allocation", "rounds"}),
        (60, 400, {"solver", "allocation"}),
    ],
)
def test_where_trials_are_few_what_is_worth_most_comes_first(
    minutes: float, solver: float, parts: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The strongest method whole, an allocation, rounds; and there is always time left to prune by the best."""
    targets = {"a": layer_target("layer", (4, 8), 3)}
    directions = SimpleNamespace(moves={"global": 0, "owl": 0}, allocation=lambda shares: Allocation("layer", targets))
    monkeypatch.setattr(choice, "directions_of", lambda *told: directions)
    trials = Costly(minutes, solver)
    request = TuneRequest(output=tmp_path / "a", target="layer:0.6", minutes=minutes)
    found = choice.Choice(request, trials, TuneListener(), trials.deadline)
    best = found.run()
    tried = {(trials._kind(one.recipe)[0], one.recipe.allocation is not None) for one in trials.found if one.share == 1}
    reached = {"solver"} if ("admm", False) in tried else set()
    reached |= {"allocation"} if ("admm", True) in tried else set()
    reached |= {"rounds"} if ("admm+block", True) in tried else set()
    assert reached == parts
    assert trials.clock + trials.seconds(best.recipe, 1.0) <= trials.deadline.end
    assert any("evolving formulas" in cut for cut in found.cuts)
    assert best.loss == min(one.loss for one in trials.found if one.share == 1)


def test_what_there_is_no_time_for_is_said(tmp_path: Path) -> None:
    with pytest.raises(GpmetricError, match="--minutes"):
        gpmetric.tune(None, output=tmp_path / "a", minutes=1e-4, **QUICK)
    assert not (tmp_path / "a").exists()


def test_refused(tmp_path: Path) -> None:
    for options, told in (
        ({}, "--output"),
        ({"output": tmp_path / "a", "target": "0"}, "removes nothing"),
        ({"output": tmp_path / "a", "target": "1.5"}, "1.5"),
        ({"output": tmp_path / "a", "metric": ["wandaa"]}, "unknown metric 'wandaa'"),
        ({"output": tmp_path / "a", "shuffle": True}, "--shuffle needs"),
        ({"output": tmp_path / "a", "sampling": "documents"}, "--sampling documents needs"),
        ({"output": tmp_path, "windows": 4}, "exists already"),
    ):
        with pytest.raises(InputError, match=told):
            gpmetric.tune(None, **options)
    done = CliRunner().invoke(app, ["tune", "--sparsity", "3:2", "-o", str(tmp_path / "a")])
    assert isinstance(done.exception, InputError)


def test_plan_says_what_it_takes() -> None:
    done = CliRunner().invoke(app, ["plan", "tune", "--sparsity", "0.6", "-o", "somewhere", "--json", "-"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["memory_bytes"] > 10**7
