"""The benchmark of the search: Pruner-Zero's trees against its own operations in torch, incumbents, and summaries."""

from __future__ import annotations

import importlib
import math
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from gpmetric.metrics import resolve_metric

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SEQUENCES, LENGTH = 4, 8


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[pytest.MonkeyPatch]:
    """The folder of benchmarks on the path, as when one of them is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield patch


@pytest.fixture(scope="module")
def pruner_zero(benchmarks: pytest.MonkeyPatch) -> ModuleType:
    return importlib.import_module("pruner_zero")


@pytest.fixture(scope="module")
def bench_search(benchmarks: pytest.MonkeyPatch) -> ModuleType:
    return importlib.import_module("bench_search")


@pytest.fixture(scope="module")
def sample() -> dict[str, Tensor]:
    """Weight [6, 42], inputs [sequences, length, 42] and gradients [sequences, 6, 42] that statistics come from."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {
        "weight": draw(6, 42),
        "inputs": 0.3 * draw(SEQUENCES, LENGTH, 42),
        "gradients": draw(SEQUENCES, 6, 42) / 50,
    }


def ours(text: str, sample: dict[str, Tensor]) -> Tensor:
    """Score of a formula, from the operands as gpmetric measures them."""
    inputs, gradients = sample["inputs"], sample["gradients"]
    rms = inputs.square().mean(dim=(0, 1)).sqrt()
    return resolve_metric(text)(sample["weight"], X=rms, H=gradients.square().mean(dim=0))


def theirs(tree: Any, sample: dict[str, Tensor]) -> Tensor:
    """Score as Pruner-Zero's code computes it: |W|, [1, in] sums of squares over tokens, l2 gradients times 100."""
    if isinstance(tree, str):
        return {
            "W": sample["weight"].abs(),
            "X": sample["inputs"].square().sum(dim=1).mean(dim=0).reshape(1, -1),
            "G": (100 * sample["gradients"]).square().sum(dim=0).sqrt(),
        }[tree]
    name, (x, *rest) = tree[0], [theirs(part, sample) for part in tree[1:]]
    operations = {
        "sqr": lambda: x * x,
        "neg": lambda: -x,
        "abs": lambda: x.abs(),
        "log": lambda: (x.abs() + 1e-3).log(),
        "exp": lambda: x.clamp(max=100).exp(),
        "sqrt": lambda: x.abs().sqrt(),
        "tanh": lambda: x.tanh(),
        "pow": lambda: x**2,
        "skip": lambda: x,
        "mms": lambda: (x - x.min()) / (x.max() - x.min()),
        "zsn": lambda: (x - x.mean()) / x.std(unbiased=False),  # theirs is unbiased: a named difference
        "add": lambda: x + rest[0],
        "sub": lambda: x - rest[0],
        "mul": lambda: x * rest[0],
        "div": lambda: x / torch.linalg.norm(rest[0]),
    }
    return operations[name]()


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        (("mul", ("abs", ("mul", "W", "W")), ("mms", "G")), "(abs((abs(W)*abs(W)))*mms((200.0*sqrt(H))))"),
        (("log", ("skip", "W")), "log(abs(abs(W))+0.001)"),
        (("div", "W", "G"), "(abs(W)/sqrt(rowsum(colsum(sqr((200.0*sqrt(H)))))))"),
        (("div", "W", "X"), "(abs(W)/sqrt(rowsum(sqr((8*sqr(X))))))"),
        ("X", "(8*sqr(X))+0*abs(W)"),
    ],
)
def test_a_tree_is_written_as_worked_by_hand(pruner_zero: ModuleType, tree: Any, text: str) -> None:
    assert pruner_zero.formula(tree, SEQUENCES, LENGTH) == text


@pytest.mark.parametrize("name", ["sqr", "neg", "abs", "log", "exp", "sqrt", "tanh", "pow", "skip", "mms", "zsn"])
@pytest.mark.parametrize("leaf", ["W", "G", "X"])
def test_unary_operations_equal_theirs(
    pruner_zero: ModuleType, sample: dict[str, Tensor], name: str, leaf: str
) -> None:
    tree = (name, ("sub", leaf, ("exp", ("neg", leaf))))  # of both signs
    found = ours(pruner_zero.formula(tree, SEQUENCES, LENGTH), sample)
    torch.testing.assert_close(found, theirs(tree, sample).expand(6, 42), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
@pytest.mark.parametrize("leaves", ["WG", "GX", "XG", "XX", "WX"])
def test_binary_operations_equal_theirs(
    pruner_zero: ModuleType, sample: dict[str, Tensor], name: str, leaves: str
) -> None:
    tree = (name, *leaves)
    found = ours(pruner_zero.formula(tree, SEQUENCES, LENGTH), sample)
    torch.testing.assert_close(found, theirs(tree, sample).expand(6, 42), rtol=1e-5, atol=1e-6)


def test_random_trees_and_their_children_equal_theirs(pruner_zero: ModuleType, sample: dict[str, Tensor]) -> None:
    """Where fp32 has room: beyond 1e6 a tenth of a percent of rounding is no difference of meaning."""
    rng = random.Random(0)
    trees = [pruner_zero.random_tree(rng) for _ in range(100)]
    trees += [pruner_zero.mutated(pruner_zero.crossed(*rng.sample(trees, 2), rng), rng) for _ in range(100)]
    compared = 0
    for tree in trees:
        expected = theirs(tree, sample).expand(6, 42)
        sizes = [theirs(part, sample).abs().max() for _, part in pruner_zero.subtrees(tree)]
        if all(size < 1e6 for size in sizes):
            found = ours(pruner_zero.formula(tree, SEQUENCES, LENGTH), sample)
            torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3, msg=str(tree))
            compared += 1
    assert compared > 100


def test_trees_have_the_published_depths(pruner_zero: ModuleType) -> None:
    rng = random.Random(0)
    trees = [pruner_zero.random_tree(rng) for _ in range(300)]
    children = [pruner_zero.crossed(*rng.sample(trees, 2), rng) for _ in range(300)]
    depths = [[max(len(path) for path, _ in pruner_zero.subtrees(tree)) for tree in some] for some in (trees, children)]
    assert (min(depths[0]), max(depths[0])) == (2, 4)
    assert max(depths[1]) <= 4


def test_evolution_repeats_with_its_seed_and_gets_better(pruner_zero: ModuleType) -> None:
    """The fewer X in place of W, the better: 60 draws lead from random trees to trees of W alone."""

    def fitness(tree: Any) -> float:
        leaves = [part for _, part in pruner_zero.subtrees(tree) if isinstance(part, str)]
        return 1 - leaves.count("W") / len(leaves)

    first, again = (list(islice(pruner_zero.evolve(fitness, 10, random.Random(1)), 60)) for _ in range(2))
    assert first == again
    assert all(value == fitness(tree) for tree, value in first)
    before, after = ([value for _, value in part] for part in (first[:10], first[-10:]))
    assert sum(after) < sum(before) / 2


def test_incumbents_are_the_strict_improvements(bench_search: ModuleType) -> None:
    trace = [("a", 2.0, 0.5), ("b", math.inf, 1.0), ("c", 1.0, 2.5), ("d", 1.0, 3.0), ("e", 0.5, 9.0)]
    run = {"steps": bench_search.incumbents(trace)}
    assert [(step["evaluations"], step["metric"]) for step in run["steps"]] == [(1, "a"), (3, "c"), (5, "e")]
    assert [bench_search.incumbent(run, "evaluations", limit) for limit in (0.5, 1, 2, 4, 9)] == [None, *"aace"]
    assert [bench_search.incumbent(run, "seconds", limit) for limit in (0.4, 2.4, 2.5, 9)] == [None, *"ace"]


def test_summary_of_three_values_by_hand(bench_search: ModuleType) -> None:
    """The 20th percentile is four tenths of the way from the lowest of three to the middle one."""
    found = bench_search.summary([1.0, 3.0, 2.0])
    assert found == pytest.approx({"median": 2, "p20": 1.4, "p80": 2.6, "low": 1, "high": 3})


def test_a_seed_without_an_incumbent_counts_as_infinitely_bad(bench_search: ModuleType) -> None:
    found = bench_search.summary([1.0, math.inf, 2.0])
    assert (found["median"], found["high"]) == (2, math.inf)
    run = {"method": "ours", "steps": [{"evaluations": 3, "seconds": 1.0, "metric": "abs(W)"}]}
    document = {"runs": [run], "held_out": {"abs(W)": 0.5}}
    summaries = bench_search.summarise(document, {"evaluations": [2, 4]})
    assert [summaries["evaluations"][limit]["ours"]["median"] for limit in (2, 4)] == [math.inf, 0.5]


@pytest.mark.parametrize(
    ("ours_at", "other", "expected"),
    [
        ((1, 2), (3, 4), "ours is better"),
        ((3, 4), (1, 2), "ours is worse"),
        ((1, 3), (2, 4), "ranges overlap"),
        ((1, 2), (2, math.inf), "ranges overlap"),
        ((1, 2), (math.inf, math.inf), "ours is better"),
        ((math.inf, math.inf), (math.inf, math.inf), "ranges overlap"),
    ],
)
def test_verdict_on_two_ranges(bench_search: ModuleType, ours_at: Any, other: Any, expected: str) -> None:
    bounds = [dict(zip(("low", "high"), pair, strict=True)) for pair in (ours_at, other)]
    assert bench_search.verdict(*bounds) == expected


def test_seconds_are_counted_over_distinct_metrics_and_full_evaluations(bench_search: ModuleType) -> None:
    runs = [
        {"method": "ours", "seconds": 10.0, "evaluations": 20, "counts": {"unique_ranked": 40}},
        {"method": "pruner_zero", "published": {"common": 1.0, "whole text": 6.5, "search windows": 0.5}},
    ]
    found = {case: (one["median"], published) for case, one, published in bench_search.cost_pairs(runs)}
    assert found == {
        "a distinct metric, published on whole text": (0.25, 7.5),
        "a distinct metric, published on search windows": (0.25, 1.5),
        "a full evaluation, published on whole text": (0.5, 7.5),
        "a full evaluation, published on search windows": (0.5, 1.5),
    }
    assert bench_search.cost_pairs(runs[:1]) == []
