"""`gpmetric discover` whole, on a tiny random model: the document, splits, workers, resuming, stopping."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from gpmetric.analysis.analyse import analyse
from gpmetric.errors import DataError, GpmetricError, InputError, LedgerError
from gpmetric.evolution import workplace
from gpmetric.evolution.discover import discover, run_campaign
from gpmetric.evolution.export import run_export
from gpmetric.evolution.ledger import Ledger, result_of
from gpmetric.evolution.request import DiscoverRequest
from gpmetric.evolution.verdict import regrouped
from gpmetric.evolution.workplace import open_sessions
from gpmetric.formats.request import ExportRequest
from gpmetric.metrics import BASELINES, masks_only, resolve_metric
from gpmetric.options import check_request, command_line, make_request
from gpmetric.session import workers as workers_of
from gpmetric.session.session import Session
from gpmetric.terminal.tables import print_discover


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def request_for(tiny_llama: Path, tiny_text: Path, cache: Path, tmp_path: Path) -> Any:
    def make(**changes: Any) -> DiscoverRequest:
        values: dict[str, Any] = {
            "model": str(tiny_llama),
            "text": str(tiny_text),
            "target": ("0.5", "2:4"),
            "population": 6,
            "evaluations": 14,
            "samples": 4,
            "search_windows": 2,
            "windows": 2,
            "calibration_seeds": 0,
            "sequence_length": 32,
            "include": r"\.0\.",  # one block of three is enough
            "cache": cache,
            "workers": 1,
            "ledger": tmp_path / "a.sqlite",
        }
        return DiscoverRequest(**(values | changes))

    return make


def without_seconds(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "seconds"}


KEYS = {
    "winner": {
        "formula",
        "group",
        "nodes",
        "operands",
        "excess",
        "mean_excess",
        "ppl",
        "error",
        "validation",
    },
    "confidence": {"asked", "draws", "rival", "winner_mean_excess", "rival_mean_excess", "difference", "interval"},
    "counts": {
        "drawn",
        "unique_texts",
        "unique_opposites",
        "unique_canonical",
        "unique_ranked",
        "unique_masks",
        "paid",
    },
    "seconds": {
        "load",
        "calibration",
        "opening",
        "baselines",
        "search",
        "final",
        "confidence",
        "per_evaluation",
        "total",
    },
}
ROW = KEYS["winner"] - {"ppl", "error"} | {"kl"}


def test_document_names_winner_front_baselines_splits(request_for: Any, tmp_path: Path) -> None:
    result = run_campaign(request_for(calibration_seeds=1))
    assert result["confidence"]["draws"] == 1
    for name, keys in KEYS.items():
        assert set(result[name]) == keys
    assert set(result["baselines"]) == {*BASELINES} - {"alps", "wandapp_rgs"}  # no rival of masks; R is not asked for
    assert (result["update"], result["fit"]) == ("none", "own")
    assert result["evaluations"] == result["counts"]["paid"] == 14
    counts = list(result["counts"].values())[:5]
    assert counts == sorted(counts, reverse=True)  # no layer of simplification tells more apart than the one before
    assert 14 <= result["unique_masks"] <= result["counts"]["unique_ranked"]
    assert [row["text"].rpartition("#")[2] for row in result["splits"].values()] == list(result["splits"])
    assert (result["bos"], result["sampling"], result["text_column"]) == ("auto", "windows", None)
    assert result["left_out"] == []
    assert set(result["dense"]) == {"search", "validation", "test"}
    winner = result["winner"]
    assert set(winner["ppl"]) == {"0.5", "2:4"}
    assert winner["mean_excess"] == pytest.approx(sum(winner["excess"].values()) / 2)
    for target, ppl in winner["ppl"].items():
        assert math.log(ppl / result["dense"]["test"]) == pytest.approx(winner["excess"][target])
    assert [row["rung"] for row in result["screening"]] == ["reconstruction", "1 windows", "2 windows"]
    assert result["screening"][-1]["measured"] == 14
    assert set(result["seconds"]["per_evaluation"]) == {"score_and_mask", "prune_and_loss", "per_candidate", "rungs"}
    json.dumps(result, allow_nan=False)


def test_the_front_holds_the_winner_and_the_best_without_gradients(request_for: Any, tmp_path: Path) -> None:
    result = run_campaign(request_for(evaluations=20))
    with Ledger.read(tmp_path / "a.sqlite") as ledger:
        rows = {row.formula: row for row in ledger.evaluations("done")}
    front = result["front"]
    for row in front:
        assert set(row) == ROW
        assert row["kl"] == rows[row["formula"]].figures["kl"]
        assert row["excess"] == rows[row["formula"]].losses
        assert row["mean_excess"] == pytest.approx(sum(row["excess"].values()) / 2)
        assert row["group"] == resolve_metric(row["formula"]).granularity
    candidates = [row["formula"] for row in front if row["validation"] is not None]
    assert result["winner"]["formula"] in (candidates if result["better"] else BASELINES)
    free = [row for row in rows.values() if not {"G", "H"} & set(str(row.operands).split(","))]
    best = result["best_gradient_free"]
    assert best["formula"] in [row.formula for row in free]
    assert best["formula"] in [row["formula"] for row in front]
    assert set(best) == {"formula", "group", "nodes", "operands", "excess", "mean_excess", "ppl", "error"}


def test_the_interval_is_that_of_the_draws(request_for: Any, tmp_path: Path) -> None:
    """Student's t of 4 draws: mean -+ 3.182446 * deviation / 2."""
    found = run_campaign(request_for(calibration_seeds=4))["confidence"]
    pairs = zip(found["winner_mean_excess"], found["rival_mean_excess"], strict=True)
    differences = [mine - other for mine, other in pairs]
    mean = sum(differences) / 4
    deviation = math.sqrt(sum((one - mean) ** 2 for one in differences) / 3)
    assert found["draws"] == 4
    assert len(set(differences)) == 4  # every draw is another sample
    assert found["difference"] == pytest.approx(mean)
    half = 3.182446 * deviation / 2
    assert found["interval"] == pytest.approx((mean - half, mean + half), rel=1e-4)
    none = run_campaign(request_for(evaluations=4, ledger=tmp_path / "b.sqlite"))["confidence"]
    assert (none["draws"], none["difference"], none["interval"]) == (0, None, None)


def test_two_models_end_with_figures_of_both(
    request_for: Any, tiny_llama: Path, tiny_gpt2: Path, tmp_path: Path
) -> None:
    models = (str(tiny_llama), str(tiny_gpt2))
    names = [folder.name for folder in (tiny_llama, tiny_gpt2)]
    labels = [f"{name} {target}" for name in names for target in ("0.5", "2:4")]
    request = request_for(model=models, evaluations=8)
    result = run_campaign(request)
    assert result["targets"] == labels
    for row in (result["winner"], *result["front"], *result["baselines"].values()):
        assert list(row["excess"]) == labels
    assert set(result["winner"]["ppl"]) == set(labels)
    assert list(result["model"]) == list(result["dense"]["test"]) == list(result["splits"]) == names
    with Ledger.read(tmp_path / "a.sqlite") as ledger:
        (wanda,) = [row for row in ledger.evaluations() if row.formula == "abs(W)*X"]
    for name in names:  # excess is told in Wanda's own units
        for figures in (wanda.figures["loss"], wanda.figures["kl"]):
            assert sum(figures[f"{name} {target}"] for target in ("0.5", "2:4")) == pytest.approx(2, rel=1e-3)


def test_models_of_one_short_name_are_told_apart(
    request_for: Any, tiny_llama: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("x/m", "m"):
        shutil.copytree(tiny_llama, tmp_path / place)
    assert list(open_sessions(request_for(model=("x/m", "m")))) == ["x/m", "m"]
    assert list(open_sessions(request_for(model=("x/m", str(tiny_llama))))) == ["m", tiny_llama.name]


def test_the_group_is_evolved(request_for: Any, tmp_path: Path) -> None:
    request = request_for(evaluations=24, population=12, start=("block:abs(W)*X",))
    result = run_campaign(request)
    with Ledger.read(tmp_path / "a.sqlite") as ledger:
        texts = [row.formula for row in ledger.candidates()]
        rows = {row.formula: row for row in ledger.evaluations("done")}
    assert "layer:abs(W)" in texts  # as published, beside magnitude_row
    assert {"abs(W)", "block:abs(W)*X", "layer:abs(W)*X"} <= set(texts)
    for row in (result["winner"], *result["front"]):
        assert row["formula"].rpartition(":")[0] == ("" if row["group"] == "row" else row["group"])
    assert rows["abs(W)"].losses["0.5"] != rows["layer:abs(W)"].losses["0.5"]
    # 2:4 knows no other group, but its figures are of one target among others
    assert rows["abs(W)"].losses["2:4"] == rows["layer:abs(W)"].losses["2:4"]


@pytest.mark.parametrize("group", ["layer", "block"])
def test_a_group_for_all(request_for: Any, tmp_path: Path, group: str) -> None:
    """The best baseline is shown in that group too, measured as `bench` would."""
    result = run_campaign(request_for(group=group, evaluations=6))
    assert {row["group"] for row in result["front"]} == {group}
    assert result["group"] == group
    if not result["better"]:  # a baseline stands as it is
        assert (result["winner"]["group"], result["regrouped"]) == ("row", None)
        return
    rival = result["confidence"]["rival"]
    assert BASELINES[rival].granularity == "row"
    regrouped = result["regrouped"]
    assert (regrouped["formula"], regrouped["group"]) == (f"{group}:{rival}", group)
    assert regrouped["excess"]["2:4"] == result["baselines"][rival]["excess"]["2:4"]
    assert regrouped["excess"]["0.5"] != result["baselines"][rival]["excess"]["0.5"]


@pytest.mark.parametrize("change", [{"update": "obs"}, {"update": "obs-blockwise"}, {"target": ("2:4",)}])
def test_the_regrouped_baseline_only_masks(request_for: Any, tmp_path: Path, change: dict[str, Any]) -> None:
    result = run_campaign(request_for(evaluations=10, **change))
    if change != {"update": "obs"}:
        assert result["regrouped"] is None
        assert {row["group"] for row in result["front"]} == {"row"}
    elif result["regrouped"] is not None:
        group, _, name = result["regrouped"]["formula"].partition(":")
        assert group == result["winner"]["group"]
        assert masks_only(name)


def moved(excess: dict[str, float], winner: str) -> str | None:
    found = regrouped({resolve_metric(name): figure for name, figure in excess.items()}, resolve_metric(winner))
    return found and found.name


def test_the_best_baseline_moves_to_the_winners_group() -> None:
    excess = {"magnitude": 0.9, "magnitude_row": 0.8, "wanda": 0.5, "ria": 0.6}
    assert moved(excess, "layer:abs(W)*G") == "layer:wanda"
    assert moved(excess, "abs(W)*G") is None
    few = {"magnitude": 0.7, "magnitude_row": 0.8}
    assert moved(few, "abs(W)*G") is None  # magnitude_row stands beside it
    assert moved(few, "block:abs(W)*G") == "block:magnitude"


def test_groups_are_searched_where_a_target_leaves_them_open(request_for: Any) -> None:
    assert request_for().groups == ("row", "layer", "block")
    assert request_for(target=("2:4", "layer:0.5")).groups == ("row",)
    assert request_for(update="obs-blockwise").groups == ("row",)
    assert request_for(group="block").groups == ("block",)
    check_request(request_for(group="search", update="obs-blockwise"))


def test_a_layer_target_tells_apart_what_rows_do_not(request_for: Any, tmp_path: Path) -> None:
    """A factor for each row leaves the order within rows alone, but not that within the layer."""
    start = ("abs(W)*X", "abs(W)*X/rowsum(abs(W))")
    few = {"target": ("layer:0.5",), "start": start, "operands": ("W", "X"), "generations": 1, "evaluations": None}
    run_campaign(request_for(**few))
    with Ledger.read(tmp_path / "a.sqlite") as ledger:
        found = {row.formula: row for row in ledger.candidates()}
    assert found[start[0]].ranked != found[start[1]].ranked
    assert found[start[0]].fingerprint != found[start[1]].fingerprint


def test_the_objective_is_in_the_document(request_for: Any, tmp_path: Path) -> None:
    result = run_campaign(request_for(objective="loss", evaluations=6))
    assert all(row["loss"] == row["excess"] and "kl" not in row for row in result["front"])
    assert result["objective"] == "loss"


def test_what_is_forbidden_is_not_started_from_either(request_for: Any, tmp_path: Path) -> None:
    """pruner_zero is W*W*mms(sqrt(H)), and stays a baseline."""
    result = run_campaign(request_for(forbid=("mms(sqrt)",), evaluations=8))
    assert "pruner_zero" in result["baselines"]
    with Ledger.read(tmp_path / "a.sqlite") as ledger:
        assert not [row for row in ledger.candidates() if "mms(sqrt(" in row.formula]


def test_start_formulas_are_evaluated_however_small_the_population(request_for: Any, tmp_path: Path) -> None:
    start = ("abs(W)*X*D", "abs(W)*G*D")
    run_campaign(request_for(start=start, population=4, generations=1, evaluations=None))
    with Ledger.read(tmp_path / "a.sqlite") as ledger:
        status = {row.formula: row.status for row in ledger.candidates()}
    assert [status[text] for text in start] == ["evaluated", "evaluated"]


@pytest.mark.parametrize(("update", "known"), [("none", 2), ("obs-blockwise", 3)])
def test_compensation_is_known_where_kept_weights_are_updated(
    request_for: Any, tmp_path: Path, update: str, known: int
) -> None:
    few = {"update": update, "group": "row", "population": 4, "generations": 1, "evaluations": None}
    run_campaign(request_for(**few))
    with Ledger.read(tmp_path / "a.sqlite") as ledger:
        drawn = {row.formula for row in ledger.candidates()}
    assert len(drawn & {"W*W*H", "W*W*F", "W*W*F*D/sqr(X)"}) == known


def test_without_gram_matrices_and_with_one_window(
    request_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_of, "_SMALL", 0)  # a large model's are collected only where they are needed
    few = {"operands": ("W", "X"), "search_windows": 1, "evaluations": 8}
    result = run_campaign(request_for(**few))
    assert [row["rung"] for row in result["screening"]] == ["reconstruction", "1 windows"]
    assert result["screening"][0]["spearman"] is None
    with Ledger.read(tmp_path / "a.sqlite") as ledger:
        assert not [row for row in ledger.candidates() if row.reason == "screened out after reconstruction"]


@pytest.mark.parametrize(("workers", "small", "threads"), [(1, True, 1), (1, False, 6), (4, False, 1)])
def test_a_large_model_has_all_cores(
    request_for: Any, monkeypatch: pytest.MonkeyPatch, workers: int, small: bool, threads: int
) -> None:
    """Its workers share them, and its calibration has them; a small model's have one thread each."""
    for module in (workplace, workers_of):
        monkeypatch.setattr(module, "cores", lambda: 6)
    monkeypatch.setattr(workers_of, "_SMALL", 10**9 if small else 0)
    seen: list[int] = []
    monkeypatch.setattr(workplace, "open_workplaces", lambda places, held, threads, **_: seen.append(threads))
    monkeypatch.setattr(workers_of, "LocalProcesses", lambda opened, arguments, *_, **__: opened(*arguments))
    stored = Session.stored_statistics

    def watched(session: Session, *arguments: Any) -> Path:
        seen.append(torch.get_num_threads())
        return stored(session, *arguments)

    monkeypatch.setattr(Session, "stored_statistics", watched)
    request = request_for(workers=workers)
    sessions = open_sessions(request)
    for session in sessions.values():
        session.start()
    statistics = {name: workplace.collect_statistics(request, one, print) for name, one in sessions.items()}
    workplace.make_executor(request, sessions, statistics)
    assert seen == [1 if small else 6, threads]


def test_a_search_text_shorter_than_asked_for_has_rungs_of_its_own(request_for: Any, tmp_path: Path) -> None:
    request = request_for(search_windows=10**6, evaluations=6)
    (session,) = open_sessions(request).values()
    windows = len(session.windows["search"].tokens)
    result = run_campaign(request)
    assert result["screening"][-1]["rung"] == f"{windows} windows"
    assert result["screening"][-1]["measured"] == 6


@pytest.mark.nightly
@pytest.mark.slow
def test_two_workers_and_one_write_the_same_ledger(request_for: Any, tmp_path: Path) -> None:
    results, tables = [], []
    for workers in (1, 2):
        path = tmp_path / f"{workers}.sqlite"
        results.append(without_seconds(run_campaign(request_for(workers=workers, ledger=path))))
        with Ledger.read(path) as ledger:
            tables.append(ledger.comparable_tables())
    assert results[0] == results[1]
    assert tables[0] == tables[1]


def test_a_finished_campaign_gives_its_result_again(request_for: Any, tmp_path: Path) -> None:
    first = run_campaign(request_for())
    assert run_campaign(request_for(resume=True)) == first
    with pytest.raises(LedgerError, match="--resume"):
        run_campaign(request_for())


@pytest.mark.every(3)
@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"seed": 5},
        {"target": ("0.5",)},
        {"samples": 3},
        {"start": ("abs(W)*D",)},
        {"group": "layer"},
        {"objective": "loss"},
        {"forbid": ("exp(abs)",)},
        {"search_windows": 1},
        {"calibration_seeds": 1},
    ],
)
def test_a_ledger_of_another_campaign_is_refused(request_for: Any, tmp_path: Path, change: dict[str, Any]) -> None:
    run_campaign(request_for(evaluations=4))
    with pytest.raises(LedgerError, match="another campaign"):
        run_campaign(request_for(evaluations=4, resume=True, **change))


def test_without_gradients_their_baselines_are_left_out(request_for: Any, tmp_path: Path) -> None:
    result = run_campaign(request_for(operands=("W", "X"), evaluations=6))
    assert set(result["baselines"]) == {"magnitude", "magnitude_row", "wanda", "ria", "sparsegpt"}
    assert all(set(row["operands"]) <= {"W", "X"} for row in result["front"])


def test_fewer_primitives_leave_out_the_start_formulas_they_cannot_make(request_for: Any, tmp_path: Path) -> None:
    few = {"operands": ("W", "X"), "primitives": ("abs", "mul", "add", "sqr"), "evaluations": None, "generations": 3}
    result = run_campaign(request_for(**few))
    assert not any("sqrt" in row["formula"] for row in result["front"])
    assert "ria" in result["baselines"]


def test_the_function_takes_the_options_as_keywords(request_for: Any, tmp_path: Path) -> None:
    request = request_for(evaluations=4)
    options = {name: value for name, value in vars(request).items() if name not in ("model", "formula_files")}
    result = discover(request.model, **options)
    assert without_seconds(result) == without_seconds(run_campaign(replace(request, ledger=tmp_path / "b.sqlite")))


@pytest.mark.every(2)
@pytest.mark.parametrize("update", ["obs", "obs-blockwise", "admm"])
def test_search_in_the_use_a_metric_will_have(request_for: Any, tmp_path: Path, update: str) -> None:
    result = run_campaign(request_for(update=update, group="row", evaluations=6))
    plain = run_campaign(request_for(group="row", evaluations=6, ledger=tmp_path / "b.sqlite"))
    assert result["update"] == update
    shared = {row["formula"]: row["excess"] for row in plain["front"]}
    assert any(shared.get(row["formula"], row["excess"]) != row["excess"] for row in result["front"])


def test_a_campaign_whose_layers_follow_the_dense_model(request_for: Any, tmp_path: Path) -> None:
    """What is measured block after pruned block changes, the last rung with it; a ledger says an unusual fit."""
    few: dict[str, Any] = {"update": "obs-blockwise", "group": "row", "operands": ("W", "X"), "evaluations": 4}
    own = run_campaign(request_for(**few))
    request = request_for(**few, fit="dense", ledger=tmp_path / "b.sqlite")
    dense = run_campaign(request)
    assert (own["fit"], dense["fit"]) == ("own", "dense")
    assert own["baselines"]["wanda"] == dense["baselines"]["wanda"]
    assert own["baselines"]["sparsegpt"] != dense["baselines"]["sparsegpt"]
    with Ledger.read(tmp_path / "a.sqlite") as one, Ledger.read(tmp_path / "b.sqlite") as other:
        assert "fit" not in one.settings
        assert other.settings["fit"] == "dense"
        rungs = [{row.rung for row in ledger.measurements()} for ledger in (one, other)]
        (last,) = rungs[0] - rungs[1]
        assert rungs[1] - rungs[0] == {f"{last} in use"}
    with pytest.raises(LedgerError, match="another campaign"):
        run_campaign(replace(request, fit="own", resume=True))
    assert without_seconds(run_campaign(replace(request, resume=True))) == without_seconds(dense)


def test_minutes_end_the_search_and_a_resume_goes_on(request_for: Any, tmp_path: Path) -> None:
    with pytest.raises(
        GpmetricError,
        match=r"--minutes 0.0001 (were over before one baseline was measured|are too few: the calibration)",
    ):
        run_campaign(request_for(evaluations=None, minutes=0.0001))
    longer = run_campaign(request_for(resume=True))
    assert without_seconds(longer) == without_seconds(run_campaign(request_for(ledger=tmp_path / "b.sqlite")))


def test_going_on_where_nothing_better_was_found(request_for: Any, tmp_path: Path) -> None:
    """A verdict that every command takes; what the command line says to do then ends as if never stopped."""
    request = request_for(evaluations=10, operands=("W", "X"))
    short = run_campaign(request)
    assert not short["better"]
    assert short["winner"]["formula"] in BASELINES
    assert short["because"] == (
        f"nothing better than {short['winner']['formula']} was found in 10 evaluations; "
        "go on with --resume and a larger budget"
    )
    told = Console(record=True, width=200, file=StringIO())
    print_discover(told, short, request)
    line = f"go on with: {command_line('discover', request.prolonged())}"
    assert line in told.export_text()
    assert "--evaluations 20" in line
    assert result_of(request.ledger)["winner"]["formula"] == short["winner"]["formula"]
    run_export(make_request(ExportRequest, {"formula": str(request.ledger), "output": tmp_path / "metric.py"}))
    assert analyse(request.ledger)["formulas"] == 10
    longer = run_campaign(request.prolonged())
    whole = run_campaign(replace(request, evaluations=20, ledger=tmp_path / "b.sqlite"))
    assert without_seconds(longer) == without_seconds(whole)


def test_the_same_text_for_two_splits_is_refused(request_for: Any, tiny_text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("another text altogether, " * 200)
    for test in (other, tiny_text):
        sources = dict.fromkeys(("calibration", "search", "validation"), str(tiny_text)) | {"test": str(test)}
        with pytest.raises(DataError, match="same text"):
            run_campaign(request_for(text=None, **sources))
    assert not (tmp_path / "a.sqlite").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"operands": ("X",)}, "--operands must hold W"),
        ({"operands": ("W", "Q")}, "unknown name 'Q'"),
        ({"primitives": ("abs", "sqrtt")}, "did you mean 'sqrt'"),
        ({"target": ("1.5",)}, "1.5"),
        ({"update": "obs-block"}, "--update"),
        (
            {"fit": "dense"},
            "--fit dense is of weights that change: take --update obs, obs-blockwise, admm, block, obs\\+block",
        ),
        ({"fit": "both", "update": "obs"}, "--fit must be one of own, dense, but got 'both'"),
        ({"population": 0}, "--population must be at least 4"),
        ({"minutes": -1.0}, "--minutes"),
        ({"workers": 0}, "--workers"),
        ({"start": ("abs(W)*Y",)}, "Y"),
        ({"start": ("abs(W)*D",), "operands": ("W", "X")}, "leaves out"),
        ({"start": ("abs(W)*X*X*X*X",), "max_nodes": 5}, "--max-nodes"),
        ({"start": ("layer:abs(W)",), "group": "row"}, "names another comparison group than --group row"),
        ({"start": ("rows:abs(W)",)}, "unknown comparison group 'rows'"),
        ({"start": ("exp(log(W))*X",), "forbid": ("exp(log)",)}, "nests log in exp"),
        ({"start": ("tanh(tanh(abs(W)))*X",)}, "nests tanh in tanh, which no formula may"),
        ({"forbid": ("exp",)}, "--forbid must be like exp"),
        ({"forbid": ("exp(lgo)",)}, "did you mean 'log'"),
        ({"objective": "ppl"}, "--objective must be one of kl, loss, but got 'ppl'"),
        ({"group": "rows"}, "--group must be one of row, layer, block, search, but got 'rows'"),
        ({"group": "layer", "update": "obs-blockwise"}, "--group layer: obs-blockwise has a threshold of its own"),
        ({"calibration_seeds": -1}, "--calibration-seeds must be at least 0"),
        ({"search_windows": 0}, "--search-windows must be at least 1"),
        ({"search": "other.txt"}, "--text is cut into all four splits"),
        ({"text": None}, "--calibration is needed"),
        ({"model": "no/such/model"}, "no/such/model"),
        ({"target": ("7:11",)}, "not divisible by 11"),
        ({"sequence_length": 100000}, "--sequence-length"),
    ],
)
def test_bad_requests(request_for: Any, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        check_and_run(request_for(**change))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "a.sqlite").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("demo_of_golden_files")
def test_an_unfinished_ledger_of_version_2_ends_as_the_finished_one_did(tmp_path: Path) -> None:
    """Both are of one campaign on the demo model, as the version before wrote them."""
    golden = Path(__file__).parent / "golden"
    path = tmp_path / "a.sqlite"
    path.write_bytes((golden / "ledger-v2-unfinished.sqlite").read_bytes())
    result = discover(
        target=("0.5", "2:4"), operands=("W", "X", "D"), evaluations=10, population=12, samples=2, search_windows=4,
        primitives=("abs", "sqr", "sqrt", "mul", "div", "add", "pow", "rowsum", "tanh"), windows=2, sequence_length=64,
        seed=1, calibration_seeds=0, workers=1, ledger=path, resume=True, cache=tmp_path / "cache",
    )  # fmt: skip
    with Ledger.read(path) as mine, Ledger.read(golden / "ledger-v2-finished.sqlite") as theirs:
        found, expected = mine.candidates(), theirs.candidates()
        assert [(row.formula, row.status) for row in found] == [(row.formula, row.status) for row in expected]
        old = theirs.result()
    assert old is not None
    (winner,) = [row for row in result["front"] if row["formula"] == old["winner"]["formula"]]
    assert winner["validation"] == pytest.approx(old["winner"]["validation"], rel=1e-4)
    assert (result["winner"]["formula"], result["better"]) == ("ria", False)  # which that version did not compare with
    assert analyse(golden / "ledger-v2-finished.sqlite")["formulas"] == 10


def check_and_run(request: DiscoverRequest) -> None:
    check_request(request)
    run_campaign(request)


@pytest.mark.slow
def test_ctrl_c_stops_cleanly_and_prints_how_to_go_on(
    tiny_llama: Path, tiny_text: Path, cache: Path, tmp_path: Path
) -> None:
    ledger = tmp_path / "a.sqlite"
    options = {"--model": tiny_llama, "--text": tiny_text, "--ledger": ledger, "--cache": cache, "--target": "0.5",
               "--samples": 4, "--search-windows": 4, "--windows": 2, "--sequence-length": 32, "--workers": 2,
               "--evaluations": 100000}  # fmt: skip
    words = [str(word) for pair in options.items() for word in pair]
    command = [sys.executable, "-m", "gpmetric", "discover", *words]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
        if ledger.exists() and ledger.stat().st_size:
            with Ledger.read(ledger) as book:
                if book.generations():
                    break
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert f"--ledger {ledger}" in errors
    assert "--resume" in errors
    with Ledger.read(ledger) as book:
        assert book.evaluations("done")
