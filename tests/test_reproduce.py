"""Published figures: the table, and a study run with a stand-in for its model and its shard."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

import gpmetric
from gpmetric.errors import InputError
from gpmetric.metrics import resolve_metric
from gpmetric.pruning import reproduce as module
from gpmetric.pruning.published import PUBLISHED, Study
from gpmetric.targets import parse_target
from tests.conftest import WORDS

SMALL: dict[str, Any] = {"samples": 4, "windows": 2, "sequence_length": 32, "device": "cpu"}


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """As C4's are: gzip, a JSON object on each line."""
    draw, path = random.Random(0), tmp_path / "c4-train.00000-of-01024.json.gz"
    rows = ({"text": " ".join(draw.choices(WORDS.split(), k=200)), "url": "x", "timestamp": "y"} for _ in range(30))
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def test_the_table_can_be_run() -> None:
    for study in PUBLISHED.values():
        for (metric, target), figure in study.figures.items():
            resolve_metric(metric)
            assert parse_target(target).text == target
            assert figure > 1
    told = gpmetric.reproduce(list=True)
    assert [study["name"] for study in told["studies"]] == list(PUBLISHED)
    rows = {(row["metric"], row["target"]): row for row in told["studies"][1]["rows"]}
    assert rows["dense", None]["published"] == 5.12
    assert rows["wanda", "2:4"] == {"metric": "wanda", "target": "2:4", "published": 11.02, "tolerance": 0.551}
    assert not any("ours" in row for study in told["studies"] for row in study["rows"])


def test_ours_stand_beside_theirs(
    tiny_llama: Path, tiny_text: Path, shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of `bench` under the same protocol; agreeing where they are near."""
    options: dict[str, Any] = {**SMALL, "calibration": str(shard)}
    bench = gpmetric.bench(
        str(tiny_llama), text=str(tiny_text), metric=["magnitude", "sparsegpt", "wanda"], target=["0.5", "2:4"],
        sampling="documents", bos="never", include="q_proj", **options,
    )  # fmt: skip
    (dense,) = bench["dense"].values()
    ours = {(row["metric"], row["target"]): next(iter(row["ppl"].values())) for row in bench["results"]}
    figures = {("wanda", "0.5"): ours["wanda", "0.5"] * 1.009, ("sparsegpt", "0.5"): ours["sparsegpt", "0.5"] * 1.02,
               ("magnitude", "2:4"): ours["magnitude", "2:4"] * 1.04}  # fmt: skip
    monkeypatch.setitem(PUBLISHED, "llama-7b", Study("here", "someone/model", 2048, figures, dense=dense * 1.01))
    found = gpmetric.reproduce(
        "llama-7b", model=str(tiny_llama), text=str(tiny_text), include="q_proj", **options
    )  # fmt: skip
    (study,) = found["studies"]
    assert found["error"] is None
    assert (study["run"]["bos"], study["run"]["sampling"]) == ("never", "documents")
    assert study["run"]["calibration"]["windows"] == 4
    by_row = {(row["metric"], row["target"]): row for row in study["rows"]}
    assert {key: row["ours"] for key, row in by_row.items()} == {("dense", None): dense} | {
        key: ours[key] for key in figures
    }
    assert {key: row["within"] for key, row in by_row.items()} == {
        ("dense", None): False, ("wanda", "0.5"): True, ("sparsegpt", "0.5"): False, ("magnitude", "2:4"): True,
    }  # fmt: skip


def test_what_cannot_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_is_here", lambda model: False)
    with pytest.raises(InputError, match=r"no model of a published study is on this machine \(huggyllama/llama-7b, "):
        gpmetric.reproduce()
    with pytest.raises(InputError, match="NAME says which"):
        gpmetric.reproduce(model=str(tmp_path))
    with pytest.raises(InputError, match="llama-8b"):
        gpmetric.reproduce("llama-8b")
    with pytest.raises(InputError, match="unknown option 'bos'"):
        gpmetric.reproduce("llama-7b", bos="never")
