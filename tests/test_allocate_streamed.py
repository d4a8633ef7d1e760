"""Models whose weights are not resident: allocated as resident ones are, to the digit, with one block in memory."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpmetric.allocation import level_masks
from gpmetric.allocation.allocate import allocate
from gpmetric.allocation.candidate_losses import candidate_losses
from gpmetric.allocation.candidate_objective import CandidateObjective
from gpmetric.allocation.level_masks import PrunedModel
from gpmetric.allocation.levels import level_table
from gpmetric.data import cut_windows, read_text
from gpmetric.loading import load_model
from gpmetric.placement import Part, Placement
from gpmetric.session import session
from tests.allocation_helpers import pruned_model

SMALL: dict[str, Any] = {"samples": 4, "search_windows": 8, "windows": 4, "sequence_length": 32, "device": "cpu"}
TIMES = {"seconds", "seconds_by_step", "after_search"}
SEARCHES: dict[str, dict[str, Any]] = {
    "slopes": {"sparsity": 0.57, "evaluations": 60, "population": 8, "genes": "module"},
    "patterns": {
        "granularity": "n:m", "metric": "W*W*H", "objective": "loss", "genes": "module", "exclude": "down_proj",
        "evaluations": 30,
    },
    "evopress": {"allocator": "evopress", "sparsity": 0.6, "granularity": "layer", "metric": "gblm_l1"},
    "update": {
        "metric": "alps", "update": "admm", "fit": "dense", "levels": 8, "sparsity": 0.6, "genes": "module",
        "evaluations": 80, "population": 8,
    },
    "rule": {"allocator": "arithmetic", "max_loss_ratio": 1.2, "lowest": 0.1, "genes": "block"},
}  # fmt: skip


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: Path, tiny_llama: Path) -> dict[str, Path]:
    """Models that are stored in half precision: what is at hand in fp32 is a copy."""
    found = {}
    for name, source in (("gpt2", tiny_gpt2), ("llama", tiny_llama)):
        found[name] = Path(shutil.copytree(source, tmp_path_factory.mktemp("half") / name))
        tensors = {key: value.half() for key, value in load_file(source / "model.safetensors").items()}
        save_file(tensors, found[name] / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((source / "config.json").read_text())
        (found[name] / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    return found


@pytest.fixture
def arrivals(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[Part]]:
    """How often each part was brought to the device; at most one block is there at a time."""
    found, there = Counter[Part](), Counter[Part]()
    at_hand = Placement.at_hand

    @contextmanager
    def watched(self: Placement, part: Part) -> Iterator[None]:
        found[part] += not there[part]
        there[part] += 1
        assert sum(count > 0 for other, count in there.items() if isinstance(other, int)) <= 1
        try:
            with at_hand(self, part):
                yield
        finally:
            there[part] -= 1

    monkeypatch.setattr(Placement, "at_hand", watched)
    yield found
    assert not +there


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Whether the models that sessions open from now on are not resident."""

    make = session.make_plan

    def switch(on: bool) -> None:
        monkeypatch.setattr(session, "make_plan", lambda *told: replace(make(*told), resident=not on))

    return switch


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("kind", "name"), [*zip(SEARCHES, ["gpt2", "llama"] * 3, strict=False), ("update", "gpt2"), ("rule", "llama")]
)
def test_a_search_is_that_of_a_resident_model(
    name: str, kind: str, halves: dict[str, Path], tiny_text: Path, tmp_path: Path, streamed: Callable[[bool], None],
    arrivals: Counter[Part],
) -> None:  # fmt: skip
    """The same ledger and the same document but for the times."""
    options = SMALL | {"evaluations": 40} | SEARCHES[kind]
    documents, ledgers = [], []
    for on in (False, True):
        streamed(on)
        arrivals.clear()
        path = tmp_path / f"{on}.jsonl"
        found = allocate(str(halves[name]), calibration=str(tiny_text), ledger=path, **options)
        documents.append({key: value for key, value in found.items() if key not in TIMES})
        ledgers.append([line for line in path.read_text().splitlines() if '"seconds"' not in line])
    assert arrivals[0] > 0
    assert ledgers[0] == ledgers[1]
    assert documents[0] == documents[1]
    assert any('"slopes"' in line for line in ledgers[0]) == (kind in ("slopes", "patterns", "update"))


@pytest.fixture
def tokens(halves: dict[str, Path], tiny_text: Path) -> Tensor:
    model = load_model(str(halves["gpt2"]), device="cpu")
    return cut_windows(read_text(str(tiny_text)), model.tokenizer, 24, 8, vocabulary=model.vocabulary).tokens


def prepared(path: Path, *, resident: bool) -> PrunedModel:
    model = load_model(str(path), device="cpu", resident=resident)
    return pruned_model(model, level_table(model, "row", "module"))


@pytest.mark.parametrize(("room", "walks", "apart"), [(2**30, [0, 1, 1], [1, 1, 1]), (1, [30, 30, 30], [4, 4, 4])])
def test_each_block_is_read_once_for_all_candidates(
    room: int, walks: list[int], apart: list[int], halves: dict[str, Path], tokens: Tensor, arrivals: Counter[Part],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As many as there is room for, on different batches, from the first block on that differs from what is kept.

    Without room, each batch of each alone on the search text, and nothing is kept.
    """
    monkeypatch.setattr(level_masks, "_STATES", room)
    table = (pruned := prepared(halves["gpt2"], resident=False)).table
    first = table.nearest([0.5] * 6)
    late = [(*first[:2], *table.nearest([share] * 6)[2:]) for share in (0.4, 0.6, 0.7)]  # from the second block on
    asked = [(levels, place % 2, 8) for place, levels in enumerate([*late, first])]
    meter = CandidateObjective(pruned, tokens)
    meter.measure(first, 0, 8)
    arrivals.clear()
    found = list(meter.measure_all(asked))
    assert [arrivals[index] for index in range(3)] == walks
    arrivals.clear()
    losses = list(candidate_losses(pruned, [*late, first], tokens))
    assert [arrivals[index] for index in range(3)] == apart
    resident = prepared(halves["gpt2"], resident=True)
    assert found == [CandidateObjective(resident, tokens).measure(*one) for one in asked]
    assert losses == list(candidate_losses(resident, [*late, first], tokens))
    assert meter.measure(first, 0, 8) == CandidateObjective(resident, tokens).measure(first, 0, 8)


def test_a_block_is_masked_while_it_is_at_hand(halves: dict[str, Path]) -> None:
    """The stored weights are as they were, between and after."""
    pruned, resident = (prepared(halves["llama"], resident=one) for one in (False, True))
    model = pruned.model
    stored = [layer.weight.clone() for layer in model.layers]
    levels = pruned.table.nearest([0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    pruned.set(levels)
    resident.set(levels)
    for index, (block, other) in enumerate(zip(model.blocks, resident.model.blocks, strict=True)):
        with pruned.block(index), resident.block(index):
            for layer, same in zip(block.layers, other.layers, strict=True):
                assert layer.weight.dtype == torch.float32
                assert torch.equal(layer.weight, same.weight)
                assert layer.parameter.data.stride() == same.parameter.data.stride()
    assert pruned.levels == resident.levels
    assert all(torch.equal(layer.weight, one) for layer, one in zip(model.layers, stored, strict=True))
