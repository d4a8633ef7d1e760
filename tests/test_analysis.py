"""The analysis of a ledger against hand-worked figures, brute force, and campaigns in which the truth is known."""

from __future__ import annotations

import json
import random
import shlex
import sqlite3
import sys
from collections.abc import Callable, Sequence
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from scipy import stats

import gpmetric
from gpmetric.analysis import plot
from gpmetric.analysis.analyse import analyse
from gpmetric.analysis.features import find_features, find_groups, merged, powers, sub_expressions
from gpmetric.analysis.lineages import find_lineages
from gpmetric.analysis.masks import distances, read_sketches
from gpmetric.analysis.plot import draw_page
from gpmetric.analysis.principles import state_principles
from gpmetric.analysis.statistics import add_q_values, compare, correlate, fitness_ranks, mantel
from gpmetric.errors import GpmetricError, InputError, LedgerError
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.records import Candidate, Evaluation
from gpmetric.expression import Expression, parse
from gpmetric.expression.canonical import canonical
from gpmetric.metrics import resolve_metric, spelled

TARGETS = ("0.5", "2:4")
SCALES = ("abs(W)", "sqr(W)", "tanh(W)", "sqrt(W)")
FACTORS = ("", "*X", "*G", "*X*G")
EXTRAS = ("", "+exp(D)", "+sqr(D)", "+exp(D)*H")
FORMULAS = [f"{scale}{factor}{extra}" for scale, factor, extra in product(SCALES, FACTORS, EXTRAS)]
Losses = Callable[[Expression, random.Random], dict[str, float]]


def known_truth(formula: Expression, rng: random.Random) -> dict[str, float]:
    """X helps and exp hurts at both targets; G helps at 0.5 and hurts as much at 2:4."""
    base = 1.0 - 0.3 * ("X" in formula.operands) + 0.5 * ("exp" in formula.tokens) + rng.uniform(0, 0.05)
    swing = 0.1 * ("G" in formula.operands)
    return {"0.5": base - swing, "2:4": 2 * base + swing}


def write_ledger(
    path: Path, losses: Losses, formulas: Sequence[str] = FORMULAS, sketches: Sequence[str | None] = ()
) -> Path:
    """A campaign of one unfinished generation, with a failed evaluation amid the others."""
    rng = random.Random(0)
    with Ledger.open(path, {"target": list(TARGETS)}, resume=False) as ledger:
        for position, text in enumerate(formulas):
            metric = resolve_metric(text)
            expression = metric.expression
            form = spelled(canonical(expression), metric.granularity)
            row = Evaluation(
                text, form, 0, "done", f"mask {position}", figures={"loss": losses(expression, rng)},
                nodes=len(expression), sketch=sketches[position] if sketches else None,
            )  # fmt: skip
            ledger.record(Candidate(0, position, text, form, "evaluated"), row)
        lost = Evaluation("W*exp(W)", "W*exp(W)", 0, "failed", "mask", reason="screened out")
        ledger.record(Candidate(0, len(formulas), "W*exp(W)", "W*exp(W)", "failed"), lost)
    return path


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return analyse(write_ledger(tmp_path_factory.mktemp("analysis") / "truth.sqlite", known_truth))


def parts(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in document["parts"]}


# Parts of formulas


def test_features_by_hand() -> None:
    """Equal up to algebra and constants is equal; a number changes nothing but in a sum; 4 formulas are few."""
    texts = ["W*W+X", "X+sqr(W)", "sqr(W)*3+X", "2+sqr(W)", "sqr(W)/7*X", "exp(W)", "exp(W)*G", "exp(W)*H", "exp(W)*D"]
    found = {feature.name: feature for feature in find_features([parse(text) for text in texts])}
    members = {name: "".join("01"[int(member)] for member in feature.members) for name, feature in found.items()}
    assert members == {
        "W": "111111111", "X": "111010000", "G": "000000100", "H": "000000010", "D": "000000001",
        "sqr": "011110000", "exp": "000001111", "add": "111100000", "mul": "101010111", "div": "000010000",
        "sqr(W)": "111110000",
    }  # fmt: skip
    assert {feature.kind for feature in found.values()} == {"operand", "primitive", "sub-expression"}


def test_constants_are_merged_by_hand() -> None:
    """Their size is not told, nor does it order terms or factors; their sign is, and a square is no power."""
    same = [("abs(W)*X**0.3", "abs(W)*X**0.41"), ("X**0.3*G**0.7*abs(W)", "X**0.8*G**0.1*abs(W)"),
            ("2*X+3*G+abs(W)", "3*X+2*G+abs(W)"), ("max(X,0.5)*W", "max(0.25,X)*W")]  # fmt: skip
    for first, second in same:
        assert merged(canonical(parse(first))) == merged(canonical(parse(second)))
    names = {
        text: merged(canonical(parse(text))) for text in ("abs(W)*X**0.3", "abs(W)*X**-0.3", "sqr(W)", "exp(W*7.7)")
    }
    assert names == {
        "abs(W)*X**0.3": "abs(W)*X**c", "abs(W)*X**-0.3": "abs(W)/X**c", "sqr(W)": "sqr(W)", "exp(W*7.7)": "exp(W*c)"
    }  # fmt: skip
    assert sub_expressions(parse("25*abs(W)*X**0.3")) == {"abs(W)", "X**c", "abs(W)*X**c"}
    found = {feature.name: feature for feature in find_features([parse(f"abs(W)*X**0.{n}") for n in range(1, 10)])}
    assert found["X**c"].members.sum() == 8  # X**0.5 is sqrt(X)


def test_a_part_recurs_from_two_per_cent_on() -> None:
    texts = ["abs(W)*X"] * 9 + ["sqr(W)*G"] * 10 + ["W"] * 481
    names = {feature.name for feature in find_features([parse(text) for text in texts])}
    assert names == {"W", "X", "G", "abs", "sqr", "mul", "sqr(W)", "sqr(W)*G"}


def test_groups_by_hand() -> None:
    """One says nothing; of two, one is what formulas without the other have."""
    assert find_groups(["layer", "layer"]) == []
    [layer] = find_groups(["layer", "row", "row", "layer"])
    assert (layer.kind, layer.name, layer.members.tolist()) == ("group", "group layer", [True, False, False, True])
    found = {feature.name: feature.members.tolist() for feature in find_groups(["block", "row", "layer", "row"])}
    assert found == {
        "group row": [False, True, False, True],
        "group layer": [False, False, True, False],
        "group block": [True, False, False, False],
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("W", set()),
        ("abs(W)*X", {1.0}),
        ("abs(W)*X**0.3", {0.3}),
        ("W*sqrt(X)+sqr(X)", {0.5, 2.0}),
        ("W*abs(sqrt(X))**3", {1.5}),
        ("W/sqr(X)", {2.0}),
        ("W*inv(sqr(-X))", {-2.0}),
        ("W*mms(X)**2", {1.0}),
        ("W*2**X", {1.0}),
        ("W*X**G", {1.0}),
    ],
)
def test_powers(text: str, expected: set[float]) -> None:
    assert powers(parse(text), "X") == expected


# Lineages


def of_generation(number: int, *formulas: str) -> list[Evaluation]:
    return [Evaluation(formula, formula, number, "done") for formula in formulas]


def lineages_of(rows: list[Evaluation], populations: dict[int, list[str]], **options: Any) -> list[int]:
    consists = [frozenset(parse(row.formula).tokens) | sub_expressions(parse(row.formula)) for row in rows]
    return find_lineages(rows, consists, populations, **options).tolist()


def test_a_formula_is_of_the_line_of_whom_it_is_most_like() -> None:
    """Of those that were bred from: X*abs(W) had died out when its like came up, which is then another's child."""
    rows = of_generation(0, "abs(W)*X", "sqr(W)*G", "exp(W)") + of_generation(1, "sqr(W)*G*H", "exp(W)*D")
    rows += of_generation(2, "abs(W)*X*H", "exp(W)*D*H")
    populations = {0: ["sqr(W)*G", "exp(W)"], 1: ["sqr(W)*G*H", "exp(W)*D"]}
    assert lineages_of(rows, populations) == [0, 1, 2, 1, 2, 1, 2]


def test_without_a_stored_population_every_earlier_formula_of_the_campaign_may_be_the_parent() -> None:
    rows = of_generation(0, "abs(W)*X", "exp(W)") + of_generation(1, "abs(W)*X*H")
    assert lineages_of(rows, {}) == [0, 1, 0]
    rows += of_generation(2, "abs(W)*X*G") + of_generation(3, "abs(W)*X*D")  # another campaign, merged into this one
    assert lineages_of(rows, {}, starts=(0, 2)) == [0, 1, 0, 3, 3]
    rows = of_generation(4, "abs(W)*X", "abs(W)*X*G")  # what the first generations held is lost
    assert lineages_of(rows, {}) == [0, 1]


def test_p_of_lineages_against_all_signs() -> None:
    """Four lineages of 1 to 4 formulas, each with one vote: the ways to give their means a sign, by brute force."""
    rng = np.random.default_rng(2)
    kin = np.repeat([7, 3, 0, 5], [1, 2, 3, 4])
    first, second = rng.random(10), rng.random(10)
    votes = np.array([1 / (4 * np.count_nonzero(kin == one)) for one in kin])

    def below(values: np.ndarray) -> np.ndarray:
        return np.array([votes[values < one].sum() + votes[values == one].sum() / 2 - 0.5 for one in values])

    products = votes * below(first) * below(second)
    means = [products[kin == one].sum() for one in np.unique(kin)]
    test = correlate(first, second, kin, 0)
    direction = np.sign(test["effect"])
    sums = [direction * np.dot(signs, means) for signs in product((1, -1), repeat=4)]
    exact = np.mean([one >= direction * sum(means) - 1e-12 for one in sums])
    assert test["p"] == pytest.approx(min(1.0, 2 * exact))
    assert correlate(first, second, np.arange(10) + 90, 5) == correlate(first, second, np.arange(10), 0)


def test_many_lineages_are_drawn_with_a_seed() -> None:
    """20 lineages all say the same: no drawn way but the observed one is as far."""
    members = np.arange(40) % 2 == 0
    excess = np.where(members, 0.0, 1.0) + np.repeat(np.arange(20), 2) / 100
    test = compare(excess, members, np.repeat(np.arange(20), 2), 3)
    assert test["p"] == pytest.approx(2 / 10_000)


def test_five_lineages_reach_no_significance_and_six_do() -> None:
    for count, p in ((5, 2 / 2**5), (6, 2 / 2**6)):
        kin = np.repeat(np.arange(count), 10)
        members = np.arange(len(kin)) % 2 == 0
        assert compare(np.where(members, 0.0, 1.0), members, kin, 0) == {"effect": 1.0, "p": pytest.approx(p)}


def test_what_descends_together_by_chance_is_no_finding() -> None:
    """Part and excess are each inherited and have nothing to do with each other, half of the formulas of one line."""
    rng = np.random.default_rng(1)
    kin = np.repeat(np.arange(16), [39, 4, 3, 2] + [1] * 12)
    found = {"lineages": 0, "formulas": 0}
    for _ in range(200):
        members, excess = (rng.random(16) < 0.4)[kin], rng.normal(size=16)[kin] + 0.3 * rng.normal(size=len(kin))
        if members.any() and not members.all():
            found["lineages"] += (compare(excess, members, kin, 0)["p"] or 1) < 0.05
            found["formulas"] += stats.mannwhitneyu(excess[members], excess[~members]).pvalue < 0.05
    assert found["formulas"] > 80
    assert found["lineages"] <= 20, "10 are expected; more than 20 in 1000 times one"


def test_what_helps_within_lineages_is_found() -> None:
    rng = np.random.default_rng(0)
    kin, members = np.repeat(np.arange(20), 8), rng.random(160) < 0.4
    excess = rng.normal(size=20)[kin] + 0.5 * rng.normal(size=160) - members
    test = compare(excess, members, kin, 0)
    assert (test["effect"] or 0) > 0.3
    assert (test["p"] or 1) < 0.001


# Statistics


def test_fitness_ranks_by_hand() -> None:
    assert fitness_ranks(np.array([3.0, 1.0, 3.0, 9.0, 2.0])).tolist() == [0.375, 1.0, 0.375, 0.0, 0.75]


def test_effect_is_the_share_of_pairs_won() -> None:
    """Brute force over all pairs, with ties."""
    rng = np.random.default_rng(3)
    excess = rng.integers(0, 12, 40).astype(float)
    members = rng.random(40) < 0.3
    duels = [np.sign(theirs - ours) for ours in excess[members] for theirs in excess[~members]]
    assert compare(excess, members, np.arange(40), 0)["effect"] == pytest.approx(np.mean(duels))


def test_nothing_to_compare() -> None:
    none = {"effect": None, "p": None}
    assert compare(np.arange(12.0), np.ones(12, bool), np.arange(12), 0) == none
    assert compare(np.ones(12), np.arange(12) < 5, np.arange(12), 0) == none
    assert correlate(np.ones(12), np.arange(12.0), np.arange(12), 0) == none
    assert mantel(np.zeros((5, 5)), np.ones((5, 5)), 0) == none


def test_q_values_by_hand() -> None:
    """0.01 * 4 / 1, then 0.03 * 4 / 2 and 0.04 * 4 / 3, of which the lower holds for both."""
    document: dict[str, Any] = {"a": {"p": 0.03}, "b": [{"p": 0.01, "c": {"p": 0.5}}, {"p": None}], "d": {"p": 0.04}}
    add_q_values(document)
    assert document["b"][0]["q"] == pytest.approx(0.04)
    assert document["a"]["q"] == document["d"]["q"] == pytest.approx(0.16 / 3)
    assert document["b"][0]["c"]["q"] == pytest.approx(0.5)
    assert document["b"][1]["q"] is None


def test_mantel_against_all_permutations() -> None:
    """5 objects have 120 orders: the estimate from 999 random ones is within 4 standard errors of the exact p."""
    rng = np.random.default_rng(0)
    first, second = (np.abs(values[:, None] - values) for values in (rng.random(5), rng.random(5)))
    above = np.triu_indices(5, 1)
    test = mantel(first, second, seed=1)
    assert test["effect"] == pytest.approx(stats.spearmanr(first[above], second[above]).statistic)
    orders = [list(order) for order in permutations(range(5))]
    all_effects = [stats.spearmanr(first[above], second[np.ix_(order, order)][above]).statistic for order in orders]
    exact = np.mean([abs(effect) >= abs(test["effect"]) - 1e-9 for effect in all_effects])
    assert test["p"] == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 999))
    assert mantel(first, second, seed=1) == test


def test_mask_distances_by_hand() -> None:
    """0x0f against 0x00 differs in 4 of 8 bits; with 0xff behind it in 4 of 16."""
    sketches = read_sketches(["0fff", "00ff", "f000"])
    assert distances(sketches, sketches[1]).tolist() == [4 / 16, 0.0, 12 / 16]


@pytest.mark.parametrize("sketches", [["0f", "0fff"], ["0g", "00"], ["0f", ""], ["0", "1"]])
def test_a_damaged_sketch_is_refused(sketches: list[str]) -> None:
    with pytest.raises(LedgerError, match="mask sketch"):
        read_sketches(sketches)


# Campaigns with a known truth


def test_what_helps_and_hurts_is_found(truth: dict[str, Any]) -> None:
    rows = parts(truth)
    assert (rows["X"]["with"], rows["X"]["without"]) == (32, 32)
    assert rows["X"]["effect"] > 0.4
    assert rows["exp"]["effect"] < -0.8
    assert rows["exp"]["mean_rank_difference"] < -0.4
    assert rows["exp(D)"]["same_as"] == "exp"
    assert max(rows["X"]["q"], rows["exp"]["q"]) < 0.01
    assert rows["tanh"]["q"] > 0.05
    assert (rows["W"]["effect"], rows["W"]["without"]) == (None, 0), "every formula has it"
    assert truth["formulas"] == len(FORMULAS)
    assert truth["evaluations"] == len(FORMULAS) + 1
    effects = [abs(row["effect"] or 0) for row in truth["parts"]]
    assert effects == sorted(effects, reverse=True)


def test_what_helps_at_one_target_and_hurts_at_another(tmp_path: Path) -> None:
    def swing(formula: Expression, rng: random.Random) -> dict[str, float]:
        sign = 1 if "G" in formula.operands else -1
        return {"0.5": 1 - 0.3 * sign + rng.random(), "2:4": 2 + 0.3 * sign + rng.random()}

    document = analyse(write_ledger(tmp_path / "x.sqlite", swing))
    effects = {target: test["effect"] for target, test in parts(document)["G"]["targets"].items()}
    assert effects["0.5"] > 0.4
    assert effects["2:4"] < -0.4
    assert parts(document)["G"]["q"] > 0.05, "nothing on the mean"
    [sentence] = [text for text in document["principles"] if text.startswith("Formulas with G ")]
    assert sentence.startswith("Formulas with G do better at 0.5 (effect +0.")
    assert " but worse at 2:4 (effect -0." in sentence
    assert sentence.endswith(", 32 against 32 formulas of 32 and 32 lineages.")


def test_principles_of_the_known_truth(truth: dict[str, Any]) -> None:
    medians = {
        has: np.median(
            [np.mean(list(point["excess"].values())) for point in truth["points"] if ("X" in point["formula"]) == has]
        )
        for has in (True, False)
    }
    [about_x] = [text for text in truth["principles"] if text.startswith("Formulas with X ")]
    share = 100 * (1 - medians[True] / medians[False])
    counts = "(32 against 32 formulas of 32 and 32 lineages, effect"
    assert f"lose {share:.1f} % less than those without {counts} +" in about_x
    assert "q = 0.0" in about_x
    [about_exp] = [text for text in truth["principles"] if text.startswith("Formulas with exp ")]
    assert " more than those without (32 against 32 formulas of 32 and 32 lineages, effect -" in about_exp
    assert "What does well at 0.5 also does well at 2:4 (effect +" in "\n".join(truth["principles"])
    assert not any("exp(D)" in text for text in truth["principles"]), "it tells the same as exp"
    strengths = [abs(float(text.split("effect ")[1].split(",")[0])) for text in truth["principles"]]
    assert strengths == sorted(strengths, reverse=True)
    assert len(strengths) <= 10


def test_of_noise_nothing_is_said(tmp_path: Path) -> None:
    document = analyse(
        write_ledger(tmp_path / "x.sqlite", lambda formula, rng: {name: rng.random() for name in TARGETS})
    )
    assert document["principles"] == []


def test_equal_losses_say_nothing(tmp_path: Path) -> None:
    document = analyse(write_ledger(tmp_path / "x.sqlite", lambda formula, rng: {"0.5": 0.25}))
    assert document["principles"] == []
    assert document["target_pairs"] == []
    draw_page(document, tmp_path / "x.png")


def test_the_power_of_an_operand(tmp_path: Path) -> None:
    """Excess rises with the power of X; formulas with two powers of it are left out."""
    formulas = (
        [f"abs(W)*X**{power}" for power in (0.25, 0.5, 0.75, 1.5, 2.5, 3)] + ["abs(W)*X"] * 5 + ["W*X+sqr(X)"] * 3
    )

    def rising(formula: Expression, rng: random.Random) -> dict[str, float]:
        return {"0.5": sum(formula.constants) or 1.0}

    row = analyse(write_ledger(tmp_path / "x.sqlite", rising, formulas))["powers"]["X"]
    assert row["formulas"] == 11
    assert row["effect"] == pytest.approx(1.0)
    assert row["levels"][3] == {"power": 1.0, "formulas": 5, "median_excess": 1.0}


def test_sizes_targets_and_points(tmp_path: Path) -> None:
    """Excess falls with size at 0.5 and rises at 2:4, but less: every size is on the front."""

    def by_size(formula: Expression, rng: random.Random) -> dict[str, float]:
        return {"0.5": 100.0 - 3 * len(formula), "2:4": 1.0 * len(formula)}

    formulas = ["abs(" * depth + "W" + ")" * depth for depth in range(1, 13)]
    document = analyse(write_ledger(tmp_path / "x.sqlite", by_size, formulas))
    assert document["nodes"]["effect"] == pytest.approx(-1)
    [pair] = document["target_pairs"]
    assert (pair["first"], pair["second"], pair["effect"]) == ("0.5", "2:4", pytest.approx(-1))
    assert all(point["front"] for point in document["points"])
    assert document["points"][2] | {"excess": 0} == {
        "evaluation": 3, "paid": 3, "formula": "abs(abs(abs(W)))", "nodes": 4, "excess": 0, "mean_excess": 46.0,
        "front": True, "founder": 3,
    }  # fmt: skip
    assert "What does well at 0.5 does badly at 2:4" in "\n".join(document["principles"])


def test_masks_farther_from_the_best_lose_more(tmp_path: Path) -> None:
    """Formula i has i of 128 bits set and loses i: every distance is a difference of losses."""
    formulas = ["abs(W)*X", "abs(W)", *FORMULAS[10:40]]
    sketches = [f"{(1 << index) - 1:032x}" for index in range(len(formulas))]
    numbers = iter(range(1000))
    path = write_ledger(tmp_path / "x.sqlite", lambda formula, rng: {"0.5": 1.0 + next(numbers)}, formulas, sketches)
    document = analyse(path)
    masks = document["masks"]
    assert (masks["formulas"], masks["bits"]) == (len(formulas), 128)
    assert masks["to_best"]["distances"] == [index / 128 for index in range(len(formulas))]
    assert masks["to_best"]["effect"] == pytest.approx(1)
    assert masks["pairs"]["effect"] == pytest.approx(1)
    assert masks["pairs"]["p"] == pytest.approx(1 / 1000)
    assert masks["references"]["wanda"]["from_best"] == 0
    assert masks["references"]["magnitude"]["from_best"] == 1 / 128
    assert document["references"]["magnitude"] == {"evaluation": 2, "formula": "abs(W)", "mean_excess": 2.0}
    assert "Masks nearer to those of the best formula lose less" in "\n".join(document["principles"])
    assert analyse(path) == document, "the subsample and the permutations have a seed"


def test_without_sketches_and_references(truth: dict[str, Any], tmp_path: Path) -> None:
    assert truth["masks"] is None
    document = analyse(write_ledger(tmp_path / "x.sqlite", known_truth, FORMULAS[5:]))
    assert document["references"] == {"magnitude": None, "wanda": None}


def test_the_group_is_a_part(tmp_path: Path) -> None:
    """Where the matrix is compared as a whole loses less; the published metrics are found within rows first."""
    alternating = [f"layer:{text}" if index % 2 else text for index, text in enumerate(FORMULAS)]
    losses = iter([2.0 - index % 2 + index / 100 for index in range(len(FORMULAS))])
    mixed = analyse(write_ledger(tmp_path / "x.sqlite", lambda formula, rng: {"0.5": next(losses)}, alternating))
    row = parts(mixed)["group layer"]
    assert (row["kind"], row["with"], row["effect"] > 0.8, row["q"] < 0.01) == ("group", 32, True, True)
    assert any(text.startswith("Formulas with group layer lose ") for text in mixed["principles"])
    assert mixed["references"]["wanda"]["formula"] == "abs(W)*X"
    draw_page(mixed, tmp_path / "x.png")

    document = gpmetric.analyse(
        write_ledger(tmp_path / "y.sqlite", known_truth, [f"layer:{text}" for text in FORMULAS])
    )
    assert "group" not in {part["kind"] for part in document["parts"]}
    assert {row["formula"] for row in document["references"].values()} == {"layer:abs(W)*X", "layer:abs(W)"}


def test_principles_need_significance() -> None:
    row = {"name": "X", "with": 9, "without": 9, "effect": 0.5, "q": 0.05, "same_as": None, "targets": {}}
    row |= {"lineages_with": 9, "lineages_without": 8, "rests_on_few": False}
    silent: dict[str, Any] = {"effect": 0.9, "q": None}
    document = {"parts": [row], "powers": {}, "nodes": silent, "target_pairs": [], "masks": None, "formulas": 18}
    assert state_principles(document) == []
    row |= {"q": 0.0499, "median_excess_with": 3.0, "median_excess_without": 1.0}
    assert state_principles(document) == [
        "Formulas with X rank better than those without "
        "(9 against 9 formulas of 9 and 8 lineages, effect +0.50, q = 0.050)."
    ]
    assert state_principles({**document, "parts": [row | {"rests_on_few": True}]}) == []
    row |= {"effect": -0.5}
    assert "lose 3.0 times as much as those without" in state_principles(document)[0]
    row |= {
        "targets": {
            "0.5": {"effect": -0.6, "q": 0.01},
            "0.7": {"effect": -0.9, "q": 0.06},
            "2:4": {"effect": 0.5, "q": 0.01},
        }
    }
    assert state_principles(document)[0].endswith("q = 0.050), most at 0.5, but the other way round at 2:4.")
    row |= {"median_excess_without": -0.5}
    assert "lose 3.5000 nats more than those without" in state_principles(document)[0]


# The page


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], dict[str, Axes]]:
    """The panels by title, of a page that is drawn but not written."""

    def draw(document: dict[str, Any]) -> dict[str, Axes]:
        pages: list[Figure] = []
        with monkeypatch.context() as patch:
            patch.setattr(Figure, "savefig", lambda figure, file, **_: pages.append(figure))
            draw_page(document, tmp_path / "page.png")
        return {axes.get_title("left").split(" (")[0].strip(): axes for axes in pages[0].axes}

    return draw


SYMBOLS, PARTS = "operands", "strongest recurring sub-expressions"
TWO, SIZES = "every formula at 0.5 and at 2:4", "size and excess, Pareto front marked"
PROGRESS = "best so far, and published metrics"


def test_panels_without_data_leave_their_room(truth: dict[str, Any], drawn: Callable[..., dict[str, Axes]]) -> None:
    panels = drawn(truth)
    assert list(panels) == [SYMBOLS, PARTS, TWO, SIZES, PROGRESS], "no sketches of masks"
    grids = [axes.get_subplotspec() for axes in panels.values()]
    assert grids[0].get_gridspec().nrows == 2
    for row in (0, 1):
        assert sum(len(one.colspan) for one in grids if row in one.rowspan) == grids[0].get_gridspec().ncols
    pairs = [{"first": a, "second": b, "effect": 0.5, "q": 0.1} for a, b in (("0.5", "2:4"), ("0.5", "1:4"))]
    panels = drawn(truth | {"targets": ["0.5", "2:4", "1:4"], "target_pairs": pairs, "parts": []})
    assert [title for title in panels if title] == ["rank correlation between targets", SIZES, PROGRESS]
    panels = drawn(truth | {"targets": ["0.5"], "target_pairs": [], "parts": []})
    assert list(panels) == [SIZES, PROGRESS]
    assert panels[SIZES].get_subplotspec().get_gridspec().nrows == 1


def test_effects_of_few_lineages_are_grey_and_what_may_be_chance_is_pale(
    truth: dict[str, Any], drawn: Callable[..., dict[str, Axes]]
) -> None:
    def part(name: str, effect: float, q: float, lineages: int) -> dict[str, Any]:
        counts = {"with": 9, "without": 20, "lineages_with": lineages, "lineages_without": 30}
        return {"kind": "primitive", "name": name, "effect": effect, "q": q, "rests_on_few": lineages < 6} | counts

    rows = [part("abs", 0.5, 0.01, 8), part("neg", -0.4, 0.01, 8), part("exp", 0.3, 0.2, 8), part("log", 0.9, 0.01, 3)]
    axes = drawn(truth | {"parts": rows})[SYMBOLS]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["neg", "exp", "abs", "log"]
    looks = [(to_hex(bar.get_facecolor()), bar.get_alpha()) for bar in axes.patches]
    assert looks == [(plot._BAD, 1.0), (plot._GOOD, 0.4), (plot._GOOD, 1.0), (plot._FAINT, 1.0)]
    assert [text.get_text() for text in axes.texts] == ["9 / 8", "9 / 8", "9 / 8", "9 / 3"]


def test_bad_formulas_at_the_beginning_do_not_squeeze_progress(
    truth: dict[str, Any], drawn: Callable[..., dict[str, Axes]]
) -> None:
    """The best falls from 90 to 1.0; wanda's 1.2 and ria's 1.1 are on the axis, magnitude's 40 is told at its edge."""
    points = [
        point | {"mean_excess": excess}
        for point, excess in zip(truth["points"], [90.0, 50.0, 1.3, 1.2, *[1.0] * 60], strict=True)
    ]
    levels = {"ria": 1.1, "wanda": 1.2, "magnitude": 40.0}
    baselines = [{"name": name, "mean_excess": level} for name, level in levels.items()]
    axes = drawn(truth | {"points": points, "baselines": baselines})[PROGRESS]
    low, high = axes.get_ylim()
    assert 0.9 < low < 1.0
    assert 1.2 < high < 1.5
    assert axes.lines[0].get_ydata()[0] == 90.0
    assert [line.get_ydata()[0] for line in axes.lines[1:]] == [1.1, 1.2]
    labels = {text.get_text(): text.xyann[1] for text in axes.texts[1:]}
    assert list(labels) == ["ria", "wanda", "▲ magnitude 40"]
    assert max(labels.values()) <= high


def test_labels_of_equal_baselines_do_not_overlap() -> None:
    levels = {f"b{number}": 1.0 + number / 1e6 for number in range(9)}
    heights = [place for _, _, place in plot._placed(levels, 0.0, 1.0)]
    assert np.diff(heights) == pytest.approx(plot._APART)
    assert heights[-1] == pytest.approx(1.0)


def test_every_published_metric_is_on_the_scale_of_the_search(tmp_path: Path) -> None:
    """GBLM is known by its form, whatever its constant; what was not measured on this text is not there."""
    formulas = [
        "layer:abs(W)",
        "abs(W)",
        "abs(W)*X",
        "abs(W)*X+25*abs(W)*sqrt(H)",
        "sqr(W)*mms(sqrt(H))",
        *FORMULAS[20:40],
    ]
    losses = iter([{"0.5": 1.0, "2:4": 3.0 + number} for number in range(len(formulas))])
    document = analyse(write_ledger(tmp_path / "x.sqlite", lambda formula, rng: next(losses), formulas))
    assert [(row["name"], row["mean_excess"]) for row in document["baselines"]] == [
        ("magnitude", 2.0), ("magnitude_row", 2.5), ("wanda", 3.0), ("gblm_l2", 3.5), ("pruner_zero", 4.0),
    ]  # fmt: skip
    assert document["baselines"][3]["formula"] == "abs(W)*X+25*abs(W)*sqrt(H)"
    assert document["unit"] == "nats per token"


def test_hostile_names_and_long_formulas_are_drawn_as_they_stand(truth: dict[str, Any], tmp_path: Path) -> None:
    nasty = "$\\frac{模型\n" * 20
    document = json.loads(json.dumps(truth).replace("2:4", "NASTY"))
    document = json.loads(json.dumps(document).replace("NASTY", json.dumps(nasty)[1:-1]))
    document["ledger"] = f"/tmp/{nasty}.sqlite"
    document["points"][5] |= {"formula": "abs(" * 90 + "W" + ")" * 90, "mean_excess": 0.0}
    document["baselines"] = [{"name": nasty, "mean_excess": 0.7}]
    document["parts"][3]["name"] = "sqrt(" * 50 + "W" + ")" * 50
    for targets in (document["targets"], [*document["targets"], nasty[1:]]):
        draw_page(document | {"targets": targets}, tmp_path / "page.png")


# The command


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`gpmetric analyse ARGUMENTS` in this process: exit status, output, errors."""

    from gpmetric import cli

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr("signal.signal", lambda *_: None)
        monkeypatch.setattr(sys, "argv", ["gpmetric", "analyse", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return (int(caught.value.code or 0), *capsys.readouterr())

    return call


def test_the_command(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """Table, principles, page and document; the ledger is left as it was."""
    ledger = write_ledger(tmp_path / "[red]$x$.sqlite", known_truth)
    before = ledger.read_bytes()
    code, out, err = run(ledger, "-o", tmp_path / "page.png", "--json", tmp_path / "x.json")
    assert (code, err) == (0, f"next: gpmetric status {shlex.quote(str(ledger))}\n")
    document = json.loads((tmp_path / "x.json").read_text())
    assert all(sentence in out for sentence in document["principles"])
    assert "associations, not causes" in out
    assert "no mask sketches" in out
    assert "at 2:4" in out
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    assert ledger.read_bytes() == before
    code, out, _ = run(ledger, "--json", "-", "-o", tmp_path / "page.PDF")
    assert json.loads(out) == document
    assert (tmp_path / "page.PDF").read_bytes().startswith(b"%PDF")


def test_no_principle_is_said(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    ledger = write_ledger(tmp_path / "x.sqlite", lambda formula, rng: {"0.5": 1.0})
    assert "no finding is significant (q < 0.05)" in run(ledger)[1]


def test_too_few_formulas(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    ledger = write_ledger(tmp_path / "few.sqlite", known_truth, FORMULAS[:9])
    code, out, err = run(ledger, "-o", tmp_path / "page.png")
    assert (code, out) == (1, "")
    assert "few.sqlite holds 9 evaluated formulas, but an analysis needs at least 10" in err
    assert not (tmp_path / "page.png").exists()


def test_bad_ledgers(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    sqlite3.connect(tmp_path / "other.sqlite").execute("CREATE TABLE x (y)").connection.close()
    (tmp_path / "empty.sqlite").touch()
    (tmp_path / "text.sqlite").write_text("not a database at all, but long enough to be looked at")
    messages = {
        "missing": "unable to open",
        "other": "another program",
        "empty": "no campaign",
        "text": "not a database",
    }
    for name, message in messages.items():
        code, out, err = run(tmp_path / f"{name}.sqlite")
        assert (code, out) == (2, "")
        assert message in err


def test_bad_outputs(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    ledger = write_ledger(tmp_path / "x.sqlite", known_truth)
    for output, message in [("x.svg", "must end in .png or .pdf"), ("page", "must end in"), ("no/x.png", "not exist")]:
        code, out, err = run(ledger, "-o", tmp_path / output)
        assert (code, out) == (2, "")
        assert message in err
    code, _, err = run(ledger, "-o", tmp_path / "a.png", "--json", tmp_path / "a.png")
    assert (code, "are the same file" in err) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["x.sqlite"]


def test_a_page_is_whole_or_unchanged(truth: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.png"
    path.write_bytes(b"before")

    def full_disk(figure: object, file: Path, **_: object) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full_disk)
    with pytest.raises(GpmetricError, match="No space left"):
        draw_page(truth, path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError):
        draw_page(truth, tmp_path / "page.txt")


def test_matplotlib_is_left_as_it_was(truth: dict[str, Any], tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw_page(truth, tmp_path / "page.png")
    assert dict(matplotlib.rcParams) == before
