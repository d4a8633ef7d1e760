"""Structured tuning: recipes, a trial against `slim`, the whole command stopped and gone on with, what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import gpmetric
from gpmetric.cli import app
from gpmetric.errors import GpmetricError, InputError
from gpmetric.session.deadline import Deadline
from gpmetric.session.session import open_session
from gpmetric.structured.groups import find_groups
from gpmetric.structured.open_units import open_units
from gpmetric.structured.request import FORMATS, UNIT_KINDS, UNIT_RULES, UnitKind, UnitRule
from gpmetric.structured.scores import UnitSession
from gpmetric.structured.search_log import State
from gpmetric.structured.slim import prepare
from gpmetric.tuning.listener import TuneListener
from gpmetric.tuning.recipe_name import recipe_name
from gpmetric.tuning.request import TuneRequest
from gpmetric.tuning.trial_log import Measurement
from gpmetric.tuning.unit_recipes import (
    UnitRecipe,
    dampings,
    every_kind,
    left_out,
    published,
    shapes,
    slim_request,
    starts_and_repairs,
)
from gpmetric.tuning.unit_trials import UnitTrials

QUICK: dict[str, Any] = {
    "samples": 8, "windows": 8, "search_windows": 8, "sequence_length": 32, "device": "cpu", "structured": True,
}  # fmt: skip
BEST = UnitRecipe("taylor2", ("channel", "head"), "hetero", "global", "least-squares", damping=0.1)


# Recipes


@pytest.mark.parametrize("form", FORMATS)
def test_every_recipe_can_be_asked_for_once(form: str) -> None:
    """Of `slim`, too, and none of those that are compared with each other stands there twice."""
    request = TuneRequest(output=Path("nowhere"), structured=True, target="0.3")
    for recipes in (
        published(form),
        starts_and_repairs(form, biased=True, may=True),
        starts_and_repairs(form, biased=False, may=True),
        shapes(replace(BEST, format=form), (form,)),
        dampings(BEST),
    ):
        assert len({UnitTrials.key(one) for one in recipes}) == len(recipes) > 1
        for one in recipes:
            slim_request(request, one).check()
            assert UnitRecipe.of(json.loads(UnitTrials.key(one))) == one


def test_published_rules_are_placed_as_published() -> None:
    found = {one.start: (one.budget, one.repair, one.add_bias) for one in published("hetero")}
    assert found == {
        "taylor2": ("global", "least-squares", False),
        "magnitude_sp": ("block", "none", False),
        "wanda_sp": ("block", "none", False),
        "flap": ("global", "bias", True),
        "block_influence": ("global", "none", False),
    }
    assert found.keys() == {name for name, rule in UNIT_RULES.items() if rule.tried and rule.tells(experts=False)}
    assert {one.budget for one in published("uniform")} == {"global"}


def test_shapes_are_all_that_slim_has() -> None:
    found = {(one.granularity, one.budget, one.format) for one in shapes(BEST, ("uniform", "hetero"))}
    several = [name for name, kind in UNIT_KINDS.items() if not kind.alone]
    kinds = {tuple(one for one, sign in zip(several, signs, strict=True) if sign) for signs in
             [(1, 1, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}  # fmt: skip
    assert (("block",), "global", "uniform") in found
    found = {one for one in found if one[0] != ("block",)}
    assert {kind for kind, budget, form in found if (budget, form) == ("global", "hetero")} == kinds
    without_layers = {kind for kind in kinds if "layer" not in kind}
    assert {kind for kind, budget, _ in found if budget == "block"} == without_layers
    assert {kind for kind, _, form in found if form == "uniform"} == without_layers
    assert {kind for kind, budget, _ in found if budget == "kind"} == {("channel", "head")}


def test_what_a_recipe_is_without_each_part() -> None:
    searched = replace(BEST, add_bias=True, steps=40)
    parts = {name.partition(" ")[0]: one for name, one in left_out(searched) if "granularity" not in name}
    begun = replace(searched, steps=0)
    assert parts == {
        "search": begun,
        "repair": replace(searched, repair="none", add_bias=False, damping=None),
        "biases": replace(searched, add_bias=False),
        "start": replace(begun, start="wanda_sp"),
        "widths": replace(begun, budget="block"),
    }
    alone = [one for name, one in left_out(searched) if "granularity" in name]
    assert alone == [replace(begun, granularity=(name,)) for name in ("head", "channel")]
    assert not list(left_out(UnitRecipe("wanda_sp", ("channel",), "uniform")))


def test_recipes_in_a_few_words() -> None:
    assert recipe_name(BEST.document()) == "taylor2 (channel,head; repair least-squares 0.1)"
    searched = UnitRecipe("flap", ("head",), "uniform", "kind", "bias", add_bias=True, steps=40)
    told = "flap (head; budget kind; uniform; repair bias with biases; 40 steps)"
    assert recipe_name(searched.document()) == told


# Trials


def trials_of(model: Path | None, text: Path, **options: Any) -> UnitTrials:
    named = {} if model is None else {"model": str(model), "calibration": str(text)}
    request = TuneRequest(output=Path("nowhere"), **QUICK | named | {"target": "0.4"} | options)
    session = open_session(request)
    asked = slim_request(request, UnitRecipe("auto", every_kind(layers=False), "hetero"))
    units = UnitSession(replace(session, inputs=asked), find_groups(session.model), products=True)
    return UnitTrials(request, units, Deadline.starting(None), lambda *told: None)


@pytest.mark.every(3)
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize(
    ("start", "repair", "budget"),
    [("taylor2", "least-squares", "global"), ("flap", "bias", "global"), ("wanda_sp", "none", "block")],
)
def test_a_trial_is_what_slim_begins_from(
    name: str, start: str, repair: str, budget: str, request: pytest.FixtureRequest, tiny_text: Path
) -> None:
    """Also where others were measured before, whose scores and moments are shared."""
    model = request.getfixturevalue(name)
    trials = trials_of(model, tiny_text)
    recipe = UnitRecipe(start, ("channel", "head"), "hetero", budget).repaired(repair, add_bias=repair == "bias")
    options = slim_request(trials._request, recipe)
    begun = prepare(options, open_units(options))
    if repair == "least-squares":
        recipe = replace(recipe, damping=begun.repairer.damping)
    expected = begun.chosen(begun.start)
    trials.measure([one for one in starts_and_repairs("hetero", biased=False, may=True) if one != recipe][:8], 0.25)
    found = trials.slimmed(recipe)
    assert (found.kept == expected.kept).all()
    assert found.repairs.keys() == expected.repairs.keys()
    for index, mine in found.repairs.items():
        for one, other in ((mine.weight, expected.repairs[index].weight), (mine.bias, expected.repairs[index].bias)):
            assert (one is None) == (other is None)
            assert one is None or (one == other).all()
    if budget == "block":
        widths = {(one["heads"], one["channels"]) for one in found.widths()}
        assert len(widths) == 1


def test_what_removes_less_is_another_bargain(tiny_llama: Path, tiny_text: Path) -> None:
    """A row with its reason: heads alone are out of reach, and whole layers cannot meet 0.2 in three blocks."""
    trials = trials_of(tiny_llama, tiny_text, target="0.6")
    heads, layers = (UnitRecipe("taylor2", (one,), "hetero").repaired("none") for one in ("head", "layer"))
    found = trials.measure([heads, replace(BEST, format="uniform"), layers], 1.0)
    assert [math.isinf(one.loss) for one in found] == [True, False, True]
    assert found[0].error is not None
    assert "out of reach" in found[0].error
    assert found[2].error is not None
    assert "can remove 0." in found[2].error


def test_rows_of_the_tables_are_tried(tiny_llama: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule by which the last units go first, and pairs of channels that go together."""
    rule = UnitRule("by place", "global", score=lambda units: -torch.arange(units.groups.units).double())
    monkeypatch.setitem(UNIT_RULES, "place", rule)
    monkeypatch.setitem(UNIT_KINDS, "pair", UnitKind("pairs of channels", "mlp", together=2))
    placed = next(one for one in published("hetero") if one.start == "place")
    paired = next(one for one in shapes(BEST, ("hetero",)) if one.granularity == ("pair", "head"))
    trials = trials_of(tiny_llama, tiny_text)
    assert all(math.isfinite(one.loss) for one in trials.measure([placed, paired, BEST], 1.0))
    for recipe in (placed, paired):
        slimmed = trials.slimmed(recipe)
        for one, mine in zip(slimmed.groups.sublayers, slimmed.groups.split(slimmed.kept), strict=True):
            if recipe is placed:
                assert not mine.sort(descending=True, stable=True).values.ne(mine).any()
            elif one.name == "mlp":
                assert len(mine) == 22


# The whole command


class Watching(TuneListener):
    """Keeps what is told; stops everything at one trial, or at the first report of a search."""

    def __init__(self, stop_at: int = 10**9, *, stop_search: bool = False) -> None:
        self.trials: list[Measurement[Any]] = []
        self.reports: list[Mapping[str, Any]] = []
        self.stop_at, self.stop_search = stop_at, stop_search

    def trial(self, trial: Measurement[Any], excess: float) -> None:
        self.trials.append(trial)
        if len(self.trials) == self.stop_at:
            raise KeyboardInterrupt

    def report(self, report: Mapping[str, Any], share: float) -> None:
        self.reports.append(report)
        if self.stop_search:
            raise KeyboardInterrupt


def test_the_whole_command(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: None
) -> None:
    monkeypatch.setattr("gpmetric.tuning.structured.STEPS", 30)
    model, ledger, text = str(tiny_llama), tmp_path / "tune.jsonl", tmp_path / "test.txt"
    text.write_text(tiny_text.read_text()[::-1])
    options = {**QUICK, "calibration": str(tiny_text), "text": str(text), "target": "0.4"}
    for stopped in (Watching(9), Watching(stop_search=True)):
        with pytest.raises(KeyboardInterrupt):
            gpmetric.tune(
                model, output=tmp_path / "a", ledger=ledger, resume=ledger.exists(), listener=stopped, **options
            )
    lines = ledger.read_text().splitlines()
    told = Watching()
    found = gpmetric.tune(model, output=tmp_path / "a", ledger=ledger, resume=True, listener=told, **options)
    assert [one["step"] for one in told.reports] == [30]
    whole = Watching()
    again = gpmetric.tune(model, output=tmp_path / "b", listener=whole, **options)
    assert [one["step"] for one in whole.reports] == [25, 30]
    measured = [(one.recipe, one.share, one.loss) for one in whole.trials]
    assert [(one.recipe, one.share, one.loss) for one in told.trials] == measured
    kept = ledger.read_text().splitlines()
    assert kept[: len(lines)] == lines
    assert len(kept) == len(measured) + 3  # its settings, the search's beginning and its end
    told = Watching()
    over = gpmetric.tune(
        model, output=tmp_path / "a", ledger=ledger, resume=True, force=True, minutes=5, listener=told, **options
    )
    assert over["recipe"] == found["recipe"]
    assert not told.reports
    assert ledger.read_text().splitlines() == kept
    assert (found["recipe"], found["excess"]) == (again["recipe"], again["excess"])
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]

    complete = [one["excess"] for one in found["trials"] if one["share"] == 1 and one["excess"] is not None]
    assert found["excess"] == min(complete)
    table = {row["what"]: row for row in found["table"]}
    assert table["recipe"]["excess"] == found["excess"] <= table["wanda_sp, as published"]["excess"]
    assert all(len(row["text_excess"]) == 1 for row in table.values())
    assert any(one["error"] for one in found["trials"])
    pruned = found["pruned"]
    assert math.log(pruned["perplexity"] / pruned["dense"]) == pytest.approx(
        table["recipe"]["text_excess"][0], abs=1e-4
    )
    assert 0.38 <= pruned["sparsity"] <= 0.42
    assert pruned["parameters_after"] < pruned["parameters_before"]
    assert gpmetric.verify(str(tmp_path / "a"), device="cpu")["ok"]
    assert json.loads((tmp_path / "a" / "gpmetric_manifest.json").read_text())["recipe"] == found["recipe"]
    with pytest.raises(InputError, match="target"):
        gpmetric.tune(model, output=tmp_path / "c", ledger=ledger, resume=True, **options | {"target": "0.3"})


def test_a_search_that_ends_worse_than_its_start_is_left(
    tmp_path: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch, here: None
) -> None:
    """Of the demo model: what should stay goes, and the other way round."""

    def turned(self: UnitTrials, recipe: UnitRecipe, *_: Any) -> int:
        self._ended = State(7, 1 - self._begun(recipe).atoms.double(), None, 0.0, 0)
        return 7

    monkeypatch.setattr(UnitTrials, "search", turned)
    found = gpmetric.tune(None, output=tmp_path / "a", target="0.3", format="uniform", **QUICK)
    searched = [one for one in found["trials"] if one["recipe"]["steps"] and one["share"] == 1]
    assert [one["recipe"]["steps"] for one in searched] == [7]
    assert searched[0]["excess"] > found["excess"]
    assert found["recipe"]["steps"] == 0
    assert found["recipe"]["format"] == "uniform"


def test_no_time_and_no_recipe_are_said(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    with pytest.raises(GpmetricError, match="--minutes"):
        gpmetric.tune(None, output=tmp_path / "a", minutes=1e-4, **QUICK)
    options = {**QUICK, "calibration": str(tiny_text), "target": "0.999"}
    with pytest.raises(GpmetricError, match=r"no recipe could be used: .*0\.999"):
        gpmetric.tune(str(tiny_llama), output=tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"target": "2:4"}, "--sparsity 2:4"),
        ({"target": "layer:0.6"}, "--sparsity layer:0.6"),
        ({"metric": ["wanda"]}, "--metric"),
        ({"evolve": True}, "--evolve"),
        ({"include": "mlp"}, "--include"),
        ({"exclude": "mlp"}, "--exclude"),
        ({"statistics_dtype": "bfloat16"}, "--statistics-dtype"),
        ({"format": "square"}, "--format"),
        ({"structured": False, "format": "uniform"}, "--structured"),
    ],
)
def test_what_is_of_single_weights_is_refused(options: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=told):
        gpmetric.tune(None, output=tmp_path / "a", **QUICK | options)


def test_the_ledger_of_a_search_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.search").write_text("{}")
    with pytest.raises(InputError, match=r"x\.jsonl\.search"):
        gpmetric.tune(None, output=tmp_path / "a", ledger=tmp_path / "x.jsonl", **QUICK)
    with pytest.raises(InputError, match=r"x\.jsonl' is not there, but its search .*x\.jsonl\.search' is"):
        gpmetric.tune(None, output=tmp_path / "a", ledger=tmp_path / "x.jsonl", resume=True, **QUICK)


def test_blocks_go_only_where_the_model_that_is_left_is_right(
    tiny_text: Path, save_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: None
) -> None:
    """A GPT-2 that scales attention by its place among the blocks cannot lose one as a stock model."""
    monkeypatch.setattr("gpmetric.tuning.structured.STEPS", 5)
    model = save_model("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64, scale_attn_by_inverse_layer_idx=True)
    found = gpmetric.tune(
        str(model), output=tmp_path / "a", calibration=str(tiny_text), target="0.3", format="uniform", **QUICK
    )
    errors = [one["error"] for one in found["trials"] if one["recipe"]["granularity"] == ["block"]]
    assert errors
    assert all("scale_attn_by_inverse_layer_idx" in str(one) for one in errors)


def test_the_command_line(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: None
) -> None:
    """What is shown names the recipe, the published ones and the parts; `--no-evolve` is no contradiction."""
    monkeypatch.setattr("gpmetric.tuning.structured.STEPS", 5)
    words = ["tune", str(tiny_llama), "--calibration", str(tiny_text), "--structured", "--sparsity", "0.3"]
    words += ["--no-evolve", "--samples", "8", "--windows", "4", "--search-windows", "4", "--sequence-length", "32"]
    words += ["-o", str(tmp_path / "a")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    for word in (
        "wanda_sp, as published",
        "without granularity",
        "of those inside the blocks removed",
        "a search for what",
    ):
        assert word in done.output
    planned = CliRunner().invoke(app, ["plan", *words, "--json", "-"])
    assert planned.exit_code == 0, planned.output
    assert json.loads(planned.stdout)["memory_bytes"] > 10**7
