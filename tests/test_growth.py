"""Each kind of growth of the lower layers, tried: a row is added to a table, and a command runs with it.

CONTRIBUTING.md has these tests in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gpmetric.calibration.accumulators import (
    ACCUMULATORS,
    FromGradients,
    FromInputs,
    FromRegion,
    FromTokens,
    LayerStatistics,
)
from gpmetric.metrics import BASELINES, Baseline, Metric
from gpmetric.operands import OPERANDS, Operand
from gpmetric.pruning.bench import bench
from gpmetric.pruning.mask import prune_by_mask, select_mask
from gpmetric.pruning.prune import prune
from gpmetric.pruning.updaters import UPDATERS, Updater
from gpmetric.pruning.verify import verify
from gpmetric.targets import GRANULARITIES, Granularity, Target, parse_target


class MeanGradient:
    """Absolute mean gradient over sequences."""

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        self.sum = torch.zeros(shape, device=device)

    def add(self, gradient: Tensor) -> None:
        self.sum += gradient

    def result(self, sequences: int) -> Tensor:
        return self.sum.abs() / sequences


class TokenCount:
    """One for every weight, from inputs and output gradients."""

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        self.seen = torch.zeros(shape, device=device)

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        assert inputs.shape[:-1] == gradients.shape[:-1]
        self.seen += 1

    def result(self, sequences: int) -> Tensor:
        return self.seen / sequences


def ppl(model: Path, text: Path, metric: Sequence[str], **options: object) -> list[float]:
    """Perplexity of the pruned tiny model, metric by metric."""
    result = bench(
        str(model), calibration=str(text), text=[str(text)], metric=metric, samples=4, windows=4, sequence_length=32,
        device="cpu", **options,
    )  # fmt: skip
    assert [row["error"] for row in result["results"]] == [None] * len(metric)
    return [row["ppl"][str(text)] for row in result["results"]]


@pytest.mark.parametrize("protocol", [False, True])
def test_an_operand_of_inputs(
    tiny_llama: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch, protocol: bool
) -> None:
    """Two rows, one in operands.py and one in calibration/accumulators.py."""
    row = Operand("P", "in", "mean square over calibration tokens of the input activation", "inputs", "P")
    monkeypatch.setitem(OPERANDS, "P", row)
    monkeypatch.setitem(ACCUMULATORS, "P", FromInputs(lambda moments: moments.rms().square()))
    mine, known = ppl(tiny_llama, tiny_text, ["abs(W)*sqrt(P)", "wanda"], one_shot=protocol)
    assert mine == pytest.approx(known)


def test_an_operand_of_gradients(tiny_llama: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, accumulator in (("M", FromGradients(MeanGradient)), ("T", FromTokens(TokenCount))):
        monkeypatch.setitem(OPERANDS, name, Operand(name, "out,in", "a statistic of gradients", "gradients", name))
        monkeypatch.setitem(ACCUMULATORS, name, accumulator)
    mine, other, known = ppl(tiny_llama, tiny_text, ["abs(W)*X*T", "abs(W)*M", "wanda"])
    assert mine == pytest.approx(known)
    assert other != pytest.approx(known)


@pytest.mark.parametrize("once", [False, True])
def test_an_operand_of_a_region(tiny_llama: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch, once: bool) -> None:
    monkeypatch.setitem(OPERANDS, "Q", Operand("Q", "out,in", "mean gradient of a block's norm", "region", "Q"))
    monkeypatch.setitem(ACCUMULATORS, "Q", FromRegion(MeanGradient))
    mine, both, known = ppl(tiny_llama, tiny_text, ["abs(W)*Q", "abs(W)*Q*R*G", "abs(W)*R"], one_shot=once)
    assert len({mine, both, known}) == 3


def test_every_operand_that_is_measured_has_an_accumulator() -> None:
    assert set(OPERANDS) - {"W"} == set(ACCUMULATORS) - {"gram"}


def test_a_granularity(tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row in targets.py: masks, bench, prune, verify and metrics before a colon know it."""
    monkeypatch.setitem(GRANULARITIES, "tile", Granularity("each 8 consecutive inputs of one output", columns=8))
    score = torch.rand(5, 20)
    kept = select_mask(score, parse_target("tile:0.5"))
    expected = [
        part.argsort(dim=1).argsort(dim=1) >= part.shape[1] // 2
        for part in (score[:, :8], score[:, 8:16], score[:, 16:])
    ]
    assert torch.equal(kept, torch.cat(expected, dim=1))
    ppl(tiny_llama, tiny_text, ["wanda", "tile:magnitude"], target=["0.5"])
    made = prune(
        str(tiny_llama), output=tmp_path / "pruned", calibration=str(tiny_text), target="tile:0.5", samples=4,
        sequence_length=32, device="cpu",
    )  # fmt: skip
    assert {layer["granularity"] for layer in made["layers"]} == {"tile"}
    assert verify(str(tmp_path / "pruned"), device="cpu")["ok"]


def double(
    weights: Sequence[Tensor],
    metric: Metric,
    targets: Sequence[Target],
    statistics: Sequence[LayerStatistics],
    scores: Sequence[Tensor] | None = None,
) -> list[list[Tensor]]:
    """Kept weights doubled."""
    return [[2 * one for one in row] for row in prune_by_mask(weights, metric, targets, statistics, scores)]


def test_an_updater(tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row in pruning/updaters.py and the function that it names."""
    monkeypatch.setitem(UPDATERS, "double", Updater("kept weights are doubled", double))
    assert ppl(tiny_llama, tiny_text, ["wanda"], update="double") != ppl(tiny_llama, tiny_text, ["wanda"])
    made = prune(
        str(tiny_llama), output=tmp_path / "pruned", calibration=str(tiny_text), update="double", samples=4,
        sequence_length=32, device="cpu",
    )  # fmt: skip
    assert made["update"] == "double"
    assert verify(str(tmp_path / "pruned"), against=str(tiny_llama), device="cpu")["ok"]


def test_a_baseline(tiny_llama: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row in metrics.py."""
    monkeypatch.setitem(BASELINES, "mine", Baseline("abs(W)*X", "a test"))
    mine, known = ppl(tiny_llama, tiny_text, ["mine", "wanda"])
    assert mine == known
