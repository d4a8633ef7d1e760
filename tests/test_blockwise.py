"""Models run block by block: bit by bit as whole, resident or streamed, forward and backward, for each architecture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from gpmetric.blockwise import ends as ends_module
from gpmetric.blockwise.backward import run_backward
from gpmetric.blockwise.ends import backward_of_loss
from gpmetric.blockwise.hidden import Hidden
from gpmetric.blockwise.replay import check_blocks, record_calls
from gpmetric.blockwise.shelf import Shelf
from gpmetric.calibration.collect import Statistics, collect
from gpmetric.data import Text, Windows
from gpmetric.errors import ModelError
from gpmetric.evaluation.perplexity import Teacher, mean_loss, predictions, run_blocks
from gpmetric.evaluation.references import parts_of
from gpmetric.loading import load_model
from gpmetric.models import Block, Layer, Model
from gpmetric.pruning.protocol import Protocol, Rule
from gpmetric.targets import parse_target
from tests.conftest import ARCHITECTURES
from tests.pruning_helpers import restored, session_of

ALL = ("X", "G", "H", "D", "F", "R", "gram")
QUICK = {"llama-fp32", "llama-widened", "llama-bf16", "gemma2-widened", "bloom-widened", "gpt2-widened"}
KINDS = {"fp32": ("float32", "float32"), "widened": ("bfloat16", "float32"), "bf16": ("bfloat16", "bfloat16")}


def make_tokens(count: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 300, (count, length), generator=torch.Generator().manual_seed(seed))


def halve(folder: Path) -> None:
    """Stores a checkpoint in bfloat16."""
    weights = {name: weight.bfloat16() for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))


@dataclass(frozen=True)
class Pair:
    """One model twice: all weights on the device, and none."""

    folder: Path
    dtype: str
    resident: Model
    streamed: Model


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((name, kind), id=(both := f"{name}-{kind}"), marks=() if both in QUICK else pytest.mark.nightly)
        for name in ARCHITECTURES
        for kind in KINDS
    ],
)
def pair(
    request: pytest.FixtureRequest, save_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Pair:
    """Every architecture, stored and loaded in fp32, stored in bf16 and loaded in fp32, and all in bf16."""
    name, kind = request.param
    folder = save_model(name, **ARCHITECTURES[name])
    stored, dtype = KINDS[kind]
    if stored == "bfloat16":
        halve(folder)
    loaded = (load_model(str(folder), dtype=dtype, resident=resident) for resident in (True, False))
    return Pair(folder, dtype, *loaded)


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_gpt2"])
def model(request: pytest.FixtureRequest) -> Model:
    return load_model(str(request.getfixturevalue(request.param)))


# A model in parts is the model


def assert_same_bits(left: Statistics, right: Statistics) -> None:
    assert list(left.layers) == list(right.layers)
    for layer in left.layers:
        one, other = left.layers[layer].values, right.layers[layer].values
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name]), (layer, name)


def test_a_streamed_model_is_the_resident_one(pair: Pair) -> None:
    """Loss and statistics, to the bit; also where no input of a block has room in memory."""
    resident, streamed = pair.resident, pair.streamed
    assert (resident.resident, streamed.resident) == (True, False)
    assert (resident.dtype, resident.digest) == (streamed.dtype, streamed.digest) == (pair.dtype, resident.digest)
    tokens = make_tokens(2, 12)
    assert mean_loss(streamed, tokens) == mean_loss(resident, tokens)
    expected = collect(resident, tokens, ALL)
    assert expected.names == {*ALL}
    for room in (None, 1000):
        assert_same_bits(collect(streamed, tokens, ALL, room=room), expected)
    for names in ("XD", "R"):
        assert_same_bits(collect(streamed, tokens, names), collect(resident, tokens, names))


def test_rules_of_a_streamed_model_are_those_of_the_resident_one(pair: Pair) -> None:
    """Measured together in one walk, under both protocols, and one at a time: to the bit."""
    calibration, text = Windows(Text("text", ""), make_tokens(2, 12)), make_tokens(3, 12, seed=1)
    for once in (False, True):
        found = []
        for model in (pair.resident, pair.streamed):
            made = Protocol(session_of(model, calibration), one_shot=once)
            named = (("wanda", "0.5"), ("sparsegpt", "2:4"), ("gblm_l1", "0.5"))
            rules = [Rule(made.session.metric(metric), parse_target(target)) for metric, target in named]
            made.prepare([rule.metric for rule in rules], "none")
            found.append([one.losses for one in made.measure(rules, [text])])
            if not model.resident and not once:
                found.append([one.losses for rule in rules for one in made.measure([rule], [text])])
        assert all(losses == found[0] for losses in found)
        assert len({losses[0] for losses in found[0]}) == len(rules)


def test_the_end_of_a_model_is_its_own(pair: Pair) -> None:
    """Logits behind the last block as transformers' own model has them, loaded by it: to the bit."""
    own = AutoModelForCausalLM.from_pretrained(pair.folder, dtype=getattr(torch, pair.dtype)).eval()
    batches = make_tokens(5, 12).split(3)
    with torch.no_grad():
        expected = [own(input_ids=batch).logits for batch in batches]
        for model in (pair.resident, pair.streamed):
            calls = record_calls(model, batches)
            found = [calls.finish(number, states).logits for number, states in enumerate(run_blocks(calls))]
            assert all(map(torch.equal, found, expected))
            assert not any("forward" in vars(block.module) for block in model.blocks)
        assert all(torch.equal(pair.resident.module(input_ids=batch).logits, expected[0]) for batch in batches[:1])


@contextmanager
def taking_gradients(block: Block, found: dict[str, Tensor]) -> Iterator[None]:
    for layer in block.layers:
        layer.parameter.requires_grad_(True)
    yield
    for layer in block.layers:
        assert layer.parameter.grad is not None
        found[layer.name] = layer.parameter.grad
        layer.parameter.grad = None
        layer.parameter.requires_grad_(False)


@pytest.mark.parametrize("first", [0, 2])
def test_gradients_block_by_block_are_those_of_one_backward_pass(pair: Pair, first: int) -> None:
    """Of the summed losses of two batches, both ways, against one `backward` through the whole model."""
    model = pair.resident
    batches, wanted = make_tokens(3, 12).split(2), model.blocks[first:]
    expected: dict[str, Tensor] = {}
    for block in wanted:
        for layer in block.layers:
            layer.parameter.requires_grad_(True)
    sum(model.module(input_ids=batch, labels=batch).loss for batch in batches).backward()
    for block in wanted:
        with taking_gradients(block, expected):
            pass
    for one in (pair.resident, pair.streamed):
        for shelf in (None, Shelf(), Shelf(0)):
            if shelf is None and not one.resident:
                continue
            found: dict[str, Tensor] = {}

            def watch(index: int, one: Model = one, found: dict[str, Tensor] = found) -> Any:
                return taking_gradients(one.blocks[index], found)

            @contextmanager
            def trace(index: int, one: Model = one) -> Iterator[None]:
                if index >= first:
                    for layer in one.blocks[index].layers:
                        layer.parameter.requires_grad_(True)
                yield

            calls = record_calls(one, batches)
            passes = run_backward(
                calls, [0, 1], backward_of_loss, first=first, shelf=shelf, forward=trace, backward=watch
            )
            assert list(passes) == list(reversed(range(first, len(one.blocks))))
            assert found.keys() == expected.keys()
            for name, gradient in found.items():
                # graphs are cut where blocks meet, and sums over batches are in another order
                near = (1e-4, 1e-6) if pair.dtype == "float32" else (0.05, 2e-3)
                torch.testing.assert_close(gradient, expected[name], rtol=near[0], atol=near[1])
            if shelf is not None:
                assert not any((index, number) in shelf for index in range(len(one.blocks)) for number in (0, 1))


# Logits part by part


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets the logits of so many predictions be in memory together."""
    return lambda size: monkeypatch.setattr(ends_module, "_LOGITS", {"cpu": size * 300, "cuda": size * 300})


@pytest.mark.parametrize("size", [1, 7, 100])
def test_logits_in_parts_are_the_same_logits(pair: Pair, cut: Callable[[int], None], size: int) -> None:
    """Windows side by side, position after position; labels are the tokens that follow."""
    tokens = make_tokens(3, 12)
    rtol, atol = (1e-4, 1e-5) if pair.dtype == "float32" else (0.05, 0.02)
    with torch.no_grad():
        whole = pair.resident.module(input_ids=tokens).logits[:, :-1].float()  # [3, 11, vocabulary]
        cut(size)
        for model in (pair.resident, pair.streamed):
            parts = list(predictions(model, tokens))
            lengths = [len(labels) // 3 for _, labels in parts]
            assert lengths == ([1] * 11 if size == 1 else [2] * 5 + [1] if size == 7 else [11])
            logits = torch.cat(
                [one.view(3, length, 300) for (one, _), length in zip(parts, lengths, strict=True)], dim=1
            )
            labels = torch.cat([one.view(3, length) for (_, one), length in zip(parts, lengths, strict=True)], dim=1)
            torch.testing.assert_close(logits, whole, rtol=rtol, atol=atol)
            assert torch.equal(labels, tokens[:, 1:])
            assert logits.dtype == torch.float32


def test_figures_of_logits_in_parts(model: Model, cut: Callable[[int], None]) -> None:
    """Loss, excess and divergence of a changed model, and gradients, up to rounding."""
    tokens = make_tokens(4, 24)

    def figures() -> tuple[float, Tensor, Statistics, int]:
        with torch.no_grad(), restored(model):
            loss = mean_loss(model, tokens)
            teachers = [Teacher(*part) for part in parts_of(model, tokens)]
            for layer in model.layers:
                layer.weight.mul_(0.9)
            told = [
                teacher.compare(logits) for teacher, (logits, _) in zip(teachers, parts_of(model, tokens), strict=True)
            ]
        return loss, torch.stack(told).sum(dim=0), collect(model, tokens, "GHF"), len(teachers)

    loss, told, statistics, parts = figures()
    assert parts == 1
    cut(9)
    loss_in_parts, told_in_parts, statistics_in_parts, parts = figures()
    assert parts == 12  # two positions of four windows each
    assert loss_in_parts == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(told_in_parts, told, rtol=1e-4, atol=2e-3)
    for name, layer in statistics.layers.items():
        for operand, value in layer.values.items():
            torch.testing.assert_close(statistics_in_parts.layers[name][operand], value, rtol=1e-3, atol=1e-7)


def test_a_model_that_cannot_leave_logits_out_gives_them_whole(cut: Callable[[int], None]) -> None:
    model = toy()
    cut(1)
    ((logits, labels),) = predictions(model, make_tokens(2, 6))
    assert logits.shape == (10, 300)
    assert len(labels) == 10


# Hidden states on their way


@pytest.mark.parametrize("limit", [None, 0])
def test_hidden_states_set_out_from_the_same_calls(model: Model, limit: int | None) -> None:
    """Several ways at once, each with what it is; one is stopped, told, and goes on elsewhere."""
    calls, shelf = record_calls(model, make_tokens(3, 8).split(2)), Shelf(limit)
    first, second = Hidden(calls, shelf), Hidden(calls, shelf)
    for number in range(2):
        assert torch.equal(first[number], calls.hidden[number])
    first.advance(0)
    expected = calls.replay(0, calls.hidden)
    assert all(map(torch.equal, first, expected))
    assert all(map(torch.equal, second, calls.hidden))
    second.restore(first)
    first.advance(1)
    second.advance(1)
    assert all(map(torch.equal, first, second))
    first.close()
    assert all(map(torch.equal, second, calls.replay(1, expected)))


# What is refused, and what is not


class ToyBlock(nn.Module):
    """Adds what it computes to its input, and may return a gate beside it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.up = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Any:
        states = hidden_states + self.up(hidden_states) * (1 if gate is None else gate)
        if self.kind == "ahead":
            states = states + states.flip(1)
        if self.kind in ("alone", "ahead"):
            return states
        output = states, states.mean(dim=-1, keepdim=True)
        return list(output) if self.kind == "list" else output


class ToyBody(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embed = nn.Embedding(300, 8)
        self.blocks = nn.ModuleList([ToyBlock(kind) for _ in range(3)])

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        states, gate = self.embed(input_ids), None
        for _ in range(2 if self.kind == "twice" else 1):
            for block in self.blocks:
                output = block(states, gate=gate)
                states, rest = output if isinstance(output, (tuple, list)) else (output, None)
                gate = rest if self.kind == "gate" else None
                if self.kind == "between":
                    states = states * 1.5
        if self.kind == "ending":
            states = states * rest
        return states


class Toy(nn.Module):
    """What `Model` needs of transformers' models, without `inputs_embeds` and `logits_to_keep`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.base_model = ToyBody(kind)
        self.head = nn.Linear(8, 300)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.head(self.base_model(input_ids, use_cache=use_cache)))

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.embed


def toy(kind: str = "alone") -> Model:
    torch.manual_seed(0)
    module = Toy(kind).requires_grad_(False)
    blocks = [
        Block(block, (Layer(f"blocks.{index}.up", block.up),)) for index, block in enumerate(module.base_model.blocks)
    ]
    return Model("toy", module, None, tuple(blocks))


@pytest.mark.parametrize("kind", ["alone", "beside", "list"])
def test_a_model_without_embeddings_for_input_is_run(kind: str) -> None:
    """Its end is run with the token ids; what blocks return beside the states and nobody reads is no matter."""
    model, tokens = toy(kind), make_tokens(3, 5)
    check_blocks(model)
    calls = record_calls(model, [tokens])
    (states,) = run_blocks(calls)
    assert torch.equal(calls.finish(0, states).logits, model.module(tokens).logits)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("gate", "its blocks hand on more than hidden states"),
        ("ending", "its blocks hand on more than hidden states"),
        ("between", "what a block reads is not what the one before it gives"),
        ("twice", "base_model.blocks.0 is called 2 times in a forward pass"),
    ],
)
def test_blocks_that_hand_on_more_than_states_are_refused(kind: str, why: str) -> None:
    """To the next block, to the end; states that others change; and blocks that are run twice."""
    for _ in range(2):  # nothing is remembered of the first time
        with pytest.raises(ModelError) as caught:
            check_blocks(toy(kind))
        assert str(caught.value) == f"model 'toy' cannot be run block by block: {why}"


def test_a_refused_model_is_left_as_it_was() -> None:
    model = toy("gate")
    with pytest.raises(ModelError):
        record_calls(model, [make_tokens(1, 4)])
    assert not any("forward" in vars(block.module) for block in model.blocks)


def test_blocks_without_hidden_states_are_refused() -> None:
    model = toy()
    for block in model.blocks:
        block.module.register_forward_pre_hook(lambda _, args, kwargs: ((), {"x": args[0]}), with_kwargs=True)
    with pytest.raises(ModelError, match=r"^the model cannot be run block by block: its blocks take x$"):
        check_blocks(model)


def test_a_model_that_looks_ahead_is_refused() -> None:
    with pytest.raises(
        ModelError, match=r"^model 'toy' is not causal: its prediction after a token depends on the next"
    ):
        check_blocks(toy("ahead"))


def test_a_dead_model_is_no_reason_to_refuse() -> None:
    """Looked at for the first time when nothing of it is finite any more: NaN follows NaN."""
    model = toy()
    model.layers[1].weight.fill_(torch.nan)
    check_blocks(model)
    assert mean_loss(model, make_tokens(2, 6)) == math.inf
