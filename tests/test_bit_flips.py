"""One flipped bit in a stored result is told, measured again or without effect: a bounded run of the benchmark."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
KINDS = ["ledger", "archive", "slim ledger", "tune ledger", "statistics cache", "remembered digest"]


@pytest.fixture(scope="module")
def bit_flips() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module("bit_flips")


@pytest.mark.parametrize("kind", KINDS)
def test_no_flipped_bit_passes_as_truth(bit_flips: ModuleType, kind: str) -> None:
    found = bit_flips.measure([kind], flips=40, seed=7)[kind]
    assert found["wrong"] == 0
    assert found.total() == 40
    assert found["detected"] > 0


def test_a_kind_of_file_without_a_checksum_would_be_noticed(bit_flips: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"0123456789")
    assert bit_flips.flip(bit_flips.Store(path, path.read_bytes), 30, 1)["wrong"] == 30
    assert path.read_bytes() == b"0123456789"


def test_all_kinds_are_listed(bit_flips: ModuleType) -> None:
    assert [*KINDS, bit_flips.MANIFEST] == list(bit_flips.KINDS)
