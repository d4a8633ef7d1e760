"""Architectures of the installed transformers, tiny: all are opened or refused in a line, some go through commands."""

from __future__ import annotations

import csv
import importlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from gpmetric import allocate, prune
from gpmetric.blockwise.backward import run_backward
from gpmetric.blockwise.ends import backward_of_loss
from gpmetric.blockwise.hidden import Hidden
from gpmetric.blockwise.replay import check_blocks, record_calls
from gpmetric.blockwise.shelf import Shelf
from gpmetric.errors import ModelError
from gpmetric.evaluation.perplexity import mean_loss, run_blocks
from gpmetric.loading import load_model
from gpmetric.models import Model
from tests.pruning_helpers import restored
from tests.test_blockwise import make_tokens, toy

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# Blocks that answer with lists, that share keys and values, that share layers, under other names in their files.
PRUNED = ("gemma4_text", "zamba", *(pytest.param(name, marks=pytest.mark.slow) for name in ("openai-gpt", "gemma3")))
LOADED = 100  # architectures at least


@pytest.fixture(scope="module")
def matrix() -> Iterator[ModuleType]:
    """The benchmark of architectures, with its folder on the path as when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("architectures")


@pytest.fixture(scope="module", params=["gemma4_text", pytest.param("gemma3n_text", marks=pytest.mark.slow)])
def sharing(request: pytest.FixtureRequest, matrix: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model whose last blocks read the keys and values of earlier ones."""
    folder = tmp_path_factory.mktemp(request.param)
    matrix.save_tiny(request.param, folder)
    return load_model(str(folder))


@pytest.mark.slow
def test_all_are_opened_or_refused_in_one_line(matrix: ModuleType) -> None:
    """Of those that the installed transformers can build tiny; what is told of each is in the benchmark's table."""
    rows = [matrix.measured(name, ()) for name in matrix.architectures()]
    assert not [row for row in rows if row["opened"] == "fails"]
    refused = [row["why"] for row in rows if row["opened"] == "refused"]
    assert all(why.startswith("opened: ModelError: ") for why in refused)
    assert sum(row["opened"] == "yes" for row in rows) >= LOADED


@pytest.mark.every(2)
@pytest.mark.parametrize("name", PRUNED)
def test_pruned_as_an_independent_loop_prunes(name: str, matrix: ModuleType) -> None:
    """Weights and perplexity under both protocols, in memory and of the files; zeros counted in the files."""
    row = matrix.measured(name, ("one_shot", "sequential"))
    assert not row["why"]
    assert float(row["one_shot"]) <= 1e-6
    assert float(row["sequential"]) <= 1e-6


def test_the_loop_tells_another_mask(matrix: ModuleType, tmp_path: Path) -> None:
    """Of as many zeros: those of the least weights are not Wanda's."""
    model, text, out = tmp_path / "model", tmp_path / "text.txt", tmp_path / "out"
    matrix.save_tiny("llama", model)
    matrix.write_text(text)
    options = {"target": "0.5", "calibration": str(text), "text": str(text), **matrix.SIZES}
    told = prune(str(model), metric="magnitude_row", output=out, **options)
    with pytest.raises(AssertionError, match=r"\d+ weights are not those of the loop"):
        matrix.compare(model, text, told, out, one_shot=False)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_one_that_hangs_or_dies_costs_its_own_row(matrix: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def begun(name: str, tried: object, report: Callable[[dict[str, Any]], None]) -> None:
        report(matrix.empty_row(name) | {"opened": "yes"})
        if name == "dies":
            os._exit(3)
        time.sleep(60)

    monkeypatch.setattr(matrix, "measured", begun)
    for name, told in (("hangs", "TimeoutError: not done in 1 s"), ("dies", "ended with status 3")):
        row = matrix.measured_apart(name, 1)
        assert (row["architecture"], row["opened"], row["why"]) == (name, "yes", told)


def test_the_table_has_every_architecture_and_no_fault(matrix: ModuleType) -> None:
    """`benchmarks/architectures.csv`, as it was made last, if that was of the transformers that is installed."""
    with (BENCHMARKS / "architectures.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == matrix.COLUMNS
    assert not [row["architecture"] for row in rows if "fails" in row.values()]
    assert all(row["why"] for row in rows if row["opened"] != "yes")
    if {row["transformers"] for row in rows} == {transformers.__version__}:
        assert [row["architecture"] for row in rows] == matrix.architectures()


# Keys and values that blocks share


def test_blocks_that_share_keys_and_values_are_the_model(sharing: Model) -> None:
    """To the bit, whatever the batches; what they carry is in the states, not in what is shared."""
    batches = make_tokens(5, 12).split(3)
    calls = record_calls(sharing, batches)
    with torch.no_grad():
        for number, states in enumerate(run_blocks(calls)):
            expected = sharing.module(input_ids=batches[number]).logits
            assert torch.equal(calls.finish(number, states).logits, expected)


def test_ways_through_the_blocks_do_not_read_each_others_keys(sharing: Model) -> None:
    """Block by block in turn, once dense and once with other weights: each ends where it ends alone."""
    calls, shelf = record_calls(sharing, [make_tokens(3, 12)]), Shelf()
    ways = [Hidden(calls, shelf) for _ in range(2)]
    others = [layer.weight * 0.5 for layer in sharing.layers]
    for index in range(len(sharing.blocks)):
        ways[0].advance(index)
        with sharing.holding(others):
            ways[1].advance(index)
    with torch.no_grad():
        found = [calls.finish(0, way[0]).logits for way in ways]
        assert torch.equal(found[0], sharing.module(input_ids=calls.batches[0]).logits)
        with sharing.holding(others):
            assert torch.equal(found[1], sharing.module(input_ids=calls.batches[0]).logits)
        assert not torch.equal(*found)


@pytest.mark.parametrize("shelf", [None, Shelf()])
def test_gradients_reach_shared_keys_and_values(sharing: Model, shelf: Shelf | None) -> None:
    """Of the loss of a batch, against one `backward` through the whole model."""
    batch = make_tokens(3, 12)
    for layer in sharing.layers:
        layer.parameter.requires_grad_(True)
    try:
        sharing.module(input_ids=batch, labels=batch).loss.backward()
        expected = taken(sharing)
        for _ in run_backward(record_calls(sharing, [batch]), [0], backward_of_loss, shelf=shelf):
            pass
        found = taken(sharing)
    finally:
        for layer in sharing.layers:
            layer.parameter.requires_grad_(False)
    keys = next(name for name in found if name.endswith("1.self_attn.k_proj"))
    assert expected[keys].abs().max() > 0
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def taken(model: Model) -> dict[str, Tensor]:
    found = {}
    for layer in model.layers:
        assert layer.parameter.grad is not None
        found[layer.name], layer.parameter.grad = layer.parameter.grad, None
    return found


def test_an_allocation_of_a_model_that_shares_keys_and_values(sharing: Model, tiny_text: Path) -> None:
    """Blocks are answered from memory while levels change behind them."""
    found = allocate(
        str(sharing.folder), calibration=str(tiny_text), sparsity=0.5, evaluations=6, samples=2, search_windows=2,
        windows=2, sequence_length=16, device="cpu",
    )  # fmt: skip
    assert found["allocation"]["sparsity"].keys() == {layer.name for layer in sharing.layers}


def test_what_is_handed_on_but_is_no_keys_and_values_is_refused() -> None:
    """A block that counts in a mapping all are given."""
    model = toy()
    counts: dict[str, Any] = {}
    body = model.module.base_model
    for block in body.blocks:
        plain = block.forward

        def forward(states: Tensor, counts: dict[str, Any], plain: Callable[..., Any] = plain) -> Any:
            counts["calls"] = counts.get("calls", 0) + 1
            return plain(states)

        block.forward = forward
        block.register_forward_pre_hook(lambda _, args, kwargs: ((args[0], counts), {}), with_kwargs=True)
    with pytest.raises(ModelError, match=r"'toy' cannot be run .*: its blocks hand on 'calls', which is no keys and"):
        check_blocks(model)


# A model's own failures


def test_what_a_model_raises_itself_is_told_with_its_name(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(str(tiny_llama))

    def fail(*_: Any, **__: Any) -> None:
        raise IndexError("of\nits own")

    with restored(model):
        monkeypatch.setattr(model.blocks[1].module.mlp, "forward", fail)
        with pytest.raises(ModelError, match=r"^model '.*' fails in its own forward pass: IndexError: of its own$"):
            mean_loss(model, make_tokens(1, 4))


def test_a_lack_of_memory_stays_one(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is met elsewhere, with smaller batches."""
    model = load_model(str(tiny_llama))

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model.blocks[1].module.mlp, "forward", fail)
    with pytest.raises(torch.OutOfMemoryError):
        mean_loss(model, make_tokens(1, 4))


def test_a_model_whose_own_loss_fails_is_differentiated(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GIT's counts images in where there are none: the mean token loss is taken of its logits, to the same gradient."""
    model, batch = load_model(str(tiny_llama)), make_tokens(2, 6)
    found = []
    for _ in range(2):
        calls = record_calls(model, [batch])
        states = calls.hidden[0].clone().requires_grad_()
        backward_of_loss(calls, 0, states)
        found.append(states.grad)

        def fail(*_: Any, **__: Any) -> None:
            raise ValueError("Expected input batch_size (10) to match target batch_size (15).")

        monkeypatch.setattr(type(model.module), "loss_function", property(lambda _, fail=fail: fail))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-8)
