"""Ledgers of every released version, in tests/golden/: read, checked, upgraded, repaired, exported, gone on with.

All are of one campaign on the demo model, finished, or stopped inside its last generation.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from gpmetric.analysis.analyse import analyse
from gpmetric.evolution import sqlite_schema
from gpmetric.evolution.discover import discover
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.ledger_check import check_ledger
from gpmetric.evolution.ledger_export import export_ledger
from gpmetric.evolution.ledger_repair import repair_ledger

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = sorted(sqlite_schema.UPGRADES)


def test_every_version_has_its_files() -> None:
    assert VERSIONS == [2, 3, 4]
    assert sqlite_schema.VERSION == 5
    for version in VERSIONS:
        for state in ("finished", "unfinished"):
            assert (GOLDEN / f"ledger-v{version}-{state}.sqlite").is_file()


@pytest.mark.parametrize("state", ["finished", "unfinished"])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_ledger_of_it_is_whole_and_upgraded_without_a_loss(version: int, state: str, tmp_path: Path) -> None:
    path = Path(shutil.copy(GOLDEN / f"ledger-v{version}-{state}.sqlite", tmp_path / "ledger.sqlite"))
    before = path.read_bytes()
    found = check_ledger(path)
    assert (found["version"], found["problems"]) == (version, [])
    with Ledger.read(path) as ledger:
        settings, expected, result = ledger.settings, ledger.comparable_tables(), ledger.result()
        counts = ledger.counts()
    assert (result is None) == (state == "unfinished" and version > 2) or version == 2
    new = tmp_path / "new.sqlite"
    assert repair_ledger(path, output=new)["dropped"] == {}
    assert export_ledger(path, output=tmp_path / "c.csv")["candidates"] == counts["drawn"]
    assert path.read_bytes() == before
    with Ledger.read(new) as ledger:
        assert ledger.comparable_tables() == expected
    with Ledger.open(path, settings, resume=True) as ledger:
        assert (ledger.comparable_tables(), ledger.result(), ledger.counts()) == (expected, result, counts)
    assert check_ledger(path)["version"] == sqlite_schema.VERSION


@pytest.mark.every(2)
@pytest.mark.slow
@pytest.mark.usefixtures("demo_of_golden_files")
@pytest.mark.parametrize("version", [3, 4])  # 2: tests/test_discover.py, with which `ria` did not compete
def test_an_unfinished_one_ends_as_the_finished_one_did(version: int, tmp_path: Path) -> None:
    path = Path(shutil.copy(GOLDEN / f"ledger-v{version}-unfinished.sqlite", tmp_path / "a.sqlite"))
    result = discover(
        target=("0.5", "2:4"), operands=("W", "X", "D"), evaluations=10, population=12, samples=2, search_windows=4,
        primitives=("abs", "sqr", "sqrt", "mul", "div", "add", "pow", "rowsum", "tanh"), windows=2, sequence_length=64,
        seed=1, calibration_seeds=0, workers=1, ledger=path, resume=True, cache=tmp_path / "cache",
    )  # fmt: skip
    with Ledger.read(path) as mine, Ledger.read(GOLDEN / f"ledger-v{version}-finished.sqlite") as theirs:
        names = ("candidates", "generations")
        assert [mine.comparable_tables()[one] for one in names] == [theirs.comparable_tables()[one] for one in names]
        old = theirs.result()
    assert old is not None
    assert result["winner"]["formula"] == old["winner"]["formula"]
    assert result["winner"]["excess"] == pytest.approx(old["winner"]["excess"], rel=1e-4)
    assert analyse(path)["formulas"] == 10
