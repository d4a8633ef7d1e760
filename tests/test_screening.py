"""Successive halving by hand: rungs, who climbs, figures over the windows read so far, what the rungs were worth."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpmetric.errors import MaskError
from gpmetric.evolution.breeding import Draw
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.records import Measurement
from gpmetric.evolution.rungs import PROBE, Rung, cumulative, describe_rungs, halving_rungs, promote
from gpmetric.evolution.screening import Seen, SuccessiveHalving
from gpmetric.evolution.search_config import SearchConfig
from gpmetric.evolution.tasks import ExcessTask, MaskFingerprint, ProbeTask, Task, UseTask
from gpmetric.executors import Serial, TaskClock
from gpmetric.expression import parse
from gpmetric.metrics import Metric, resolve_metric

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
    rungs = halving_rungs(windows)
    assert [rung.last for rung in rungs] == bounds
    assert [rung.first for rung in rungs] == [0, *bounds[:-1]]
    assert [rung.keep for rung in rungs] == [0.4] * (len(bounds) - 1) + [1.0]
    assert [rung.name for rung in rungs] == [f"{last} windows" for last in bounds]
    *early, last = halving_rungs(windows, in_use=True)
    assert early == [replace(rungs[0], keep=0.2, hardest=True)] * (windows > 1)
    assert (last.name, last.first, last.last, last.in_use) == (f"{windows} windows in use", 0, windows, True)
    assert last.task([resolve_metric("abs(W)")]) == UseTask(resolve_metric("abs(W)"))


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


# Rungs that are climbed

# operand that tells a metric -> reconstruction error, (loss, kl) on window 0, (loss, kl) on windows 1 to 3
WORTH: dict[str, tuple[float, tuple[float, float], tuple[float, float]]] = {
    "X": (0.1, (0.5, 0.9), (0.1, 0.1)),
    "G": (0.2, (0.4, 0.3), (0.2, 0.3)),
    "H": (0.3, (0.3, 0.2), (0.3, 0.2)),
    "D": (0.4, (0.2, 0.6), (0.4, 0.4)),
    "F": (0.5, (0.1, 0.1), (0.5, 0.5)),
}


def draw(text: str) -> Draw:
    expression = parse(text)
    metric = Metric(text, expression)
    return Draw(metric, expression, expression, expression, metric)


DRAWS = [draw(f"abs(W)*{name}") for name in WORTH]


def answer(task: Task) -> Any:
    if isinstance(task, ProbeTask):
        return [MaskFingerprint(one.name, "", {"0.5": WORTH[one.name[-1]][0]}) for one in task.metrics]
    assert isinstance(task, ExcessTask)
    loss, kl = WORTH[task.metric.name[-1]][1 if task.first == 0 else 2]
    return {"loss": {"0.5": loss}, "kl": {"0.5": kl}}


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "a", {}, resume=False) as opened:
        yield opened


def halving(
    ledger: Ledger, objective: str = "loss", function: Any = answer, generation: int = 1, start: int = 0, **options: Any
) -> SuccessiveHalving:
    metrics = tuple(one.metric for one in DRAWS[:start])
    config = SearchConfig(("0.5",), ("W",), (), metrics, (), 5, 9, 0, RUNGS, objective)
    return SuccessiveHalving(config, ledger, Serial(function), Seen(), generation, **options)


def statuses(ledger: Ledger) -> dict[str, str]:
    return {row.formula[-1]: f"{row.status}: {row.reason}" if row.reason else row.status for row in ledger.candidates()}


@pytest.mark.parametrize(("objective", "expected"), [("loss", "HD"), ("kl", "GH")])
def test_who_climbs(ledger: Ledger, objective: str, expected: str) -> None:
    """The probe drops F, the last fifth; of X to D the first window sends on the better half by the objective."""
    halving(ledger, objective).run(DRAWS)
    fates = statuses(ledger)
    assert "".join(name for name, fate in fates.items() if fate == "evaluated") == expected
    assert fates["F"] == "screened: screened out after reconstruction"
    assert fates["X"] == "screened: screened out after 1 windows"
    for row in ledger.evaluations("done"):
        _, first, rest = WORTH[row.formula[-1]]
        for column, kind in enumerate(("loss", "kl")):
            assert row.figures[kind] == {"0.5": pytest.approx((first[column] + 3 * rest[column]) / 4)}


def test_the_last_rung_in_use_tells_alone(ledger: Ledger) -> None:
    """What was measured in one shot does not count there, and the probe holds nobody back."""
    used = {name: (place / 10, place / 5) for place, name in enumerate(WORTH, start=1)}

    def use(task: Task) -> Any:
        if not isinstance(task, UseTask):
            return answer(task)
        loss, kl = used[task.metric.name[-1]]
        return {"loss": {"0.5": loss}, "kl": {"0.5": kl}}

    one = halving(ledger, function=use)
    one.config = replace(one.config, rungs=(RUNGS[0], replace(RUNGS[-1], name="in use", first=0, in_use=True)))
    one.run(DRAWS)
    fates = statuses(ledger)
    assert "reconstruction" not in "".join(fates.values())
    evaluated = {row.formula[-1]: row.figures for row in ledger.evaluations("done")}
    assert set(evaluated) == {"H", "D", "F"}  # by the first window
    for name, figures in evaluated.items():
        assert figures == {"loss": {"0.5": used[name][0]}, "kl": {"0.5": used[name][1]}}
    rows = describe_rungs(ledger.measurements(), one.config.rungs, "loss")
    assert [(row["rung"], row["spearman"]) for row in rows] == [
        (PROBE.name, pytest.approx(1)), (RUNGS[0].name, pytest.approx(-1)), ("in use", pytest.approx(1)),
    ]  # fmt: skip


def test_those_of_the_start_climb_whatever_they_are_measured_at(ledger: Ledger) -> None:
    """Half of X to F is three, of which F is the best."""
    halving(ledger, generation=0, start=5).run(DRAWS)
    assert set(statuses(ledger).values()) == {"evaluated"}


def test_without_reconstruction_errors_the_probe_drops_nobody(ledger: Ledger) -> None:
    """No Gram matrix, no error: the order in which candidates were drawn says nothing about them."""

    def blind(task: Task) -> Any:
        if isinstance(task, ProbeTask):
            return [MaskFingerprint(one.name, "", {}) for one in task.metrics]
        return answer(task)

    halving(ledger, function=blind).run(DRAWS)
    fates = statuses(ledger)
    assert [name for name, fate in fates.items() if fate == "evaluated"] == ["H", "D", "F"]
    assert {fates["X"], fates["G"]} == {"screened: screened out after 1 windows"}


def test_what_fails_on_a_rung_stays_there_even_of_the_start(ledger: Ledger) -> None:
    def fail(task: Task) -> Any:
        if isinstance(task, ProbeTask):
            return answer(task)
        if task.metric.name.endswith("D"):  # type: ignore[union-attr]
            raise MaskError("no")
        found = answer(task)
        if task.metric.name.endswith("H"):  # type: ignore[union-attr]
            found["kl"] = {"0.5": INF}
        return found

    halving(ledger, function=fail, generation=0, start=5).run(DRAWS)
    fates = statuses(ledger)
    assert fates["H"] == "failed: loss or divergence is not finite at 0.5"
    assert fates["D"] == "failed: no"
    assert len(ledger.evaluations()) == 3


def test_a_second_run_measures_nothing_again(ledger: Ledger) -> None:
    first = halving(ledger).run(DRAWS)
    before = ledger.comparable_tables()

    def refuse(task: Task) -> Any:
        raise AssertionError(f"measured again: {task}")

    assert halving(ledger, function=refuse).run(DRAWS) == first == [1, 2]
    assert ledger.comparable_tables() == before


def test_what_is_not_affordable_is_left_for_later(ledger: Ledger) -> None:
    """Of H and D only the first; what was drawn before it is decided."""
    assert halving(ledger).run(DRAWS, affordable=1) is None
    assert list(statuses(ledger)) == ["X", "G", "H"]
    assert halving(ledger).run(DRAWS, affordable=2) == [1, 2]
    assert list(statuses(ledger)) == list(WORTH)


def test_batches_of_eight_and_one_by_one_where_a_batch_is_lost(ledger: Ledger) -> None:
    asked: list[list[str]] = []

    def fragile(task: Task) -> Any:
        if not isinstance(task, ProbeTask):
            return {"loss": {"0.5": 1.0}, "kl": {"0.5": 1.0}}
        asked.append([one.name for one in task.metrics])
        if "abs(W)**3.5" in asked[-1]:
            raise MaskError("killed its worker")
        return [MaskFingerprint(one.name, "", {}) for one in task.metrics]

    halving(ledger, function=fragile).run([draw(f"abs(W)**{number}.5") for number in range(10)])
    assert [len(batch) for batch in asked] == [8, 2, *[1] * 8]
    probed = [row for row in ledger.measurements() if row.rung == PROBE.name]
    assert [(row.position, row.error) for row in probed if row.error] == [(3, "killed its worker")]
    by_position = {row.position: row for row in probed}
    assert by_position[2].value["fingerprint"] == "abs(W)**2.5"
    assert sorted(by_position) == list(range(10))


def test_out_of_time_keeps_what_was_measured(ledger: Ledger) -> None:
    now = iter(range(100))
    one = halving(ledger)
    one.executor.clock = TaskClock(lambda: next(now), last_start=8)  # read three times a task
    assert one.run(DRAWS) is None
    assert [row.position for row in ledger.measurements() if row.rung == "1 windows"] == [0, 1]


def test_equal_masks_in_a_generation_before_are_no_new_ones(ledger: Ledger) -> None:
    first = halving(ledger, generation=0)
    first.run(DRAWS)
    one = halving(ledger)
    one.seen = Seen(masks=first.seen.masks)
    assert one.run([DRAWS[2], DRAWS[0]]) == []
    duplicate, equal = ledger.candidates()[-2:]
    assert (duplicate.status, duplicate.evaluation) == ("duplicate", 1)
    assert (equal.status, equal.reason) == ("failed", "equal to a formula that failed or was screened out")


# What it was worth


def row(position: int, rung: str, value: Any, duration: float = 1.0, generation: int = 0) -> Measurement:
    return Measurement(generation, position, rung, value, None if value else "failed", duration)


def kl(figure: float) -> dict[str, Any]:
    return {"loss": {"0.5": 9.0}, "kl": {"0.5": figure}}


def probe(figure: float | None) -> dict[str, Any]:
    errors = {} if figure is None else {"0.5": figure}
    return {"fingerprint": "", "sketch": "", "reconstruction": errors}


def test_describe_rungs_by_hand() -> None:
    """Over all windows 0.1, 0.2, 0.3 and 0.4; the first window says 0.2, 0.1, 0.3, 0.4, whose Spearman's rho is 0.8."""
    measured = [
        *(row(place, PROBE.name, probe(error), 0.5) for place, error in enumerate([0.4, 0.3, 0.2, 0.1, 0.9])),
        row(5, PROBE.name, None),
        *(row(place, "1 windows", kl(figure), 2.0) for place, figure in enumerate([0.2, 0.1, 0.3, 0.4, 0.8])),
        *(
            row(place, "4 windows", kl((4 * whole - first) / 3), 4.0 + place)
            for place, (first, whole) in enumerate([(0.2, 0.1), (0.1, 0.2), (0.3, 0.3), (0.4, 0.4)])
        ),
    ]
    described = describe_rungs(measured, RUNGS, "kl")
    assert described == [
        {"rung": PROBE.name, "measured": 5, "compared": 4, "spearman": pytest.approx(-1.0)},
        {"rung": "1 windows", "measured": 5, "compared": 4, "spearman": pytest.approx(0.8)},
        {"rung": "4 windows", "measured": 4, "compared": 4, "spearman": pytest.approx(1.0)},
    ]


def test_describe_rungs_of_too_little() -> None:
    """Two candidates, or equal figures, have no rank correlation; positions of other generations are other ones."""
    assert [one["spearman"] for one in describe_rungs([], RUNGS, "kl")] == [None] * 3
    two = [
        row(0, rung, kl(figure), generation=place)
        for place, figure in enumerate([0.1, 0.2])
        for rung in ("1 windows", "4 windows")
    ]
    described = describe_rungs(two, RUNGS, "kl")
    assert [(one["measured"], one["compared"], one["spearman"]) for one in described] == [
        (0, 0, None),
        (2, 2, None),
        (2, 2, None),
    ]
    blind = [row(place, PROBE.name, probe(None)) for place in range(4)]
    assert describe_rungs(blind, RUNGS, "kl")[0] == {
        "rung": PROBE.name,
        "measured": 4,
        "compared": 0,
        "spearman": None,
    }
