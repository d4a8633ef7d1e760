"""The rules of allocation that go by statistics, against what is computed otherwise from weights and statistics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpmetric.allocation.allocate import allocate
from gpmetric.allocation.evidence import saliency_counts, shares_below
from gpmetric.calibration.collect import collect
from gpmetric.data import cut_windows, read_text
from gpmetric.loading import load_model

SMALL: dict[str, Any] = {
    "samples": 4, "search_windows": 8, "windows": 4, "sequence_length": 32, "device": "cpu", "granularity": "layer",
}  # fmt: skip


@pytest.fixture(scope="module")
def texts(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three that share nothing."""
    folder, lines = tmp_path_factory.mktemp("texts"), tiny_text.read_text().splitlines(keepends=True)
    for index, name in enumerate(("calibration", "search", "validation")):
        (folder / f"{name}.txt").write_text("".join(lines[index::3]))
    return {name: str(folder / f"{name}.txt") for name in ("calibration", "search", "validation")}


@pytest.fixture(scope="module")
def layers(tiny_llama: Path, texts: dict[str, str]) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """By name, W, X and F."""
    model = load_model(str(tiny_llama), device="cpu")
    text = read_text(texts["calibration"])
    tokens = cut_windows(text, model.tokenizer, 32, 4, vocabulary=model.vocabulary).tokens
    found = collect(model, tokens, {"X", "F"}).layers
    return {
        layer.name: (layer.weight.clone(), found[layer.name]["X"], found[layer.name]["F"]) for layer in model.layers
    }


def allocated_by(name: str, model: Path, texts: dict[str, str], **options: Any) -> dict[str, float]:
    found = allocate(str(model), allocator=name, sparsity=0.6, **texts, **SMALL | options)
    shares: dict[str, float] = found["allocation"]["sparsity"]
    budget = sum(int(0.6 * layer.weight.numel()) for layer in load_model(str(model), device="cpu").layers)
    assert abs(found["picked"]["removed"] - budget) <= 1
    return shares


def test_dlp_by_medians(tiny_llama: Path, texts: dict[str, str], layers: dict[str, tuple[torch.Tensor, ...]]) -> None:
    """0.3 less is kept of the block with the highest median than of the one with the lowest, others in between."""
    found = allocated_by("dlp", tiny_llama, texts)
    medians = []
    for block in range(3):
        scores = [(w.abs() * x).flatten().numpy() for name, (w, x, _) in layers.items() if f"layers.{block}." in name]
        joined = np.sort(np.concatenate(scores))
        medians.append(joined[(len(joined) - 1) // 2])
    place = (np.array(medians) - min(medians)) / (max(medians) - min(medians))
    expected = 0.6 + 0.3 * (place - place.mean())
    for name, share in found.items():
        block = int(name.split(".")[2])
        assert share == pytest.approx(expected[block], abs=0.02)


@pytest.mark.parametrize("genes", ["matrix", "block"])
def test_global_by_one_threshold(
    genes: str, tiny_llama: Path, texts: dict[str, str], layers: dict[str, tuple[torch.Tensor, ...]]
) -> None:
    """Half of the way to what is below the 0.6 quantile of W*W*F over all matrices, of a matrix or of a block's."""
    found = allocated_by("global", tiny_llama, texts, genes=genes)
    scores = {name: (w.double() ** 2 * f.double()).flatten().numpy() for name, (w, _, f) in layers.items()}
    everything = np.sort(np.concatenate(list(scores.values())))
    threshold = everything[int(0.6 * len(everything))]
    gene: Callable[[str], str] = (lambda name: name) if genes == "matrix" else (lambda name: name.split(".")[2])
    for name, share in found.items():
        members = np.concatenate([score for other, score in scores.items() if gene(other) == gene(name)])
        assert share == pytest.approx(0.6 + 0.5 * ((members < threshold).mean() - 0.6), abs=0.02)
    assert np.ptp(list(found.values())) > 0.05


def test_shares_below_a_threshold_by_hand() -> None:
    """5 of 8 weights: all of the two lowest bins, and a third of the three weights in the next."""
    counts = np.array([[1, 1, 1, 0], [0, 2, 2, 1]])
    assert shares_below(counts, 5 / 8) == pytest.approx([(2 + 1 / 3) / 3, (2 + 2 / 3) / 5])
    assert shares_below(counts, 0.5) == pytest.approx([2 / 3, 2 / 5])


def test_bins_are_in_order() -> None:
    """Each saliency is in a bin at or above those of lower ones, 16 of them for a factor of 2."""
    weight = torch.tensor([[0.0, 1e-12, -0.5, 1.0, -2.0, 3e4]])
    fisher = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    places = [int(saliency_counts(weight[:, [one]], fisher[:, [one]]).argmax()) for one in range(6)]
    assert places == sorted(places)
    assert places[0] == 0
    assert places[4] - places[3] == places[3] - places[2] == 32  # from 0.25 to 1 to 4
    assert saliency_counts(weight.half(), fisher).sum() == 6


def test_global_stands_beside_where_its_statistics_are(tiny_llama: Path, texts: dict[str, str]) -> None:
    """A metric that has no F does not pay for it."""
    options: dict[str, Any] = {"allocator": "uniform", "sparsity": 0.6, **texts, **SMALL}
    assert allocate(str(tiny_llama), **options)["baselines"].keys() == {
        "uniform", "owl", "dlp", "arithmetic", "sensitivity",
    }  # fmt: skip
    assert "global" in allocate(str(tiny_llama), metric="W*W*F", **options)["baselines"]
