"""Targets as users write them: every spelling accepted, and every wrong one refused in one line that quotes it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gpmetric.errors import InputError
from gpmetric.pruning.target import GRANULARITIES, Target, parse_target

ACCEPTED = [
    ("0.5", Target("0.5", "row", 0.5)),
    ("0", Target("0", "row", 0.0)),
    ("0.0", Target("0.0", "row", 0.0)),
    (".5", Target(".5", "row", 0.5)),
    ("0.999999", Target("0.999999", "row", 0.999999)),
    ("1e-1", Target("1e-1", "row", 0.1)),
    ("5E-1", Target("5E-1", "row", 0.5)),
    ("+0.5", Target("+0.5", "row", 0.5)),
    ("1e-400", Target("1e-400", "row", 0.0)),
    (" 0.5 ", Target(" 0.5 ", "row", 0.5)),
    ("layer:0.5", Target("layer:0.5", "layer", 0.5)),
    ("layer:0", Target("layer:0", "layer", 0.0)),
    ("layer:7e-1", Target("layer:7e-1", "layer", 0.7)),
    ("block:0.5", Target("block:0.5", "block", 0.5)),
    (" block:.7 ", Target(" block:.7 ", "block", 0.7)),
    ("2:4", Target("2:4", "n:m", 0.5, 2, 4)),
    ("4:8", Target("4:8", "n:m", 0.5, 4, 8)),
    ("1:4", Target("1:4", "n:m", 0.75, 1, 4)),
    ("3:4", Target("3:4", "n:m", 0.25, 3, 4)),
    ("7:11", Target("7:11", "n:m", 1 - 7 / 11, 7, 11)),
    ("02:04", Target("02:04", "n:m", 0.5, 2, 4)),
    (" 2:4 ", Target(" 2:4 ", "n:m", 0.5, 2, 4)),
    ("1:9999", Target("1:9999", "n:m", 1 - 1 / 9999, 1, 9999)),
]

REFUSED = [
    "", " ", "-0.1", "-1e-9", "1", "1.0", "1.5", "50", "50%", "0,5", "NaN", "nan", "inf", "-inf", "Infinity", "1e999",
    "9" * 10_000, "0." + "9" * 10_000, "0x1", "1_0", "0.5.5", "e", "1e", "--0.5", "0.5j", "0 .5", "half", "W",
    "４:８", "２:4", "０.５", "٠.٥", "0.5\u200b", "\u202e0.5", "0.5\x00",
    "4:2", "0:4", "4:4", "0:0", "-2:4", "2:-4", "2:4:8", "2:", ":4", ":", "2.0:4", "2/4", "2;4", "2: 4", "1:10000",
    "layer", "layer:", "layer:2:4", "layer:1", "layer:-0.1", "layer:nan", "layer: 0.5", "layer:layer:0.5", "Layer:0.5",
    "block", "block:", "block:2:4", "block:1", "block: 0.5", "block:layer:0.5", "Block:0.5", "layer:block:0.5",
    "row:0.5", "global:0.5", ":0.5", "0.5:", "none:0.5",
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), ACCEPTED, ids=[repr(text) for text, _ in ACCEPTED])
def test_accepted(text: str, expected: Target) -> None:
    """Written down by hand; the user's spelling is kept as it is, since results are keyed by it."""
    assert parse_target(text) == expected


@pytest.mark.parametrize("text", REFUSED, ids=[ascii(text)[:20] for text in REFUSED])
def test_refused(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_target(text)
    message = str(caught.value)
    assert message.startswith(f"--target {text!r:.60}")
    assert "0.5, layer:0.5, block:0.5, or N:M with 0 < N < M" in message
    assert message.isprintable(), "one line without control characters"
    assert len(message) < 250


@pytest.mark.parametrize("text", ["4:2", "0:4", "4:4"])
def test_a_pattern_the_wrong_way_round_says_what_it_would_keep(text: str) -> None:
    keep, group = text.split(":")
    with pytest.raises(InputError, match=f"keeps {keep} of each {group}"):
        parse_target(text)


def test_every_granularity_has_a_spelling() -> None:
    assert {parse_target(text).granularity for text in ("0.5", "layer:0.5", "block:0.5", "2:4")} == set(GRANULARITIES)


def test_the_granularity_can_be_replaced() -> None:
    """As the magnitude baseline does with plain numbers."""
    assert parse_target("0.5").with_granularity("layer") == Target("0.5", "layer", 0.5)
    assert parse_target("block:0.5").with_granularity("row") == Target("block:0.5", "row", 0.5)


def test_no_tensor_library_is_needed() -> None:
    code = "import sys; from gpmetric.pruning.target import parse_target; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
