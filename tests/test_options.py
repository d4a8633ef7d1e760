"""Requests: one made up here, its options, its keywords, its function, its command, and what each refuses."""

from __future__ import annotations

import inspect
import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

import gpmetric
from gpmetric import cli
from gpmetric.allocation.request import AllocateRequest
from gpmetric.commands import COMMANDS, Command
from gpmetric.errors import InputError
from gpmetric.evolution.request import DiscoverRequest
from gpmetric.functions import as_function
from gpmetric.options import Option, Request, check_request, command_line, described, make_request
from gpmetric.pruning.requests import BenchRequest, PruneRequest, VerifyRequest
from gpmetric.results import Result
from gpmetric.session.requests import EvaluateRequest
from gpmetric.targets import parse_target

SHADES = {"light": "a meaning", "dark": "another"}


@dataclass(frozen=True, kw_only=True)
class Base(Request):
    """What is inherited."""

    model: Annotated[str | tuple[str, ...] | None, Option("A model.", argument=True)] = None
    samples: Annotated[int, Option("Windows.", least=1)] = 8
    gone: Annotated[str | None, Option("Of no use here.")] = None
    source: Annotated[str | None, Option("A text.", reads=True)] = None


@dataclass(frozen=True, kw_only=True)
class Paint(Base):
    """A made-up command's request, with a field of every kind."""

    unused: ClassVar[frozenset[str]] = frozenset({"gone"})

    text: Annotated[tuple[str, ...], Option("Texts.", reads=True)] = ("a", "b")
    letters: Annotated[tuple[str, ...], Option("Letters.", listed=True, choices="WXG")] = ("W", "X")
    shade: Annotated[str, Option("Shade: {choices}.", choices=SHADES)] = "light"
    share: Annotated[float, Option("A share.", above=0, below=1)] = 0.5
    weight: Annotated[float | None, Option("A weight.", least=0)] = None
    seed: Annotated[int, Option("A seed.", least=0, below=2**63)] = 0
    fast: Annotated[bool, Option("Fast or slow.", names=("--fast/--thorough",))] = False
    force: Annotated[bool, Option("Force.", names=("--force",))] = False
    output: Annotated[Path | None, Option("A folder.", names=("--output", "-o"), writes="folder")] = None
    csv: Annotated[Path | None, Option("A file.", metavar="FILE", writes="table")] = None
    plot: Annotated[Path | None, Option("A picture.", writes="picture")] = None

    def check(self) -> None:
        super().check()
        if self.fast and self.force:
            raise InputError("--fast and --force exclude each other")

    def completed(self) -> Paint:
        return self if self.csv is None or self.csv.suffix else replace(self, csv=self.csv.with_suffix(".csv"))


FIELDS = (
    "model", "text", "letters", "shade", "share", "weight", "seed", "fast", "force", "output", "csv", "plot",
    "samples", "source",
)  # fmt: skip


# What fields say


def test_the_model_comes_first_then_own_options_then_inherited_ones() -> None:
    assert tuple(field.name for field in described(Paint)) == FIELDS


def test_fields_are_described() -> None:
    found = {field.name: field for field in described(Paint)}
    assert {name for name, field in found.items() if field.optional} == {
        "model", "weight", "output", "csv", "plot", "source"
    }  # fmt: skip
    assert {name for name, field in found.items() if field.several} == {"text", "letters"}
    kinds = {name: field.kind for name, field in found.items() if not field.several}
    assert kinds == {
        "model": str, "shade": str, "share": float, "weight": float, "seed": int, "fast": bool, "force": bool,
        "output": Path, "csv": Path, "plot": Path, "samples": int, "source": str,
    }  # fmt: skip
    assert found["fast"].spelled == "--fast"
    assert found["output"].spelled == "--output"
    assert {field.spelled for field in described(BenchRequest)} >= {"--sequence-length", "--one-shot", "--memory"}


@pytest.mark.parametrize("request_type", [command.request for command in COMMANDS.values()], ids=COMMANDS)
def test_every_field_of_every_command_is_an_option_with_a_sentence(request_type: type[Request]) -> None:
    names = [field.spelled for field in described(request_type)]
    assert len(set(names)) == len(names)
    for field in described(request_type):
        assert isinstance(field.option, Option)
        assert field.option.help.endswith(".")
        assert not field.option.listed or field.several


def test_an_option_of_one_or_several_is_several_and_an_argument_is_one() -> None:
    """`bench --model A --model B`, `prune A`."""
    models = {kind: next(iter(described(kind))) for kind in (BenchRequest, PruneRequest, EvaluateRequest)}
    assert {kind: field.name for kind, field in models.items()} == dict.fromkeys(models, "model")
    assert {kind: field.several for kind, field in models.items()} == {
        BenchRequest: True, PruneRequest: False, EvaluateRequest: False
    }  # fmt: skip
    assert all(field.optional for field in models.values())


# From keywords to a request


def test_make_request_takes_texts_for_paths_and_for_one_of_several() -> None:
    made = make_request(
        Paint, {"output": "x/y", "text": "one", "letters": "G, W,G", "source": Path("z"), "share": 0.25}
    )
    assert made == Paint(output=Path("x/y"), text=("one",), letters=("G", "W"), source="z", share=0.25)
    assert make_request(Paint, {"text": ["b", Path("a"), "b"]}).text == ("b", "a")
    assert make_request(Paint, {"letters": ["X", "G"]}).letters == ("X", "G")
    assert make_request(Paint, {"text": []}).text == ()


def test_none_is_the_default_where_it_is_no_value() -> None:
    """What typer gives for an option that may be repeated and was not given."""
    assert make_request(Paint, dict.fromkeys(FIELDS)) == Paint()
    assert make_request(Paint, {"weight": 2.0, "text": None}) == Paint(weight=2.0)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("samplse", "did you mean 'samples'? "), ("gone", ""), ("xyzzy", ""), ("out_put", "did you mean 'output'? ")],
)
def test_an_unknown_keyword_is_answered_with_all(name: str, hint: str) -> None:
    """Also one that is inherited and of no use."""
    with pytest.raises(InputError) as caught:
        make_request(Paint, {name: 1})
    assert str(caught.value) == f"unknown option {name!r}: {hint}accepted are {', '.join(FIELDS)}"


@pytest.mark.parametrize("value", [["a", "b"], ("a",), []])
@pytest.mark.parametrize("name", ["model", "shade", "output"])
def test_several_values_for_one_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"^--{name} must be (text|a path), but got [\[(]"):
        make_request(Paint, {name: value})


# Checks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "--samples must be at least 1, but got 0"),
        ({"samples": -5}, "--samples must be at least 1, but got -5"),
        ({"seed": -1}, "--seed must be at least 0, but got -1"),
        ({"seed": 2**63}, "--seed must be below 9223372036854775808, but got 9223372036854775808"),
        ({"share": 0.0}, "--share must be above 0 and below 1, but got 0.0"),
        ({"share": 1.0}, "--share must be above 0 and below 1, but got 1.0"),
        ({"share": math.nan}, "--share must be above 0 and below 1, but got nan"),
        ({"share": math.inf}, "--share must be above 0 and below 1, but got inf"),
        ({"weight": -0.1}, "--weight must be at least 0, but got -0.1"),
        ({"weight": math.nan}, "--weight must be at least 0, but got nan"),
        ({"shade": "grey"}, "--shade must be one of light, dark, but got 'grey'"),
        ({"letters": ("W", "Q")}, "--letters must be one of W, X, G, but got 'Q'"),
        ({"letters": ("",)}, "--letters must be one of W, X, G, but got ''"),
        ({"plot": Path("x.gif")}, "--plot 'x.gif' must end in .png or .pdf"),
        ({"fast": True, "force": True}, "--fast and --force exclude each other"),
        ({"csv": Path("-")}, "--csv -: only --json goes to standard output"),
        ({"plot": Path("no/such/x.png")}, "--plot 'no/such/x.png': the directory 'no/such' does not exist"),
        ({"csv": Path("a.txt"), "text": ("b.txt", "a.txt")}, "--csv 'a.txt' is also read"),
        ({"csv": Path("a.txt"), "source": "./a.txt"}, "--csv 'a.txt' is also read"),
        ({"csv": Path("x.png"), "plot": Path("x.png")}, "--csv and --plot are the same file 'x.png'"),
        ({"csv": Path("x"), "output": Path("x")}, "--csv and --output are the same file 'x'"),
    ],
)
def test_what_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each names option, value and what is accepted, or what is in the way."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(InputError) as caught:
        check_request(Paint(**options))
    assert str(caught.value) == message


def test_the_json_is_an_output_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    check_request(Paint(csv=Path("x.csv")), Path("x.json"))
    check_request(Paint(csv=Path("x.csv")), Path("-"))
    for request, message in (
        (Paint(csv=Path("x")), r"^--json and --csv are the same file 'x'$"),
        (Paint(source="x", text=("y", "a.txt")), None),
        (Paint(), None),
    ):
        if message is None:
            check_request(request, Path("x"))
        else:
            with pytest.raises(InputError, match=message):
                check_request(request, Path("x"))
    with pytest.raises(InputError, match=r"^--json 'a\.txt' is also read$"):
        check_request(Paint(text=("a.txt",)), Path("a.txt"))


@pytest.mark.parametrize("name", ["None", "a", "8"])
def test_a_file_may_have_any_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a default, or of what is not given, is nothing that is read."""
    monkeypatch.chdir(tmp_path)
    check_request(Paint(csv=Path(name), text=()))


def test_the_ends_that_are_accepted() -> None:
    check_request(Paint())
    check_request(Paint(samples=1, seed=0, share=1e-9, weight=0.0, letters=(), shade="dark"))
    check_request(Paint(seed=2**63 - 1, share=1 - 1e-9, weight=1e300, letters=("G",)))


# The function


def run(request: Paint, listener: Any = None) -> dict[str, Any]:
    """Says what was asked for."""
    return {"request": request, "listener": listener}


paint = as_function("made_up", Paint, run, "model")


def test_the_function_is_of_keywords() -> None:
    assert paint("m", shade="dark", output="x")["request"] == Paint(model="m", shade="dark", output=Path("x"))
    assert paint(model="m") == {"request": Paint(model="m"), "listener": None}
    assert paint(listener=3) == {"request": Paint(), "listener": 3}


def test_the_function_completes_and_checks(tmp_path: Path) -> None:
    assert paint(csv=tmp_path / "x")["request"].csv == tmp_path / "x.csv"
    with pytest.raises(InputError, match="--samples must be at least 1, but got 0"):
        paint(samples=0)
    with pytest.raises(InputError, match="did you mean 'samples'"):
        paint(sample=1)


def test_the_function_refuses_arguments_without_a_name() -> None:
    with pytest.raises(TypeError, match="at most 1 arguments without a name, but got 2"):
        paint("m", "n")
    with pytest.raises(TypeError, match="two values for the argument 'model'"):
        paint("m", model="n")


def test_the_signature() -> None:
    """What `help` and editors show: names, order, defaults and types of the fields, no `Option` among them."""
    parameters = inspect.signature(paint).parameters
    assert list(parameters) == [*FIELDS, "listener", "progress"]
    kinds = {name for name, one in parameters.items() if one.kind is not inspect.Parameter.KEYWORD_ONLY}
    assert kinds == {"model"}
    assert {name: one.default for name, one in parameters.items()} == {
        name: getattr(Paint(), name, None) for name in parameters
    }
    assert parameters["samples"].annotation is int
    assert parameters["weight"].annotation == float | None
    assert parameters["text"].annotation == tuple[str, ...]
    assert inspect.signature(paint).return_annotation is Result
    assert paint.__doc__ == run.__doc__


def test_a_field_without_default_is_asked_for() -> None:
    verify = as_function("made_up", VerifyRequest, lambda request: {"folder": request.folder}, "folder")
    assert "progress" not in inspect.signature(verify).parameters  # there is nobody to tell
    assert inspect.signature(verify).parameters["folder"].default is inspect.Parameter.empty
    assert verify("x") == verify(folder="x") == verify(Path("x")) == {"folder": "x"}
    with pytest.raises(TypeError, match="folder"):
        verify()


# The command


class Listener:
    """A context manager that is told."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.console.print("listened")


def work(request: Paint, listener: Listener) -> dict[str, Any]:
    listener.console.print("worked")
    return {"asked": {name: str(getattr(request, name)) for name in FIELDS}, "error": request.source}


def show(console: Console, document: Mapping[str, Any], request: Paint) -> None:
    console.print(f"shown {document['asked']['shade']} {request.shade}")


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> typer.Typer:
    """A command line of two commands, one of them made of `Paint`."""
    made = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    made.command("other")(lambda: None)
    monkeypatch.setattr(cli, "app", made)
    cli._add(made, "paint", Command("Paints. Slowly.", Paint, work, show, Listener))
    return made


def asked(app: typer.Typer, *words: str) -> dict[str, str]:
    done = CliRunner().invoke(app, ["paint", *words, "--json", "-"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found: dict[str, str] = json.loads(done.stdout)["asked"]
    return {name: value for name, value in found.items() if value != str(getattr(Paint(), name))}


def test_the_command_of_a_request(app: typer.Typer, tmp_path: Path) -> None:
    assert asked(app) == {}
    assert asked(app, "m", "--text", "c", "--text", "a", "--text", "c") == {"model": "m", "text": "('c', 'a')"}
    assert asked(app, "--letters", "G, W", "--shade", "dark") == {"letters": "('G', 'W')", "shade": "dark"}
    assert asked(app, "--share", "0.25", "--weight", "3", "--seed", "4", "--samples", "9") == {
        "share": "0.25", "weight": "3.0", "seed": "4", "samples": "9"
    }  # fmt: skip
    assert asked(app, "--fast") == {"fast": "True"}
    assert asked(app, "--thorough", "--force", "-o", "x") == {"force": "True", "output": "x"}
    assert asked(app, "--csv", str(tmp_path / "x")) == {"csv": str(tmp_path / "x.csv")}


def test_the_help_of_a_command(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    done = CliRunner().invoke(app, ["paint", "--help"])
    words = " ".join(done.stdout.split())
    for told in (
        "Paints. Slowly.", "Shade: light, dark. [default: light]", "--fast / --thorough", "-o, --output", "--csv FILE",
        "Letters. [default: W,X]", "A share. Above 0 and below 1. [default: 0.5]", "--json FILE", "--config FILE.toml",
    ):  # fmt: skip
        assert told in words
    assert "--gone" not in words
    shown = ("letters", "shade", "source", "text", "samples", "seed", "json")  # by groups, own options first
    assert [words.index(f"--{name} ") for name in shown] == sorted(words.index(f"--{name} ") for name in shown)


def test_what_the_command_refuses_it_refuses_before_it_works(app: typer.Typer) -> None:
    for words, message in (
        (["--shade", "grey"], "--shade must be one of light, dark, but got 'grey'"),
        (["--samples", "0"], "--samples must be at least 1, but got 0"),
        (["--letters", "W,Q"], "--letters must be one of W, X, G, but got 'Q'"),
    ):
        done = CliRunner().invoke(app, ["paint", *words])
        assert isinstance(done.exception, InputError)
        assert str(done.exception) == message
        assert "worked" not in done.output


def test_a_result_that_says_it_failed_is_shown_and_then_an_error(app: typer.Typer, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["paint", "--source", "rain", "--json", str(tmp_path / "x.json")])
    assert str(done.exception) == "rain"
    assert done.stdout == "shown light light\n"
    assert [line.strip() for line in done.stderr.splitlines()] == ["worked", "listened"]
    assert json.loads((tmp_path / "x.json").read_text())["error"] == "rain"


def test_a_config_file_has_the_names_of_the_options(app: typer.Typer, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('model = "m"\nsamples = 3\nfast = true\ntext = ["x", "y"]\nletters = "G"\n')
    assert asked(app, "--config", str(path), "--samples", "4") == {
        "model": "m", "samples": "4", "fast": "True", "text": "('x', 'y')", "letters": "('G',)"
    }  # fmt: skip
    path.write_text("gone = 1\n")
    done = CliRunner().invoke(app, ["paint", "--config", str(path)])
    assert isinstance(done.exception, InputError)
    assert "unknown key 'gone'" in str(done.exception)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": "8"}, "--samples must be a whole number, but got '8'"),
        ({"samples": True}, "--samples must be a whole number, but got True"),
        ({"shuffle": "no"}, "--shuffle must be True or False, but got 'no'"),
        ({"metric": [None]}, "--metric must be text, but got None"),
        ({"output": 3}, "--output must be a path, but got 3"),
    ],
)
def test_wrong_types_are_refused(options: dict[str, Any], message: str) -> None:
    kind = PruneRequest if "output" in options else BenchRequest
    with pytest.raises(InputError, match=re.escape(message)):
        make_request(kind, options)


def test_numbers_are_taken_for_targets() -> None:
    assert make_request(BenchRequest, {"target": 0.5}).target == ("0.5",)
    assert make_request(BenchRequest, {"target": [0.5, "2:4"]}).target == ("0.5", "2:4")


def test_an_older_spelling_is_a_keyword_and_a_config_key_too(tmp_path: Path) -> None:
    assert make_request(AllocateRequest, {"archive": "x.jsonl"}).ledger == Path("x.jsonl")
    (tmp_path / "c.toml").write_text("archive = 'no/such/folder/x.jsonl'\n", encoding="utf-8")
    command = [sys.executable, "-m", "gpmetric", "allocate", "--config", str(tmp_path / "c.toml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "--ledger 'no/such/folder/x.jsonl'" in done.stderr) == (2, True), done.stderr


def test_a_command_line_asks_for_the_same_again() -> None:
    """Flags, lists, repeated options, floats, quotes."""
    asked = DiscoverRequest(
        model=("a", "b c"), operands=("W", "X"), target=("0.5", "2:4"), start=("abs(W)*X",), minutes=2.5, resume=True,
        ledger=Path("x.sqlite"), seed=3,
    )  # fmt: skip
    line = command_line("discover", asked)
    assert line == (
        "gpmetric discover --model a --model 'b c' --target 0.5 --target 2:4 --operands W,X --start 'abs(W)*X' "
        "--ledger x.sqlite --resume --minutes 2.5 --seed 3"
    )
    assert command_line("evaluate", EvaluateRequest(model="dir", text=("t",))) == "gpmetric evaluate dir --text t"
    assert command_line("bench", BenchRequest(one_shot=True)) == "gpmetric bench --one-shot"


def test_numbers_of_numpy_sets_and_generators_are_taken() -> None:
    asked = make_request(BenchRequest, {"samples": np.int64(3), "minutes": np.float32(0.5), "target": np.float32(0.5)})
    assert (asked.samples, asked.minutes, asked.target) == (3, 0.5, ("0.5",))
    assert type(asked.samples) is int
    assert make_request(BenchRequest, {"target": (text for text in ("0.5", "2:4"))}).target == ("0.5", "2:4")
    assert make_request(DiscoverRequest, {"operands": {"X", "W"}}).operands == ("W", "X")
    for wrong in ({"samples": 4.0}, {"samples": np.float64(4)}, {"target": {"0.5": 1}}, {"shuffle": 1}):
        with pytest.raises(InputError, match=rf"^--{next(iter(wrong))} must be "):
            make_request(BenchRequest, wrong)


def test_a_request_that_is_made_by_hand_converts_too() -> None:
    """A text would be taken apart letter by letter, a number could not be."""
    assert BenchRequest(target=0.5, metric="wanda", text="t.txt") == BenchRequest(  # type: ignore[arg-type]
        target=("0.5",), metric=("wanda",), text=("t.txt",)
    )
    assert DiscoverRequest(operands="W,X").operands == ("W", "X")  # type: ignore[arg-type]
    assert replace(BenchRequest(), metric=["wanda"]).metric == ("wanda",)  # type: ignore[arg-type]


def test_the_library_reads_what_the_command_line_does() -> None:
    """Or says what it takes; a number is a sparsity."""
    score = torch.arange(16.0).reshape(2, 8)
    half = torch.arange(8).repeat(2, 1) >= 4
    for target in (0.5, "0.5", "row:0.5", parse_target("0.5"), parse_target(0.5)):
        assert torch.equal(gpmetric.select_mask(score, target), half)
    with pytest.raises(InputError, match=r"--target '1\.5' is not a target"):
        gpmetric.select_mask(score, 1.5)
    with pytest.raises(InputError, match=r"--target 'None' is not a target"):
        gpmetric.parse_target(None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"a metric is a name or a formula, but got 0\.5"):
        gpmetric.Metric.parse(0.5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a model is a directory or a name of the Hub, but got 3"):
        gpmetric.load_model(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="unknown option 'minuts': did you mean 'minutes'"):
        gpmetric.discover(minuts=5)
