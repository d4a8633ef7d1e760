"""What a person sees: bars from the first moment, tables that fit, marks without colour, and the next command."""

from __future__ import annotations

import io
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gpmetric import cli
from gpmetric.allocation.allocate import run_allocation
from gpmetric.allocation.listener import AllocateListener
from gpmetric.allocation.request import AllocateRequest
from gpmetric.analysis.request import AnalyseRequest
from gpmetric.commands import COMMANDS
from gpmetric.evolution.discover import run_campaign
from gpmetric.evolution.ledger_requests import (
    LedgerExportRequest,
    LedgerMergeRequest,
    LedgerRepairRequest,
    LedgerRequest,
)
from gpmetric.evolution.listener import DiscoverListener
from gpmetric.evolution.request import DiscoverRequest
from gpmetric.evolution.selection import Individual
from gpmetric.evolution.status_request import StatusRequest
from gpmetric.formats.request import ExportRequest
from gpmetric.listing import ListRequest
from gpmetric.metrics import resolve_metric
from gpmetric.options import Request, check_request, described, make_request
from gpmetric.packing.pack import run_pack
from gpmetric.packing.requests import PackRequest, UnpackRequest
from gpmetric.packing.unpack import run_unpack
from gpmetric.pruning.bench import run_bench
from gpmetric.pruning.listeners import BenchListener, PruneListener
from gpmetric.pruning.prune import run_prune
from gpmetric.pruning.requests import BenchRequest, CatalogueRequest, PruneRequest, ReproduceRequest, VerifyRequest
from gpmetric.pruning.verify import run_verify
from gpmetric.reporting.request import ReportRequest
from gpmetric.session.evaluate import run_evaluate
from gpmetric.session.layers import run_layers
from gpmetric.session.listeners import EvaluateListener, Listener
from gpmetric.session.requests import CalibrateRequest, EvaluateRequest, LayersRequest
from gpmetric.structured.listener import SlimListener
from gpmetric.structured.request import SlimRequest
from gpmetric.structured.search import Schedule
from gpmetric.structured.search_log import State
from gpmetric.structured.slim import run_slim
from gpmetric.terminal import next_steps
from gpmetric.terminal.bars import opening
from gpmetric.terminal.figures import shortened
from gpmetric.terminal.live import DiscoverReport
from gpmetric.terminal.reports import PlainReport
from gpmetric.terminal.tables import print_discover
from gpmetric.tuning.listener import TuneListener
from gpmetric.tuning.request import TuneRequest
from gpmetric.tuning.tune import run_tune

GOLDEN = Path(__file__).parent / "golden" / "ledger-v4-finished.sqlite"
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
FORMULA = "abs(W)*X**0.48371654*sqrt(G)"


def console(width: int, *, terminal: bool, colour: bool = True) -> Console:
    return Console(file=io.StringIO(), width=width, height=40, force_terminal=terminal, no_color=not colour)


def written(target: Console) -> str:
    return ESCAPES.sub("", target.file.getvalue())  # type: ignore[attr-defined]


# Formulas


@pytest.mark.parametrize(
    ("formula", "told"),
    [
        (FORMULA, "abs(W)*X**0.48*sqrt(G)"),
        ("layer:W*W*F", "layer:W*W*F"),
        ("catalogue:alps_dense2", "catalogue:alps_dense2"),
        ("abs(W)*1.5e-07+12*X", "abs(W)*1.5e-07+12*X"),
        ("2:4", "2:4"),
        ("min(0.30000,W)", "min(0.3,W)"),
    ],
)
def test_constants_have_two_digits(formula: str, told: str) -> None:
    assert shortened(formula) == told


# Bars


@pytest.mark.parametrize("width", [60, 80])
def test_a_bar_fits_and_tells_the_time_left(width: int) -> None:
    target = console(width, terminal=True)
    with PlainReport(target) as report:
        report.progress("sparsegpt, wanda and other metrics with long names on the validation text", 0, 4000)
        report.progress("sparsegpt, wanda and other metrics with long names on the validation text", 1000, 4000)
        report._bar.refresh()
    lines = [line for line in re.split(r"[\r\n]+", written(target)) if line.strip()]
    assert max(map(len, lines)) <= width
    assert any("0/4000" in line for line in lines)
    assert re.search(r"1000/4000 0:00:\d\d \d+ s left", written(target))


def test_what_is_done_or_of_the_step_before_goes() -> None:
    target = console(80, terminal=True)
    with DiscoverReport(target) as report:
        report.progress("calibration", 0, 4)
        report.progress("windows", 0, 2)
        report.progress("windows", 2, 2)
        assert [task.description for task in report._bar.tasks if task.visible] == ["calibration"]
        report.step("baselines")
        assert not report._bar.tasks


def test_without_a_terminal_there_are_no_bars() -> None:
    for target in (
        console(80, terminal=False),
        Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"}),
    ):
        with PlainReport(target) as report:
            report.progress("calibration", 0, 4)
            began, first = report._began["calibration"]
            report._began["calibration"] = began - 30, first
            report.progress("calibration", 2, 4)
            report.progress("calibration", 2, 4)  # told again, it goes on
            report._told -= 100
            report.progress("calibration", 3, 4)
        assert written(target) == "calibration: 3 of 4, about 10 s left\n"


# Steps of commands

Told = list[tuple[str, int, int]]


def recording(kind: type[Listener]) -> tuple[Any, Told]:
    told: Told = []

    class Recording(kind):  # type: ignore[misc, valid-type]
        def progress(self, what: str, done: int, total: int) -> None:
            told.append((what, done, total))

    return Recording(), told


def assert_begun(told: Told, *steps: str) -> None:
    """Each step that was told of began at 0, ended at all of it, and never had more than that."""
    named = dict.fromkeys(what for what, _, _ in told)
    assert set(steps) <= named.keys(), named
    for what in named:
        calls = [(done, total) for name, done, total in told if name == what]
        assert calls[0][0] == 0, (what, calls)
        assert all(done <= total for done, total in calls), (what, calls)
        assert calls[-1][0] == calls[-1][1], (what, calls)


@pytest.fixture
def small(tiny_llama: Path, tiny_text: Path) -> dict[str, Any]:
    names = {"model": str(tiny_llama), "calibration": str(tiny_text), "device": "cpu"}
    return names | {"samples": 4, "sequence_length": 16, "windows": 4}


OPENED = ("opening the model", "reading texts", "checking weights", "trying the model")


def test_evaluate_bench_and_layers_tell_each_step_from_its_beginning(small: dict[str, Any]) -> None:
    text = (small.pop("calibration"),)
    own = {name: value for name, value in small.items() if name != "samples"}
    listener, told = recording(EvaluateListener)
    run_evaluate(EvaluateRequest(text=text, **own), listener)
    assert_begun(told, *OPENED, "perplexity")
    listener, told = recording(BenchListener)
    run_bench(BenchRequest(calibration=text[0], text=text, metric=("wanda", "gblm_l1"), **small), listener)
    assert_begun(told, *OPENED, "calibration", "perplexity", "pruning")
    assert (told[-1][1], told[-1][2]) == (21, 21)  # seven layers of three blocks
    listener, told = recording(Listener)
    run_layers(LayersRequest(model=small["model"], device="cpu"), listener)
    assert_begun(told, "opening the model", "checking weights", "trying the model")


def test_prune_verify_and_packing_tell_each_step_from_its_beginning(small: dict[str, Any], tmp_path: Path) -> None:
    listener, told = recording(PruneListener)
    run_prune(PruneRequest(output=tmp_path / "pruned", metric="sparsegpt", **small), listener)
    assert_begun(told, *OPENED, "perplexity", "pruning", "files", "tensors")
    listener, told = recording(Listener)
    run_verify(VerifyRequest(folder=str(tmp_path / "pruned"), against=small["model"], device="cpu"), listener)
    assert_begun(told, "files", "tensors", "tensors beside the dense ones", "opening the model", "perplexity")
    listener, told = recording(Listener)
    run_pack(PackRequest(folder=tmp_path / "pruned", output=tmp_path / "p.pack"), listener)
    run_unpack(UnpackRequest(archive=tmp_path / "p.pack", output=tmp_path / "again"), listener)
    assert_begun(told, "megabytes")


def test_searches_tell_each_step_from_its_beginning(small: dict[str, Any], tmp_path: Path) -> None:
    listener, told = recording(AllocateListener)
    run_allocation(AllocateRequest(search_windows=2, evaluations=8, **small), listener)
    assert_begun(told, *OPENED, "calibration", "candidates", "search, % of the budget", "front on validation")
    listener, told = recording(SlimListener)
    slim = SlimRequest(output=tmp_path / "slim", search_windows=2, sparsity=0.3, steps=2, **small)
    run_slim(slim, listener)
    assert_begun(told, *OPENED, "scores of units", "starts", "search, % of its length", "perplexity")


def test_a_campaign_tells_each_step_from_its_beginning(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "digests"))  # where none is remembered
    text = small.pop("calibration")
    request = DiscoverRequest(
        text=text, operands=("W", "X"), target=("0.5",), population=4, generations=1, calibration_seeds=0,
        search_windows=2, workers=1, ledger=tmp_path / "c.sqlite", cache=tmp_path / "cache", **small,
    )  # fmt: skip
    listener, told = recording(DiscoverListener)
    rivals: list[str] = []
    listener.rivals = lambda found: rivals.extend(found)
    run_campaign(request, listener)
    assert_begun(
        told,
        *OPENED,
        "hashing weights",
        "calibration",
        "dense model on the search text",
        "generation 0, reconstruction",
    )
    assert {"wanda", "magnitude_row"} <= set(rivals)


def test_tune_tells_each_step_from_its_beginning(small: dict[str, Any], tmp_path: Path) -> None:
    listener, told = recording(TuneListener)
    request = TuneRequest(output=tmp_path / "tuned", target="2:4", evolve=False, search_windows=2, **small)
    run_tune(request, listener)
    assert_begun(told, *OPENED, "calibration", "perplexity", "pruning")


def test_a_search_that_ends_late_is_over_and_no_more() -> None:
    schedule = Schedule(steps=None, minutes=0.5, draws=2, rate=0.0, seed=0)
    state = State(1, None, seconds=51.3)  # type: ignore[arg-type]
    assert schedule.over(state) == 1.0


# Tables


def individual(text: str, excess: float) -> Individual:
    figures = {"0.5": excess, "2:4": excess + 0.1}
    return Individual(resolve_metric(text), figures, figures)


@pytest.mark.parametrize("colour", [True, False])
@pytest.mark.parametrize("width", [60, 80])
def test_the_live_table_fits_and_needs_no_colour(width: int, colour: bool) -> None:
    """Numbered rows, baselines below in the same columns, the best without gradients marked."""
    target = console(width, terminal=True, colour=colour)
    front = [individual(FORMULA, 0.1234), *(individual(f"abs(W)*G*{n}.123456", 0.2) for n in range(9)),
             individual("abs(W)*X**1.2345", 0.3456)]  # fmt: skip
    counts = {"drawn": 3, "unique_masks": 2, "paid": 1}
    with DiscoverReport(target) as report:
        report.rivals({"wanda": individual("abs(W)*X", 0.4567), "magnitude": individual("abs(W)", 0.9)})
        report.generation(3, front, counts)
        report.progress("generation 4, reconstruction", 0, 40)
        report.step("finalists")
    text = written(target)
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    assert max(map(len, lines)) <= width
    for number in ("0.1734", "0.1234", "0.2234", "0.4567"):
        assert number in text
    assert "0.48371654" not in text
    assert "wanda: abs(W)*X" in " ".join(text.split())
    [marked, *_] = [line for line in lines if "*11" in line]
    assert "0.3956" in marked
    assert "generation 4, reconstruction" in text  # the bar is there with the table
    assert "constants to two digits" in " ".join(text.split())


def test_what_updates_weights_is_marked() -> None:
    row = {"ppl": {"0.5": 12.0}, "mean_excess": 0.25, "formula": FORMULA}
    result = {
        "winner": row, "best_gradient_free": None, "regrouped": None, "better": True,
        "baselines": {"wanda": row | {"mean_excess": 0.4}, "sparsegpt": row | {"mean_excess": 0.3}},
        "confidence": {"draws": 0, "asked": 0, "interval": None}, "model": "m", "dense": {"test": 10.0},
        "targets": ["0.5"], "screening": [], "evaluations": 7,
        "counts": dict.fromkeys(
            ("drawn", "unique_texts", "unique_opposites", "unique_canonical", "unique_ranked", "unique_masks"), 7
        ),
        "seconds": {"per_evaluation": {"per_candidate": 0.5, "rungs": {}}},
    }  # fmt: skip
    for update, expected in (("none", {"sparsegpt +u"}), ("obs", {"sparsegpt +u", "winner +u"})):
        target = console(80, terminal=False)
        print_discover(target, result, DiscoverRequest(ledger=Path("x"), update=update))
        cells = [[cell.strip() for cell in line.split("│")] for line in written(target).splitlines() if "│" in line]
        assert {row[2] for row in cells if row[2].endswith("+u")} == expected
        assert [row[1] for row in cells[:3]] == ["1", "2", "3"]
        assert "+u: kept weights are updated" in written(target)


# The next command


def documents(folder: Path) -> dict[str, tuple[dict[str, Any], Request]]:
    """Of each command: what it may have come to, and the request, of names that a shell would take apart."""
    (there := folder / "a folder").mkdir()
    (there / "gpmetric_manifest.json").write_text("{}")
    (archive := folder / "an archive.pack").write_bytes(b"")
    (allocation := folder / "allo cation.json").write_text("{}")
    ledger, new = folder / "it's.sqlite", folder / "new folder"
    texts = {"model": "a model's folder", "calibration": "c 1.txt"}
    row = {"metric": FORMULA, "target": "2:4", "error": None, "ppl": {"t": 12.0}, "fit": "own"}
    entry = {"formula": FORMULA, "update": "admm", "fit": "dense"}
    found = LedgerRequest(ledger=ledger)
    return {
        "discover": (
            {"winner": {"formula": "layer:" + FORMULA}, "better": True},
            DiscoverRequest(ledger=ledger, model="m", text="t t.txt", target=("layer:0.5",), device="cpu", seed=3),
        ),
        "bench": (
            {"results": [row]},
            BenchRequest(text=("t.txt",), update="obs", permute=True, target=("2:4",), **texts),
        ),
        "export": ({"formula": "W*G", "group": "layer"}, ExportRequest(formula=str(ledger), output=Path("m.py"))),
        "catalogue": ({"entries": {"one": entry}}, CatalogueRequest()),
        "reproduce": ({"studies": [{"name": "llama-7b"}]}, ReproduceRequest(list=True)),
        "allocate": ({"allocation": {}}, AllocateRequest(output=allocation, metric="ria", update="obs", **texts)),
        "tune": ({}, TuneRequest(output=there, **texts)),
        "prune": ({}, PruneRequest(output=there, text="t.txt", windows=3, **texts)),
        "slim": ({}, SlimRequest(output=there, **texts)),
        "verify": ({"ok": True, "kind": "prune"}, VerifyRequest(folder=str(there))),
        "evaluate": ({}, EvaluateRequest(model="m", text=("t.txt",), dtype="bfloat16")),
        "pack": ({}, PackRequest(folder=there, output=archive)),
        "unpack": ({}, UnpackRequest(archive=archive, output=there)),
        "layers": ({}, LayersRequest(model="m", include="mlp|attn")),
        "calibrate": ({"operands": ["X", "F"]}, CalibrateRequest(output=Path("s.safetensors"), operands=("X", "F"))),
        "report": ({}, ReportRequest(source=ledger, output=Path("p.html"))),
        "list": ({}, ListRequest()),
        "status": ({"state": "running", "result": None}, StatusRequest(ledger=ledger)),
        "analyse": ({}, AnalyseRequest(ledger=ledger)),
        "ledger check": ({"ok": False}, found),
        "ledger repair": ({}, LedgerRepairRequest(ledger=ledger, output=new)),
        "ledger export": ({}, LedgerExportRequest(ledger=ledger, output=Path("c.csv"))),
        "ledger merge": ({}, LedgerMergeRequest(ledgers=("a", "b"), output=new)),
        "ledger free": ({}, found),
    }


@pytest.fixture
def accepted(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[str, Request]]:
    """The command and the request of a command line, once the request has passed all checks that need no model."""
    found: list[tuple[str, Request]] = []

    def take(command: Any, name: str, options: Any, json: Any, config: Any, *, force: bool) -> None:
        request = make_request(command.request, dict(options)).completed()
        check_request(request, json, config=config, force=force)
        found.append((name, request))

    monkeypatch.setattr(cli, "_run", take)

    def parse(line: str) -> tuple[str, Request]:
        program, *words = shlex.split(line)
        assert program == "gpmetric"
        cli.app(words, standalone_mode=False)
        return found.pop()

    return parse


def test_each_command_ends_with_one_that_is_accepted(
    accepted: Callable[[str], tuple[str, Request]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(GOLDEN, tmp_path / "it's.sqlite")
    asked = documents(tmp_path)
    assert asked.keys() == COMMANDS.keys()
    named = {}
    for name, (document, request) in asked.items():
        lines = COMMANDS[name].next(document, request)
        assert 1 <= len(lines) <= 2, name
        named[name] = [accepted(line) for line in lines]
    (exported, pruned) = (request for _, request in named["discover"])
    assert isinstance(pruned, PruneRequest)
    assert (pruned.metric, pruned.target, pruned.calibration, pruned.seed) == (
        "layer:" + FORMULA,
        "layer:0.5",
        "t t.txt",
        3,
    )
    assert isinstance(exported, ExportRequest)
    assert exported.formula_files == (str(tmp_path / "it's.sqlite"),)
    [(_, benched)] = named["bench"]
    assert isinstance(benched, PruneRequest)
    assert (benched.metric, benched.update, benched.permute, benched.model) == (
        FORMULA,
        "obs",
        True,
        "a model's folder",
    )


def test_what_comes_next_has_the_plugins_that_a_formula_may_need(tmp_path: Path) -> None:
    for name, (document, request) in documents(tmp_path).items():
        if name != "list" and any(field.name == "plugin" for field in described(type(request))):
            for line in COMMANDS[name].next(document, replace(request, plugin=("mine.py",))):  # type: ignore[call-arg]
                words = shlex.split(line)
                taken = any(field.name == "plugin" for field in described(COMMANDS[words[1]].request))
                assert ("--plugin" in words) == taken, line


def test_each_other_end_is_accepted_too(
    accepted: Callable[[str], tuple[str, Request]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(GOLDEN, tmp_path / "it's.sqlite")
    asked = documents(tmp_path)
    unnamed = replace(asked["allocate"][1], output=None)
    status, analysed = asked["status"][1], replace(asked["analyse"][1], output=Path("a.png"))
    structured = replace(asked["tune"][1], structured=True, target="0.3")
    ends = [
        next_steps.after_allocate({"allocation": {}}, unnamed),
        next_steps.after_status({"state": "finished", "result": {}}, status),
        next_steps.after_status({"state": "killed", "result": None}, status),
        next_steps.after_analyse({}, analysed),
        next_steps.after_tune({}, structured),
        next_steps.after_ledger_check({"ok": True}, asked["ledger check"][1]),
        next_steps.after_plan({}, asked["bench"][1], "bench"),
        next_steps.after_layers({}, LayersRequest()),
        next_steps.after_discover({"winner": {"formula": "wanda"}, "better": False}, asked["discover"][1]),
    ]
    for lines in ends:
        assert lines
        for line in lines:
            accepted(line)
    assert next_steps.after_bench({"results": []}, asked["bench"][1]) == []
    assert next_steps.after_allocate({"allocation": None}, unnamed) == []
    assert next_steps.after_verify({"ok": False, "kind": "prune"}, asked["verify"][1]) == []


def test_the_next_command_is_told_beside_the_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On standard error, and not where standard output is JSON."""
    monkeypatch.setattr(cli, "watch_signals", lambda: None)
    for words, count in ((["catalogue"], 1), (["catalogue", "--json", "-"], 0)):
        monkeypatch.setattr("sys.argv", ["gpmetric", *words])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 0
        told = capsys.readouterr()
        assert "next:" not in told.out
        assert told.err.count("next: gpmetric prune ") == count


def test_standard_output_is_its_own_while_something_moves(capsys: pytest.CaptureFixture[str]) -> None:
    """What a command writes there, CSV for instance, is not taken to standard error, where bars are."""
    target = Console(stderr=True, force_terminal=True, width=80)
    with opening(target, "gpmetric: ledger export"):
        print("a,b")
    with PlainReport(target) as report:
        report.progress("calibration", 0, 4)
        print("1,2")
    told = capsys.readouterr()
    assert told.out == "a,b\n1,2\n"
    assert "gpmetric: ledger export" in told.err
    assert "calibration" in told.err
