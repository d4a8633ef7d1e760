"""Models run block by block: bit by bit as whole, resident or streamed, forward and backward, whatever the architecture."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from gpmetric.blockwise import backward, ends
from gpmetric.blockwise.backward import run_backward
from gpmetric.blockwise.ends import backward_of_loss
from gpmetric.blockwise.hidden import Hidden
from gpmetric.blockwise.replay import BlockCalls, check_blocks, record_calls
from gpmetric.blockwise.shelf import Shelf
from gpmetric.calibration.collect import Statistics, collect
from gpmetric.data import Text, Windows
from gpmetric.errors import GpmetricError, ModelError
from gpmetric.evaluation.perplexity import Teacher, mean_loss, predictions, run_blocks, sum_loss
from gpmetric.files import cache_folder
from gpmetric.loading import load_model
from gpmetric.models import Block, Layer, Model
from gpmetric.pruning.protocol import Measured, Protocol, Rule
from gpmetric.targets import parse_target
from tests.pruning_helpers import session_of

ALL = ("X", "G", "H", "D", "F", "gram")
DTYPES = ["float32", "bfloat16"]


def make_tokens(count: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 300, (count, length), generator=torch.Generator().manual_seed(seed))


def halve(folder: Path, to: Path) -> Path:
    """A copy of a checkpoint that is stored in bfloat16."""
    shutil.copytree(folder, to)
    weights = {name: weight.bfloat16() for name, weight in load_file(to / "model.safetensors").items()}
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return to


@pytest.fixture(scope="module")
def halved(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return halve(checkpoint, tmp_path_factory.mktemp("halved") / "model")


def both(folder: Path, dtype: str | None = None) -> tuple[Model, Model]:
    """A model whose weights are all on the device, and the same one with none there."""
    return load_model(str(folder), dtype=dtype), load_model(str(folder), dtype=dtype, resident=False)


def assert_same_bits(left: Statistics, right: Statistics) -> None:
    assert list(left.layers) == list(right.layers)
    for layer in left.layers:
        one, other = left.layers[layer].values, right.layers[layer].values
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name]), (layer, name)


# A model in parts is the model


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_streamed_model_is_the_resident_one(checkpoint: Path, dtype: str) -> None:
    """Loss and every statistic, to the bit; the second way keeps none of the blocks' inputs in memory."""
    check_streamed(*both(checkpoint, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_halved_model_is_streamed_as_it_is_resident(halved: Path, dtype: str) -> None:
    """Stored in bfloat16; in fp32, it is widened block by block."""
    check_streamed(*both(halved, dtype))


def check_streamed(resident: Model, streamed: Model) -> None:
    assert resident.dtype == streamed.dtype
    assert resident.digest == streamed.digest
    tokens = make_tokens(3, 20)
    assert mean_loss(streamed, tokens) == mean_loss(resident, tokens)
    expected = collect(resident, tokens, ALL)
    assert expected.names == {*ALL}
    for room in (None, 1000):
        assert_same_bits(collect(streamed, tokens, ALL, room=room), expected)
    assert_same_bits(collect(streamed, tokens, "XD"), collect(resident, tokens, "XD"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_end_of_the_model_is_its_own(halved: Path, dtype: str) -> None:
    """Logits behind the last block, to the bit, as transformers' own forward pass has them."""
    tokens = make_tokens(5, 20)
    for model in both(halved, dtype):
        calls = record_calls(model, [tokens[:3], tokens[3:]])
        found = [calls.finish(number, states).logits for number, states in enumerate(run_blocks(calls))]
        if model.resident:
            with torch.no_grad():
                expected = [model.module(input_ids=batch).logits for batch in calls.batches]
        assert all(map(torch.equal, found, expected))
        assert not any("forward" in vars(block.module) for block in model.blocks)


def test_a_halved_model_is_widened_as_transformers_does(halved: Path) -> None:
    """Also where a buffer is of half precision, Gemma's scale of embeddings."""
    own = AutoModelForCausalLM.from_pretrained(halved, dtype=torch.float32).eval()
    tokens = make_tokens(2, 20)
    with torch.no_grad():
        expected = own(input_ids=tokens).logits
    for model in both(halved, "float32"):
        calls = record_calls(model, [tokens])
        (states,) = run_blocks(calls)
        assert torch.equal(calls.finish(0, states).logits, expected)
