"""Plug-ins: an example of each kind used by a command, what is refused, and what ledgers, workers and files say."""

from __future__ import annotations

import json
import re
import shlex
import signal
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from torch import Tensor

import gpmetric
from gpmetric import cli
from gpmetric.allocation.allocate import allocate
from gpmetric.calibration.cache import cache_key
from gpmetric.calibration.collect import collect
from gpmetric.codegen.functions import triton_functions
from gpmetric.errors import GpmetricError, InputError, LedgerError, PluginError
from gpmetric.evaluation.objectives import OBJECTIVES
from gpmetric.evolution.discover import discover
from gpmetric.evolution.export import run_export
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.live_page import LivePage
from gpmetric.evolution.request import DiscoverRequest
from gpmetric.expression import PRIMITIVES, parse
from gpmetric.expression.evaluate import evaluate
from gpmetric.formats.request import ExportRequest
from gpmetric.loading import load_model
from gpmetric.modules import load_module
from gpmetric.operands import OPERANDS
from gpmetric.options import check_request, command_line, described, make_request
from gpmetric.plugins import Source, adopt, in_use, installed, load_plugin, loading, sources
from gpmetric.plugins.tables import TABLES
from gpmetric.pruning.bench import bench
from gpmetric.pruning.prune import prune
from gpmetric.pruning.updaters import UPDATERS

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "plugins"
SIZE: dict[str, Any] = {"samples": 4, "windows": 4, "sequence_length": 32, "device": "cpu"}


def forget() -> None:
    """As in a process that has loaded nothing."""
    for plugin in loading._LOADED.values():
        for kind, names in plugin.rows.items():
            for name in names:
                del TABLES[kind].rows[name]
    loading._LOADED.clear()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    yield
    forget()


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes a plug-in and gives its path."""

    def written(text: str, name: str = "mine") -> str:
        path = tmp_path / f"{name}.py"
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return str(path)

    return written


def example(name: str) -> str:
    return str(EXAMPLES / f"{name}.py")


def export(formula: str, plugin: str, form: str, output: Path) -> dict[str, Any]:
    request = make_request(ExportRequest, {"formula": formula, "plugin": plugin, "format": form, "output": output})
    check_request(request)
    return run_export(request)


# The examples


def test_an_operand(tiny_llama: Path, tiny_text: Path) -> None:
    """A is the mean over tokens of what the layer reads, by size; the statistics cache tells whose it is."""
    model, tokens = load_model(str(tiny_llama), device="cpu"), torch.arange(96).view(3, 32)
    load_plugin(example("mean_input"))
    read: list[Tensor] = []
    layer = model.layers[3]
    with layer.module.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0])), torch.no_grad():
        model.module(input_ids=tokens)
    found = collect(model, tokens, ["A"]).layers[layer.name]["A"]
    assert found.tolist() == pytest.approx(torch.cat(read).flatten(0, 1).abs().mean(dim=0).tolist(), rel=1e-5)
    key = cache_key(model, tokens, ["A"])
    forget()
    assert key != cache_key(model, tokens, ["A"])
    result = bench(
        str(tiny_llama), plugin=example("mean_input"), metric=["abs(W)*A", "wanda"], target="0.6",
        calibration=str(tiny_text), text=str(tiny_text), **SIZE,
    )  # fmt: skip
    mine, known = (row["ppl"][str(tiny_text)] for row in result["results"])
    assert mine != known
    assert result["plugins"] == {"mean_input": in_use("of")["of"]["mean_input"]}


def test_a_primitive(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    """cbrt(X) is X**0.333...; every export has it."""
    result = bench(
        str(tiny_llama), plugin=[example("cube_root")], metric=["abs(W)*cbrt(X)", "abs(W)*X**0.3333333"], target="0.6",
        calibration=str(tiny_text), text=str(tiny_text), **SIZE,
    )  # fmt: skip
    mine, known = (row["ppl"][str(tiny_text)] for row in result["results"])
    assert mine == pytest.approx(known, rel=1e-4)
    plugin, formula = example("cube_root"), "cbrt(-W)*W*X"
    record = export(formula, plugin, "python", tmp_path / "score.py")
    assert "cbrt(W)" in record["canonical"]  # it is odd
    assert record["latex"].startswith(r"\sqrt[3]{")
    operands = {"W": torch.tensor([[8.0, -1.0], [0.0, 27.0]]), "X": torch.tensor([1.0, 2.0])}
    score = load_module(tmp_path / "score.py").score(**operands)
    assert score.flatten().tolist() == pytest.approx([-16.0, -2.0, 0.0, -162.0], rel=1e-5)
    assert "op_pow(v0, tl.full(v0.shape, 0.6666666666666666, tl.float32))" in triton_functions([parse("cbrt(W)")])
    assert export(formula, plugin, "sympy", tmp_path / "a.txt")["sympy"] == "W*X*cbrt(-W)"


@pytest.mark.usefixtures("here")
def test_an_objective(tiny_llama: Path, tiny_text: Path) -> None:
    """KL(pruned || dense) of two words by hand: of (1/2, 1/2) from (3/4, 1/4) it is ln(2/sqrt(3))."""
    found = allocate(
        str(tiny_llama), plugin=example("reverse_kl"), objective="reverse-kl", sparsity=0.6, genes="block",
        evaluations=20, calibration=str(tiny_text), search_windows=8, **SIZE,
    )  # fmt: skip
    assert found["objective"] == "reverse-kl"
    assert "reverse_kl" in found["plugins"]
    dense = OBJECTIVES["reverse-kl"].reference(torch.tensor([[3.0, 1.0]]).log(), torch.tensor([0]))
    assert float(dense.excess(torch.zeros(1, 2))) == pytest.approx(np.log(2 / np.sqrt(3)))


def test_an_updater(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    """Every row's output is nearer than the masked one's; the manifest says whose the updater is."""
    load_plugin(example("rescale"))
    generator = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(shape, generator=generator) for shape in ((6, 8), (50, 8)))
    from gpmetric.calibration.accumulators import LayerStatistics
    from gpmetric.metrics import resolve_metric
    from gpmetric.pruning.updaters import prune_weights
    from gpmetric.targets import parse_target

    known = LayerStatistics(X=inputs.square().mean(dim=0).sqrt(), gram=inputs.t() @ inputs / 50)
    errors = []
    for update in ("none", "rescale"):
        ((pruned,),) = prune_weights([weight], resolve_metric("wanda"), [parse_target("0.5")], [known], update)
        errors.append((inputs @ (weight - pruned).t()).square().sum(dim=0))
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert (errors[1] < errors[0] * 0.999).any()
    assert {"rescale", "rescale+block"} <= set(UPDATERS)
    made = prune(
        str(tiny_llama), plugin=example("rescale"), update="rescale", output=tmp_path / "pruned",
        calibration=str(tiny_text), samples=4, sequence_length=32, device="cpu",
    )  # fmt: skip
    manifest = json.loads((tmp_path / "pruned" / "gpmetric_manifest.json").read_text())
    assert made["update"] == manifest["update"] == "rescale"
    assert list(manifest["plugins"]) == ["rescale"]
    forget()
    with pytest.raises(InputError, match=r"manifest.json' names what a plug-in added: --plugin rescale"):
        gpmetric.verify(tmp_path / "pruned", device="cpu")
    assert gpmetric.verify(tmp_path / "pruned", device="cpu", plugin=example("rescale"))["ok"]


@pytest.mark.usefixtures("here")
def test_an_allocator(tiny_llama: Path, tiny_text: Path) -> None:
    found = allocate(
        str(tiny_llama), plugin=example("by_depth"), allocator="depth", sparsity=0.6, calibration=str(tiny_text),
        search_windows=8, **SIZE,
    )  # fmt: skip
    means = [
        sum(share for name, share in found["allocation"]["sparsity"].items() if f"layers.{block}." in name) / 7
        for block in range(3)
    ]
    assert means == pytest.approx([0.5, 0.6, 0.7], abs=0.02)


def test_an_exporter(tmp_path: Path) -> None:
    formula = "abs(W)*sqrt(X)/rowsum(abs(W)) + max(W, 0.5)"
    export(formula, example("numpy_file"), "numpy", tmp_path / "score.py")
    operands = {"W": torch.tensor([[1.0, -3.0], [0.25, 2.0]]), "X": torch.tensor([4.0, 0.25])}
    score = load_module(tmp_path / "score.py").score(**{name: one.numpy() for name, one in operands.items()})
    assert score.tolist() == [pytest.approx(row) for row in evaluate(parse(formula), operands).tolist()]
    with pytest.raises(InputError, match="numpy has no form for zsn"):
        export("zsn(W)", example("numpy_file"), "numpy", tmp_path / "other.py")


def test_the_command_line_and_a_config_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A choice that a plug-in adds is accepted, from either; without it the choice is refused."""
    (tmp_path / "c.toml").write_text(f'plugin = ["{example("numpy_file")}"]\n')
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)  # that of this process stays
    command = ["gpmetric", "export", "abs(W)*X", "--format", "numpy", "-o", str(tmp_path / "out.py")]
    for more, code in (([], 2), (["--plugin", example("numpy_file")], 0), (["--config", str(tmp_path / "c.toml")], 0)):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == code, capsys.readouterr().err
        forget()
    assert "--format must be one of python, triton, latex, sympy, json, but got 'numpy'" in capsys.readouterr().err


def test_a_plugin_is_told_of_before_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """It imports torch, for seconds, in which nothing else could be seen."""
    told, opening = [], cli.opening

    def noted(console: Any, line: str) -> Any:
        told.append((line.partition(": ")[2], bool(sources())))
        return opening(console, line)

    monkeypatch.setattr(cli, "opening", noted)
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    monkeypatch.setattr(sys, "argv", ["gpmetric", "list", "exports", "--plugin", example("numpy_file")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert told[0] == (f"loading {example('numpy_file')}", False)
    assert told[1][1]


def test_the_python_function_says_what_was_added() -> None:
    found = gpmetric.load_plugin(example("mean_input"))
    assert found["rows"] == {"operand": ["A"], "accumulator": ["A"]}
    assert found == load_plugin(EXAMPLES / "mean_input.py")  # once more is the same
    request = make_request(DiscoverRequest, {})
    assert request.operands == ("W", "X", "G", "H", "D", "F", "A")  # which a search begins with
    assert "A" not in make_request(DiscoverRequest, {"operands": "W,X"}).operands
    assert command_line("discover", request) == "gpmetric discover"
    without = make_request(DiscoverRequest, {"operands": "W,X,G,H,D,F"})
    assert command_line("discover", without) == "gpmetric discover --operands W,X,G,H,D,F"


# What is refused

PRIMITIVE = """
from gpmetric.expression.primitives import Primitive
def half(x): return x / 2
"""
REFUSED = {
    "x = 1": "mine.py must hold PLUGIN, rows by name, but it is None",
    "PLUGIN = {}": "must hold PLUGIN",
    "PLUGIN = {'a': 1}": "plug-in mine, a: a row must be of .*Updater, but got 1",
    "PLUGIN = {'a b': 1}": "a row's name must be letters, digits, - and _, but got 'a b'",
    "import no_such_module": r"cannot be loaded from .*mine.py: ModuleNotFoundError: .*\(mine.py, line 1\)",
    "\n1 / 0": r"ZeroDivisionError: division by zero \(mine.py, line 2\)",
    "raise SystemExit(3)": "SystemExit: 3",
    "def f(:": "SyntaxError",
    PRIMITIVE + "PLUGIN = {'abs': Primitive('abs', 1, half)}": "primitive abs: gpmetric has one called abs already",
    PRIMITIVE + "PLUGIN = {'half': Primitive('other', 1, half)}": "by 'half' and 'other'",
    PRIMITIVE + "PLUGIN = {'half': Primitive('half', 2, half)}": r"half\(\) takes 1 positional argument",
    PRIMITIVE + "PLUGIN = {'half': Primitive('half', 1, half, lambda x: x)}": "scalar is not so",
    PRIMITIVE + "PLUGIN = {'half': Primitive('half', 1, half, parity='even')}": "parity even is not so",
    PRIMITIVE + "PLUGIN = {'half': Primitive('half', 1, half, sign='always')}": "sign always is not so",
    PRIMITIVE + "PLUGIN = {'half': Primitive('half', 1, half, monotonicity=('decreasing',))}": "not decreasing",
    PRIMITIVE + "PLUGIN = {'half': Primitive('half', 1, half, triton='{7}')}": "is not a text with",
    PRIMITIVE + "PLUGIN = {'total': Primitive('total', 1, lambda x: x.sum())}": r"must give \[3, 11\] in float32",
    PRIMITIVE + "PLUGIN = {'half': Primitive('half', 1, lambda x: x.mul_(0.5))}": "writes to its argument",
    PRIMITIVE + "PLUGIN = {'half': Primitive('half', 1, lambda x: x.double())}": "in float64",
    PRIMITIVE + "PLUGIN = {'up': Primitive('up', 1, lambda x: x.log())}": "gave NaN or infinity",
    PRIMITIVE + "PLUGIN = {'ones': Primitive('ones', 1, lambda x: x * 0 + 1).__class__}": "but got <class",
    """
    from gpmetric.operands import Operand
    PLUGIN = {"M": Operand("M", "in", "", "inputs", "M")}
    """: "operand M: how it is measured is missing",
    """
    from gpmetric.calibration.accumulators import FromInputs
    from gpmetric.operands import Operand
    PLUGIN = {"M": (Operand("M", "in", "", "inputs", "M"), FromInputs(lambda moments: moments.rms()[:2]))}
    """: r"accumulator M: the statistic must give \[5\] in float32, but gave \[2\]",
    """
    from gpmetric.calibration.accumulators import FromInputs
    from gpmetric.operands import Operand
    PLUGIN = {"M": (Operand("M", "in", "", "inputs", "M"), FromInputs(lambda mean: mean, of=lambda rows: rows))}
    """: "it can be negative, so the operand must be signed=True",
    """
    from gpmetric.calibration.accumulators import FromInputs
    from gpmetric.operands import Operand
    PLUGIN = {"X": (Operand("X", "in", "", "inputs", "M"), FromInputs(lambda moments: moments.rms()))}
    """: "operand X: gpmetric has one called X already",
    """
    from gpmetric.pruning.updaters import Updater
    PLUGIN = {"same": Updater("", lambda weights, metric, targets, statistics, scores: weights)}
    """: "updater same: prune must give 2 lists, by target, of 2 weights",
    """
    from gpmetric.pruning.updaters import Updater
    def dense(weights, metric, targets, statistics, scores=None): return [list(weights) for _ in targets]
    PLUGIN = {"dense": Updater("", dense)}
    """: r"prune of \[6, 8\] to 0.5 gave 0 zeros",
    """
    from gpmetric.evaluation.objectives import Objective
    class One:
        bytes, predictions = 0, 6
        def __init__(self, logits, labels): self.dense = logits
        def excess(self, logits): return logits.mean()
    PLUGIN = {"one": Objective("", One)}
    """: "excess must be 0 for the dense model's own logits",
    """
    from gpmetric.allocation.request import Allocator
    PLUGIN = {"flat": Allocator("", lambda problem: problem)}
    """: "allocator flat: it is called with problem, sparsity: too many positional arguments",
    """
    from gpmetric.formats import Format
    PLUGIN = {"bytes": Format(lambda formula: b"")}
    """: "exporter bytes: text of .* must be a str, but is b''",
}  # fmt: skip


@pytest.mark.parametrize(("text", "told"), REFUSED.items(), ids=range(len(REFUSED)))
def test_refusals(text: str, told: str, write: Any) -> None:
    """One line that names the plug-in; the tables are as they were."""
    before = {kind: list(table.rows) for kind, table in TABLES.items()}
    with pytest.raises(InputError, match=told) as refusal:
        load_plugin(write(text))
    assert "plug-in mine" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert {kind: list(table.rows) for kind, table in TABLES.items()} == before
    assert in_use("plugins") == {}


def test_all_of_a_plugin_or_nothing(write: Any) -> None:
    text = PRIMITIVE + "PLUGIN = {'half': Primitive('half', 1, half), 'bad': 1}"
    with pytest.raises(InputError, match="plug-in mine, bad"):
        load_plugin(write(text))
    assert "half" not in PRIMITIVES


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("no/such.py", "'no/such.py' is no file"),
        ("a\0.py", "the file's name must be letters"),
        ("x y.py", "the file's name must be letters"),
        ("folder/", "the file's name must be letters"),
        ("no-such", "'no-such' is neither a file NAME.py nor an installed plug-in"),
        ("", "is neither a file"),
    ],
)
def test_names_that_lead_nowhere(named: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        load_plugin(named)


def test_a_changed_file_needs_another_process(write: Any) -> None:
    text = PRIMITIVE + "PLUGIN = {'half': Primitive('half', 1, half)}\n"
    load_plugin(write(text))
    with pytest.raises(InputError, match=r"plug-in mine is loaded as [0-9a-f]{12}, and .*mine.py is [0-9a-f]{12}: "):
        load_plugin(write(text + "# changed\n"))
    with pytest.raises(InputError, match="primitive half: plug-in mine has one called half already"):
        load_plugin(write(text, "yours"))


def test_an_installed_plugin_is_loaded_when_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site"
    (package / "halves-1.5.dist-info").mkdir(parents=True)
    (package / "halves-1.5.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: halves\nVersion: 1.5\n")
    (package / "halves-1.5.dist-info" / "entry_points.txt").write_text(
        "[gpmetric.plugins]\nhalf = halves_of_mine\nbroken = no_module_of_mine\n"
    )
    text = PRIMITIVE + "PLUGIN = {'half': Primitive('half', 1, half)}\n"
    (package / "halves_of_mine.py").write_text(text)
    monkeypatch.syspath_prepend(package)
    mine = [one for one in installed() if one["name"] == "half"]
    assert mine == [{"name": "half", "place": "halves_of_mine", "package": "halves", "version": "1.5"}]
    assert "half" not in PRIMITIVES
    assert load_plugin("half")["rows"] == {"primitive": ["half"]}
    (carried,) = sources()
    forget()
    adopt([carried])
    assert "half" in PRIMITIVES
    forget()
    with pytest.raises(InputError, match=r"plug-in half is [0-9a-f]{12} here, 000000000000 where it was asked for"):
        adopt([Source(carried.name, carried.place, None, "0" * 64)])
    with pytest.raises(InputError, match="plug-in broken cannot be loaded from no_module_of_mine: ModuleNotFoundError"):
        load_plugin("broken")


# What raises at work


def test_a_failing_updater_costs_its_rows_alone(tiny_llama: Path, tiny_text: Path, write: Any) -> None:
    text = """
        from gpmetric.pruning.mask import prune_by_mask
        from gpmetric.pruning.updaters import Updater
        def late(weights, metric, targets, statistics, scores=None):
            if weights[0].shape[1] > 12:
                raise ValueError("too wide")
            return prune_by_mask(weights, metric, targets, statistics, scores)
        PLUGIN = {"late": Updater("raises", late)}
    """
    result = bench(
        str(tiny_llama), plugin=write(text), metric=["wanda", "alps"], update="late", target="0.5",
        calibration=str(tiny_text), text=str(tiny_text), **SIZE,
    )  # fmt: skip
    errors = {row["metric"]: row["error"] for row in result["results"]}
    assert errors["alps"] is None  # which has an updater of its own
    assert "plug-in mine, updater late, prune: ValueError: too wide (mine.py, line 6)" in errors["wanda"]


@pytest.mark.parametrize("one_shot", [False, True])
@pytest.mark.parametrize("source", ["inputs", "gradients"])
def test_a_failing_operand_costs_its_rows_alone(
    source: str, one_shot: bool, tiny_llama: Path, tiny_text: Path, write: Any
) -> None:
    """One that fails on more tokens than it was tried with, or in the third backward pass."""
    text = """
        import torch
        from gpmetric.calibration.accumulators import FromGradients, FromInputs
        from gpmetric.operands import Operand
        def few(rows):
            if len(rows) > 20:
                raise ValueError("too many")
            return rows.abs()
        class Few:
            def __init__(self, shape, device): self.count = 0
            def add(self, gradient):
                self.count += 1
                few("x" * 10 * self.count) if self.count > 2 else None
            def result(self, sequences): return torch.ones(3, 5)
        HOW = {"inputs": FromInputs(lambda mean: mean, of=few), "gradients": FromGradients(Few)}
        PLUGIN = {"M": (Operand("M", AXES, "", SOURCE, "M"), HOW[SOURCE])}
    """.replace("SOURCE", repr(source)).replace("AXES", repr("in" if source == "inputs" else "out,in"))
    result = bench(
        str(tiny_llama), plugin=write(text), metric=["abs(W)*M", "wanda"], target="0.5", one_shot=one_shot,
        calibration=str(tiny_text), text=str(tiny_text), **SIZE,
    )  # fmt: skip
    errors = {row["metric"]: row["error"] for row in result["results"]}
    assert errors["wanda"] is None
    assert re.search("plug-in mine, accumulator M, .*: ValueError: too many .mine.py, line 7.", errors["abs(W)*M"])


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ("problem.no_such", "plug-in mine, allocator odd, rule: AttributeError: .*mine.py, line 3"),
        ("(0, 1)", r"allocator odd gave no level of each of 3 genes, but \(0, 1\)"),
    ],
)
def test_a_failing_rule_is_no_baseline(
    rule: str, told: str, tiny_llama: Path, tiny_text: Path, write: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The front is searched without it; asked for, it is the error."""
    text = f"""
        from gpmetric.allocation.request import Allocator
        def odd(problem, sparsity): return {rule}
        PLUGIN = {{"odd": Allocator("fails", odd)}}
    """
    made: dict[str, Any] = {
        "plugin": write(text), "sparsity": 0.6, "genes": "block", "evaluations": 20, "calibration": str(tiny_text),
        "search_windows": 8, **SIZE,
    }  # fmt: skip
    found = allocate(str(tiny_llama), **made)
    assert "owl" in found["baselines"]
    assert "odd" not in found["baselines"]
    assert re.search(f"{told}.*; it is no baseline here", caplog.text)
    with pytest.raises(PluginError, match=told):
        allocate(str(tiny_llama), allocator="odd", **made)


FAILS = textwrap.dedent("""
    from gpmetric.expression.primitives import Primitive
    def wide(x):
        if x.shape[-1] > 11 and x.shape[0] > 1:
            raise ValueError("too wide")
        return x / 2
    PLUGIN = {"wide": Primitive("wide", 1, wide)}
""")


def options(model: Path, text: Path, folder: Path) -> dict[str, Any]:
    """A campaign on one block of a tiny model."""
    return {
        "model": str(model), "text": str(text), "target": ("0.5",), "population": 6, "evaluations": 8, "samples": 4,
        "search_windows": 4, "windows": 2, "calibration_seeds": 0, "sequence_length": 32, "include": r"\.0\.",
        "cache": folder / "cache", "ledger": folder / "a.sqlite", "operands": ("W", "X"), "device": "cpu",
    }  # fmt: skip


def test_a_failing_primitive_is_a_failed_candidate(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, write: Any
) -> None:
    made = options(tiny_llama, tiny_text, tmp_path) | {"workers": 1, "start": ["abs(W)*wide(W*W)", "abs(W)*sqrt(X)"]}
    result = discover(**made, plugin=write(FAILS))
    assert result["winner"]["formula"]
    with Ledger.read(made["ledger"]) as ledger:
        errors = {row.reason for row in ledger.candidates() if row.reason}
    assert any("plug-in mine, primitive wide, torch: ValueError: too wide (mine.py, line 5)" in one for one in errors)


# Ledgers and workers


@pytest.mark.slow
def test_a_campaign_with_a_plugin(tiny_llama: Path, tiny_text: Path, tmp_path: Path, write: Any) -> None:
    """Two worker processes have it, too; the ledger is gone on with by the same plug-in only."""
    made = options(tiny_llama, tiny_text, tmp_path)
    made |= {"workers": 2, "operands": ("W", "A"), "start": ["abs(W)*A"]}
    text = (EXAMPLES / "mean_input.py").read_text()
    plugin = write(text, "mean_input")
    result = discover(**made, plugin=plugin)
    assert list(result["plugins"]) == ["mean_input"]
    with Ledger.read(made["ledger"]) as ledger:
        assert ledger.settings["plugin"] == result["plugins"]
        assert {row.formula: row.status for row in ledger.evaluations()}["abs(W)*A"] == "done"
    assert export(str(made["ledger"]), plugin, "latex", tmp_path / "a.tex")["operands"][0] == "W"
    with LivePage(0, made["ledger"]) as live, urlopen(live.address) as page:
        content = page.read().decode()
    assert "abs(W)*A" in content
    assert f"--plugin {plugin}" in content
    forget()
    with pytest.raises(LedgerError, match=r"a.sqlite is of --plugin mean_input"):
        gpmetric.report(made["ledger"])
    again = made | {"resume": True, "evaluations": 12, "workers": 1}
    with pytest.raises(InputError, match="unknown name 'A'"):
        discover(**again)
    with pytest.raises(LedgerError, match="They differ in:") as refusal:
        discover(**again | {"operands": ("W", "X"), "start": []})
    assert any(re.search("--plugin: .*mean_input.* there, none here", line) for line in refusal.value.details)
    with pytest.raises(LedgerError, match=r"a.sqlite is of --plugin mean_input \([0-9a-f]{12} there, not named\)"):
        gpmetric.status(made["ledger"])
    write(text + "# changed\n", "mean_input")
    with pytest.raises(LedgerError, match="They differ in:") as refusal:
        discover(**again, plugin=plugin)
    assert [line.partition(":")[0] for line in refusal.value.details] == ["--plugin"]
    forget()
    write(text, "mean_input")
    assert discover(**again, plugin=plugin)["evaluations"] > result["evaluations"]


def test_a_json_ledger_is_of_its_plugins(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    made = {"calibration": str(tiny_text), "text": str(tiny_text), "ledger": tmp_path / "a.jsonl", **SIZE}
    bench(str(tiny_llama), metric="abs(W)*cbrt(X)", plugin=example("cube_root"), **made)
    forget()
    with pytest.raises(InputError, match=r"another search's: plugin is {'cube_root': '.* there, None here"):
        bench(str(tiny_llama), metric="wanda", resume=True, **made)


# Exports


def test_exports_say_what_they_lack(tmp_path: Path, write: Any) -> None:
    """A primitive without Triton, one whose function is not alone, and one that is no function of Python."""
    text = """
        import math
        import torch
        from gpmetric.expression.primitives import Primitive
        def helped(x): return x * math.pi
        PLUGIN = {
            "helped": Primitive("helped", 1, helped), "sigmoid": Primitive("sigmoid", 1, torch.sigmoid),
            "half": Primitive("half", 1, lambda x: x / 2),
        }
    """
    plugin, place = write(text), tmp_path / "out.py"
    with pytest.raises(InputError, match="primitive helped has no Triton form"):
        export("helped(W)", plugin, "triton", place)
    with pytest.raises(InputError, match=r"the function helped of a plug-in cannot stand .*: it uses math, and torch"):
        export("helped(W)", plugin, "python", place)
    with pytest.raises(InputError, match=r"the function sigmoid of a plug-in .*: its text is not to be had"):
        export("sigmoid(W)", plugin, "python", place)
    with pytest.raises(InputError, match="it must be a plain def"):
        export("half(W)", plugin, "python", place)
    assert not place.exists()
    assert export("helped(W)", plugin, "latex", place)["latex"] == r"\operatorname{helped}\left(W\right)"


def test_the_kernels_leave_what_they_cannot_score_to_torch(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpmetric.pruning import fused
    from gpmetric.targets import parse_target

    load_plugin(write(PRIMITIVE + "PLUGIN = {'half': Primitive('half', 1, half)}\n"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(fused, "_installed", lambda: True)
    weight, targets = torch.randn(4, 8), [parse_target("row:0.5")]
    assert fused.usable(weight, targets)
    assert fused.usable(weight, targets, parse("abs(W)"))
    assert not fused.usable(weight, targets, parse("abs(half(W))"))


# The documentation


def test_the_documentation_shows_the_examples_as_they_are() -> None:
    text = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    files = {path.read_text(encoding="utf-8"): path.name for path in EXAMPLES.glob("*.py")}
    assert {files[block] for block in blocks if block in files} == set(files.values())
    assert all(TABLES[kind].types[0].__name__ in text for kind in TABLES)


def test_the_commands_of_the_examples_are_options() -> None:
    """Each example's first lines say how it is used; the words are options of that command."""
    from gpmetric.commands import COMMANDS

    for path in EXAMPLES.glob("*.py"):
        line = next(one for one in path.read_text(encoding="utf-8").splitlines() if one.startswith("gpmetric "))
        command, *words = shlex.split(line)[1:]
        known = {
            name for field in described(COMMANDS[command].request) for name in (field.spelled, *field.option.names)
        }
        assert {word for word in words if word.startswith("-")} <= known
        assert words[words.index("--plugin") + 1] == f"examples/plugins/{path.name}"


def test_every_table_has_an_example() -> None:
    for path in EXAMPLES.glob("*.py"):
        load_plugin(path)
    assert {kind for one in loading._LOADED.values() for kind in one.rows} == set(TABLES)
    assert "A" in OPERANDS


@pytest.mark.parametrize("error", [GpmetricError("ours"), MemoryError(), RuntimeError("CUDA out of memory")])
def test_ours_and_a_want_of_memory_pass(error: Exception, write: Any) -> None:
    from gpmetric.plugins.guard import guarded

    def function() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        guarded(function, "told", "mine.py")()
    assert raised.value is error
