"""Targets as users write them: every spelling accepted, and every wrong one refused in one line that quotes it."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import pytest

from gpmetric.errors import InputError
from gpmetric.targets import GRANULARITIES, Granularity, Target, parse_target, plain_granularities

ACCEPTED = [
    ("0.5", Target("0.5", None, 0.5)),
    ("0", Target("0", None, 0.0)),
    ("0.0", Target("0.0", None, 0.0)),
    (".5", Target(".5", None, 0.5)),
    ("0.999999", Target("0.999999", None, 0.999999)),
    ("1e-1", Target("1e-1", None, 0.1)),
    ("5E-1", Target("5E-1", None, 0.5)),
    ("+0.5", Target("+0.5", None, 0.5)),
    ("1e-400", Target("1e-400", None, 0.0)),
    (" 0.5 ", Target(" 0.5 ", None, 0.5)),
    ("row:0.5", Target("row:0.5", "row", 0.5)),
    (" row:0 ", Target(" row:0 ", "row", 0.0)),
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
    "row", "row:", "row:2:4", "row:1", "row: 0.5", "row:row:0.5", "Row:0.5", "n:m:0.5", "n:m",
    "global:0.5", ":0.5", "0.5:", "none:0.5",
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
    assert "0.5, row:0.5, layer:0.5, block:0.5, or N:M with 0 < N < M" in message
    assert message.isprintable(), "one line without control characters"
    assert len(message) < 250


@pytest.mark.parametrize("text", ["4:2", "0:4", "4:4"])
def test_a_pattern_the_wrong_way_round_says_what_it_would_keep(text: str) -> None:
    keep, group = text.split(":")
    with pytest.raises(InputError, match=f"keeps {keep} of each {group}"):
        parse_target(text)


def test_every_granularity_has_a_spelling() -> None:
    spelled = [*(f"{name}:0.5" for name in plain_granularities()), "2:4"]
    assert [parse_target(text).granularity for text in spelled] == list(GRANULARITIES)
    assert all(parse_target(f"{name}:0.5").granularity == name for name in plain_granularities())


def test_the_granularity_can_be_replaced() -> None:
    """A plain number leaves it open; only then does a default hold."""
    assert parse_target("0.5").within("layer") == Target("0.5", "layer", 0.5)
    assert parse_target("block:0.5").within("row") == Target("block:0.5", "row", 0.5)
    assert parse_target("1:4").within("row") == Target("1:4", "row", 0.75)
    for name in plain_granularities():
        assert parse_target("0.5").resolved(name) == Target("0.5", name, 0.5)
        for said in ("row:0.5", "layer:0.5", "block:0.5", "2:4"):
            assert parse_target(said).resolved(name) == parse_target(said)


# Comparison groups

ROWS = [0, 1, 3, 6]
COLUMNS = [0, 1, 2, 4, 6, 8, 42, 64, 123, 127, 128, 129, 200, 256, 257, 300, 384]
PATTERNS = {"1:2": 2, "2:4": 4, "3:4": 4, "4:8": 8, "2:3": 3, "7:11": 11, "1:80": 80}


def sizes(granularity: str | None, rows: int, columns: int, group: int = 0) -> list[int]:
    """Entries of each comparison group, every entry of the matrix being put into the group that it belongs to."""
    belongs: Callable[[int, int], object] = {
        None: lambda row, column: row,
        "row": lambda row, column: row,
        "layer": lambda row, column: 0,
        "block": lambda row, column: column // 128,
        "n:m": lambda row, column: (row, column // group),
    }[granularity]
    counted = Counter(belongs(row, column) for row in range(rows) for column in range(columns))
    return sorted(counted.values(), reverse=True)


# each granularity, also that of a plain number, at several sparsities
TARGETS = [
    *(
        f"{prefix}{sparsity}"
        for prefix in ("", "row:", "layer:", "block:")
        for sparsity in ("0", "0.1", "0.37", "0.999")
    ),
    *PATTERNS,
]


@pytest.mark.parametrize("target", [parse_target(text) for text in TARGETS], ids=TARGETS)
def test_groups_are_the_brute_force(target: Target) -> None:
    """How many of which size, what each loses and what all lose, by hand for odd shapes, empty ones among them."""
    for rows in ROWS:
        for columns in COLUMNS:
            if not target.fits(columns):
                continue
            expected = sizes(target.granularity, rows, columns, target.group)
            found = target.groups((rows, columns))
            assert [size for count, size in found for _ in range(count)] == expected, (rows, columns)
            keep = target.group - target.keep
            removed = [keep if target.group else int(size * target.sparsity) for size in expected]
            assert [target.removed(size) for size in expected] == removed, (rows, columns)
            assert target.removes((rows, columns)) == sum(removed), (rows, columns)


@pytest.mark.parametrize("target", [parse_target(text) for text in TARGETS], ids=TARGETS)
def test_width_is_the_reach_of_the_first_group(target: Target) -> None:
    for columns in COLUMNS:
        if target.fits(columns) and columns:
            (_, size), *_ = target.groups((5, columns))
            assert target.width(columns) == size // (5 if target.across_rows else 1)
            assert target.across_rows == (target.granularity in ("layer", "block"))


@pytest.mark.parametrize("target", [parse_target(text) for text in TARGETS], ids=TARGETS)
def test_only_patterns_leave_a_remainder(target: Target) -> None:
    for columns in COLUMNS:
        assert target.fits(columns) == (columns % PATTERNS.get(target.text, 1) == 0)


def test_a_row_more_is_known_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 inputs of one output: parsed, named in messages, cut and counted without another line of code."""
    monkeypatch.setitem(GRANULARITIES, "tile", Granularity("each 16 inputs of one output", columns=16))
    target = parse_target("tile:0.5")
    assert (target.granularity, target.across_rows, target.width(40)) == ("tile", False, 16)
    assert target.groups((3, 40)) == [(6, 16), (3, 8)]
    assert target.removes((3, 40)) == 6 * 8 + 3 * 4
    with pytest.raises(InputError, match=r"block:0\.5, tile:0\.5, or N:M"):
        parse_target("half")


def test_no_tensor_library_is_needed() -> None:
    code = "import sys; from gpmetric.targets import parse_target; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
