"""What speaks against a result is in its words: few tokens, an interval with zero, a test that says otherwise."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from rich.console import Console

from gpmetric.evolution import verdict
from gpmetric.evolution.held_out import HeldOutFigures
from gpmetric.metrics import resolve_metric
from gpmetric.pruning.recipe import Recipe
from gpmetric.session.caveats import above_start, few_tokens
from gpmetric.session.session import Session
from gpmetric.terminal.tables import print_slim
from gpmetric.tuning.steps import Steps
from gpmetric.tuning.trial_log import Measurement


def session(tokens: int) -> Session:
    """Of two layers with 8 and 12 inputs."""
    layers = [SimpleNamespace(name=name, weight=torch.empty(4, inputs)) for name, inputs in (("up", 8), ("down", 12))]
    return cast(Session, SimpleNamespace(model=SimpleNamespace(layers=layers), tokens=torch.zeros(1, tokens)))


def test_too_few_tokens_for_the_widest_layer() -> None:
    told = "calibration has 11 tokens, fewer than the 12 inputs of down: too few to tell its weights apart by "
    assert few_tokens(session(11)) == [told + "(--samples, --sequence-length)"]
    assert few_tokens(session(12)) == []
    assert few_tokens(session(11), {"W"}) == few_tokens(session(11), ()) == []  # magnitude reads no statistic


def figures(excess: float) -> HeldOutFigures:
    return HeldOutFigures({"0.5": excess}, {"0.5": 1 + excess}, {})


def measured(mine: float, theirs: float, *, better: bool = True) -> verdict.Tested:
    """A winner and its rival with these figures on test."""
    winner, rival = resolve_metric("abs(W)*X" if better else "ria"), resolve_metric("wanda")
    made = verdict.Verdict(winner, [rival], better, "", figures(0.1))
    return verdict.Tested(made, rival, None, None, {winner: figures(mine), rival: figures(theirs)})


@pytest.mark.parametrize(
    ("mine", "theirs", "interval", "told"),
    [
        (0.20, 0.30, (-0.2, -0.1), []),
        (0.20, 0.30, None, []),
        (0.40, 0.30, None, ["test contradicts validation: there, wanda has mean excess 0.3000, the winner 0.4000"]),
        (0.20, 0.30, (-0.2, 0.05), ["-0.2000 to +0.0500, holds zero: the gain may be the sample's"]),
        (0.20, 0.30, (-0.2, 0.0), ["-0.2000 to +0.0000, holds zero: the gain may be the sample's"]),
        (0.40, 0.30, (0.01, 0.2), ["test contradicts", "+0.0100 to +0.2000, is above zero: there is no gain"]),
        (math.inf, 0.30, None, []),  # not measured: there was no time, which is said as such
    ],
)
def test_what_speaks_against_a_winner(
    mine: float, theirs: float, interval: tuple[float, float] | None, told: list[str]
) -> None:
    found = verdict.doubts(measured(mine, theirs), {"interval": interval})
    assert len(found) == len(told)
    assert all(part in line for part, line in zip(told, found, strict=True))


def test_a_baseline_that_nothing_beats_is_no_gain_to_doubt() -> None:
    """Only that another baseline does better on test is said."""
    assert verdict.doubts(measured(0.2, 0.3, better=False), {"interval": (-0.1, 0.1)}) == []
    (told,) = verdict.doubts(measured(0.4, 0.3, better=False), {"interval": None})
    assert told == "test contradicts validation: there, wanda has mean excess 0.3000, ria 0.4000"


def test_a_search_that_ends_above_its_start() -> None:
    assert above_start(True, 20.0, 19.0, 19.001) == []
    assert above_start(False, 20.0, 21.0, 20.0) == [
        "the search ended above its start on validation, 21.000 from 20.000: the start was kept"
    ]
    assert above_start(False, 20.0, 20.0, 20.0) == [
        "the search found nothing better than its start, which was kept: search longer (--minutes)"
    ]
    (told,) = above_start(True, 20.0, 19.0, 20.1)
    assert told == "what was written is above the start on validation, 20.100 from 20.000"
    assert "above its start" in above_start(False, 20.0, math.inf, 20.0)[0]


def test_a_text_that_contradicts_the_choice_of_tune() -> None:
    """Losses of the dense model are 3; the recipe is best on validation, and on the first text."""
    recipe = Recipe("wanda", "0.5")
    made = {"recipe": (3.5, 3.5), "wanda": (3.6, 3.25), "sparsegpt": (3.7, 3.4), "cut": ()}
    table = {name: Measurement(recipe, 1.0, 3.1, 1.0, None, others) for name, others in made.items()}
    texts = [SimpleNamespace(text=SimpleNamespace(name=name), tokens=None) for name in ("a.txt", "b.txt")]
    trials: Any = SimpleNamespace(session=SimpleNamespace(evaluated=texts), dense_on=lambda tokens: 3.0)
    steps = Steps[Recipe](cast(Any, None), trials, cast(Any, None), cast(Any, None), table=table)
    told = "b.txt contradicts validation: there, 'wanda' has excess 0.2500, the recipe 0.5000"
    assert steps._contradictions() == [told]
    steps.table["recipe"] = replace(steps.table["recipe"], others=())  # not measured for want of time
    assert steps._contradictions() == []


def test_warnings_are_shown() -> None:
    result = {
        "model": "m", "widths": [], "granularity": ["channel"], "parameters_before": 2, "parameters_after": 1,
        "dense": 1.0, "initial": 2.0, "perplexity": 2.0,
        "repair": "none", "repaired": False, "starts": {}, "share": 0.0, "sparsity": 0.5,
        "asked": 0.5, "output": "o", "warnings": ["the first", "[red]the second"],
    }  # fmt: skip
    console = Console(file=io.StringIO(), width=80)
    print_slim(console, result, cast(Any, None))
    assert "\nwarning: the first\nwarning: [red]the second\n" in cast(Any, console.file).getvalue()
