"""The ladder by hand: its rungs, who climbs, figures over the windows read so far, and what a ladder was worth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from gpmetric.errors import MaskError
from gpmetric.evolution.executors import Serial
from gpmetric.evolution.ledger import Ledger, Measurement
from gpmetric.evolution.screening import (
    PROBE,
    Ladder,
    OutOfTime,
    Rung,
    cumulative,
    describe_ladder,
    ladder,
    promote,
)

INF, NAN = math.inf, math.nan
RUNGS = (Rung("1 windows", 0, 1, 0.5), Rung("4 windows", 1, 4, 1.0))


@pytest.mark.parametrize(
    ("windows", "bounds"),
    [
        (1, [1]),
        (2, [1, 2]),
        (3, [1, 3]),
        (8, [1, 4, 8]),
        (32, [4, 16, 32]),
        (64, [8, 32, 64]),
    ],
)
def test_rungs(windows: int, bounds: list[int]) -> None:
    """An eighth, half and all of the windows, at least one; each rung reads what those before it did not."""
    rungs = ladder(windows)
    assert [rung.last for rung in rungs] == bounds
    assert [rung.first for rung in rungs] == [0, *bounds[:-1]]
    assert [rung.keep for rung in rungs] == [0.4] * (len(bounds) - 1) + [1.0]
    assert [rung.name for rung in rungs] == [f"{last} windows" for last in bounds]


@pytest.mark.parametrize(
    ("figures", "keep", "always", "expected"),
    [
        ([3.0, 1.0, 2.0, 4.0], 0.5, (), [1, 2]),
        ([3.0, 1.0, 2.0, 4.0, 5.0], 0.5, (), [0, 1, 2]),  # 2.5 is rounded up
        ([3.0, 1.0, 2.0, 4.0], 1.0, (), [0, 1, 2, 3]),
        ([3.0, 1.0, 2.0], 0.01, (), [1]),
        ([3.0, 1.0, 2.0], 0.01, (0,), [0, 1]),  # besides the share, not out of it
        ([3.0, 1.0, 2.0], 0.4, (1,), [1, 2]),
        ([2.0, 1.0, 1.0, 1.0], 0.5, (), [1, 2]),  # of equal ones the earlier
        ([NAN, 1.0, INF, 2.0], 0.5, (), [1, 3]),
        ([NAN, 1.0, INF, 2.0], 0.25, (0, 2), [1]),  # what is not finite never goes on
        ([INF, -INF], 1.0, (0,), []),
        ([], 0.5, (), []),
        ([-1.0, -2.0], 0.5, (), [1]),
    ],
)
def test_promote(figures: list[float], keep: float, always: tuple[int, ...], expected: list[int]) -> None:
    assert promote(dict(enumerate(figures)), keep, frozenset(always)) == expected


def test_promote_keeps_the_positions_it_was_given() -> None:
    assert promote({30: 0.1, 7: 0.2, 12: 0.3}, 0.6) == [7, 30]


def test_cumulative_weighs_by_windows() -> None:
    """(1 * 0.8 + 3 * 0.4) / 4 and (1 * 2 + 3 * 0) / 4."""
    parts = [(1, {"0.5": 0.8, "2:4": 2.0}), (3, {"0.5": 0.4, "2:4": 0.0})]
    assert cumulative(parts) == {"0.5": pytest.approx(0.5), "2:4": pytest.approx(0.5)}
    assert cumulative(parts[:1]) == parts[0][1]


# A ladder that is climbed

# metric -> reconstruction error, (loss, kl) on window 0, (loss, kl) on windows 1 to 3
WORTH: dict[str, tuple[float, tuple[float, float], tuple[float, float]]] = {
    "a": (0.1, (0.5, 0.9), (0.1, 0.1)),
    "b": (0.2, (0.4, 0.3), (0.2, 0.3)),
    "c": (0.3, (0.3, 0.2), (0.3, 0.2)),
    "d": (0.4, (0.2, 0.6), (0.4, 0.4)),
    "e": (0.5, (0.1, 0.1), (0.5, 0.5)),
}
METRICS = dict(enumerate(WORTH))


def answer(task: Mapping[str, Any]) -> Any:
    if task["kind"] == "probe":
        return [
            {"error": None, "fingerprint": text, "sketch": "", "reconstruction": {"0.5": WORTH[text][0]}}
            for text in task["metrics"]
        ]
    loss, kl = WORTH[task["metric"]][1 if task["first"] == 0 else 2]
    return {"loss": {"0.5": loss}, "kl": {"0.5": kl}}


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "a", {}, resume=False) as opened:
        yield opened


def climbing(ledger: Ledger, objective: str = "loss", function: Any = answer, **options: Any) -> Ladder:
    never = options.pop("out_of_time", lambda: False)
    return Ladder(RUNGS, objective, ledger, Serial(function), 0, never, **options)


@pytest.mark.parametrize(("objective", "expected"), [("loss", [2, 3]), ("kl", [1, 2])])
def test_who_climbs(ledger: Ledger, objective: str, expected: list[int]) -> None:
    """The probe drops e, the last fifth; of a to d the first window sends on the better half by the objective."""
    one = climbing(ledger, objective)
    one.probe(METRICS)
    assert one.screen(METRICS, frozenset()) == expected
    assert one.measurement(4, "1 windows") is None
    one.finish({position: METRICS[position] for position in expected})
    for position in expected:
        _, first, rest = WORTH[METRICS[position]]
        for column, kind in enumerate(("loss", "kl")):
            mean = (first[column] + 3 * rest[column]) / 4
            assert one.figures(position, kind) == {"0.5": pytest.approx(mean)}


def test_those_of_the_start_climb_whatever_they_are_measured_at(ledger: Ledger) -> None:
    one = climbing(ledger)
    one.probe(METRICS)
    assert one.screen(METRICS, frozenset({0, 4})) == [0, 2, 3, 4]  # half of five is three, and e is the best of them


def test_without_reconstruction_errors_the_probe_drops_nobody(ledger: Ledger) -> None:
    """No Gram matrix, no error: the order in which candidates were drawn says nothing about them."""

    def blind(task: Mapping[str, Any]) -> Any:
        found = answer(task)
        return [part | {"reconstruction": {}} for part in found] if task["kind"] == "probe" else found

    one = climbing(ledger, function=blind)
    one.probe(METRICS)
    assert one.screen(METRICS, frozenset()) == [2, 3, 4]
    assert all(one.measurement(position, "1 windows") for position in METRICS)


def test_what_fails_on_a_rung_stays_there_even_of_the_start(ledger: Ledger) -> None:
    def fail(task: Mapping[str, Any]) -> Any:
        if task.get("metric") == "d":
            raise MaskError("no")
        found = answer(task)
        if task.get("metric") == "c":
            found["kl"] = {"0.5": INF}
        return found

    one = climbing(ledger, function=fail)
    one.probe(METRICS)
    assert one.screen(METRICS, frozenset({2, 3})) == [0, 1]
    found = {position: one.measurement(position, "1 windows") for position in (2, 3)}
    assert {position: row and row.error for position, row in found.items()} == {
        2: "loss or divergence is not finite at 0.5",
        3: "no",
    }


def test_a_second_ladder_measures_nothing_again(ledger: Ledger) -> None:
    first = climbing(ledger)
    first.probe(METRICS)
    first.finish(dict.fromkeys(()) or {3: "d"}) if first.screen(METRICS, frozenset()) else None

    def refuse(task: Mapping[str, Any]) -> Any:
        raise AssertionError(f"measured again: {task}")

    again = climbing(ledger, function=refuse)
    assert again.probe(METRICS) == {position: again.measurement(position, PROBE) for position in METRICS}
    assert again.screen(METRICS, frozenset()) == [2, 3]
    again.finish({3: "d"})
    assert again.figures(3, "loss") == first.figures(3, "loss")


def test_batches_of_eight_and_one_by_one_where_a_batch_is_lost(ledger: Ledger) -> None:
    asked: list[list[str]] = []

    def fragile(task: Mapping[str, Any]) -> Any:
        asked.append(task["metrics"])
        if "m3" in task["metrics"]:
            raise MaskError("killed its worker")
        return [{"error": None, "fingerprint": text, "sketch": "", "reconstruction": {}} for text in task["metrics"]]

    metrics = {position: f"m{position}" for position in range(10)}
    found = climbing(ledger, function=fragile).probe(metrics)
    assert [len(batch) for batch in asked] == [8, 2, *[1] * 8]
    assert [position for position, row in found.items() if row.error] == [3]
    assert found[3].error == "killed its worker"
    assert found[2].value["fingerprint"] == "m2"
    assert list(found) == list(metrics)


def test_out_of_time_is_asked_after_every_measurement_but_the_last(ledger: Ledger) -> None:
    clock = iter([False, True])
    one = climbing(ledger, out_of_time=lambda: next(clock))
    one.probe(METRICS)  # one task: the clock is not read
    with pytest.raises(OutOfTime):
        one.screen(METRICS, frozenset())
    assert [row.position for row in ledger.measurements() if row.rung == "1 windows"] == [0, 1]


# What it was worth


def row(position: int, rung: str, value: Any, duration: float = 1.0, generation: int = 0) -> Measurement:
    return Measurement(generation, position, rung, value, None if value else "failed", duration)


def kl(figure: float) -> dict[str, Any]:
    return {"loss": {"0.5": 9.0}, "kl": {"0.5": figure}}


def probe(figure: float | None) -> dict[str, Any]:
    errors = {} if figure is None else {"0.5": figure}
    return {"error": None, "fingerprint": "", "sketch": "", "reconstruction": errors}


def test_describe_ladder_by_hand() -> None:
    """Over all windows 0.1, 0.2, 0.3 and 0.4; the first window says 0.2, 0.1, 0.3, 0.4, whose Spearman's rho is 0.8."""
    measured = [
        *(row(place, PROBE, probe(error), 0.5) for place, error in enumerate([0.4, 0.3, 0.2, 0.1, 0.9])),
        row(5, PROBE, None),
        *(row(place, "1 windows", kl(figure), 2.0) for place, figure in enumerate([0.2, 0.1, 0.3, 0.4, 0.8])),
        *(
            row(place, "4 windows", kl((4 * whole - first) / 3), 4.0 + place)
            for place, (first, whole) in enumerate([(0.2, 0.1), (0.1, 0.2), (0.3, 0.3), (0.4, 0.4)])
        ),
    ]
    described = describe_ladder(measured, RUNGS, "kl")
    assert described == [
        {"rung": PROBE, "measured": 5, "compared": 4, "spearman": pytest.approx(-1.0)},
        {"rung": "1 windows", "measured": 5, "compared": 4, "spearman": pytest.approx(0.8)},
        {"rung": "4 windows", "measured": 4, "compared": 4, "spearman": pytest.approx(1.0)},
    ]


def test_describe_ladder_of_too_little() -> None:
    """Two candidates, or equal figures, have no rank correlation; positions of other generations are other ones."""
    assert [one["spearman"] for one in describe_ladder([], RUNGS, "kl")] == [None] * 3
    two = [
        row(0, rung, kl(figure), generation=place)
        for place, figure in enumerate([0.1, 0.2])
        for rung in ("1 windows", "4 windows")
    ]
    described = describe_ladder(two, RUNGS, "kl")
    assert [(one["measured"], one["compared"], one["spearman"]) for one in described] == [
        (0, 0, None),
        (2, 2, None),
        (2, 2, None),
    ]
    blind = [row(place, PROBE, probe(None)) for place in range(4)]
    assert describe_ladder(blind, RUNGS, "kl")[0] == {
        "rung": PROBE,
        "measured": 4,
        "compared": 0,
        "spearman": None,
    }
