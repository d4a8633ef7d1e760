"""A row added to a table is searched with at once: an objective, a comparison group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpmetric.evaluation.objectives import OBJECTIVES, Objective
from gpmetric.evolution.discover import discover
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.request import DiscoverRequest
from gpmetric.evolution.verdict import regrouped
from gpmetric.metrics import resolve_metric
from gpmetric.pruning.protocol import Protocol, Rule
from gpmetric.session.session import Session, open_session
from gpmetric.targets import GRANULARITIES, Granularity, parse_target


@pytest.fixture
def options(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> dict[str, Any]:
    """A campaign on one block of a tiny model, in this process."""
    return {
        "model": str(tiny_llama), "text": str(tiny_text), "target": ("0.5", "2:4"), "operands": ("W", "X"),
        "population": 6, "evaluations": 10, "samples": 4, "search_windows": 4, "windows": 2, "calibration_seeds": 0,
        "sequence_length": 32, "include": r"\.0\.", "cache": tmp_path / "cache", "workers": 1,
        "ledger": tmp_path / "a.sqlite",
    }  # fmt: skip


class Disagreement:
    """The dense model's likeliest next tokens."""

    bytes = 0

    def __init__(self, logits: Tensor, labels: Tensor) -> None:
        self.predictions = len(labels)
        self._likeliest = logits.argmax(dim=-1)

    def excess(self, logits: Tensor) -> Tensor:
        """How often a model chooses another."""
        return (logits.argmax(dim=-1) != self._likeliest).sum().float()


TOP1 = Objective("share of predictions whose likeliest token changes", Disagreement)
STRIP = Granularity("each 16 consecutive inputs of one output", columns=16)


@torch.no_grad()
def disagreement(session: Session, formula: str, target: str) -> float:
    """The share of the search text's predictions that pruning in one shot changes."""
    tokens, module = session.windows["search"].tokens, session.model.module
    before = module(input_ids=tokens).logits[:, :-1].argmax(dim=-1)
    metric = resolve_metric(formula)
    protocol = Protocol(session, one_shot=True)
    protocol.prepare([metric], "none")
    pruned = {
        name: one for _, (block,) in protocol.walk([Rule(metric, parse_target(target))]) for name, one in block.items()
    }
    with session.model.holding([pruned[layer.name] for layer in session.model.layers]):
        after = module(input_ids=tokens).logits[:, :-1].argmax(dim=-1)
    return float((before != after).double().mean())


def test_an_objective_is_a_row(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates are compared by it; loss and divergence are measured all the same."""
    monkeypatch.setitem(
        OBJECTIVES, "top1", Objective("share of predictions whose likeliest token changes", Disagreement)
    )
    result = discover(**options, objective="top1")
    assert result["objective"] == "top1"
    with Ledger.read(options["ledger"]) as ledger:
        rows = {row.formula: row for row in ledger.evaluations("done")}
    assert all(set(row.figures) == {"loss", "kl", "top1"} for row in rows.values())
    means = {formula: sum(row.figures["top1"].values()) / 2 for formula, row in rows.items()}
    assert min(means.values()) == min(means[row["formula"]] for row in result["front"])
    for row in result["front"]:
        assert row["top1"] == rows[row["formula"]].figures["top1"]
    session = open_session(DiscoverRequest(**options))
    for formula in ("abs(W)*X", result["front"][0]["formula"]):
        for target in ("0.5", "2:4"):
            expected = disagreement(session, formula, target)
            assert rows[formula].figures["top1"][target] == pytest.approx(expected, abs=1e-9)


def test_an_objective_is_a_row_where_kept_weights_are_updated(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        OBJECTIVES, "top1", Objective("share of predictions whose likeliest token changes", Disagreement)
    )
    result = discover(**options | {"evaluations": 6}, objective="top1", update="obs")
    assert all(set(row["top1"]) == {"0.5", "2:4"} for row in result["front"])


@pytest.mark.slow
def test_a_comparison_group_is_a_row(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It can be asked for as a target, started from, and is evolved with the formulas where a target leaves it open."""
    monkeypatch.setitem(GRANULARITIES, "strip", STRIP)
    changes = {"target": ("0.5", "strip:0.5"), "start": ("strip:abs(W)*X",), "evaluations": 24, "population": 12}
    result = discover(**options | changes, group="search")
    assert result["targets"] == ["0.5", "strip:0.5"]
    with Ledger.read(options["ledger"]) as ledger:
        rows = {row.formula: row for row in ledger.evaluations("done")}
        groups = {resolve_metric(row.formula).granularity for row in ledger.candidates()}
    assert groups == {"row", "layer", "block", "strip"}
    row, strip = rows["abs(W)*X"], rows["strip:abs(W)*X"]
    assert strip.losses["0.5"] == strip.losses["strip:0.5"] == row.losses["strip:0.5"]
    assert row.losses["0.5"] != strip.losses["0.5"]


def test_a_comparison_group_that_is_given_is_everyones(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(GRANULARITIES, "strip", STRIP)
    result = discover(**options | {"evaluations": 6}, group="strip")
    assert {row["group"] for row in result["front"]} == {"strip"}
    assert result["better"] is False  # nor is a published metric moved then, which it is beside a formula that wins
    assert (result["winner"]["formula"], result["regrouped"]) == ("magnitude_row", None)
    moved = regrouped({resolve_metric("wanda"): 0.5}, resolve_metric("strip:abs(W)"))
    assert moved is not None
    assert moved.name == "strip:wanda"
