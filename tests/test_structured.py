"""Structured pruning from the inside: units, shrinking, budgets, the policy, repairs, the ledger of a search."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gpmetric.data import Text, Windows, cut_windows, read_text
from gpmetric.errors import GpmetricError, InputError, ModelError
from gpmetric.evaluation.objectives import OBJECTIVES
from gpmetric.loading import load_model
from gpmetric.models import Model
from gpmetric.session.session import Session
from gpmetric.structured.cost_budgets import accepted_heads, macs, pools_of, uniform_counts, uniform_pools
from gpmetric.structured.draw_objective import DrawObjective
from gpmetric.structured.exchange import Exchange, ExchangeSearch, exchanged, is_better
from gpmetric.structured.groups import Groups, find_groups
from gpmetric.structured.policy import Policy, draw, entropy, initial
from gpmetric.structured.repair import Repairer
from gpmetric.structured.request import UNIT_RULES, SlimRequest
from gpmetric.structured.scores import UnitSession, standardised, unit_scores
from gpmetric.structured.search import PolicySearch, Schedule
from gpmetric.structured.search_log import SearchLog
from gpmetric.structured.shrink import Repair, Shrinker
from gpmetric.structured.starts import Start, best_start, make_start, started_from
from gpmetric.structured.unit_space import Pool, UnitSpace, find_space, project, top_units

KINDS = ("tiny_llama", "tiny_gpt2")
RULES = [name for name, rule in UNIT_RULES.items() if rule.tells(experts=False)]


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> Model:
    return load_model(str(request.getfixturevalue(request.param)), device="cpu")


@pytest.fixture
def groups(model: Model) -> Groups:
    return find_groups(model)


@pytest.fixture
def tokens(model: Model, tiny_text: Path) -> Tensor:
    return cut_windows(read_text(str(tiny_text)), model.tokenizer, 24, 8, vocabulary=model.vocabulary).tokens


def drawn(groups: Groups, seed: int = 0, share: float = 0.6) -> Tensor:
    """Units that stay, the first sublayer and the last but two losing all."""
    kept = torch.rand(groups.units, generator=torch.Generator().manual_seed(seed)) < share
    places = groups.split(torch.arange(groups.units))
    kept[places[0]] = False
    kept[places[-2]] = False
    return kept


def parameters(model: Model) -> int:
    return sum(one.numel() for block in model.blocks for one in block.module.parameters())


def logits(model: Model, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.module(input_ids=tokens, use_cache=False).logits
    return found


# Units


def test_units_and_their_costs(model: Model, groups: Groups) -> None:
    """Each removed alone, against the parameters that are left."""
    shrinker, whole = Shrinker(model, groups), parameters(model)
    assert groups.parameters == whole
    assert [one.unit for one in groups.sublayers] == ["head", "channel"] * 3
    for unit in {0, 1, groups.sublayers[0].units, groups.units - 1}:
        kept = torch.ones(groups.units, dtype=torch.bool)
        kept[unit] = False
        with shrinker.keeping(kept):
            assert whole - parameters(model) == groups.cost[unit] == groups.removed(kept)
    kept = drawn(groups)
    with shrinker.keeping(kept):
        assert whole - parameters(model) == groups.removed(kept)
    assert parameters(model) == whole


def test_other_architectures_are_refused(save_model: Callable[..., Path]) -> None:
    folder = save_model(
        "opt", hidden_size=32, ffn_dim=44, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
        word_embed_proj_dim=32,
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"is a opt model.*accepted are llama, mistral, qwen2, qwen3, gpt2"):
        find_groups(load_model(str(folder), device="cpu"))


@pytest.mark.parametrize("repaired", [False, True])
def test_what_is_gathered_is_what_is_masked(model: Model, groups: Groups, tokens: Tensor, repaired: bool) -> None:
    shrinker = Shrinker(model, groups)
    dense, state = logits(model, tokens), {name: one.clone() for name, one in model.module.state_dict().items()}
    for seed in range(3):
        kept = drawn(groups, seed)
        repairs = {}
        if repaired:
            for index, (sublayer, mine) in enumerate(zip(groups.sublayers, groups.split(kept), strict=True)):
                weight = sublayer.weight
                repairs[index] = Repair(
                    weight[:, sublayer.columns[mine].flatten()] * 1.5 if index % 3 else None, torch.randn(len(weight))
                )
        with shrinker.keeping(kept, repairs):
            small = logits(model, tokens)
        with shrinker.masking(kept, repairs):
            masked = logits(model, tokens)
        assert torch.allclose(small, masked, rtol=0, atol=1e-5 * float(masked.abs().max()))
        assert not torch.allclose(small, dense, atol=1e-2)
        assert torch.equal(logits(model, tokens), dense)
    assert model.module.state_dict().keys() == state.keys()
    assert all(torch.equal(one, state[name]) for name, one in model.module.state_dict().items())


# Budgets


def simple_space(cost: Sequence[float]) -> tuple[UnitSpace, list[Pool]]:
    """Atoms without gates; half of the cost stays."""
    costs = torch.tensor(cost, dtype=torch.float64)
    count = len(costs)
    space = UnitSpace(torch.arange(count), costs, torch.full((2, count), count), count)
    return space, [Pool(torch.arange(count), float(costs.sum()) / 2)]


@pytest.mark.slow
def test_the_projection_is_the_nearest_point_of_the_budget() -> None:
    """No point of 100 random ones on the budget is nearer, distances weighted by the costs."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        space, pools = simple_space(generator.uniform(0.5, 3, 6).tolist())
        values = torch.from_numpy(generator.normal(0.5, 1.0, 6))
        found = project(values, space, pools)
        assert float((found * space.cost).sum()) == pytest.approx(pools[0].kept)
        assert ((found >= 0) & (found <= 1)).all()
        others = torch.stack([project(torch.from_numpy(generator.uniform(-1, 2, 6)), space, pools) for _ in range(100)])
        weights = space.cost.sqrt()
        assert ((weights * (others - values)).norm(dim=1) >= (weights * (found - values)).norm() - 1e-9).all()


@pytest.mark.parametrize("granularity", [("head", "channel"), ("channel",), ()])
@pytest.mark.parametrize("layers", [False, True])
def test_every_space_meets_its_budget(model: Model, groups: Groups, granularity: Any, layers: bool) -> None:
    if not granularity and not layers:
        return
    space = find_space(groups, granularity, layers=layers)
    pools = pools_of(groups, space, 0.3, groups.cost)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        values = torch.rand(space.entries, generator=generator, dtype=torch.float64) * 1.4 - 0.2
        found = project(values, space, pools)
        expected = float((space.cost * space.stays(found)).sum())
        assert expected == pytest.approx(pools[0].kept, rel=1e-6)
        assert ((found >= 0) & (found <= 1)).all()
        kept = top_units(space.stays(found), space, pools)
        short = 0.3 * groups.parameters - float(groups.cost[~kept].sum())
        assert -1e-6 <= short < float(space.cost.min())
    if not granularity:  # whole parts only
        assert all(mine.all() or not mine.any() for mine in groups.split(kept))


def test_gates_close_what_is_behind_them(groups: Groups) -> None:
    space = find_space(groups, ("channel",), layers=True)
    values = torch.ones(space.entries, dtype=torch.float64)
    assert space.stays(values).all()
    values[-1] = 0  # the last block
    kept = space.kept(space.stays(values))
    assert [bool(mine.any()) for mine in groups.split(kept)] == [True] * 4 + [False] * 2
    cost = space.cost
    slopes, step = space.slopes(torch.full_like(values, 0.5), cost), 1e-6
    for entry in (0, len(cost) - 1, len(cost), space.entries - 1):
        moved = torch.full_like(values, 0.5)
        moved[entry] += step
        change = (cost * (space.stays(moved) - space.stays(torch.full_like(values, 0.5)))).sum() / step
        assert float(slopes[entry]) == pytest.approx(float(change), rel=1e-4)


def test_the_units_least_likely_to_stay_go() -> None:
    """Half of a cost of 10 by hand: 3 and 1 go, 4 is passed over, and another 1."""
    space, pools = simple_space([4.0, 3.0, 1.0, 1.0, 1.0])
    stays = torch.tensor([0.3, 0.1, 0.2, 0.4, 0.4], dtype=torch.float64)
    assert top_units(stays, space, pools).tolist() == [True, False, False, False, True]


def test_budgets_by_kind(groups: Groups) -> None:
    space = find_space(groups, ("head", "channel"), layers=False)
    pools = pools_of(groups, space, 0.5, groups.cost, by_kind=True)
    assert len(pools) == 2
    shares = [1 - pool.kept / float(space.cost[pool.atoms].sum()) for pool in pools]
    assert shares[0] == pytest.approx(shares[1])
    with pytest.raises(InputError, match=r"--sparsity 0\.99 is out of reach"):
        pools_of(groups, find_space(groups, ("head",), layers=False), 0.99, groups.cost)


def test_equal_counts(model: Model, groups: Groups) -> None:
    heads = accepted_heads(groups, model.module.config)
    counts = uniform_counts(groups, 0.3, ("head", "channel"), heads)
    assert counts["attention"] in heads
    space = find_space(groups, ("head", "channel"), layers=False)
    kept = top_units(torch.rand(len(space.cost), dtype=torch.float64), space, uniform_pools(groups, space, counts))
    assert [int(mine.sum()) for mine in groups.split(kept)] == [counts["attention"], counts["mlp"]] * 3
    assert 0 <= 0.3 * groups.parameters - groups.removed(kept) < 3 * groups.sublayers[1].cost
    with pytest.raises(InputError, match="no channel would be left"):
        uniform_counts(groups, 0.9, ("channel",), heads)
    some = uniform_counts(groups, 0.3, ("channel",), heads)["mlp"]
    for multiple in (2, 3, 4, 8):
        stays = uniform_counts(groups, 0.3, ("channel",), heads, multiple)["mlp"]
        assert some <= stays < some + multiple
        assert stays % multiple == 0
    whole = groups.sublayers[1].units
    with pytest.raises(InputError, match=rf"of {whole} channels, none if what stays is a multiple of 1000 \("):
        uniform_counts(groups, 0.3, ("channel",), heads, 1000)


def test_multiply_accumulates_of_a_head(groups: Groups) -> None:
    """Weights, and a score and a value for half of 100 tokens, for each feature of its queries."""
    sublayer = groups.sublayers[0]
    biases = sum(
        rows.shape[0] * rows.shape[2]
        for name, rows in sublayer.rows.items()
        if getattr(sublayer.module, name).bias is not None
    )
    found = macs(groups, 100)
    assert float(found[0]) == sublayer.cost - biases + 100 * sublayer.columns.shape[1]
    assert float(found[-1]) <= groups.sublayers[-1].cost


# The policy


def test_rloo_is_the_natural_gradient_over_the_root_of_the_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The expected step over every antithetic pair of draws of 3 units, against 2 s (1 - s) / sqrt(c) times the
    true gradient; all differences of losses have the deviation 1."""
    monkeypatch.setattr(Policy, "_averaged", lambda *_: 1.0)
    space, _ = simple_space([1.0, 1.0, 4.0])
    chances = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)
    generator = np.random.default_rng(0)
    losses = {bits: float(generator.uniform()) for bits in itertools.product((0, 1), repeat=3)}

    def pairs(p: float) -> list[tuple[float, tuple[int, int]]]:
        """Of one unit: chance and draws of u and 1 - u."""
        one = min(p, 1 - p)
        return [(one, (1, 0)), (one, (0, 1)), (1 - 2 * one, (1, 1) if p > 0.5 else (0, 0))]

    expected = torch.zeros(3, dtype=torch.float64)
    for units in itertools.product(*(pairs(float(p)) for p in chances)):
        first, second = zip(*(draws for _, draws in units), strict=True)
        policy = Policy(space, [], chances.clone(), average=1.0)
        draws = [torch.tensor(bits, dtype=torch.float64) for bits in (first, second)]
        policy.update(draws, [losses[first], losses[second]], 1e-3)
        expected += math.prod(chance for chance, _ in units) * (chances - policy.probabilities) / 1e-3
    true = torch.zeros(3, dtype=torch.float64)
    for unit, (bits, loss) in itertools.product(range(3), losses.items()):
        others = math.prod(
            float(p if bit else 1 - p)
            for place, (bit, p) in enumerate(zip(bits, chances, strict=True))
            if place != unit
        )
        true[unit] += (1 if bits[unit] else -1) * others * loss
    assert torch.allclose(expected, 2 * chances * (1 - chances) / space.cost.sqrt() * true, atol=1e-9)


def test_rloo_steps_in_deviations_of_the_differences() -> None:
    """A pair of one unit with losses 3 and 1, then 1 and 1.5: averages of 4 and 4 - 3.75 / 50; a dead model is held."""
    space, _ = simple_space([1.0])
    policy = Policy(space, [], torch.tensor([0.5], dtype=torch.float64))
    pair = [torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]
    policy.update(pair, [3.0, 1.0], 0.1)
    assert policy.average == 4.0
    assert float(policy.probabilities) == pytest.approx(0.5 - 0.1 * 1 * 0.5)
    policy.update(pair, [1.0, 1.5], 0.1)
    assert policy.average == pytest.approx(4 - 3.75 / 50)
    assert float(policy.probabilities) == pytest.approx(0.45 + 0.1 * 0.5 / math.sqrt(4 - 3.75 / 50) * 0.55)
    before, average = float(policy.probabilities), policy.average
    policy.update(pair, [1.0, math.inf], 0.1)
    assert policy.average == average
    assert before < float(policy.probabilities) <= before + 0.1 * 3
    policy = Policy(space, [], torch.tensor([0.5], dtype=torch.float64))
    policy.update(pair, [1.0, 1.0], 0.1)
    assert float(policy.probabilities) == 0.5


def test_the_published_estimator_by_hand() -> None:
    """Two draws, losses 3 and 1, then 2 and 2; the average moves a fifth of the way and is taken before the step."""
    space, _ = simple_space([1.0, 1.0])
    policy = Policy(space, [], torch.tensor([0.5, 0.8], dtype=torch.float64), "paper")
    draws = [torch.tensor([1.0, 1.0], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)]
    policy.update(draws, [3.0, 1.0], 0.01)
    assert policy.average == 2.0
    assert policy.probabilities.tolist() == pytest.approx([0.5 - 0.01 * (1 * 0.5 - 1 * -0.5) / 0.5, 0.8], abs=1e-6)
    policy.update(draws, [2.5, 2.5], 0.01)
    assert policy.average == pytest.approx(2.1)


def test_draws_come_in_antithetic_pairs_and_again() -> None:
    chances = torch.linspace(0, 1, 400, dtype=torch.float64)
    first, second = draw(chances, 2, seed=3, step=5, antithetic=True)
    assert torch.equal(first, draw(chances, 2, seed=3, step=5, antithetic=True)[0])
    assert not torch.equal(first, draw(chances, 2, seed=3, step=6, antithetic=True)[0])
    assert not ((first == 0) & (second == 0) & (chances > 0.5)).any()  # u or 1 - u is below one half
    assert not ((first == 1) & (second == 1) & (chances < 0.5)).any()
    assert first[0] == 0
    assert first[-1] == 1
    mean = sum(draw(chances, 2, seed=0, step=step, antithetic=True)[1] for step in range(500)) / 500
    assert torch.allclose(mean, chances, atol=0.12)


def test_entropy_in_bits() -> None:
    assert entropy(torch.tensor([0.5, 0.5], dtype=torch.float64)) == pytest.approx(1)
    assert entropy(torch.tensor([0.0, 1.0], dtype=torch.float64)) == 0


# Scores and repairs


def unit_session(
    model: Model, groups: Groups, tokens: Tensor, *, products: bool = False, **options: Any
) -> UnitSession:
    windows = Windows(Text("tiny", ""), tokens)
    return UnitSession(Session(SlimRequest(**options), model, {"calibration": windows}), groups, products)


@pytest.mark.every(3)
@pytest.mark.parametrize("name", [*RULES, "abs(W)*X", "W*W*H", "W*W*D"])
def test_every_rule_scores_every_unit(model: Model, groups: Groups, tokens: Tensor, name: str) -> None:
    scores = unit_scores(name, unit_session(model, groups, tokens))
    assert scores.shape == (groups.units,)
    assert scores.isfinite().all()
    means = [float(mine.mean()) for mine in groups.split(standardised(groups, scores))]
    assert means == pytest.approx([0.0] * len(means), abs=1e-9)


@pytest.mark.parametrize("index", [0, 1])
def test_flap_and_wanda_by_hand(model: Model, groups: Groups, tokens: Tensor, index: int) -> None:
    """From the activations themselves, of an attention and an MLP; FLAP standardises features, a head is their mean."""
    seen: list[Tensor] = []
    sublayer = groups.sublayers[index]
    layer = sublayer.output
    with layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1]))):
        logits(model, tokens)
    inputs, weight = torch.cat(seen).double(), sublayer.weight.double()
    per_unit = sublayer.columns.shape[1]
    units = unit_session(model, groups, tokens)
    flap = groups.split(unit_scores("flap", units))[index]
    expected = (inputs.var(dim=0, correction=0) * weight.square().sum(dim=0)) ** (2 if index == 0 else 1)
    expected = (expected - expected.mean()) / expected.std()
    assert torch.allclose(flap, expected.view(-1, per_unit).mean(dim=1), rtol=1e-4, atol=1e-6)
    wanda = groups.split(unit_scores("wanda_sp", units))[index]
    expected = (weight.abs() * inputs.square().mean(dim=0).sqrt()).sum(dim=0)
    assert torch.allclose(wanda, expected.view(-1, per_unit).mean(dim=1), rtol=1e-4)


def gate_slopes(model: Model, groups: Groups, tokens: Tensor, labels: Tensor, centres: list[Any]) -> Tensor:
    """Gradient of the summed loss at a gate for each unit and token, [windows, length, units], by autograd alone."""
    gates = [torch.ones(*tokens.shape, one.units, requires_grad=True) for one in groups.sublayers]

    def close(index: int, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        one, centre, states = groups.sublayers[index], centres[index], args[0].clone()
        for unit, columns in enumerate(one.columns):
            states[..., columns] = centre[columns] + gates[index][..., unit, None] * (
                args[0][..., columns] - centre[columns]
            )
        return (states,)

    with ExitStack() as hooks:
        for index, one in enumerate(groups.sublayers):
            hooks.enter_context(one.output.register_forward_pre_hook(lambda _, args, index=index: close(index, args)))
        found = model.module(input_ids=tokens, use_cache=False).logits[:, :-1]
        cross_entropy(found.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    return torch.cat([one.grad for one in gates if one.grad is not None], dim=-1).double()


@pytest.mark.parametrize("kinds", [("channel", "head"), ("channel",)])
@pytest.mark.parametrize("repair", ["none", "bias", "least-squares"])
def test_second_order_costs_of_removal(
    model: Model, groups: Groups, tokens: Tensor, repair: str, kinds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the mean squared slope at each gate; units that are not told apart have one gate together."""
    labels = logits(model, tokens)[:, :-1].argmax(dim=-1)
    monkeypatch.setattr(torch, "multinomial", lambda chances, *_, **__: chances.argmax(dim=-1, keepdim=True))
    units = unit_session(model, groups, tokens, repair=repair, granularity=kinds)
    centred = [
        repair == "least-squares" or (repair == "bias" and one.output.bias is not None) for one in groups.sublayers
    ]
    centres = [one.mean.float() * told for one, told in zip(units.features, centred, strict=True)]
    found = groups.split(unit_scores("taylor2", units))
    for one, mine, slopes in zip(
        groups.sublayers,
        found,
        gate_slopes(model, groups, tokens, labels, centres).split([one.units for one in groups.sublayers], dim=-1),
        strict=True,
    ):
        if one.unit in kinds:
            expected = slopes.square().sum(dim=(0, 1)) / (2 * tokens.numel())
        else:
            total = slopes.sum(dim=-1).square().sum() / (2 * tokens.numel())
            expected = (total / one.units).expand(one.units)
        assert torch.allclose(mine, expected, rtol=1e-3, atol=1e-4 * float(expected.max()))


def test_a_loss_is_weighed_against_its_cost(model: Model, groups: Groups, tokens: Tensor) -> None:
    """`taylor2` takes what costs the divergence least per parameter, wherever it is."""
    units = unit_session(model, groups, tokens)
    space = find_space(groups, groups.kinds, layers=False)
    pools = pools_of(groups, space, 0.4, groups.cost)
    start = make_start("taylor2", units, space, pools, "rloo").probabilities
    prices = unit_scores("taylor2", units) / groups.cost
    assert torch.equal(top_units(start, space, pools), top_units(prices, space, pools))


def test_the_best_start_is_what_was_measured_best() -> None:
    figures = {"a": 0.3, "b": 0.1, "c": 0.1}
    starts = [Start(name, torch.zeros(2), torch.full((2,), value), {}) for name, value in figures.items()]
    best = best_start(starts, lambda one: float(one[0]))
    assert (best.name, float(best.probabilities[0])) == ("b", pytest.approx(0.1))
    assert best.compared == pytest.approx(figures)
    assert best_start(starts[:1], lambda one: math.nan) is starts[0]

    def tried(*granularity: str) -> set[str]:
        return set(started_from(SlimRequest(granularity=granularity)))

    assert "block_influence" not in tried("channel", "head")
    assert {"taylor2", "wanda_sp", "block_influence"} < tried("channel", "layer")
    assert tried("block") == {"taylor2", "block_influence"}  # the others give all blocks the same


def test_repairs_against_least_squares(model: Model, groups: Groups, tokens: Tensor) -> None:
    """Of one MLP: the mean is that of what is gone; the fit leaves less than the constant, and what lstsq leaves."""
    sublayer, index = groups.sublayers[1], 1
    kept = torch.ones(groups.units, dtype=torch.bool)
    places = groups.split(torch.arange(groups.units))[index]
    kept[places[::2]] = False
    seen: list[Tensor] = []
    layer = sublayer.output
    with layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1]))):
        logits(model, tokens)
    inputs, weight = torch.cat(seen).double(), sublayer.weight.double()
    bias = 0 if layer.bias is None else layer.bias.double()
    wanted, stays = inputs @ weight.t() + bias, kept[places]
    features = unit_session(model, groups, tokens, products=True).features

    def left(repair: Repair) -> float:
        columns = weight[:, stays] if repair.weight is None else repair.weight.double()
        constant = bias if repair.bias is None else repair.bias.double()
        return float((wanted - inputs[:, stays] @ columns.t() - constant).square().mean())

    constant = Repairer(groups, features, "bias", add_bias=True).repairs(kept)
    fitted = Repairer(groups, features, "least-squares", add_bias=True).repairs(kept)
    assert constant.keys() == fitted.keys() == {index}
    assert torch.allclose(
        constant[index].bias.double(), bias + weight[:, ~stays] @ inputs[:, ~stays].mean(dim=0), rtol=1e-4, atol=1e-6
    )
    assert fitted[index].weight is not None
    design = torch.cat([inputs[:, stays], torch.ones(len(inputs), 1)], dim=1)
    best = torch.linalg.lstsq(design, wanted).solution
    least = float((wanted - design @ best).square().mean())
    assert left(Repair()) > left(constant[index]) > left(fitted[index])
    assert least <= left(fitted[index]) <= 1.05 * least + 1e-9
    assert Repairer(groups, features, "none").repairs(kept) == {}
    without = Repairer(groups, features, "bias").repairs(kept)
    assert bool(without) == (layer.bias is not None)


# The search


def made_policy(model: Model, groups: Groups, tokens: Tensor) -> tuple[Policy, Shrinker, Repairer]:
    space = find_space(groups, ("head", "channel"), layers=True)
    pools = pools_of(groups, space, 0.3, groups.cost)
    start = initial(space, pools, torch.zeros(len(space.cost), dtype=torch.float64), 0.9)
    repairer = Repairer(groups, unit_session(model, groups, tokens).features, "bias")
    return Policy(space, pools, start), Shrinker(model, groups), repairer


@pytest.mark.every(2)
@pytest.mark.slow
def test_a_search_goes_on_wherever_it_was_killed(
    model: Model, groups: Groups, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same probabilities to the last bit; no gradient is computed, and the model is left as it was."""
    monkeypatch.setattr("gpmetric.structured.search._STATE", 2)  # reports behind a state, and one without
    schedule = Schedule(55, None, draws=2, rate=0.02, seed=1)
    dense = logits(model, tokens)

    def run(path: Path | None, resume: bool = False) -> tuple[Policy, list[dict[str, Any]]]:
        policy, shrinker, repairer = made_policy(model, groups, tokens)
        with SearchLog(path, {"seed": 1}, resume=resume) as ledger:
            PolicySearch(policy, shrinker, repairer, DrawObjective(model, tokens, "kl", 2, 1), schedule, ledger).run()
        return policy, [{name: value for name, value in one.items() if name != "seconds"} for one in ledger.reports]

    whole = tmp_path / "whole.jsonl"
    policy, reports = run(whole)
    assert [one["step"] for one in reports] == [25, 50, 55]
    assert all(parameter.grad is None for parameter in model.module.parameters())
    assert torch.equal(logits(model, tokens), dense)
    content = whole.read_bytes()
    for cut in (0, 5, len(content) // 3, len(content) // 2, len(content) - 3, len(content)):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(content[:cut])
        again, told = run(path, resume=True)
        assert torch.equal(again.probabilities, policy.probabilities), cut
        assert told == reports, cut
    with pytest.raises(InputError, match="exists: go on with --resume"):
        run(whole)


def test_an_interrupted_search_loses_no_step(
    model: Model, groups: Groups, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of a step after step 7; resumed, it ends where it would have."""
    schedule = Schedule(12, None, draws=2, rate=0.02, seed=1)

    def run(path: Path | None, calls: int) -> Policy:
        policy, shrinker, repairer = made_policy(model, groups, tokens)
        measure, measured = DrawObjective(model, tokens, "kl", 2, 1), DrawObjective.__call__

        def interrupted(self: DrawObjective) -> float:
            nonlocal calls
            calls -= 1
            if not calls:
                raise KeyboardInterrupt
            return measured(self)

        monkeypatch.setattr(DrawObjective, "__call__", interrupted)
        try:
            with SearchLog(path, {}, resume=True) as ledger:
                PolicySearch(policy, shrinker, repairer, measure, schedule, ledger).run()
        finally:
            monkeypatch.setattr(DrawObjective, "__call__", measured)
        return policy

    path = tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(path, 16)
    with SearchLog(path, {}, resume=True) as ledger:
        assert ledger.state is not None
        assert ledger.state.step == 7
    assert torch.equal(run(path, 0).probabilities, run(None, 0).probabilities)


def test_a_foreign_or_damaged_ledger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for content, told in (
        ("a poem\n", "is no ledger"),
        ("a poem", "is no ledger"),
        ('{"format": 2, "seed": 2}\n', "seed is 2 there, 1 here"),
        ('{"format": 2, "seed": 1}\nx\n', "is damaged at line 2"),
        ('{"format": 2, "seed": 1}\n{"state": {"step": 1}}\n', "is damaged at line 2"),
    ):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(InputError, match=told):
            SearchLog(path, {"seed": 1}, resume=True)
        assert path.read_text(encoding="utf-8") == content


def test_what_drawn_models_are_measured_by(
    model: Model, groups: Groups, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Divergence and loss by their definitions; a window once a round; predictions kept or made anew."""
    shrinker, kept, dense = Shrinker(model, groups), drawn(groups), logits(model, tokens)

    def figures(objective: Any) -> list[tuple[float, Tensor]]:
        measure, found = DrawObjective(model, tokens, objective, 3, seed=4), []
        assert len(measure) == 3
        for step in range(6):
            measure.turn(step)
            with shrinker.keeping(kept):
                found.append((measure(), measure._windows))
        return found

    with shrinker.keeping(kept):
        small = logits(model, tokens)
    rows = {tuple(window.tolist()): place for place, window in enumerate(tokens)}
    divergences, losses = figures("kl"), figures("loss")
    for (divergence, windows), (loss, same) in zip(divergences, losses, strict=True):
        assert torch.equal(windows, same)
        places = [rows[tuple(window.tolist())] for window in windows]
        teacher, log_small = dense[places, :-1].softmax(-1), small[places, :-1].log_softmax(-1)
        assert divergence == pytest.approx(float((teacher * (teacher.log() - log_small)).sum(-1).mean()), rel=1e-3)
        taken = log_small.gather(-1, windows[:, 1:, None])
        assert loss == pytest.approx(-float(taken.mean()), rel=1e-5)
    for first in (0, 3):  # 8 windows in rounds of 3 batches
        seen = [rows[tuple(window.tolist())] for _, windows in divergences[first : first + 3] for window in windows]
        assert sorted(seen) == list(range(8))
    monkeypatch.setattr("gpmetric.structured.draw_objective.REFERENCE_BYTES", 0)
    assert [one for one, _ in figures("kl")] == [one for one, _ in divergences]


def test_a_policy_finds_what_does_no_harm() -> None:
    """Every other unit costs a loss of 1 when it is gone, the rest nothing: found from equal probabilities."""
    space, pools = simple_space([1.0] * 60)
    policy = Policy(space, pools, torch.full((60,), 0.5, dtype=torch.float64))
    for step in range(300):
        draws = draw(policy.probabilities, 2, 0, step, antithetic=True)
        policy.update(draws, [float((1 - one)[1::2].sum()) for one in draws], 0.02)
    assert policy.probabilities[1::2].mean() > policy.probabilities[::2].mean() + 0.3


def test_an_exchange_by_hand() -> None:
    """Costs 3 and 3 against 1 each: the cheap ones that are worth least go for a dear one, if there is room."""
    cost = torch.tensor([3.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    worth = torch.tensor([0.1, 0.2, 0.5, 0.3, 0.4, 0.9, 0.8])
    dear, cheap = torch.arange(2), torch.arange(2, 7)
    kept = torch.tensor([True, False, True, True, True, False, True])

    def after(count: int, room: float, giver: Tensor = cheap, taker: Tensor = dear) -> list[int]:
        found: list[int] = (
            exchanged(kept, cost, Exchange(giver, taker, count, worth, worth), room).nonzero()[:, 0].tolist()
        )
        return found

    assert after(2, 1.0) == [0, 1, 2, 6]
    assert after(3, 0.0) == [0, 1, 6]
    assert after(2, 0.0) == [0, 2, 4, 5, 6]  # no room for the dear one: the cheap ones worth most
    assert after(1, 0.0, giver=dear, taker=cheap) == [2, 3, 4, 5, 6]
    assert after(1, 0.0, taker=cheap) == [0, 2, 4, 5, 6]


def test_a_gain_is_two_standard_errors() -> None:
    assert is_better([-1.0, -1.0, -1.0])
    assert not is_better([-3.0, 1.0, -1.0, 1.0])  # mean -0.5, standard error 0.96
    assert not is_better([0.0, 0.0])
    assert not is_better([0.0])
    assert is_better([-0.1])


def made_exchanges(
    model: Model, groups: Groups, tokens: Tensor, steps: int, path: Path | None = None, **chosen: bool
) -> ExchangeSearch:
    """From random units at 0.4, so that there is something to gain."""
    space = find_space(groups, () if chosen.get("blocks") else groups.kinds, **{"layers": False} | chosen)
    pools = pools_of(groups, space, 0.4, groups.cost)
    worth = torch.randn(len(space.cost), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    kept = torch.zeros(len(space.cost), dtype=torch.bool)
    kept[space.atom] = top_units(worth, space, pools)
    repairer = Repairer(groups, unit_session(model, groups, tokens).features, "bias")
    measure, schedule = DrawObjective(model, tokens, "kl", 2, 1), Schedule(steps, None, 2, 0.0, 1)
    log = SearchLog(path, {}, resume=path is not None)
    return ExchangeSearch(groups, space, pools, worth, kept, Shrinker(model, groups), repairer, measure, schedule, log)


@pytest.mark.every(3)
@pytest.mark.parametrize("chosen", [{}, {"layers": True}, {"blocks": True}])
def test_exchanges_lower_the_divergence_at_the_same_cost(
    model: Model, groups: Groups, tokens: Tensor, chosen: dict[str, bool]
) -> None:
    """Measured anew on all windows, which are what its steps compared models on."""
    search = made_exchanges(model, groups, tokens, 40, **chosen)
    space, before = search.space, search.kept.clone()

    def divergence(kept: Tensor) -> float:
        units, total = space.kept(kept), 0.0
        for piece in range(len(search.objective)):
            search.objective.turn(piece)
            with search.shrinker.keeping(units, search.repairer.repairs(units)):
                total += search.objective()
        return total / len(search.objective)

    after = search.run().probabilities.bool()
    assert float(space.cost[after].sum()) <= float(space.cost[before].sum()) + 1e-6
    if not chosen.get("blocks"):
        assert not torch.equal(before, after)
        assert divergence(after) < divergence(before)
    else:
        assert int(after.sum()) == int(before.sum()) == 2
        assert divergence(after) <= divergence(before)
    assert search.log.reports[-1]["loss"] == pytest.approx(divergence(after), rel=0.2)


def test_repairs_of_what_moved_are_those_of_the_whole(model: Model, groups: Groups, tokens: Tensor) -> None:
    repairer = Repairer(groups, unit_session(model, groups, tokens, products=True).features, "least-squares")
    before, after = drawn(groups, 1), drawn(groups, 1)
    places = groups.split(torch.arange(groups.units))
    after[places[1]] = ~after[places[1]]
    after[places[2]] = True
    after[places[3]] = False
    expected, found = repairer.repairs(after), repairer.moved(repairer.repairs(before), before, after)
    assert found.keys() == expected.keys()
    for index, one in expected.items():
        for mine, other in ((found[index].weight, one.weight), (found[index].bias, one.bias)):
            assert (mine is None and other is None) or torch.equal(mine, other)  # type: ignore[arg-type]


@pytest.mark.every(2)
def test_a_search_of_exchanges_goes_on(model: Model, groups: Groups, tokens: Tensor, tmp_path: Path) -> None:
    """Ended after 7 steps: it goes on to the same units, what stays being measured again."""
    path = tmp_path / "a.jsonl"
    first = made_exchanges(model, groups, tokens, 7, path)
    with first.log:
        first.run()
    again = made_exchanges(model, groups, tokens, 30, path)
    assert again.state.step == 7
    with again.log:
        found = again.run()
    whole = made_exchanges(model, groups, tokens, 30).run()
    assert torch.equal(found.probabilities, whole.probabilities)
    assert found.step == whole.step == 30


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_model_without_a_loss_ends_the_search(model: Model, groups: Groups, tokens: Tensor, objective: Any) -> None:
    policy, _, repairer = made_policy(model, groups, tokens)
    with model.holding([torch.full_like(layer.weight, 1e30) for layer in model.layers]):
        measure, schedule = DrawObjective(model, tokens, objective, 2, 0), Schedule(60, None, 2, 0.1, 0)
        with pytest.raises(GpmetricError, match="no model that was drawn has a finite loss"):
            PolicySearch(policy, Shrinker(model, groups), repairer, measure, schedule, SearchLog(None, {})).run()
