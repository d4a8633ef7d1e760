"""The command line: exit status, one line per error, nothing heavy imported for what is wrong on the face of it."""

from __future__ import annotations

import inspect
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console

import gpmetric
from gpmetric import cli
from gpmetric.command_help import COMMAND_GROUPS, OPTION_GROUPS, group_of
from gpmetric.commands import COMMANDS as COMMAND_ROWS
from gpmetric.commands import Command
from gpmetric.errors import GpmetricError, LedgerError, MaskError
from gpmetric.evolution.ledger import Ledger, result_of
from gpmetric.evolution.request import DiscoverRequest
from gpmetric.interrupts import check_stop
from gpmetric.metrics import BASELINES, resolve_metric
from gpmetric.options import Request, check_request, described, make_request
from gpmetric.pruning.recipe import Recipe, recipe_text

CONSOLE_SCRIPT = Path(sys.executable).with_name("gpmetric")
COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
LEDGER = Path(__file__).parent / "golden" / "ledger-v4-finished.sqlite"
WINNER = (result_of(LEDGER)["winner"]["formula"],)
HEAVY = ("torch", "transformers", "sympy")

BAD_FORMULAS = [
    "", " ", "\t", "1", "-1", "X", "X*G", "2*3+4",
    "__import__('os').system('x')", "W.__class__", "().__class__", "W.__class__.__mro__[-1].__subclasses__()",
    "lambda: W", "[W for W in X]", "(W:=1)", "f'{W}'", "W if X else G", "eval('W')", "exec(W)", "import os", "W;X",
    "foo(W)", "abss(W)", "W*Q", "w", "abs(W,X)", "max(W)", "abs()", "abs", "X(W)", "abs(W)(X)", "abs(W", "W)", "W W",
    "W*", "*W", "W**", "W,X", "W^2", "W%2", "W@X", "W==X", "W'", '"W"', "#W", "W//2", "$W", "`W`", "W!", "W|X",
    "9**9**9", "W*9**9**9", "W*1e999", "W*1e31", "W*nan", "W*inf", "W*0x10", "W*1_000", "W*" + "9" * 5000, "W*1j",
    "W*log", "W*exp(exp(exp(9)))*exp(80)",
    "Ｗ", "ａｂｓ(W)", "W*\u200bX", "\u202eW", "\ufeffW", "W\x00", "W\r\n*X", "W\u00a0*X", "𝑊", "W*２",
    "W\x1b[31m", "W]", "[/red]", "[bold]W[/bold]", "<script>alert(1)</script>", "=cmd()", ":smile:", "../../x", "con",
    "abs(" * 10_000 + "W" + ")" * 10_000, "-" * 10_000 + "W", "(" * 10_000, "+".join("W" * 100_000), "W" * 100_000,
    "W**" * 600 + "W",
]  # fmt: skip


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that an error is, without its prefix."""
        assert self.err.endswith("\n")
        [line] = self.err.splitlines()
        assert line.startswith("gpmetric: error: ")
        assert line.isprintable()
        return line.removeprefix("gpmetric: error: ")


Run = Callable[..., Outcome]
Asked = Callable[[Sequence[str]], Request]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """`gpmetric ARGUMENTS` in this process, without the command that may come next; see `test_terminal.py`."""
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setenv("COLUMNS", "250")  # tables unfolded

    def call(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["gpmetric", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert isinstance(caught.value.code, int)
        out, err = capsys.readouterr()
        told = [line for line in err.splitlines(keepends=True) if not line.startswith("next: gpmetric ")]
        return Outcome(caught.value.code, out, "".join(told))

    yield call
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def asked(run: Run, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """The request that a command line makes, checked as before its work, which is not done."""
    made: list[Request] = []

    def note(
        command: Command, name: str, options: dict[str, Any], json: Path | None, config: Path | None, *, force: bool
    ) -> None:
        made.append(make_request(command.request, options).completed())
        check_request(made[-1], json, config=config, force=force)

    monkeypatch.setattr(cli, "_run", note)

    def ask(words: Sequence[str]) -> Request:
        assert run(*words) == Outcome(0, "", "")
        return made[-1]

    return ask


@pytest.fixture
def quick(tiny_llama: Path, tiny_text: Path) -> list[str]:
    """Options of a bench that takes a tenth of a second."""
    text = ["--calibration", str(tiny_text), "--text", str(tiny_text), "--sequence-length", "32"]
    return ["--model", str(tiny_llama), *text, "--samples", "4", "--windows", "2", "--device", "cpu"]


def toml(folder: Path, content: str) -> Path:
    path = folder / "config.toml"
    path.write_text(content, encoding="utf-8")
    return path


# What works


def test_version(run: Run) -> None:
    from importlib.metadata import version

    assert run("--version") == Outcome(0, f"gpmetric {version('gpmetric')}\n", "")


def test_without_arguments_there_is_help(run: Run) -> None:
    outcome = run()
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == run("--help").out
    assert all(name in outcome.out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_complete(run: Run, name: str) -> None:
    """Every option of every command is there with a word on it."""
    outcome = run(name, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    for parameter in COMMANDS[name].params:
        if getattr(parameter, "hidden", False):
            assert f"--{parameter.name} " not in outcome.out
            continue
        shown = [name for name in parameter.opts if name.startswith("--")] or [parameter.metavar or parameter.name]
        assert shown[0].lower() in outcome.out.lower()
        assert parameter.name == "help" or (parameter.help or "").endswith("."), f"--{parameter.name} has no help"


@pytest.mark.parametrize("name", [name for name in COMMANDS if name in COMMAND_ROWS])
def test_options_stand_in_groups_and_no_line_is_wider_than_the_terminal(
    run: Run, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for width in (60, 80):
        monkeypatch.setenv("COLUMNS", str(width))
        lines = run(name, "--help").out.splitlines()
        assert max(map(len, lines[: lines.index("Examples:")])) <= width
        headings = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
        assert headings[-1] == "Examples:"
        known = ["Arguments:", "Options:", *(f"{group}:" for group in OPTION_GROUPS)]
        assert headings[:-1] == [one for one in known if one in headings]
        assert lines[0].endswith("...]" if name in ("bench", "discover") else lines[0][-3:])


def test_commands_stand_by_what_they_are_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    told = run("--help").out
    assert max(map(len, told.splitlines())) <= 60
    assert " ".join(told.split()).count("Evolves metrics for a model and puts the winner beside every baseline.") == 1
    names = [name for group in COMMAND_GROUPS.values() for name in group]
    assert len(names) == len(set(names))
    assert "More:" not in told


def test_an_option_is_in_one_group() -> None:
    names = [name for group in OPTION_GROUPS.values() for name in group]
    assert len(names) == len(set(names))
    known = {field.name for row in COMMAND_ROWS.values() for field in described(row.request)}
    assert set(names) <= known | {"json", "config", "force"}
    assert group_of("samples") == "Windows"
    assert group_of("sparsity") == "Options"


def test_every_command_has_examples() -> None:
    assert [name for name, row in COMMAND_ROWS.items() if not row.examples] == []


EXAMPLES = [(name, line) for name, row in COMMAND_ROWS.items() for line in row.examples]


@pytest.mark.parametrize(("name", "line"), EXAMPLES, ids=[line for _, line in EXAMPLES])
def test_examples_are_accepted(
    name: str, line: str, tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the work itself; of names that an example uses, there are such files."""
    shutil.copyfile(LEDGER, tmp_path / "campaign.sqlite")
    (tmp_path / "bench.json").write_text("{}")
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned.pack").touch()
    if "-o metric.py" not in line:
        (tmp_path / "metric.py").write_text('"""Pruning score: abs(W)*X\n"""\n')
    (tmp_path / "tuned").mkdir()
    recipe = Recipe(metric="wanda", target="0.5", update="none", fit="own")
    (tmp_path / "tuned" / "recipe.toml").write_text(recipe_text(recipe))
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)
    assert words[:1] + words[1 : 1 + len(name.split())] == ["gpmetric", *name.split()]
    assert isinstance(asked(words[1:]), COMMAND_ROWS[name].request)


def test_the_model_is_named_in_either_way(run: Run, tiny_llama: Path) -> None:
    """By all commands that read one; also with the names and signs of the published scripts."""
    with_options = {"layers": [], "evaluate": ["--windows", "0"], "prune": ["-o", "x", "--nsamples", "0"]}
    for name, options in with_options.items():
        outcomes = [run(name, *way, *options) for way in ([tiny_llama], ["--model", tiny_llama])]
        assert outcomes[0] == outcomes[1]
    told = "MODEL is one, but got 'a' and 'b'"
    assert run("prune", "a", "--model", "b", "-o", "x").error == told
    assert run("allocate", "a", "b").error == told


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["bench", "a", "--model", "b"], "model", ("a", "b")),
        (["discover", "a", "b"], "model", ("a", "b")),
        (["bench", "--nsamples", "7"], "samples", 7),
        (["bench", "--seqlen", "64"], "sequence_length", 64),
        (["bench", "--sequence_length=64"], "sequence_length", 64),
        (["prune", "--sparsity_ratio", "0.6", "--save_model", "x"], "target", "0.6"),
        (["prune", "--prune_method", "wanda", "-o", "x"], "metric", "wanda"),
        (["bench", "--sparsity", "2:4"], "target", ("2:4",)),
        (["allocate", "m", "--sparsity-ratio", "0.6"], "sparsity", 0.6),
        (["status", "--ledger", "x.sqlite"], "ledger", Path("x.sqlite")),
        (["bench", "--metric", str(LEDGER)], "metric", WINNER),
        (["discover", "--start", str(LEDGER)], "start", WINNER),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_other_ways_to_say_it(words: list[str], field: str, value: object, asked: Asked) -> None:
    assert getattr(asked(words), field) == value


def test_other_scripts_options_are_told_what_they_are_here(run: Run) -> None:
    assert run("prune", "--sparsity_type", "2:4").error == (
        "--sparsity-type is another script's: here --target 0.5 is unstructured, --target 2:4 a pattern"
    )
    assert "No such option: --sparsity-typ" in run("prune", "--sparsity-typ", "2:4").error


def test_a_shell_completes_choices(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for typed, word, found in (
        ("discover --update obs", 3, "obs-blockwise"),
        ("slim --granularity channel,h", 3, "channel,head"),
        ("list pri", 2, "primitives"),
    ):
        monkeypatch.setenv("_GPMETRIC_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", f"gpmetric {typed}")
        monkeypatch.setenv("COMP_CWORD", str(word))
        assert found in run().out.split()


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("export", {"--seed", "--device"}), ("pack", {"--seed", "--device"}), ("unpack", {"--seed", "--device"}),
        ("verify", {"--seed"}), ("analyse", {"--device"}), ("evaluate", set[str]()),
    ],
)  # fmt: skip
def test_what_has_no_use_is_accepted_and_not_offered(name: str, hidden: set[str], run: Run) -> None:
    """A wrong value is told as of any option, and keywords are accepted that docstrings do not name."""
    shown = run(name, "--help").out
    assert {option for option in ("--seed", "--device") if f" {option} " not in shown} == hidden
    assert run(name, "x", "--seed", "-1").error == "--seed must be at least 0, but got -1"
    assert run(name, "x", "--device", "tpu").error == "--device must be one of auto, cpu, cuda, but got 'tpu'"
    if name != "export":  # which Python has no function of
        function = getattr(gpmetric, name)
        told = inspect.getdoc(function) or ""
        assert {option for option in ("--seed", "--device") if f"    {option[2:]}: " not in told} == hidden
        assert {"seed", "device"} <= inspect.signature(function).parameters.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_the_common_options(name: str) -> None:
    command = COMMANDS[name]
    for one in getattr(command, "commands", {"": command}).values():
        options = {option for parameter in one.params for option in parameter.opts}
        assert {"--seed", "--device", "--json", "--config"} <= options
    if name in ("discover", "bench"):
        assert {"--calibration", "--samples", "--sequence-length", "--windows", "--shuffle"} <= options


def test_bench_writes_its_document(run: Run, quick: list[str], tmp_path: Path, tiny_text: Path) -> None:
    """Asked for twice, measured once; the keys are what was typed."""
    path = tmp_path / "bench.json"
    metrics = ["--metric", "wanda", "--metric", "abs(W) * X", "--metric", "wanda"]
    outcome = run("bench", *quick, *metrics, "--target", "0.50", "--target", "2:4", "--target", "0.50", "--json", path)
    assert outcome.code == 0
    result = json.loads(path.read_text())
    rows = [(row["metric"], row["target"]) for row in result["results"]]
    assert rows == [("wanda", "0.50"), ("abs(W) * X", "0.50"), ("wanda", "2:4"), ("abs(W) * X", "2:4")]
    assert list(result["dense"]) == [str(tiny_text)]
    for row in result["results"]:
        assert f"{row['ppl'][str(tiny_text)]:.3f}" in outcome.out
        assert f"{row['target']} {row['metric']}: " in outcome.err, "every row is shown as soon as it is measured"
    assert outcome.err.startswith("dense: ")


def test_json_alone_on_standard_output(
    run: Run, quick: list[str], tiny_text: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run("bench", *quick, "--metric", "wanda", "--json", "-")
    assert outcome.code == 0
    assert json.loads(outcome.out)["results"][0]["metric"] == "wanda"
    assert "perplexity" in outcome.err
    evaluated = run("evaluate", tiny_llama, "--text", tiny_text, "--windows", "2", "--json", "-")
    assert json.loads(evaluated.out)["ppl"].keys() == {str(tiny_text)}
    assert "perplexity" in evaluated.err
    exported = run("export", "wanda", "-o", tmp_path / "wanda.py", "--json", "-")
    assert json.loads(exported.out)["formula"] == "abs(W)*X"
    assert [path.name for path in tmp_path.iterdir()] == ["wanda.py"]


def test_evaluate(run: Run, tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    outcome = run("evaluate", tiny_llama, "--text", tiny_text, "--windows", "3", "--json", tmp_path / "x.json")
    result = json.loads((tmp_path / "x.json").read_text())
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(f"{tiny_text}: perplexity {result['ppl'][str(tiny_text)]:.4f}\n")
    assert (result["windows"], result["tokens"], result["sequence_length"]) == (3, 3 * 64, 64)


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_can_be_exported(run: Run, tmp_path: Path, name: str) -> None:
    outcome = run("export", name, "-o", tmp_path / "x.py", "--json", tmp_path / "x.json")
    assert outcome == Outcome(0, "", "")
    assert "def score" in (tmp_path / "x.py").read_text()


def test_the_winner_is_exported_with_its_group(run: Run, tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "x", {}, resume=False) as ledger:
        ledger.save_result({"winner": {"formula": "layer:abs(W)*X", "group": "layer"}})
    outcome = run("export", tmp_path / "x", "-o", tmp_path / "x.py", "--json", "-")
    record = json.loads(outcome.out)
    assert (outcome.code, record["formula"], record["group"]) == (0, "abs(W)*X", "layer")
    assert "Scores compete within the whole matrix." in (tmp_path / "x.py").read_text()


def test_a_long_formula_is_no_file_name(run: Run, tmp_path: Path) -> None:
    """Longer than any file name may be."""
    formula = "+".join(["abs(W)*X"] * 40)
    assert len(formula) > 255
    assert run("export", formula, "--format", "latex", "-o", tmp_path / "x.tex").code == 0


@pytest.mark.parametrize("name", ["[red].txt", "[bold]x[", "[/red].txt", "<script>.txt", ":smile:.txt", "=cmd().txt"])
def test_names_are_printed_as_they_are(run: Run, quick: list[str], tiny_text: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)  # a closing tag holds a slash
    path.write_bytes(tiny_text.read_bytes())
    outcome = run("bench", *quick, "--text", path, "--metric", "wanda")
    assert outcome.code == 0
    assert f"{path} " in outcome.out
    assert f"{path} " in outcome.err


# What a campaign shows

ROW = {"ppl": {"a 0.5": 20.0, "b 0.5": 30.0}, "excess": {"a 0.5": 0.5, "b 0.5": 0.25}, "mean_excess": 0.375}


@pytest.fixture
def verdict() -> dict[str, Any]:
    """What `print_discover` reads of a result of two models."""
    counts = ("drawn", "unique_texts", "unique_opposites", "unique_canonical", "unique_ranked", "unique_masks")
    return {
        "winner": ROW | {"formula": "layer:abs(W)*G"},
        "best_gradient_free": ROW | {"formula": "abs(W)*sqrt(X)", "mean_excess": 0.4321},
        "regrouped": ROW | {"formula": "layer:wanda", "mean_excess": 0.4123},
        "baselines": {"wanda": ROW},
        "confidence": {"draws": 1, "asked": 3, "interval": None, "difference": None, "rival": "wanda"},
        "model": {"a": "/models/a", "b": "/models/b"},
        "dense": {"test": {"a": 12.0, "b": 23.0}},
        "targets": list(ROW["ppl"]),
        "counts": dict.fromkeys(counts, 7),
        "screening": [],
        "seconds": {"per_evaluation": {"per_candidate": 0.5, "rungs": {}}},
        "evaluations": 7,
    }


def shown(result: dict[str, Any]) -> str:
    from gpmetric.terminal.tables import print_discover

    console = Console(file=io.StringIO(), width=200)
    print_discover(console, result, DiscoverRequest(ledger=Path("x")))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_verdict_is_shown(verdict: dict[str, Any]) -> None:
    text = shown(verdict)
    assert "perplexity on test, a, b, dense (a 12.000, b 23.000)" in text
    assert "winner: layer:abs(W)*G\nbest without gradients: abs(W)*sqrt(X)\n" in text
    [row] = [line for line in text.splitlines() if "0.4321" in line]
    assert row.split("│")[2].strip() == "best without gradients"
    [row] = [line for line in text.splitlines() if "0.4123" in line]
    assert row.split("│")[2].strip() == "layer:wanda"
    assert "no confidence interval: 1 of 3 draws fitted into the time" in text


def test_what_there_is_not_is_not_shown(verdict: dict[str, Any]) -> None:
    """No draws asked for; the winner needs no gradients itself, or no metric does without."""
    verdict["confidence"] |= {"draws": 0, "asked": 0}
    for free in (verdict["winner"], None):
        text = shown(verdict | {"best_gradient_free": free})
        assert "without gradients" not in text
        assert "confidence" not in text


def test_generations_are_shown() -> None:
    """Targets of several models head the table; the best without gradients is there once, whatever its place."""
    from gpmetric.evolution.selection import Individual
    from gpmetric.terminal.live import DiscoverReport

    excess = {"a 0.5": 0.25, "b 0.5": 0.5}
    greedy = [Individual(resolve_metric(f"abs(W)*G*{number}"), excess, excess) for number in range(2, 22)]
    free = Individual(resolve_metric("abs(W)*X"), excess, excess)
    counts = {"drawn": 3, "unique_masks": 2, "paid": 1}
    for front in ([free, *greedy], [*greedy[:5], free], [*greedy, free]):
        console = Console(file=io.StringIO(), width=200, height=40, force_terminal=True, color_system="standard")
        with DiscoverReport(console) as report:
            report.dense({"search": {"a": 12.0, "b": 23.0}})
            report.generation(0, front, counts)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert "dense: search (a 12.000, b 23.000)" in text
        assert "a 0.5" in text
        rows = {line for line in text.splitlines() if line.startswith("│ ") and " 0.3750 " in line}
        assert len(rows) == min(len(front), 12)
        assert sum("\x1b[1mabs(W)*X" in row for row in rows) == 1
        assert sum("\x1b[1m" in row for row in rows) == 1

    line = "generation 4: 3 drawn, 2 masks, 1 evaluated, mean excess of the best 0.3750: "
    for front, told in (
        ([*greedy, free], "abs(W)*G*2; without gradients 0.3750: abs(W)*X"),
        ([free, *greedy], "abs(W)*X"),
    ):
        console = Console(file=io.StringIO(), width=200)
        with DiscoverReport(console) as report:
            report.generation(4, front, counts)
        assert console.file.getvalue() == f"{line}{told}\n"  # type: ignore[attr-defined]


# What is wrong on the face of it


@pytest.mark.slow
def test_nothing_heavy_is_imported_to_refuse() -> None:
    """All bad formulas, options in turn, in one process that never loads torch, transformers or sympy.

    Each is one line and status 2.
    """
    driver = f"""
import contextlib, io, json, sys
from gpmetric.cli import main
found = []
options = ("bench --metric", "bench --target", "discover --start", "export -o x.py --")
for turn, formula in enumerate(json.loads(sys.stdin.read())):
    sys.argv = ["gpmetric", *options[turn % 4].split(), formula]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            found.append([stop.code, out.getvalue(), err.getvalue()])
print(json.dumps([found, [name for name in {HEAVY} if name in sys.modules]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", driver], input=json.dumps(BAD_FORMULAS), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found, heavy = json.loads(done.stdout)
    assert heavy == []
    for (code, out, err), formula in zip(found, BAD_FORMULAS, strict=True):
        outcome = Outcome(code, out, err)
        assert (outcome.code, outcome.out) == (2, ""), formula[:60]
        assert 10 < len(outcome.error) < 450, outcome.error[:1000]


@pytest.mark.parametrize("formula", BAD_FORMULAS, ids=[ascii(formula)[:20] for formula in BAD_FORMULAS])
def test_a_bad_formula_is_not_exported(run: Run, tmp_path: Path, formula: str) -> None:
    outcome = run("export", "-o", tmp_path / "x.py", "--", formula)
    assert (outcome.code, outcome.out) == (2, "")
    assert len(outcome.error) < 450
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["benchh"], "No such command 'benchh'"),
        (["bench", "--foo"], "No such option: --foo"),
        (["prune", "a", "b", "-o", "c"], "MODEL is one, but got 'a' and 'b'"),
        (["bench", "--samples"], "requires an argument"),
        (["bench", "--samples", "0"], "--samples"),
        (["bench", "--samples", "many"], "--samples"),
        (["bench", "--windows", "0"], "--windows"),
        (["bench", "--windows", "1.5"], "--windows"),
        (["bench", "--seed", "-1"], "--seed"),
        (["bench", "--seed", str(2**64)], "--seed"),
        (["discover", "--seed", "-1"], "--seed"),
        (["evaluate", "--seed", str(2**63)], "--seed"),
        (["bench", "--target", "1.5"], "'1.5' is not a target"),
        (["bench", "--target", "4:2"], "keeps 4 of each 2"),
        (["bench", "--target", "0.5", "--target", "50%"], "'50%' is not a target"),
        (["bench", "--metric", "wanda", "--metric", "wnada"], "did you mean 'wanda'"),
        (["bench", "--update", "all"], "none, obs, obs-blockwise, admm"),
        (["bench", "--fit", "all"], "--fit must be one of own, dense, but got 'all'"),
        (["bench", "--fit", "dense", "--one-shot"], "--one-shot takes the dense model's"),
        (["bench", "--fit", "dense", "--metric", "wanda"], "take --update obs, obs-blockwise, admm, block, obs+block"),
        (
            ["prune", "-o", "x", "--fit", "dense", "--metric", "wanda"],
            "take --update obs, obs-blockwise, admm, block, obs+block",
        ),
        (["bench", "--device", "foo"], "--device must be one of auto, cpu, cuda, but got 'foo'"),
        (["bench", "--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16, but got 'int8'"),
        (["bench", "--include", "("], "--include '(' is not a regular expression"),
        (["bench", "--model", "/no/such/model"], "--calibration is needed"),
        (["evaluate", "/no/such/model", "--text", "demo:test"], "'/no/such/model' does not exist"),
        (["evaluate", "--text", "/no/such/text"], "'/no/such/text' does not exist"),
        (["evaluate", "--text", "hf:x"], "not of the form"),
        (["discover", "--population", "0"], "--population must be at least"),
        (["discover", "--population", "1"], "--population must be at least"),
        (["discover", "--generations", "0"], "--generations must be at least 1"),
        (["discover", "--evaluations", "0"], "--evaluations must be at least 1"),
        (["discover", "--minutes", "0"], "--minutes must be above 0"),
        (["discover", "--minutes", "nan"], "--minutes must be above 0"),
        (["discover", "--workers", "0"], "--workers must be at least 1"),
        (["discover", "--max-nodes", "1"], "--max-nodes must be at least"),
        (["discover", "--operands", "X"], "--operands must hold W"),
        (["discover", "--operands", "W,Q"], "--operands: unknown name 'Q'"),
        (["discover", "--primitives", "abs,addd"], "did you mean 'add'"),
        (["discover", "--start", "abs(W)*G", "--operands", "W,X"], "uses 'G', which --operands"),
        (["discover", "--target", "-0.1"], "'-0.1' is not a target"),
        (["discover", "--update", ""], "--update must be one of"),
        (["discover", "--fit", "dense"], "--fit dense is of weights that change: take --update obs"),
        (["discover", "--objective", "ppl"], "--objective must be one of kl, loss, but got 'ppl'"),
        (["discover", "--group", "rows"], "--group must be one of row, layer, block, search, but got 'rows'"),
        (["discover", "--group", "block", "--update", "obs-blockwise"], "--group block: obs-blockwise has"),
        (["discover", "--forbid", "exp"], "--forbid must be like exp(log), outer(inner), but got 'exp'"),
        (["discover", "--forbid", "exp(log)", "--forbid", "exp(lgo)"], "--forbid: unknown name 'lgo'"),
        (["discover", "--forbid", "abs(W)"], "--forbid: unknown name 'W'"),
        (["discover", "--start", "layer:abs(W)", "--group", "row"], "names another comparison group than --group row"),
        (["discover", "--start", "exp(log(W))*X", "--forbid", "exp(log)"], "nests log in exp, which no formula may"),
        (["discover", "--calibration-seeds", "-1"], "--calibration-seeds must be at least 0"),
        (["export"], "METRIC is missing"),
        (["export", "wanda", "-o", "/tmp"], "is a directory"),
        (["export", "no.sqlite", "-o", "x.py"], "no.sqlite"),
    ],
)
def test_bad_options(run: Run, arguments: list[str], message: str) -> None:
    outcome = run(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.error


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "/no/such/model"], "'/no/such/model' does not exist"),
        (
            ["--target", "7:11"],
            "--target 7:11: in = 32 of layer model.layers.0.self_attn.q_proj is not divisible by 11",
        ),
        (["--sequence-length", "1"], "--sequence-length must be at least 2"),
        (["--sequence-length", "65"], "at most 64"),
        (["--text", "/no/such/text"], "'/no/such/text' does not exist"),
        (["--include", "nothing"], "no prunable layer is left"),
        (["--target", "0.5", "--target", "1"], "'1' is not a target"),
    ],
)
def test_bad_input_writes_no_json(run: Run, quick: list[str], tmp_path: Path, more: list[str], message: str) -> None:
    outcome = run("bench", *quick, *more, "--json", tmp_path / "x.json")
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("content", "message"), [("Two words.", "fewer than one window of 32"), ("", "is empty")])
@pytest.mark.parametrize("option", ["--text", "--calibration"])
def test_a_short_text_is_refused(
    run: Run, quick: list[str], tmp_path: Path, option: str, content: str, message: str
) -> None:
    (tmp_path / "short.txt").write_text(content)
    outcome = run("bench", *quick, option, tmp_path / "short.txt")
    assert outcome.code == 2
    assert message in outcome.error
    assert "short.txt" in outcome.error


@pytest.mark.parametrize("command", [["bench"], ["discover"], ["evaluate"], ["export", "wanda", "-o", "x.py"]])
@pytest.mark.parametrize("place", ["missing/x.json", ".", "/dev/null", "n" * 300])
def test_output_is_checked_first(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run(*command, "--json", place)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.error.startswith(f"--json {place!r}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command", [["discover", "--ledger", "x", "--json", "./x"], ["export", "wanda", "-o", "x", "--json", "x"]]
)
def test_two_outputs_need_two_files(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run(*command)
    assert outcome.code == 2
    assert "are the same file 'x'" in outcome.error
    assert not list(tmp_path.iterdir())


# --config


def test_config_gives_values_and_the_command_line_wins(run: Run, quick: list[str], tmp_path: Path) -> None:
    path = toml(
        tmp_path,
        """
        metric = ["wanda", "abs(W)"]
        target = [0.5, "2:4"]
        samples = 3
        sequence_length = 16
        one-shot = true
        seed = 5
        windows = 1
        """,
    )
    options = [quick[index : index + 2] for index in range(0, len(quick), 2)]
    typed = [word for option in options if option[0] not in ("--samples", "--sequence-length") for word in option]
    outcome = run("bench", *typed, "--config", path, "--seed", "6", "--json", tmp_path / "x.json")
    assert outcome.code == 0, outcome.err
    result = json.loads((tmp_path / "x.json").read_text())
    rows = [(row["metric"], row["target"]) for row in result["results"]]
    assert rows == [(metric, target) for target in ("0.5", "2:4") for metric in ("wanda", "abs(W)")]
    assert result["calibration"]["windows"] == 3
    assert result["sequence_length"] == 16
    assert result["protocol"] == "one-shot"
    assert result["seed"] == 6
    assert result["texts"][0]["windows"] == 2


def test_config_may_hold_everything(run: Run, quick: list[str], tmp_path: Path, tiny_llama: Path) -> None:
    """Also a repeated option without brackets, `json`, and an argument."""
    values = "\n".join(f"{quick[i].removeprefix('--')} = {json.dumps(quick[i + 1])}" for i in range(0, len(quick), 2))
    path = toml(tmp_path, f"{values}\nmetric = 'wanda'\ntarget = 0.5\njson = '{tmp_path}/x.json'\nshuffle = false\n")
    assert run("bench", "--config", path).code == 0
    assert json.loads((tmp_path / "x.json").read_text())["model"] == str(tiny_llama)
    path = toml(tmp_path, f"formula = 'ria'\noutput = '{tmp_path}/ria.py'\n")
    assert run("export", "--config", path) == Outcome(0, "", "")
    assert (tmp_path / "ria.py").is_file()


def test_a_model_that_is_typed_wins_over_that_of_the_config(asked: Asked, tmp_path: Path) -> None:
    """As an argument, too, of one as of several."""
    for name, more in (("layers", ""), ("bench", "calibration = 'c.txt'\ntext = 't.txt'\n")):
        path = str(toml(tmp_path, f"model = 'other'\n{more}"))
        for typed in (["mine"], ["--model", "mine"]):
            assert asked([name, *typed, "--config", path]).models == ("mine",)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("metrics = ['wanda']", "unknown key 'metrics'; accepted: bos, calibration, device,"),
        ("[bench]\nsamples = 1", "unknown key 'bench'"),
        ("help = true", "unknown key 'help'"),
        ("config = 'x'", "unknown key 'config'"),
        ("samples = 1\nsamples = 2", "is not TOML"),
        ("target = 2:4", "is not TOML"),
        ("samples", "is not TOML"),
        ("sequence_length = 8\nsequence-length = 9", "'sequence-length' stands there twice"),
        ("samples = true", "samples must be text or a number, but got True"),
        ("samples = [1]", "samples must be text or a number, but got [1]"),
        ("samples = 1.5", "--samples"),
        ("samples = 'many'", "--samples"),
        ("samples = 0", "--samples"),
        ("seed = -1", "--seed"),
        ("seed = 1979-05-27", "seed must be text or a number"),
        ("shuffle = 'no'", "shuffle must be true or false, but got 'no'"),
        ("one-shot = 1", "one-shot must be true or false, but got 1"),
        ("model = {a = 1}", "model must be text or a number"),
        ("metric = [['wanda']]", "metric must be text or a number or a list of them, but got [['wanda']]"),
        ("target = [true]", "target must be text or a number or a list of them, but got [True]"),
        ("target = 1.5", "'1.5' is not a target"),
        ("target = nan", "'nan' is not a target"),
        ("metric = ['wnada']", "did you mean 'wanda'"),
        ("json = '/no/such/x.json'", "--json '/no/such/x.json'"),
        ('json = "nul\\u0000"', "embedded null"),
    ],
)
def test_a_wrong_config_is_refused(run: Run, tmp_path: Path, content: str, message: str) -> None:
    outcome = run("bench", "--config", toml(tmp_path, content))
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.error


def test_a_config_takes_the_names_that_the_command_line_takes(run: Run, tmp_path: Path) -> None:
    """Also where the function calls an option otherwise."""
    outcome = run("slim", "-o", tmp_path / "x", "--config", toml(tmp_path, "format = 'onnx'"))
    assert outcome.code == 2
    assert outcome.error.startswith("--format must be one of hetero")


def test_a_config_that_cannot_be_read_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b"model = '\xff'")
    for path, message in [("missing.toml", "No such file"), ("", "Is a directory"), ("latin.toml", "is not TOML")]:
        outcome = run("bench", "--config", f"{tmp_path}/{path}")
        assert outcome.code == 2
        assert message in outcome.error


# Exit status of work that fails


@pytest.mark.parametrize(
    ("error", "code"),
    [(GpmetricError("no\nway"), 1), (MaskError("no way"), 1), (LedgerError("no  way"), 2)],
)
def test_status_of_errors(run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(cli, "check_request", fail)
    outcome = run("bench")
    assert outcome.code == code
    assert outcome.error == "no way"


def test_a_metric_that_fails_is_status_1_and_costs_the_others_nothing(
    run: Run, quick: list[str], tmp_path: Path
) -> None:
    formula = "abs(W)*exp(W*1e9)*1e29"
    outcome = run("bench", *quick, "--metric", formula, "--metric", "wanda", "--json", tmp_path / "x.json")
    assert outcome.code == 1
    last = outcome.err.splitlines()[-1]
    assert last.startswith(f"gpmetric: error: metric {formula} at 0.5: ")
    assert last.endswith("are NaN or infinite (layer model.layers.0.self_attn.q_proj)")
    failed, wanda = json.loads((tmp_path / "x.json").read_text())["results"]
    assert (failed["metric"], wanda["metric"]) == (formula, "wanda")
    assert last.endswith(failed["error"])
    assert set(failed["ppl"].values()) == {None}
    assert wanda["error"] is None
    assert all(value > 1 for value in wanda["ppl"].values())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_is_130(run: Run, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    monkeypatch.setattr(cli, "check_request", lambda *_, **__: os.kill(os.getpid(), number))
    outcome = run("bench")
    assert outcome.code == 130
    assert outcome.error == "interrupted"
    check_stop()  # it is answered: the next command of this process runs


def test_interrupted_is_130_where_a_library_swallows_it(
    run: Run, quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run would have gone on to its end, and written its result."""

    def swallow(*_: object, **__: object) -> dict[str, Any]:
        with suppress(BaseException):
            os.kill(os.getpid(), signal.SIGINT)
        return {"results": [], "dense": {}}

    monkeypatch.setattr("gpmetric.pruning.bench.run_bench", swallow)
    outcome = run("bench", *quick, "--json", tmp_path / "x.json")
    assert (outcome.code, outcome.error, list(tmp_path.iterdir())) == (130, "interrupted", [])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["discover"], "gpmetric discover --ledger 'my ledger' --resume"),
        (["discover", "--ledger", "my ledger", "--resume"], "gpmetric discover --ledger 'my ledger' --resume"),
        (["discover", "--ledger=my ledger"], "gpmetric discover '--ledger=my ledger' --resume"),
        (["discover", "--start", "abs(W)*X"], "gpmetric discover --start 'abs(W)*X' --ledger 'my ledger' --resume"),
    ],
)
def test_how_to_go_on(monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gpmetric", *arguments])
    assert cli.resume_command(Path("my ledger")) == expected


# As a user runs it


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--version"], 0), (["bench", "--metric", "__import__('os')"], 2), (["nothing"], 2)]
)
def test_the_console_script(arguments: list[str], code: int) -> None:
    done = subprocess.run([CONSOLE_SCRIPT, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert len((done.stdout + done.stderr).splitlines()) == 1


def test_a_terminal_that_cannot_show_a_name_is_told_its_escapes(tiny_llama: Path, tiny_text: Path) -> None:
    """In an old locale; before, a traceback in place of the result."""
    text = tiny_text.with_name("\u6587.txt")
    text.write_bytes(tiny_text.read_bytes())
    command = [sys.executable, "-m", "gpmetric", "evaluate", str(tiny_llama), "--text", str(text)]
    command += ["--windows", "1", "--sequence-length", "8", "--device", "cpu"]
    surroundings = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=surroundings, check=False)
    assert done.returncode == 0, done.stderr
    assert r"\u6587.txt: perplexity " in done.stdout


@pytest.mark.slow
def test_the_module_runs_too(tiny_llama: Path, tiny_text: Path) -> None:
    command = [sys.executable, "-m", "gpmetric", "evaluate", str(tiny_llama), "--text", str(tiny_text), "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["dtype"] == "float32"
