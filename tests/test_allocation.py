"""Candidate allocations: levels, masks and measurements, against brute force, fresh models and finite differences."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gpmetric.allocation import candidate_objective as objective_module
from gpmetric.allocation.candidate_objective import CandidateObjective
from gpmetric.allocation.level_masks import PrunedModel, kept_at, level_codes
from gpmetric.allocation.levels import Levels, LevelTable, find_genes, level_table
from gpmetric.allocation.variation import switch
from gpmetric.data import cut_windows, read_text
from gpmetric.errors import InputError, MaskError
from gpmetric.loading import load_model
from gpmetric.models import Model
from gpmetric.pruning.allocation import layer_target, mean_sparsity, read_allocation
from gpmetric.pruning.mask import select_mask
from gpmetric.targets import Target, parse_target
from tests.allocation_helpers import drawn, pruned_model

MODELS = ["tiny_llama", "tiny_gpt2"]
GENES = {
    "matrix": {"tiny_llama": 7, "tiny_gpt2": 4},
    "module": dict.fromkeys(MODELS, 2),
    "block": dict.fromkeys(MODELS, 1),
}


@pytest.fixture(scope="module")
def load(request: pytest.FixtureRequest) -> Callable[[str], Model]:
    return lambda name: load_model(str(request.getfixturevalue(name)), device="cpu")


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, load: Callable[[str], Model]) -> Model:
    return load(request.param)


@pytest.fixture(scope="module")
def gpt2(load: Callable[[str], Model]) -> Model:
    return load("tiny_gpt2")


@pytest.fixture(scope="module")
def tokens(gpt2: Model, tiny_text: Path) -> Tensor:
    return cut_windows(read_text(str(tiny_text)), gpt2.tokenizer, 24, 8, vocabulary=gpt2.vocabulary).tokens


@pytest.fixture(autouse=True)
def _two_windows_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "batch_tokens", 48)
    monkeypatch.setattr(objective_module, "_STAGES", 1)


@pytest.fixture
def pruned(model: Model) -> Iterator[PrunedModel]:
    """Each sub-module a gene, rows."""
    found = pruned_model(model, level_table(model, "row", "module"))
    yield found
    found.dense()


def by_hand(model: Model, table: LevelTable, levels: Levels) -> list[Tensor]:
    """The masks of a candidate, from the model's present weights."""
    pairs = zip(model.layers, table.targets_of(levels), strict=True)
    return [select_mask(layer.weight.abs(), target) for layer, target in pairs]


# Levels


@pytest.mark.parametrize("kind", GENES)
@pytest.mark.parametrize("granularity", ["row", "layer", "block"])
def test_levels_are_steps_of_equal_weight_counts(model: Model, granularity: str, kind: Any) -> None:
    """A 250th of the largest gene, to within one weight per comparison group of its matrices."""
    table = level_table(model, granularity, kind)
    quantum = math.ceil(max(table.sizes) / 250)
    groups = {"row": lambda out, _: out, "layer": lambda *_: 1, "block": lambda _, columns: -(-columns // 128)}
    assert table.nested
    assert table.entries == sum(layer.weight.numel() for layer in model.layers)
    for members, counts, size in zip(table.genes, table.removed, table.sizes, strict=True):
        counted = [
            sum(table.targets[layer][level].removes(table.shapes[layer]) for layer in members)
            for level in range(len(counts))
        ]
        assert counts.tolist() == counted
        assert counts[0] == 0
        assert (np.diff(counts) >= 0).all()
        assert counts[-1] < size
        slack = sum(groups[granularity](*table.shapes[layer]) for layer in members)
        assert np.abs(counts - quantum * np.arange(len(counts))).max() <= slack
        assert size - counts[-1] <= quantum + slack
        assert len(counts) <= 251


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", GENES)
def test_genes(load: Callable[[str], Model], name: str, kind: Any) -> None:
    model = load(name)
    genes = find_genes(model, kind)
    assert [layer for members in genes for layer in members] == list(range(len(model.layers)))
    assert len(genes) == 3 * GENES[kind][name]
    if kind == "module":
        parts = [{model.layers[layer].name.rpartition(".")[0] for layer in members} for members in genes]
        assert [len(part) for part in parts] == [1] * 6


@pytest.mark.parametrize("granularity", ["row", "layer", "block", "n:m"])
def test_candidates_and_their_files(gpt2: Model, granularity: str, tmp_path: Path) -> None:
    """The nearest candidate by brute force; its file, read again, removes what the table says."""
    table = level_table(gpt2, granularity, "matrix" if granularity == "n:m" else "module")
    rng = random.Random(0)
    for _ in range(5):
        wanted = [rng.random() for _ in table.genes]
        levels = table.nearest(wanted)
        profile = table.profile(levels)
        for counts, size, share, got in zip(table.removed, table.sizes, wanted, profile, strict=True):
            assert abs(got - share) == min(abs(int(count) / size - share) for count in counts)
        assert table.removes(table.nearest(profile)) == table.removes(levels)
        assert table.sparsity(levels) == table.removes(levels) / table.entries
        path = tmp_path / "a.json"
        path.write_text(json.dumps(table.allocation(levels).document()))
        read = read_allocation(path)
        assert read == table.allocation(levels)
        assert round(mean_sparsity(gpt2.layers, read.targets) * table.entries) == table.removes(levels)


def test_the_levels_of_a_mix(gpt2: Model) -> None:
    table = level_table(gpt2, "n:m", patterns=("1:4", "2:4", "dense", "4:8"))
    assert not table.nested
    sizes = [layer.weight.numel() for layer in gpt2.layers]
    assert [counts.tolist() for counts in table.removed] == [[0, n // 2, n // 2, 3 * n // 4] for n in sizes]
    texts = [target.text for target in table.targets[0]]
    assert texts == ["0.0", "2:4", "4:8", "1:4"]  # of equal sparsity in the order given


@pytest.mark.parametrize(
    ("patterns", "told"),
    [
        (("2:4", "1:4"), "must be `dense` and N:M patterns, each once"),
        (("dense",), "must be `dense` and N:M patterns, each once"),
        (("dense", "2:4", "2:4"), "must be `dense` and N:M patterns, each once"),
        (("dense", "0.5"), "'0.5'"),
        (("dense", "half"), "'half'"),
        (("dense", "4:2"), "'4:2'"),
        (("dense", "2:4", "1:3"), "1:3: in = 32 of layer transformer.h.0.attn.c_attn is not divisible by 3"),
        (("dense", *(f"{keep}:16" for keep in range(1, 9))), "are 9; accepted: at most 8"),
    ],
)
def test_what_is_no_mix(gpt2: Model, patterns: tuple[str, ...], told: str) -> None:
    with pytest.raises(InputError, match=told):
        level_table(gpt2, "n:m", patterns=patterns)


# Masks


def scores(shape: tuple[int, int], seed: int = 0) -> list[Tensor]:
    """Negative ones and zeros of both signs, without ties and with many; half precision; transposed, as a Conv1D's."""
    score = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return [score, (2 * score).round(), score.half(), score.t().contiguous().t(), torch.zeros(shape)]


@pytest.mark.parametrize("granularity", ["row", "layer", "block"])
@pytest.mark.parametrize("shape", [(6, 42), (3, 300), (1, 7)])
def test_the_mask_of_every_level(granularity: str, shape: tuple[int, int]) -> None:
    size = {"row": shape[1], "layer": shape[0] * shape[1], "block": shape[0] * min(128, shape[1])}[granularity]
    counts = sorted({*range(0, size, max(1, size // 40)), size - 1})
    targets = [layer_target(granularity, shape, count) for count in [0, *counts, size - 1]]  # some levels are equal
    for score in scores(shape):
        assert_every_level(score, targets, nested=True)


def test_the_mask_of_every_level_of_a_model(model: Model) -> None:
    table = level_table(model, "layer")
    for layer, targets in list(zip(model.layers, table.targets, strict=True))[:7]:
        assert_every_level(layer.weight, targets, nested=True)


@pytest.mark.parametrize("shape", [(6, 40), (1, 8)])
def test_the_mask_of_every_pattern(shape: tuple[int, int]) -> None:
    targets = [Target("0.0", "row", 0.0), *map(parse_target, ("7:8", "3:4", "4:8", "2:4", "1:2", "1:4", "1:8"))]
    for score in scores(shape):
        assert_every_level(score, targets, nested=False)


def assert_every_level(score: Tensor, targets: Sequence[Target], *, nested: bool) -> None:
    codes = level_codes(score, targets, nested=nested)
    assert (codes.dtype, codes.shape) == (torch.uint8, score.shape)  # one byte per weight
    for level, target in enumerate(targets):
        assert torch.equal(kept_at(codes, level, nested=nested), select_mask(score, target)), target


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("text", ["0.5", "block:0.5", "2:4"])
def test_scores_that_are_not_finite(value: float, text: str) -> None:
    score = torch.ones(4, 8)
    score[2, 3] = value
    with pytest.raises(MaskError, match="1 of 32 scores are NaN or infinite"):
        level_codes(score, [parse_target(text)], nested=text != "2:4")


def test_a_model_at_any_levels_is_one_pruned_by_hand(load: Callable[[str], Model], pruned: PrunedModel) -> None:
    model, table, rng = pruned.model, pruned.table, random.Random(0)
    ids = torch.arange(1, 25)[None]
    weights = [layer.weight.clone() for layer in model.layers]
    storages = [layer.parameter.data_ptr() for layer in model.layers]
    for _ in range(3):
        levels = drawn(table, rng)
        pruned.dense()
        masks = by_hand(model, table, levels)
        pruned.set(levels)
        logits = model.module(input_ids=ids).logits
        with model.holding([weight * mask for weight, mask in zip(weights, masks, strict=True)]):
            assert torch.equal(model.module(input_ids=ids).logits, logits)
    pruned.dense()
    assert pruned.levels == (None,) * len(model.layers)
    for layer, weight, storage in zip(model.layers, weights, storages, strict=True):
        assert layer.parameter.data_ptr() == storage
        assert torch.equal(layer.weight, weight)


def test_only_what_differs_is_masked_again(pruned: PrunedModel) -> None:
    """Marks on the weights stay where a layer's level stays."""
    model, table = pruned.model, pruned.table
    first = table.nearest([0.5] * len(table.genes))
    second = tuple(level + (gene in (1, 4)) * 40 for gene, level in enumerate(first))
    differ = [gene in (1, 4) for gene in table.gene_of]
    pruned.set(first)
    storages = [layer.parameter.data_ptr() for layer in model.layers]
    for layer in model.layers:
        layer.weight.fill_(7)
    pruned.set(second)
    assert [bool((layer.weight != 7).any()) for layer in model.layers] == differ
    assert [layer.parameter.data_ptr() for layer in model.layers] == storages
    assert pruned.levels == tuple(second[gene] for gene in table.gene_of)
    pruned.dense()
    masks = by_hand(model, table, second)
    pruned.set(second)  # every layer, the marked ones too
    for layer, mask in zip(model.layers, masks, strict=True):
        assert torch.equal(layer.weight != 0, mask)


# Measurements


@pytest.mark.parametrize("objective", ["kl", "loss"])
def test_measurements_do_not_depend_on_those_before(pruned: PrunedModel, tokens: Tensor, objective: Any) -> None:
    """20 candidates a few genes apart, on some batches each, others setting the model between, against fresh meters."""
    table, rng = pruned.table, random.Random(0)
    meter = CandidateObjective(pruned, tokens, objective)
    assert (len(meter), sum(meter.tokens)) == (4, tokens.numel())
    levels = drawn(table, rng)
    for step in range(20):
        levels = switch(table, levels, rng) if step % 5 else drawn(table, rng)
        first, last = sorted(rng.sample(range(len(meter) + 1), 2))
        found = meter.measure(levels, first, last)
        rng.choice([pruned.dense, lambda: pruned.set(drawn(table, rng)), lambda: None])()
        if step % 4 == 1:
            assert meter.measure(levels, 0, len(meter))[first:last] == found
        if step % 2:  # a fresh one sets the model, too
            assert CandidateObjective(pruned, tokens, objective).measure(levels, first, last) == found
        assert not any("forward" in vars(block.module) for block in pruned.model.blocks)
    assert meter.measure(tuple(0 for _ in table.genes), 0, 4) == pytest.approx([0] * 4, abs=1e-3)


def test_a_meter_against_the_definitions(pruned: PrunedModel, tokens: Tensor) -> None:
    """KL(dense || pruned) and excess loss per prediction, in double precision."""
    levels = pruned.table.nearest([0.6] * len(pruned.table.genes))
    with torch.no_grad():
        dense = pruned.model.module(input_ids=tokens).logits[:, :-1].double().log_softmax(-1)
        pruned.set(levels)
        sparse = pruned.model.module(input_ids=tokens).logits[:, :-1].double().log_softmax(-1)
    kl = (dense.exp() * (dense - sparse)).sum(-1)
    loss = (dense - sparse).gather(-1, tokens[:, 1:, None])[..., 0]
    for objective, expected in (("kl", kl), ("loss", loss)):
        found = CandidateObjective(pruned, tokens, objective).measure(levels, 0, 4)  # type: ignore[arg-type]
        assert found == pytest.approx(expected.view(4, -1).mean(1).tolist(), rel=1e-3, abs=2e-5)


def test_blocks_before_the_first_change_are_not_computed(pruned: PrunedModel, tokens: Tensor) -> None:
    computed: list[int] = []
    hooks = [
        block.layers[0].module.register_forward_pre_hook(lambda *_, index=index: computed.append(index))
        for index, block in enumerate(pruned.model.blocks)
    ]
    meter = CandidateObjective(pruned, tokens)
    first = pruned.table.nearest([0.5] * 6)
    for levels, blocks in ((first, [0, 1, 2]), ((*first[:4], 3, 4), [2]), (first, [2]), (first, [])):
        computed.clear()
        meter.measure(levels, 1, 2)
        assert computed == blocks
    for hook in hooks:
        hook.remove()


def test_a_failure_leaves_the_model_as_it_was(pruned: PrunedModel, tokens: Tensor) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    meter = CandidateObjective(pruned, tokens)
    first, second = (pruned.table.nearest([share] * 6) for share in (0.5, 0.6))
    meter.measure(first, 0, 4)
    for act in (lambda: meter.measure(second, 0, 4), lambda: meter.slopes(second, 4)):
        hook = pruned.model.blocks[1].layers[-1].module.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            act()
        hook.remove()
        assert not any("forward" in vars(block.module) for block in pruned.model.blocks)
        assert not any(parameter.requires_grad for parameter in pruned.model.module.parameters())
    again = meter.measure(second, 0, 4)
    assert again == CandidateObjective(pruned, tokens).measure(second, 0, 4)


def test_a_dead_model_is_infinitely_bad(pruned: PrunedModel, tokens: Tensor) -> None:
    meter = CandidateObjective(pruned, tokens)
    hook = pruned.model.blocks[-1].module.register_forward_hook(lambda *_: torch.full((2, 24, 32), torch.nan))
    assert meter.measure(pruned.table.nearest([0.5] * 6), 0, 2) == [math.inf] * 2
    hook.remove()


def test_predictions_that_would_not_fit(pruned: PrunedModel) -> None:
    many = torch.zeros(1, 1, dtype=torch.int64).expand(2**13, 2**10)
    with pytest.raises(InputError, match=r"--objective kl would keep 4\.\d GiB of predictions, of 4 allowed"):
        CandidateObjective(pruned, many)


@pytest.mark.parametrize("objective", ["kl", "loss"])
@pytest.mark.parametrize(("name", "nested"), [("tiny_llama", True), ("tiny_gpt2", True), ("tiny_gpt2", False)])
def test_slopes_are_derivatives(
    load: Callable[[str], Model], tokens: Tensor, name: str, nested: bool, objective: Any
) -> None:
    """Central differences in double precision: weights W * (mask + t * (other mask - mask)) at t = +-0.003."""
    model = load(name)
    model.module.double()
    table = level_table(model, "row", "module") if nested else level_table(model, "n:m", "module")
    pruned = pruned_model(model, table)
    dense = [layer.weight for layer in model.layers]
    meter = CandidateObjective(pruned, tokens, objective)
    with torch.no_grad():
        logits = model.module(input_ids=tokens[:6]).logits[:, :-1]
    expected = logits.float().softmax(-1).half().double()  # as the teacher keeps them
    if objective == "loss":
        expected = torch.nn.functional.one_hot(tokens[:6, 1:], model.vocabulary).double()
    levels = table.nearest([0.55] * 6)
    found = meter.slopes(levels, 3)
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in model.module.parameters())
    assert not any(layer.parameter._post_accumulate_grad_hooks for layer in model.layers)
    assert [len(counts) for counts in found] == [len(counts) for counts in table.removed]
    assert [counts[level] for counts, level in zip(found, levels, strict=True)] == [0] * 6

    @torch.no_grad()
    def value(masks: Sequence[Tensor]) -> float:
        with model.holding([weight * mask for weight, mask in zip(dense, masks, strict=True)]):
            sparse = model.module(input_ids=tokens[:6]).logits[:, :-1].log_softmax(-1)
        return -(expected * sparse).sum(-1).mean().item()

    pruned.dense()
    now = by_hand(model, table, levels)
    for gene in (0, 3, 5):
        for level in (levels[gene] - 8, levels[gene] + 12, len(found[gene]) - 1) if nested else range(4):
            there = by_hand(model, table, (*levels[:gene], level, *levels[gene + 1 :]))
            pairs = list(zip(now, there, strict=True))
            ends = [
                value([mask + t * (other.double() - mask.double()) for mask, other in pairs]) for t in (3e-3, -3e-3)
            ]
            assert found[gene][level] == pytest.approx((ends[0] - ends[1]) / 6e-3, rel=1e-3, abs=3e-6)


def test_few_windows_are_looked_at_in_stages(gpt2: Model, tiny_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    tokens = cut_windows(read_text(str(tiny_text)), gpt2.tokenizer, 24, 9, vocabulary=gpt2.vocabulary).tokens
    pruned = pruned_model(gpt2, level_table(gpt2, "row", "block"))
    try:
        assert CandidateObjective(pruned, tokens).windows == [2, 2, 2, 2, 1]
        assert CandidateObjective(pruned, tokens[:8]).windows == [1] * 8
        assert CandidateObjective(pruned, tokens[:2]).windows == [1, 1]
    finally:
        pruned.dense()
