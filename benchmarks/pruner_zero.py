"""Pruner-Zero's search as far as it is published: trees, written as formulas of ours, their variation, and the cost.

The published code holds the primitives and random trees but no search. `bench_search.py` compares ours with this one.
Source: Dong et al. 2024 (Pruner-Zero), section 3 and algorithm 1.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gpmetric.calibration.cache import load_statistics
from gpmetric.evaluation.perplexity import mean_loss
from gpmetric.loading import load_model
from gpmetric.pruning.protocol import Protocol, Rule
from gpmetric.session.session import Session
from gpmetric.session.splits import read_windows
from gpmetric.targets import parse_target

Tree = str | tuple[Any, ...]  # a terminal, or an operation and its arguments

TERMINALS = ("W", "G", "X")
# operation -> the same in our language. Differences: exp is clamped at 80, where theirs is infinite in fp32 beyond 88;
# zsn takes the population deviation, which changes it by 1 / (2 * entries); 0 / 0 of mms and zsn is 0, theirs NaN.
UNARY = {
    "sqr": "sqr({})",
    "neg": "(-{})",
    "abs": "abs({})",
    "log": "log(abs({})+0.001)",
    "exp": "exp({})",
    "sqrt": "sqrt({})",
    "tanh": "tanh({})",
    "pow": "sqr({})",
    "skip": "{}",
    "mms": "mms({})",
    "zsn": "zsn({})",
}
BINARY = {"add": "({}+{})", "sub": "({}-{})", "mul": "({}*{})", "div": "({}/{})"}
DEPTHS = (2, 4)  # of a random tree; children are no deeper than the second
_TOURNAMENT = 0.4  # share of the population, and chance of a mutation: those of a public re-implementation, since the
_MUTATED = 0.3  # published code holds no search


def formula(tree: Tree, sequences: int, length: int) -> str:
    """A tree of Pruner-Zero's as a formula of ours, in its units, that gives the same score.

    Their W is |W|, their G is sqrt(sum_n (100 g_n)^2) = 100 sqrt(N H), their X the squared norm of an input, L X^2.

    Args:
        tree: of any depth.
        sequences: calibration sequences N.
        length: tokens per sequence L.
    """
    leaves = {"W": "abs(W)", "G": f"({100 * math.sqrt(sequences)!r}*sqrt(H))", "X": f"({length}*sqr(X))"}

    def emit(part: Tree) -> str:
        if isinstance(part, str):
            return leaves[part]
        name, *arguments = part
        texts = [emit(argument) for argument in arguments]
        if name == "div":  # by the Frobenius norm, of a vector where there is only X
            total = "rowsum(sqr({}))" if _is_vector(arguments[1]) else "rowsum(colsum(sqr({})))"
            texts[1] = f"sqrt({total.format(texts[1])})"
        return (UNARY | BINARY)[name].format(*texts)

    text = emit(tree)
    return text if "W" in text else f"{text}+0*abs(W)"  # half of their draws hold no W, which ours must


def _is_vector(tree: Tree) -> bool:
    if isinstance(tree, str):
        return tree == "X"
    return all(_is_vector(argument) for argument in (tree[1:2] if tree[0] == "div" else tree[1:]))


def random_tree(rng: random.Random, depth: int = 0) -> Tree:
    """Operations, all equally likely, down to the first of DEPTHS; below it every other node is a terminal."""
    if depth >= DEPTHS[1] or (depth >= DEPTHS[0] and rng.random() < 0.5):
        return rng.choice(TERMINALS)
    name = rng.choice([*UNARY, *BINARY])
    return (name, *(random_tree(rng, depth + 1) for _ in range(1 if name in UNARY else 2)))


def subtrees(tree: Tree, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Tree]]:
    """Every subtree with the way to it from the root."""
    yield path, tree
    if not isinstance(tree, str):
        for place in range(1, len(tree)):
            yield from subtrees(tree[place], (*path, place))


def replaced(tree: Tree, path: tuple[int, ...], part: Tree) -> Tree:
    """The tree with another subtree at the end of a way from the root."""
    if not path:
        return part
    return (*tree[: path[0]], replaced(tree[path[0]], path[1:], part), *tree[path[0] + 1 :])


def crossed(first: Tree, second: Tree, rng: random.Random) -> Tree:
    """The first with a random subtree of the second in place of one of its own."""
    while True:
        (path, _), (_, part) = rng.choice(list(subtrees(first))), rng.choice(list(subtrees(second)))
        child = replaced(first, path, part)
        if max(len(path) for path, _ in subtrees(child)) <= DEPTHS[1]:
            return child


def mutated(tree: Tree, rng: random.Random) -> Tree:
    """The tree with one node replaced by a random one of as many arguments."""
    path, part = rng.choice(list(subtrees(tree)))
    if isinstance(part, str):
        return replaced(tree, path, rng.choice(TERMINALS))
    return replaced(tree, path, (rng.choice(list(UNARY if part[0] in UNARY else BINARY)), *part[1:]))


def evolve(fitness: Callable[[Tree], float], size: int, rng: random.Random) -> Iterator[tuple[Tree, float]]:
    """Every candidate with its fitness (less is better), without end: nothing is recognised as equal to another.

    A random population; then each child of two tournaments' winners, by subtree crossover and sometimes node mutation,
    takes the place of the worst. Source: Dong et al. 2024 (Pruner-Zero), algorithm 1, whose settings are not published.
    """
    population: list[tuple[float, Tree]] = []
    while True:
        if len(population) < size:
            tree = random_tree(rng)
        else:
            entered = (rng.sample(population, math.ceil(_TOURNAMENT * size)) for _ in range(2))
            first, second = (min(some, key=lambda one: one[0])[1] for some in entered)
            tree = crossed(first, second, rng)
            if rng.random() < _MUTATED:
                tree = mutated(tree, rng)
        value = fitness(tree)
        yield tree, value
        population = sorted([*population, (value, tree)], key=lambda one: one[0])[:size]


def published_procedure(session: Session, gradients: Path) -> dict[str, float]:
    """Processor seconds that one candidate takes as published, its formula being theirs.

    Args:
        session: says which model, which texts and how many calibration windows.
        gradients: a file of the statistics cache.

    Returns:
        `common`: loading model, gradients and texts, calibration and pruning block after block; then perplexity on the
        `whole text` that search windows are taken from, or on these `search windows` alone. Starting Python and
        importing torch are left out.
    """
    ticks = [time.process_time()]
    request, texts = session.inputs, session.windows
    model, length = load_model(request.models[0], device="cpu"), texts["search"].tokens.shape[1]
    sample = read_windows(model, texts["calibration"].text, length, request.samples)
    whole = read_windows(model, texts["search"].text, length, None).tokens
    protocol = Protocol(
        Session(request, model, {"calibration": sample}, dense=load_statistics(gradients)), one_shot=False
    )
    rule = Rule(protocol.session.metric("pruner_zero"), parse_target("0.5"))
    protocol.prepare([rule.metric], rule.update)
    protocol.measure([rule], [])
    ticks.append(time.process_time())
    for tokens in (whole, texts["search"].tokens):
        mean_loss(model, tokens)
        ticks.append(time.process_time())
    return dict(zip(("common", "whole text", "search windows"), np.diff(ticks).tolist(), strict=True))
