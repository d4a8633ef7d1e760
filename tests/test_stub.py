"""What type checkers and editors know of the package: `gpmetric/__init__.pyi` is as the functions are, and is used."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import gpmetric
from gpmetric.commands import COMMANDS
from gpmetric.options import described
from gpmetric.provenance import gpmetric_version

ROOT = Path(__file__).parents[1]

USES = """
from collections.abc import Mapping
from pathlib import Path
from typing import Any, assert_type

from torch import Tensor

import gpmetric
from gpmetric import Metric, Result
from gpmetric.pruning.bench import BenchRow
from gpmetric.pruning.listeners import BenchListener
from gpmetric.results import BenchResult, DiscoverResult


class Told(BenchListener):
    def row(self, row: BenchRow) -> None:
        print(row.ppl)


found = gpmetric.bench("DIR", metric=["wanda", "abs(W)*X"], target=[0.5, "2:4"], samples=8, listener=Told())
assert_type(found, BenchResult)
rows: list[dict[str, Any]] = found.table()
document: Mapping[str, Any] = found
found.save(Path("bench.json"))
assert_type(gpmetric.discover(minutes=5, progress=True), DiscoverResult)
assert_type(gpmetric.load_result("bench.json"), Result)
assert_type(gpmetric.statistics(Path("DIR"), operands="X,G"), dict[str, dict[str, Tensor]])
metric = Metric.parse("wanda")
text: str = metric.export("latex", path="metric.tex") + metric.latex + gpmetric.__version__
gpmetric.export("wanda", format="json", output="metric.json")["latex"]
gpmetric.bench(metrik="wanda")  # call-arg
gpmetric.bench(samples="many")  # arg-type
gpmetric.bench(device="tpu")  # arg-type
gpmetric.bench("DIR", "wanda")  # call-arg
gpmetric.verify()  # call-arg
gpmetric.BenchResult  # attr-defined
"""


@pytest.fixture
def make_stub(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return import_module("make_stub")


def test_the_stub_is_as_the_functions_are(make_stub: object) -> None:
    assert make_stub.stub_text() == make_stub.STUB.read_text(encoding="utf-8"), "make stubs"  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_type_checker_sees_what_is_wrong_and_nothing_else(tmp_path: Path) -> None:
    """One run of mypy for the package and its use: there, each line that ends in a comment has that error.

    No other line has any, of the package neither.
    """
    script = tmp_path / "uses.py"
    script.write_text(USES)
    command = [sys.executable, "-m", "mypy", "gpmetric", str(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert all("uses.py:" in line for line in lines), done.stdout
    found = {int(line.split(":")[1]): line.rpartition("[")[2].rstrip("]") for line in lines}
    expected = {
        number: line.partition("  # ")[2]
        for number, line in enumerate(USES.splitlines(), start=1)
        if "  # " in line
    }  # fmt: skip
    assert found == expected, done.stdout + done.stderr


def test_every_command_has_its_function() -> None:
    """Under its own name; of a group, with the group's: `gpmetric ledger check` is `check_ledger`."""
    for name, command in COMMANDS.items():
        group, _, own = name.rpartition(" ")
        names = {own if not group else f"{own}_{group}", f"{own}_{group}s"}  # merge_ledgers takes several
        names = {"list_names"} if name == "list" else names  # Python has a `list` of its own
        (function,) = (getattr(gpmetric, one) for one in names & set(gpmetric.__all__))
        shown = [field.name for field in described(command.request)]
        given = set(inspect.signature(function).parameters) - {"listener", "progress"}
        assert given == set(shown)
        assert "    started:" not in (function.__doc__ or "")  # what only the command line knows
    assert {"export", "catalogue", "layers"} <= set(gpmetric.__all__)


def test_a_module_does_not_hide_a_function() -> None:
    """Importing `gpmetric.x` makes it an attribute of the package, which comes before what is found lazily."""
    assert not [name for name in gpmetric.__all__ if (ROOT / "gpmetric" / name).exists()]
    assert not [name for name in gpmetric.__all__ if (ROOT / "gpmetric" / f"{name}.py").exists()]


def test_the_version() -> None:
    assert gpmetric.__version__ == gpmetric_version()
    assert "__version__" not in vars(gpmetric)  # it is read when it is asked for
