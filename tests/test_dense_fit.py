"""`--fit dense`: inputs in both models against plain hooks in float64, goals in closed form, and pruning by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpmetric.blocks import find_blocks
from gpmetric.blockwise.hidden import Hidden
from gpmetric.blockwise.replay import BlockCalls, record_calls
from gpmetric.blockwise.shelf import Shelf
from gpmetric.calibration.accumulators import LayerStatistics, curvature
from gpmetric.calibration.paired import DenseInputs, collect_paired, reading_order
from gpmetric.errors import InputError, ModelError, SolverError
from gpmetric.evaluation.perplexity import mean_loss
from gpmetric.loading import load_model
from gpmetric.metrics import resolve_metric
from gpmetric.models import Layer, Model
from gpmetric.options import check_request
from gpmetric.pruning.allocation import Allocation
from gpmetric.pruning.bench import bench
from gpmetric.pruning.dense_fit import dense_goal
from gpmetric.pruning.protocol import Protocol, Rule
from gpmetric.pruning.prune import prune
from gpmetric.pruning.requests import BenchRequest, PruneRequest, check_fit
from gpmetric.pruning.updaters import UPDATERS
from gpmetric.pruning.verify import verify
from gpmetric.targets import parse_target
from tests.conftest import ARCHITECTURES
from tests.pruning_helpers import damped, make_layer, prune_weight, session_of, windows_of

LLAMA = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]
SOLVERS = [name for name, row in UPDATERS.items() if row.solves]


class Mixture(nn.Module):
    """A layer of experts, each a few `nn.Linear`, of which every token goes to one; the last is never chosen."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.ModuleDict(
                {"gate_proj": nn.Linear(width, 24), "up_proj": nn.Linear(width, 24), "down_proj": nn.Linear(24, width)}
            )
            for _ in range(experts)
        )
        with torch.no_grad():
            self.gate.bias[-1] = -1e9

    def forward(self, states: Tensor) -> Tensor:
        rows = states.flatten(0, -2)  # [tokens, width]
        chosen, found = self.gate(rows).argmax(dim=-1), torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            (mine,) = (chosen == number).nonzero(as_tuple=True)
            if len(mine):
                read = rows[mine]
                inner = nn.functional.silu(expert["gate_proj"](read)) * expert["up_proj"](read)
                found[mine] = expert["down_proj"](inner)
        return found.view_as(states)


def mixture(folder: Path, experts: int = 3) -> Model:
    """A Llama whose second block has experts."""
    model = load_model(str(folder), device="cpu")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.module.model.layers[1].mlp = Mixture(32, experts).eval().requires_grad_(False)
    return replace(model, blocks=find_blocks(model.module))


def calls_of(model: Model, text: Path, count: int = 7, length: int = 24) -> BlockCalls:
    """In batches of 3 windows, and what is left."""
    return record_calls(model, windows_of(model, text, length, count).tokens.split(3))


def stages(model: Model, index: int, calls: BlockCalls, hidden: Hidden) -> list[list[str]]:
    """Names without those of the block."""
    found = reading_order(calls, index, hidden)
    return [[layer.name.partition(f".{index}.")[2] for layer in stage] for stage in found]


# The order of reading


def test_the_layers_of_a_llama_in_the_order_of_reading(tiny_llama: Path, tiny_text: Path) -> None:
    model = load_model(str(tiny_llama), device="cpu")
    calls = calls_of(model, tiny_text)
    hidden = Hidden(calls, Shelf())
    for index in range(len(model.blocks)):
        assert stages(model, index, calls, hidden) == LLAMA
        hidden.advance(index)


def test_the_layers_of_a_gpt2_in_the_order_of_reading(tiny_gpt2: Path, tiny_text: Path) -> None:
    model = load_model(str(tiny_gpt2), device="cpu")
    calls = calls_of(model, tiny_text)
    assert stages(model, 0, calls, Hidden(calls, Shelf())) == [
        ["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"],
    ]  # fmt: skip


def test_an_mlp_beside_the_attention_reads_with_it(save_model: Callable[..., Path], tiny_text: Path) -> None:
    model = load_model(str(save_model("phi", **ARCHITECTURES["phi"])), device="cpu")
    calls = calls_of(model, tiny_text)
    assert stages(model, 1, calls, Hidden(calls, Shelf())) == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"], ["self_attn.dense"], ["mlp.fc2"],
    ]  # fmt: skip


def test_layers_that_are_left_out_are_in_no_stage(tiny_llama: Path, tiny_text: Path) -> None:
    model = load_model(str(tiny_llama), device="cpu", exclude="[kov]_proj|up_proj")
    calls = calls_of(model, tiny_text)
    hidden = Hidden(calls, Shelf())
    assert stages(model, 0, calls, hidden) == [["self_attn.q_proj"], ["mlp.gate_proj"], ["mlp.down_proj"]]


def test_experts_are_taken_together(tiny_llama: Path, tiny_text: Path) -> None:
    """Also the one that no token of the first batch goes to; the router is no layer."""
    model = mixture(tiny_llama)
    calls = calls_of(model, tiny_text)
    first, second, reads, writes = stages(model, 1, calls, Hidden(calls, Shelf()))
    assert [first, second] == LLAMA[:2]
    assert sorted(reads) == [f"mlp.experts.{n}.{name}" for n in range(3) for name in ("gate_proj", "up_proj")]
    assert sorted(writes) == [f"mlp.experts.{number}.down_proj" for number in range(3)]


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_layer_is_in_one_stage(family: str, save_model: Callable[..., Path], tiny_text: Path) -> None:
    """Of each architecture; no layer comes before one that it reads of: outputs of the stages before are enough."""
    model = load_model(str(save_model(family, **ARCHITECTURES[family])), device="cpu")
    calls = calls_of(model, tiny_text, count=2, length=12)
    found = reading_order(calls, 0, Hidden(calls, Shelf()))
    assert sorted(layer.name for stage in found for layer in stage) == sorted(
        layer.name for layer in model.blocks[0].layers
    )
    for place, stage in enumerate(found):
        before = _inputs(model, model.blocks[0].layers, calls.batches[0])
        with torch.no_grad():
            own = [layer.weight.clone() for later in found[place:] for layer in later]
            for layer in (one for later in found[place:] for one in later):
                layer.weight.mul_(0.5)
            after = _inputs(model, model.blocks[0].layers, calls.batches[0])
            for layer, weight in zip((one for later in found[place:] for one in later), own, strict=True):
                layer.weight.copy_(weight)
        assert all(torch.equal(before[layer.name], after[layer.name]) for layer in stage)


def _inputs(model: Model, layers: Sequence[Layer], tokens: Tensor) -> dict[str, Tensor]:
    """What layers read in a run of the whole model, [tokens, in], by plain hooks."""
    found: dict[str, Tensor] = {}
    hooks = [
        layer.module.register_forward_pre_hook(
            lambda _, args, name=layer.name: found.__setitem__(name, args[0].flatten(0, -2).clone())
        )
        for layer in layers
    ]
    with torch.no_grad():
        model.module(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


# What is measured in both models


def by_hooks(folder: Path, changed: Mapping[str, Tensor], index: int, tokens: Tensor) -> dict[str, dict[str, Tensor]]:
    """X, gram and cross of a block's layers in float64: a whole dense model beside one with other weights."""
    models = [load_model(str(folder), device="cpu") for _ in range(2)]
    for layer in models[1].layers:
        layer.weight.copy_(changed.get(layer.name, layer.weight))
    dense, pruned = [
        _inputs(model, model.blocks[index].layers, tokens)
        for model in (replace(one, module=one.module.double()) for one in models)
    ]
    return {
        name: {
            "X": mine.square().mean(dim=0).sqrt(),
            "gram": mine.t() @ mine / len(mine),
            "cross": dense[name].t() @ mine / len(mine),
        }
        for name, mine in pruned.items()
    }


def half_of(layers: Sequence[Layer], seed: int = 0) -> dict[str, Tensor]:
    """Half of each weight, drawn."""
    generator = torch.Generator().manual_seed(seed)
    return {layer.name: layer.weight * (torch.rand(layer.weight.shape, generator=generator) > 0.5) for layer in layers}


def moved(calls: BlockCalls, blocks: int, weights: Mapping[str, Tensor]) -> Hidden:
    """States behind some blocks that have these weights."""
    model, hidden = calls.model, Hidden(calls, Shelf())
    for index in range(blocks):
        layers = model.blocks[index].layers
        with model.holding([weights.get(layer.name, layer.weight) for layer in layers], layers):
            hidden.advance(index)
    return hidden


@pytest.mark.parametrize("index", [1, 2])
@pytest.mark.parametrize(("family", "keep"), [("tiny_llama", True), ("tiny_gpt2", True), ("tiny_gpt2", False)])
def test_inputs_in_both_models_against_plain_hooks(
    family: str, keep: bool, index: int, tiny_text: Path, request: pytest.FixtureRequest
) -> None:
    """Stage by stage, those before in the block being pruned by then."""
    folder = request.getfixturevalue(family)
    model = load_model(str(folder), device="cpu")
    calls, block = calls_of(model, tiny_text), model.blocks[index]
    weights = half_of([layer for one in model.blocks[:index] for layer in one.layers])
    pruned, dense = moved(calls, index, weights), moved(calls, index, {})
    both = DenseInputs(calls, index, dense, keep=keep)
    for stage in reading_order(calls, index, pruned):
        held = [weights.get(layer.name, layer.weight) for layer in block.layers]
        found = collect_paired(calls, index, pruned, both, stage, ["X", "gram", "D"], held)
        expected = by_hooks(folder, weights, index, torch.cat(calls.batches))
        assert list(found) == [layer.name for layer in stage]
        for name, one in found.items():
            assert one.values.keys() == {"X", "gram", "D", "cross"}
            for kind, value in expected[name].items():
                # fp32 against float64, two blocks deep
                scale = float(value.abs().max())
                torch.testing.assert_close(one[kind].double(), value, rtol=1e-3, atol=1e-5 * scale)
            assert torch.equal(one["D"], curvature(one["gram"]))
            assert not torch.allclose(one["cross"], one["gram"], rtol=1e-2)
        weights |= half_of(stage, seed=len(weights))
    assert not any(torch.equal(layer.weight, weights[layer.name]) for layer in block.layers), "the model stays dense"


def test_only_what_is_asked_for_is_measured(tiny_llama: Path, tiny_text: Path) -> None:
    """And X, which costs nothing; gradients are not measured here."""
    model = load_model(str(tiny_llama), device="cpu")
    calls = calls_of(model, tiny_text)
    layers, hidden = model.blocks[0].layers, Hidden(calls, Shelf())
    held = [layer.weight for layer in layers]
    found = collect_paired(calls, 0, hidden, DenseInputs(calls, 0, hidden, keep=True), layers[:1], ["gram", "G"], held)
    (one,) = found.values()
    assert one.values.keys() == {"X", "gram", "cross"}
    torch.testing.assert_close(one["cross"], one["gram"])


def test_an_expert_has_no_cross_where_tokens_differ(tiny_llama: Path, tiny_text: Path) -> None:
    """Its own statistics are of the tokens that the pruned model sends to it, by hand; attention has all tokens."""
    model = mixture(tiny_llama, experts=3)
    calls = calls_of(model, tiny_text)
    block, weights = model.blocks[1], half_of(model.blocks[0].layers)
    pruned, dense = moved(calls, 1, weights), moved(calls, 1, {})
    reached = [layer for layer in block.layers if "experts.2" not in layer.name]
    found = collect_paired(
        calls,
        1,
        pruned,
        DenseInputs(calls, 1, dense, keep=True),
        reached,
        ["gram"],
        [layer.weight for layer in block.layers],
    )
    reads: dict[str, list[Tensor]] = {}
    for number, states in enumerate(pruned):
        with torch.no_grad():
            hooks = [
                layer.module.register_forward_pre_hook(
                    lambda _, args, name=layer.name: reads.setdefault(name, []).append(args[0].flatten(0, -2).double())
                )
                for layer in reached
            ]
            calls.call(1, number, states)
        for hook in hooks:
            hook.remove()
    assert len({len(torch.cat(rows)) for rows in reads.values()}) > 1
    for name, one in found.items():
        rows = torch.cat(reads[name])
        torch.testing.assert_close(one["gram"].double(), rows.t() @ rows / len(rows), rtol=1e-3, atol=1e-5)
        assert ("cross" in one.values) == ("experts" not in name)
        (weight,) = (layer.weight for layer in reached if layer.name == name)
        assert (dense_goal(weight, one) is weight) == ("experts" in name)


def test_an_expert_that_has_all_tokens_is_a_layer_like_others(tiny_llama: Path, tiny_text: Path) -> None:
    model = mixture(tiny_llama, experts=2)
    calls = calls_of(model, tiny_text)
    layers = [layer for layer in model.blocks[1].layers if "experts.0" in layer.name]
    pruned, dense = moved(calls, 1, half_of(model.blocks[0].layers)), moved(calls, 1, {})
    found = collect_paired(
        calls,
        1,
        pruned,
        DenseInputs(calls, 1, dense, keep=True),
        layers,
        ["gram"],
        [one.weight for one in model.blocks[1].layers],
    )
    assert all("cross" in one.values for one in found.values())


def test_a_layer_that_no_token_reaches_is_refused(tiny_llama: Path, tiny_text: Path) -> None:
    model = mixture(tiny_llama)
    calls = calls_of(model, tiny_text)
    layers = [layer for layer in model.blocks[1].layers if "experts.2" in layer.name]  # without siblings to borrow from
    hidden = moved(calls, 1, {})
    with pytest.raises(ModelError, match=r"^layer model\.layers\.1\.mlp\.experts\.2\.gate_proj is not reached by"):
        collect_paired(
            calls,
            1,
            hidden,
            DenseInputs(calls, 1, hidden, keep=True),
            layers,
            ["gram"],
            [layer.weight for layer in model.blocks[1].layers],
        )


def test_an_input_that_is_changed_behind_its_layer_is_as_it_was_read(tiny_llama: Path, tiny_text: Path) -> None:
    """By an MLP that adds to what it was given."""
    model = load_model(str(tiny_llama), device="cpu")
    mlp = model.blocks[0].module.mlp
    mlp.forward = lambda states: states.mul_(0).add_(type(mlp).forward(mlp, states.clone()))
    found = {}
    for keep in (True, False):
        calls = calls_of(model, tiny_text)
        hidden = Hidden(calls, Shelf())
        inputs = DenseInputs(calls, 0, hidden, keep=keep)
        found[keep] = [inputs.of(0, [layer])[layer.name].clone() for layer in model.blocks[0].layers]
        inputs.advance()
        found[keep].append(hidden[0])
    assert all(torch.equal(one, other) for one, other in zip(found[True], found[False], strict=True))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("asked", [True, False])
def test_the_dense_model_moves_on(keep: bool, asked: bool, tiny_llama: Path, tiny_text: Path) -> None:
    """As if nobody had asked what its layers read; a block that is kept is run once."""
    model = load_model(str(tiny_llama), device="cpu")
    calls = calls_of(model, tiny_text)
    hidden, plain, ran = Hidden(calls, Shelf()), Hidden(calls, Shelf()), list[int]()
    plain.advance(0)
    with model.blocks[0].module.register_forward_pre_hook(lambda *_: ran.append(1)):
        inputs = DenseInputs(calls, 0, hidden, keep=keep)
        for number in range(len(hidden)) if asked else ():
            for layer in model.blocks[0].layers:
                assert layer.name in inputs.of(number, [layer])
        inputs.advance()
    assert all(torch.equal(one, other) for one, other in zip(hidden, plain, strict=True))
    assert len(ran) == len(hidden) * (1 if keep or not asked else len(model.blocks[0].layers) + 1)


# What a layer is to be


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 6), (5, 42), (6, 123)])
def test_the_goal_is_least_squares_in_closed_form(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """W C A^-1, and by a solver on stacked rows: the damping is rows of input that both models read."""
    weight, weight_of = make_layer(*shape)[0].to(dtype), torch.Generator().manual_seed(5)
    tokens, width = 3 * shape[1], shape[1]
    dense = torch.randn(tokens, width, generator=weight_of, dtype=torch.float64)
    pruned = dense + 0.5 * torch.randn(tokens, width, generator=weight_of, dtype=torch.float64)
    gram, cross = pruned.t() @ pruned / tokens, dense.t() @ pruned / tokens
    damping = 10 * (damped(gram) - gram)
    statistics = LayerStatistics(gram=gram.float(), cross=cross.float())
    found = dense_goal(weight, statistics)
    assert found.dtype == torch.float32
    closed = weight.double() @ (cross + damping) @ torch.linalg.inv(gram + damping)
    torch.testing.assert_close(found.double(), closed, rtol=1e-3, atol=1e-4)
    extra = (tokens * damping).sqrt()
    solved = torch.linalg.lstsq(torch.cat([pruned, extra]), torch.cat([dense, extra]) @ weight.double().t()).solution
    torch.testing.assert_close(found.double(), solved.t(), rtol=1e-3, atol=1e-4)


def test_without_a_difference_the_weight_is_its_own_goal() -> None:
    weight, gram = make_layer(5, 42)
    assert dense_goal(weight, LayerStatistics(gram=gram)) is weight
    assert torch.equal(dense_goal(weight, LayerStatistics(gram=gram, cross=gram)), weight)
    zeros = torch.zeros(42, 42)
    assert torch.equal(dense_goal(weight, LayerStatistics(gram=zeros, cross=zeros)), weight)


def test_a_gram_matrix_that_is_not_finite_is_refused() -> None:
    weight, gram = make_layer(5, 42)
    with pytest.raises(SolverError, match="NaN or infinity"):
        dense_goal(weight, LayerStatistics(gram=gram * torch.nan, cross=gram))


# Pruning by it


def by_hand(folder: Path, tokens: Tensor, metric: str, target: str, update: str) -> Model:
    """A Llama pruned stage by stage, two whole models being run for each."""
    dense, pruned = (load_model(str(folder), device="cpu") for _ in range(2))
    for index, block in enumerate(pruned.blocks):
        by_name = {layer.name: layer for layer in block.layers}
        for stage in LLAMA:
            theirs, mine = (_inputs(one, one.blocks[index].layers, tokens) for one in (dense, pruned))
            for name in (f"model.layers.{index}.{one}" for one in stage):
                one, other, layer = mine[name].double(), theirs[name].double(), by_name[name]
                gram, cross = one.t() @ one / len(one), other.t() @ one / len(one)
                damping = 10 * (damped(gram) - gram)
                goal = torch.linalg.solve(gram + damping, (cross + damping).t() @ layer.weight.double().t()).t()
                statistics = LayerStatistics(X=one.square().mean(dim=0).sqrt().float(), gram=gram.float())
                chosen = resolve_metric(metric)
                layer.weight.copy_(prune_weight(goal.float(), chosen, parse_target(target), statistics, update))
    return pruned


OPTIONS: dict[str, Any] = {"samples": 12, "windows": 12, "sequence_length": 32, "device": "cpu"}


def bench_row(folder: Path | None, text: str, **options: Any) -> dict[str, Any]:
    texts = {"calibration": text, "text": [text]}
    model = None if folder is None else str(folder)
    (row,) = bench(model, **OPTIONS | texts | options)["results"]
    assert row["error"] is None
    return row | {"ppl": row["ppl"][text]}


@pytest.mark.parametrize(
    ("metric", "target", "update"),
    [("wanda", "0.5", "obs-blockwise"), ("wanda", "2:4", "obs"), ("abs(W)*X", "layer:0.5", "admm")],
)
def test_a_whole_model_by_hand(tiny_llama: Path, tiny_text: Path, metric: str, target: str, update: str) -> None:
    dense = load_model(str(tiny_llama), device="cpu")
    tokens = windows_of(dense, tiny_text).tokens
    expected = math.exp(mean_loss(by_hand(tiny_llama, tokens, metric, target, update), tokens))
    options: dict[str, Any] = {"metric": [metric], "target": [target], "update": update}
    found = bench_row(tiny_llama, str(tiny_text), **options, fit="dense")
    assert found["ppl"] == pytest.approx(expected, rel=1e-4)
    assert found["fit"] == "dense"
    assert bench_row(tiny_llama, str(tiny_text), **options)["ppl"] != pytest.approx(expected, rel=1e-3)


@pytest.mark.every(2)
@pytest.mark.slow
@pytest.mark.parametrize("update", ["obs-blockwise", "admm"])
def test_the_loss_is_below_that_of_layers_that_keep_their_own_outputs(update: str) -> None:
    """Of the demo model, on the text that it is calibrated on and on another."""
    options: dict[str, Any] = {"metric": ["wanda"], "target": ["0.6"], "update": update, "samples": 24}
    options |= {"sequence_length": 128, "windows": 24, "device": "cpu", "calibration": "demo:calibration"}
    options["text"] = ["demo:calibration", "demo:test"]
    own, dense = (bench(None, fit=fit, **options)["results"][0] for fit in ("own", "dense"))
    assert (own["fit"], dense["fit"]) == ("own", "dense")
    assert dense["ppl"].keys() == own["ppl"].keys() == set(options["text"])
    for text, ppl in own["ppl"].items():
        assert dense["ppl"][text] < ppl, text


def test_the_first_layers_of_all_are_fitted_to_their_own_outputs(tiny_llama: Path, tiny_text: Path) -> None:
    """Nothing before them is pruned."""
    model = load_model(str(tiny_llama), device="cpu")
    first = []
    for fit in ("own", "dense"):
        made = Protocol(session_of(model, windows_of(model, tiny_text)), one_shot=False)
        rule = Rule(resolve_metric("wanda"), parse_target("0.5"), "obs", fit)
        made.prepare([rule.metric], "obs")
        first.append(next(iter(made.walk([rule])))[1][0])
    for name in first[0]:
        same = torch.allclose(first[0][name], first[1][name], rtol=1e-4, atol=1e-5)
        assert same == any(kind in name for kind in LLAMA[0]), name


def test_a_row_that_only_masks_says_own(tiny_llama: Path, tiny_text: Path) -> None:
    """What has nothing to fit is as it was."""
    options: dict[str, Any] = {
        "text": [str(tiny_text)],
        "calibration": str(tiny_text),
        "metric": ["wanda", "sparsegpt"],
    }
    both = [bench(str(tiny_llama), fit=fit, **OPTIONS, **options)["results"] for fit in ("own", "dense")]
    assert [[row["fit"] for row in rows] for rows in both] == [["own", "own"], ["own", "dense"]]
    assert both[0][0]["ppl"] == both[1][0]["ppl"]
    assert both[0][1]["ppl"] != both[1][1]["ppl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit": "dense", "update": "obs", "one_shot": True}, "--one-shot takes the dense model's"),
        (
            {"fit": "dense"},
            "--fit dense is of weights that change: take --update obs, obs-blockwise, admm, block, obs+block",
        ),
        ({"fit": "none", "update": "obs"}, "--fit must be one of own, dense, but got 'none'"),
    ],
)
@pytest.mark.parametrize("kind", [BenchRequest, PruneRequest])
def test_what_nothing_makes_use_of_is_refused(kind: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    where = {"metric": ("wanda",)} if kind is BenchRequest else {"output": Path("a"), "metric": "wanda"}
    with pytest.raises(InputError) as caught:
        check_request(kind(**where, **options))
    assert message in str(caught.value)


def test_one_metric_with_a_solver_is_enough() -> None:
    check_fit("dense", [resolve_metric("wanda"), resolve_metric("sparsegpt")], "none")
    for update in SOLVERS:
        check_fit("dense", [resolve_metric("wanda")], update)
    check_fit("own", [resolve_metric("wanda")], "none", one_shot=True)
    check_request(BenchRequest(fit="dense"))  # of all baselines


def rules_of(*rows: tuple[str, str, str, str]) -> list[Rule]:
    return [Rule(resolve_metric(name), parse_target(target), update, fit) for name, target, update, fit in rows]


@pytest.mark.parametrize(
    ("formula", "told"),
    [
        ("wanda", "metric wanda at 0.5: a Gram matrix holds NaN or infinity: {} (layer {})"),
        ("abs(W)*D", "layer {1}: a Gram matrix holds NaN or infinity: {0}"),
    ],
)
def test_overflowing_activations_name_the_layer(tiny_llama: Path, tiny_text: Path, formula: str, told: str) -> None:
    model = load_model(str(tiny_llama), device="cpu")
    model.blocks[0].layers[4].weight.fill_(1e30)  # squares of what down_proj reads overflow
    (error,) = [error for _, _, error in measured(model, tiny_text, rules_of((formula, "0.5", "obs", "dense")))]
    assert error == told.format("the model's activations overflow", model.blocks[0].layers[6].name)


RULES = rules_of(
    ("wanda", "0.5", "obs", "dense"),
    ("wanda", "0.5", "obs", "own"),
    ("wanda", "2:4", "none", "dense"),
    ("wanda", "0.5", "admm", "dense"),
    ("abs(W)*exp(W*1e9)*1e29", "0.5", "obs", "dense"),  # fails
    ("sparsegpt", "2:4", "none", "dense"),
    ("alps", "0.5", "none", "own"),
)


def measured(model: Model, text: Path, rules: Sequence[Rule]) -> list[tuple[list[float], float, str]]:
    windows = windows_of(model, text, 24, 5)
    made = Protocol(session_of(model, windows), one_shot=False)
    for rule in rules:
        made.prepare([rule.metric], rule.update)
    found = made.measure(rules, [windows.tokens, windows_of(model, text, 60, 10).tokens])
    return [(one.losses, 0.0 if one.error else one.sparsity, str(one.error)) for one in found]


def test_rules_of_both_kinds_together_are_as_each_alone(tiny_llama: Path, tiny_text: Path) -> None:
    """To the bit."""
    model = load_model(str(tiny_llama), device="cpu")
    before = [layer.weight.clone() for layer in model.layers]
    together = measured(model, tiny_text, RULES)
    assert together == [measured(model, tiny_text, [rule])[0] for rule in RULES]
    assert len({losses[0] for losses, _, _ in together}) == len(RULES)
    assert [error for _, _, error in together if error != "None"] == [
        f"metric {RULES[4].metric.name} at 0.5: {together[4][2].partition(': ')[2]}"
    ]
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(model.layers, before, strict=True))


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_a_streamed_model_is_pruned_as_a_resident_one(
    family: str, tiny_text: Path, request: pytest.FixtureRequest
) -> None:
    folder = str(request.getfixturevalue(family))
    resident, streamed = (load_model(folder, device="cpu", resident=one) for one in (True, False))
    assert (resident.resident, streamed.resident) == (True, False)
    assert measured(streamed, tiny_text, RULES) == measured(resident, tiny_text, RULES)


@pytest.mark.parametrize("update", SOLVERS)
def test_a_layer_that_an_allocation_leaves_dense_is_left_alone(tiny_llama: Path, tiny_text: Path, update: str) -> None:
    """Whole stages among them, and the rest of a stage."""
    model = load_model(str(tiny_llama), device="cpu")
    alone = [name for name in (layer.name for layer in model.layers) if "k_proj" in name or "o_proj" in name]
    targets = {layer.name: parse_target("0" if layer.name in alone else "0.5") for layer in model.layers}
    rule = Rule(resolve_metric("wanda"), Allocation("row", targets), update, "dense")
    made = Protocol(session_of(model, windows_of(model, tiny_text)), one_shot=False)
    made.prepare([rule.metric], update)
    walk = made.walk([rule], [windows_of(model, tiny_text).tokens])
    pruned = {name: weight for _, (block,) in walk for name, weight in block.items()}
    assert pruned.keys() == targets.keys() - {*alone}
    (found,) = walk.measured()
    entries = {layer.name: layer.weight.numel() for layer in model.layers}
    half = sum(size for name, size in entries.items() if name not in alone) / 2
    assert found.sparsity == pytest.approx(half / sum(entries.values()))
    assert math.isfinite(found.losses[0])


def test_a_checkpoint_says_its_fit_and_is_what_bench_measures(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path
) -> None:
    options = {"update": "admm", "fit": "dense", "samples": 6, "windows": 6, "sequence_length": 32, "device": "cpu"}
    told = prune(
        str(tiny_llama), output=tmp_path / "a", metric="wanda", target="2:4", calibration=str(tiny_text), **options
    )
    assert (told["update"], told["fit"]) == ("admm", "dense")
    row = bench_row(tiny_llama, str(tiny_text), metric=["wanda"], target=["2:4"], **options)
    assert told["perplexity"] == pytest.approx(row["ppl"], rel=1e-3)
    assert verify(tmp_path / "a", against=str(tiny_llama), device="cpu")["problems"] == []
    own = prune(
        str(tiny_llama), output=tmp_path / "b", metric="wanda", target="2:4", calibration=str(tiny_text),
        **options | {"fit": "own"},
    )  # fmt: skip
    assert own["fit"] == "own"
    assert own["perplexity"] != told["perplexity"]


def test_a_mixture_is_pruned_expert_by_expert(tiny_llama: Path, tiny_text: Path) -> None:
    """Experts keep their own outputs, everything else follows the dense model; all reach their sparsity."""
    model = mixture(tiny_llama, experts=3)
    blocks = find_blocks(model.module, exclude=r"experts\.2")
    model = replace(model, blocks=blocks)
    windows = windows_of(model, tiny_text)
    made = Protocol(session_of(model, windows), one_shot=False)
    rule = Rule(resolve_metric("wanda"), parse_target("0.5"), "obs", "dense")
    made.prepare([rule.metric], "obs")
    walk = made.walk([rule], [windows.tokens])
    pruned = {name: weight for _, (block,) in walk for name, weight in block.items()}
    (found,) = walk.measured()
    assert found.error is None
    assert found.sparsity == 0.5
    assert pruned.keys() == {layer.name for layer in model.layers}
