"""Files that version 0.1.0 wrote, in tests/golden/: of the demo model on `text.txt`, they open and searches go on.

Made by that version's `allocate` (genes block, 30 evaluations, population 6; evopress under N:M) and `slim` (30 steps,
repair none), all with --samples 2 --search-windows 4 --windows 2 --sequence-length 32 --seed 1.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gpmetric.allocation.allocate import allocate
from gpmetric.errors import InputError
from gpmetric.loading import load_model
from gpmetric.pruning.allocation import check_allocation, read_allocation
from gpmetric.structured.slim import slim
from gpmetric.targets import parse_target

GOLDEN = Path(__file__).parent / "golden"
SIZE: dict[str, Any] = {
    "calibration": str(GOLDEN / "text.txt"), "samples": 2, "search_windows": 4, "windows": 2, "sequence_length": 32,
    "device": "cpu", "seed": 1, "resume": True,
}  # fmt: skip


def read(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


@pytest.fixture
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy that a search may write to."""
    return Path(shutil.copy(GOLDEN / f"{request.param}.jsonl", tmp_path))


@pytest.mark.parametrize("ledger", ["allocate"], indirect=True)
def test_an_allocation_search_goes_on(ledger: Path, tmp_path: Path) -> None:
    """Nothing is measured again: the figures of the search are those of the file, to the digit."""
    content = ledger.read_bytes()
    options: dict[str, Any] = {"genes": "block", "evaluations": 30, "population": 6, "ledger": ledger, **SIZE}
    found = allocate(None, sparsity=0.6, output=tmp_path / "a.json", **options)
    assert ledger.read_bytes() == content
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == read("allocation-row.json")
    expected = read("allocate.json")
    assert [point["genes"] for point in found["front"]] == expected["front"]
    assert {name: found[name] for name in expected if name != "front"} == {
        name: value for name, value in expected.items() if name != "front"
    }
    with pytest.raises(InputError, match=r"is another search's: genes is 'block' there, 'module' here"):
        allocate(None, sparsity=0.6, **options | {"genes": "module"})


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("ledger", ["slim"], indirect=True)
def test_a_structured_search_goes_on(ledger: Path, tmp_path: Path) -> None:
    content = ledger.read_bytes()
    options: dict[str, Any] = {"output": tmp_path / "small", "ledger": ledger, "repair": "none", "start": "wanda_sp"}
    options |= SIZE | {"estimator": "rloo"}
    found = slim(None, sparsity=0.3, steps=30, **options)
    assert ledger.read_bytes() == content
    expected = read("slim.json")
    assert {name: found[name] for name in expected} == expected
    with pytest.raises(InputError, match=r"is another search's: sparsity is 0\.3 there, 0\.4 here"):
        slim(None, sparsity=0.4, **options | {"output": tmp_path / "other"})


@pytest.mark.parametrize("name", ["allocation-row", "allocation-nm"])
def test_an_allocation_opens(name: str) -> None:
    """It is one of the demo model's layers and has its budget; written again, it says the same."""
    allocation = read_allocation(GOLDEN / f"{name}.json")
    target = parse_target("row:0.6") if name == "allocation-row" else None
    check_allocation(load_model(None, device="cpu").layers, allocation, target)
    assert allocation.document() == read(f"{name}.json")
