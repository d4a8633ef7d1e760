"""The generation loop against a fake evaluator: budgets, equivalence, screening, and resuming after any stop."""

from __future__ import annotations

import functools
import math
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpmetric.errors import GpmetricError, LedgerError, MaskError
from gpmetric.evolution import breeding, sqlite_schema
from gpmetric.evolution.breeding import _rounded
from gpmetric.evolution.campaign import Campaign
from gpmetric.evolution.fitness import best_of, hinge_penalty
from gpmetric.evolution.grammar import nests
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.refinement import neighbours
from gpmetric.evolution.rungs import PROBE, Rung
from gpmetric.evolution.search_config import SearchConfig, named
from gpmetric.evolution.selection import Individual, select_survivors
from gpmetric.evolution.tasks import ExcessTask, MaskFingerprint, ProbeTask, Task
from gpmetric.executors import Executor, LocalProcesses, Outcome, OutOfTime, Serial
from gpmetric.expression import PRIMITIVES, parse
from gpmetric.metrics import Metric, resolve_metric
from gpmetric.targets import plain_granularities
from tests import campaign_helpers as fake
from tests.campaign_helpers import TARGETS

RUNGS = (Rung("1 windows", 0, 1, 0.4), Rung("4 windows", 1, 4, 0.5), Rung("8 windows", 4, 8, 1.0))
START = ("abs(W)", "abs(W)*X", "W*W*mms(G)", "abs(-W)")
Tables = dict[str, list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simplification is pure, so it is remembered between runs; and no fsync, which only a power cut needs."""
    for name in ("canonical", "cancel_opposites", "rank_form"):
        monkeypatch.setattr(breeding, name, REMEMBERED[name])
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite_schema.sqlite3, "connect", lambda *a, **k: connect(*a, **k, factory=Hasty))


REMEMBERED = {name: functools.cache(getattr(breeding, name)) for name in ("canonical", "cancel_opposites", "rank_form")}


class Hasty(sqlite3.Connection):
    def execute(self, statement: str, *arguments: Any) -> sqlite3.Cursor:  # type: ignore[override]
        return super().execute(statement.replace("synchronous = FULL", "synchronous = OFF"), *arguments)


class Mortal(Serial):
    """Keeps the tasks it is given, and dies, as a killed driver does, when asked for one outcome too many."""

    def __init__(
        self,
        life: float = math.inf,
        function: Callable[[Any], Any] = fake.evaluate,
        death: type[BaseException] = KeyboardInterrupt,
    ) -> None:
        super().__init__(function)
        self.life, self.death = life, death
        self.tasks: list[Any] = []

    def map_ordered(self, candidates: Iterable[Any]) -> Iterator[Outcome]:
        tasks = list(candidates)
        for task, outcome in zip(tasks, super().map_ordered(tasks), strict=True):
            if len(self.tasks) >= self.life:
                raise self.death
            self.tasks.append(task)
            yield outcome


def config(**changes: Any) -> SearchConfig:
    values: dict[str, Any] = {
        "targets": TARGETS,
        "operands": ("W", "X", "G"),
        "primitives": tuple(PRIMITIVES),
        "start": START,
        "population": 8,
        "max_nodes": 15,
        "seed": 1,
        "rungs": RUNGS,
        "generations": 5,
    }
    values |= changes
    values["start"] = tuple(metric(text) for text in values["start"])
    return SearchConfig(**({"rivals": values["start"]} | values))


def metric(text: str) -> Metric:
    """Named as a draw is."""
    found = resolve_metric(text)
    return named(found.expression, found.granularity)


def run(path: Path, executor: Executor | None = None, *, resume: bool = False, **changes: Any) -> Tables:
    """Runs a campaign; returns the tables that two equal campaigns share."""
    chosen = config(**changes)
    with Ledger.open(path, {"seed": chosen.seed}, resume=resume) as ledger:
        Campaign(chosen, ledger, executor or Mortal()).run()
        return ledger.comparable_tables()


def paid(tables: Tables) -> list[str]:
    return [row["formula"] for row in tables["evaluations"]]


# What a campaign records


def test_a_campaign_finishes_its_generations(tmp_path: Path) -> None:
    tables = run(tmp_path / "a")
    assert [row["number"] for row in tables["generations"]] == [0, 1, 2, 3, 4]
    assert {row["status"] for row in tables["candidates"]} == {"evaluated", "duplicate", "screened", "failed"}
    assert [row["formula"] for row in tables["candidates"][:4]] == list(START)
    assert tables["candidates"][3]["status"] == "duplicate"  # abs(-W) is abs(W) once opposites cancel
    assert tables["candidates"][3]["evaluation"] == tables["candidates"][0]["evaluation"]


def test_figures_are_means_over_all_windows(tmp_path: Path) -> None:
    """Whatever the windows were cut into: 1, 3 and 4 of them."""
    done = [row for row in run(tmp_path / "a")["evaluations"] if row["status"] == "done"]
    assert len(done) > 8
    for row in done:
        for kind in ("loss", "kl"):
            for target in TARGETS:
                expected = sum(fake.figure(row["formula"], kind, target, window) for window in range(8)) / 8
                assert row["figures"][kind][target] == pytest.approx(expected, rel=1e-12)


def test_each_candidate_has_what_simplification_left_of_it(tmp_path: Path) -> None:
    formula, alike = "exp(log(abs(W)))*X+rowsum(abs(W))", "abs(W)*X"
    first, second = run(tmp_path / "a", start=(formula, alike))["candidates"][:2]
    assert first["formula"] == formula
    assert first["opposites"] == "abs(W)*X+rowsum(abs(W))"
    assert first["canonical"] == "rowsum(abs(W))+abs(W)*X"
    assert first["ranked"] == "abs(W)*X"  # the sum is one number for each row
    assert (second["status"], second["evaluation"]) == ("duplicate", first["evaluation"])
    first, second = run(tmp_path / "b", start=(formula, alike), rank_group="layer")["candidates"][:2]
    assert first["ranked"] == first["canonical"]
    assert second["status"] == "evaluated"


def test_failures_are_recorded_with_their_reasons(tmp_path: Path) -> None:
    tables = run(tmp_path / "a", generations=24)
    assert {row["reason"] for row in tables["candidates"] if row["status"] == "failed"} == {
        "3 of 8 scores are NaN or infinite",
        "the scores ran away",
        "equal to a formula that failed or was screened out",
    }
    assert {row["reason"] for row in tables["candidates"] if row["status"] == "screened"} == {
        "screened out after reconstruction",
        "screened out after 1 windows",
        "screened out after 4 windows",
    }
    for row in tables["candidates"]:
        if row["reason"] == "3 of 8 scores are NaN or infinite":
            assert row["fingerprint"] is row["evaluation"] is None
    ran_away = [row for row in tables["evaluations"] if row["status"] == "failed"]
    assert ran_away
    for row in ran_away:
        assert (row["reason"], row["figures"]) == ("the scores ran away", {})


@pytest.mark.parametrize("kind", ["loss", "kl"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_figure_that_is_not_finite_is_a_failure(tmp_path: Path, kind: str, bad: float) -> None:
    def ruin(task: Task) -> Any:
        answer = fake.evaluate(task)
        if isinstance(task, ExcessTask) and fake.number("ruined", task.metric.name) < 0.3:
            answer[kind]["2:4"] = bad
        return answer

    tables = run(tmp_path / "a", Mortal(function=ruin))
    reasons = [row["reason"] for row in tables["candidates"] if row["reason"] and "not finite" in row["reason"]]
    assert reasons
    assert all("not finite at 2:4" in reason for reason in reasons)
    assert not [text for text in paid(tables) if fake.number("ruined", text) < 0.3 and text not in START[:3]]


# Nothing is paid for twice


def test_nothing_is_measured_twice(tmp_path: Path) -> None:
    executor = Mortal()
    tables = run(tmp_path / "a", executor, generations=12)
    probed = [one.name for task in executor.tasks if isinstance(task, ProbeTask) for one in task.metrics]
    measured = [(task.metric.name, task.first) for task in executor.tasks if isinstance(task, ExcessTask)]
    assert max(Counter(probed).values()) == max(Counter(measured).values()) == 1
    masks = Counter((fake.mask(text), first) for text, first in measured)
    assert max(masks.values()) == 1  # no mask either
    forms = Counter(row["ranked"] for row in tables["candidates"])
    assert len(probed) == len(forms) < len(tables["candidates"])
    assert len({fake.mask(text) for text in paid(tables)}) == len(paid(tables))


def test_equal_masks_are_told_by_the_probe_alone(tmp_path: Path) -> None:
    """Everything of one mask: one candidate is measured, the others are its duplicates, and the search is over."""

    def alike(task: Task) -> Any:
        if isinstance(task, ProbeTask):
            return [MaskFingerprint("one", "", {}) for _ in task.metrics]
        return fake.evaluate(replace(task, metric=metric("abs(W)")))

    tables = run(tmp_path / "a", Mortal(function=alike))
    assert paid(tables) == ["abs(W)"]
    assert Counter(row["status"] for row in tables["candidates"]) == {
        "evaluated": 1,
        "duplicate": len(tables["candidates"]) - 1,
    }


def test_without_fingerprints_equal_masks_are_paid_for_again(tmp_path: Path) -> None:
    forgetful = run(tmp_path / "a", fingerprints=False, generations=24)
    masks = [fake.mask(text) for text in paid(forgetful)]
    assert len(masks) > len(set(masks))
    forms = [row["ranked"] for row in forgetful["candidates"] if row["status"] == "evaluated"]
    assert len(forms) == len(set(forms))


# Screening


def test_start_formulas_are_never_screened_out(tmp_path: Path) -> None:
    def against(task: Task) -> Any:
        started = ("abs(W)", "abs(W)*X", "sqr(W)*mms(G)")
        if isinstance(task, ProbeTask):
            worst = dict.fromkeys(TARGETS, 9.0)
            names = [one.name for one in task.metrics]
            return [MaskFingerprint(name, "", worst) if name in started else fake.probe(name) for name in names]
        if task.metric.name in started:
            return {kind: dict.fromkeys(TARGETS, 50.0) for kind in ("loss", "kl")}
        return fake.evaluate(task)

    tables = run(tmp_path / "a", Mortal(function=against), generations=1)
    assert [row["status"] for row in tables["candidates"][:4]] == ["evaluated"] * 3 + ["duplicate"]
    assert [row["figures"]["loss"]["0.5"] for row in tables["evaluations"][:3]] == [50.0] * 3
    assert len(tables["evaluations"]) > 3  # the better ones climb beside them


def test_every_start_formula_is_drawn_however_small_the_population(tmp_path: Path) -> None:
    start = ("abs(W)", "abs(W)*X", "abs(W)*G", "abs(W)*X*G", "abs(W) + X", "abs(W) + G")
    tables = run(tmp_path / "a", population=4, generations=1, start=start)
    assert [resolve_metric(row["formula"]).expression for row in tables["candidates"]] == [parse(one) for one in start]


def test_no_more_than_its_share_climbs(tmp_path: Path) -> None:
    """0.8 of the distinct masks, 0.4 of those, half of those, each rounded up; and the three of the start."""
    tables = run(tmp_path / "a", generations=8, population=20)
    for number in range(8):
        climbed = Counter(row["rung"] for row in tables["measurements"] if row["generation"] == number)
        distinct = {
            row["value"]["fingerprint"]
            for row in tables["measurements"]
            if row["generation"] == number and row["rung"] == PROBE.name and row["value"]
        }
        counts = [len(distinct), *(climbed[rung.name] for rung in RUNGS)]
        for share, below, above in zip((0.8, 0.4, 0.5), counts, counts[1:], strict=False):
            assert above <= math.ceil(share * below) + 3 * (number == 0)
        assert 1 <= counts[-1] < counts[0]


def test_the_better_part_climbs(tmp_path: Path) -> None:
    tables = run(tmp_path / "a", population=20, generations=3, objective="loss")
    for number in (1, 2):
        found: dict[str, dict[int, float]] = {rung.name: {} for rung in RUNGS}
        for row in tables["measurements"]:
            if row["generation"] == number and row["rung"] == RUNGS[0].name and row["error"] is None:
                found[row["rung"]][row["position"]] = sum(row["value"]["loss"].values())
            elif row["generation"] == number and row["rung"] in found:
                found[row["rung"]][row["position"]] = 0.0
        first, second = found[RUNGS[0].name], found[RUNGS[1].name]
        left = [value for position, value in first.items() if position not in second]
        assert left
        assert max(first[position] for position in second) <= min(left)


@pytest.mark.parametrize("objective", ["kl", "loss"])
def test_the_objective_orders_candidates(tmp_path: Path, objective: str) -> None:
    chosen = config(objective=objective)
    with Ledger.open(tmp_path / "a", {}, resume=False) as ledger:
        campaign = Campaign(chosen, ledger, Mortal())
        campaign.run()
        rows = ledger.evaluations("done")
        assert campaign.front()[0].text == min(rows, key=lambda row: sum(row.figures[objective].values())).formula
        for individual, row in zip(campaign.individuals(), rows, strict=True):
            assert individual.searched == row.figures[objective]
            assert individual.excess == row.losses


def test_the_objectives_lead_to_different_searches(tmp_path: Path) -> None:
    assert (
        run(tmp_path / "a", population=20)["candidates"]
        != run(tmp_path / "b", population=20, objective="loss")["candidates"]
    )


def test_the_front_holds_the_best_mean_and_nothing_dominated(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "a", {}, resume=False) as ledger:
        campaign = Campaign(config(), ledger, Mortal())
        campaign.run()
        front, everyone = campaign.front(), campaign.individuals()
    assert front[0].merit == min(one.merit for one in everyone)
    free = [one for one in everyone if "G" not in one.expression.operands]
    assert min(free, key=lambda one: one.mean) in front  # what gradients cost is an objective
    for one in front:
        assert not any(
            all(a <= b for a, b in zip(other.fitness.values, one.fitness.values, strict=True))
            and other.fitness.values != one.fitness.values
            for other in everyone
        )


# Groups, yardsticks, and what is bred


def test_groups_are_searched_with_the_formulas(tmp_path: Path) -> None:
    executor = Mortal()
    tables = run(tmp_path / "a", executor, groups=plain_granularities(), generations=8, population=20)
    groups = {resolve_metric(text).granularity for text in paid(tables)}
    assert groups == {"row", "layer", "block"}
    for row in tables["candidates"]:
        texts = [row[name] for name in ("formula", "opposites", "canonical", "ranked")]
        assert len({text.rpartition(":")[0] for text in texts}) == 1  # the group stays with the formula
        assert texts[0].rpartition(":")[0] in ("", "layer", "block")
    for number in range(8):
        assert all(text in paid(tables) for text in tables["generations"][number]["population"])
    asked = {task.metric.name for task in executor.tasks if isinstance(task, ExcessTask)}
    assert any(text.startswith("block:") for text in asked)


def test_in_a_layer_what_is_constant_in_a_row_only_counts(tmp_path: Path) -> None:
    start = tuple(f"{group}abs(W)*X{term}" for group in ("", "layer:") for term in ("", "/rowsum(abs(W))"))
    rows = run(tmp_path / "a", start=start, groups=plain_granularities(), generations=1)["candidates"][:4]
    forms = [row["ranked"] for row in rows]
    assert forms[0] == forms[1] == "abs(W)*X"
    assert forms[2] == "layer:abs(W)*X"
    assert forms[3].startswith("layer:")
    assert forms[3] != forms[2]


@pytest.mark.parametrize("group", ["layer", "block"])
def test_a_group_that_is_given_is_everyones(tmp_path: Path, group: str) -> None:
    tables = run(tmp_path / "a", groups=(group,), start=(f"{group}:abs(W)",))
    assert all(row["formula"].startswith(f"{group}:") for row in tables["candidates"])


def test_constants_are_rounded_but_those_of_start_metrics(tmp_path: Path) -> None:
    """To four digits, unless that made a number whole: W**1 has the sign that W**1.00004 does not have."""
    start = ("abs(W)*min(X,0.123456)", "abs(W)*X")
    tables = run(tmp_path / "a", start=start, generations=4)
    assert any("0.123456" in text for text in paid(tables))
    [first, *others] = tables["candidates"]
    assert first["ranked"] == "abs(W)*min(X,0.1235)"
    constants = [
        one for row in others if "W" in row["ranked"] for one in resolve_metric(row["ranked"]).expression.constants
    ]
    assert constants
    assert all(float(f"{one:.4g}") in (one, round(one)) for one in constants)
    assert str(_rounded(parse("W**1.00004*X*D**1.23456"))) == "W**1.00004*X*D**1.235"


def test_every_third_generation_begins_with_neighbours_of_the_best(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "a", {}, resume=False) as ledger:
        campaign = Campaign(config(generations=2), ledger, Mortal())
        campaign.run()
        population = [resolve_metric(text) for text in ledger.generations()[-1].population]
    expected = {str(one) for metric in population for one in neighbours(metric.expression, 1.5)}
    tables = run(tmp_path / "b", generations=3)
    drawn = [row["formula"] for row in tables["candidates"] if row["generation"] == 2]
    assert drawn[0] in expected
    assert sum(text in expected for text in drawn) >= 4


def test_without_breeding_every_formula_is_drawn_at_random(tmp_path: Path) -> None:
    """What is drawn does not depend on what was found, also in the generation that neighbours begin otherwise."""

    def reversed_worth(task: Task) -> Any:
        answer = fake.evaluate(task)
        if isinstance(task, ExcessTask):
            answer = {kind: {target: 4 - value for target, value in part.items()} for kind, part in answer.items()}
        return answer

    first = run(tmp_path / "a", breeding=False)
    second = run(tmp_path / "b", Mortal(function=reversed_worth), breeding=False)
    assert paid(first) != paid(second)
    assert [row["formula"] for row in first["candidates"]] == [row["formula"] for row in second["candidates"]]
    assert run(tmp_path / "c")["candidates"] != run(tmp_path / "d", Mortal(function=reversed_worth))["candidates"]


def test_forbidden_nestings_are_nowhere(tmp_path: Path) -> None:
    """Not after simplification either, nor among the neighbours of generation 3."""
    forbidden = (("pow", "abs"), ("mul", "sqrt"), ("sqrt", "mul"))
    tables = run(tmp_path / "a", forbidden=forbidden, start=("abs(W)",), generations=8, population=12)
    assert len(paid(tables)) > 8
    for text in [*paid(tables), *(row["formula"] for row in tables["candidates"])]:
        assert not any(nests(parse(text), *pair) for pair in forbidden), text


# Budgets


@pytest.mark.parametrize("evaluations", [1, 5, 17])
def test_the_budget_of_evaluations_is_met_exactly(tmp_path: Path, evaluations: int) -> None:
    tables = run(tmp_path / "a", generations=None, evaluations=evaluations)
    assert len(tables["evaluations"]) == evaluations


def test_the_budget_spent_first_ends_the_search(tmp_path: Path) -> None:
    assert len(run(tmp_path / "a", generations=2, evaluations=1000)["generations"]) == 2
    assert len(run(tmp_path / "b", generations=1000, evaluations=6)["evaluations"]) == 6


@pytest.mark.parametrize("fewer", range(1, 14))
def test_more_evaluations_on_resume_equal_having_asked_for_them_at_once(tmp_path: Path, fewer: int) -> None:
    at_once = run(tmp_path / "a", generations=None, evaluations=15)
    run(tmp_path / "b", generations=None, evaluations=fewer)
    assert run(tmp_path / "b", generations=None, evaluations=15, resume=True) == at_once


def test_a_longer_budget_begins_with_what_the_shorter_found(tmp_path: Path) -> None:
    short = run(tmp_path / "a", generations=2)
    long = run(tmp_path / "b", generations=4)
    assert long["evaluations"][: len(short["evaluations"])] == short["evaluations"]
    assert run(tmp_path / "a", generations=4, resume=True) == long


def test_a_finished_campaign_asks_for_nothing(tmp_path: Path) -> None:
    for name, budget in {"a": {"generations": 3}, "b": {"generations": None, "evaluations": 7}}.items():
        tables, idle = run(tmp_path / name, **budget), Mortal(0)
        assert run(tmp_path / name, idle, resume=True, **budget) == tables


def test_out_of_time_at_every_measurement_keeps_it_and_a_resume_goes_on(tmp_path: Path) -> None:
    """Not one more is made, and nothing that was made is lost; with time over, nothing evaluated is no error."""
    whole = Mortal()
    expected = run(tmp_path / "whole", whole, generations=3)
    for count in range(1, len(whole.tasks)):
        path, executor = tmp_path / str(count), Mortal(count, death=OutOfTime)
        executor.clock.end = time.monotonic() + 3600
        with Ledger.open(path, {"seed": 1}, resume=False) as ledger:
            Campaign(config(generations=3), ledger, executor).run()
            assert bool(ledger.evaluations("done")) == any(getattr(task, "last", 0) == 8 for task in executor.tasks)
        assert len(executor.tasks) == count
        assert run(path, generations=3, resume=True) == expected, f"out of time after {count} outcomes"


# Stopped and resumed


def test_same_seed_same_ledger_another_seed_another(tmp_path: Path) -> None:
    first, second = (run(tmp_path / name) for name in ("a", "b"))
    assert first == second
    assert run(tmp_path / "c", seed=2)["candidates"] != first["candidates"]


@pytest.mark.parametrize(("step", "changes"), [(1, {}), (4, {"groups": plain_granularities(), "fingerprints": False})])
def test_stopped_after_every_outcome_and_resumed_equals_uninterrupted(
    tmp_path: Path, step: int, changes: dict[str, Any]
) -> None:
    whole = Mortal()
    expected = run(tmp_path / "whole", whole, generations=3, **changes)  # the third begins with neighbours
    for life in range(0, len(whole.tasks), step):
        path, dying, reborn = tmp_path / str(life), Mortal(life), Mortal()
        with pytest.raises(KeyboardInterrupt):
            run(path, dying, generations=3, **changes)
        assert run(path, reborn, resume=True, generations=3, **changes) == expected, f"stopped after {life} outcomes"
        assert len(reborn.tasks) == len(whole.tasks) - life  # nothing is computed again


@pytest.mark.slow
def test_stopped_after_every_ledger_write_and_resumed_equals_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes, life = 0, math.inf
    write = Ledger._write

    @contextmanager
    def counted(ledger: Ledger, **how: bool) -> Iterator[None]:
        nonlocal writes
        with write(ledger, **how):
            yield
        writes += 1
        if writes > life:
            raise KeyboardInterrupt

    monkeypatch.setattr(Ledger, "_write", counted)
    expected = run(tmp_path / "whole", generations=3)
    total = writes
    assert total > 50
    for life in range(total):
        path, writes = tmp_path / str(life), 0
        with pytest.raises(KeyboardInterrupt):
            run(path, generations=3)
        writes = -10_000
        assert run(path, resume=True, generations=3) == expected, f"stopped after {life + 1} writes"


def test_stopped_again_and_again_equals_uninterrupted(tmp_path: Path) -> None:
    expected = run(tmp_path / "whole")
    stops, tables = 0, None
    while tables is None:
        try:
            tables = run(tmp_path / "often", Mortal(1), resume=True)  # a measurement each time is enough
        except KeyboardInterrupt:
            stops += 1
    assert stops > 30
    assert tables == expected


def test_a_ledger_with_other_draws_is_a_clear_error(tmp_path: Path) -> None:
    tables = run(tmp_path / "a", generations=None, evaluations=11)
    assert tables["candidates"][-1]["generation"] == len(tables["generations"])  # drawn in one that is not finished
    with closing(sqlite3.connect(tmp_path / "a")) as connection, connection:
        connection.row_factory = sqlite3.Row
        row = dict(connection.execute("SELECT * FROM candidates ORDER BY id DESC").fetchone()) | {
            "formula": "abs(W)*X*X"
        }
        del row["checksum"]
        update = "UPDATE candidates SET formula = ?, checksum = ? WHERE id = ?"
        connection.execute(update, (row["formula"], sqlite_schema.row_checksum("candidates", row), row["id"]))
    with pytest.raises(LedgerError, match="but this campaign draws"):
        run(tmp_path / "a", generations=None, evaluations=15, resume=True)


# Workers


def test_the_number_of_workers_does_not_matter(tmp_path: Path) -> None:
    expected = run(tmp_path / "0", generations=3, population=20)
    for workers in (1, 3):
        with LocalProcesses(fake.make_evaluator, (), workers) as executor:
            assert run(tmp_path / str(workers), executor, generations=3, population=20) == expected


def test_a_batch_whose_worker_is_killed_is_probed_one_by_one(tmp_path: Path) -> None:
    start = (*START, fake.KILLER)
    with LocalProcesses(fake.make_deadly, (), workers=1) as executor:
        tables = run(tmp_path / "a", executor, generations=1, start=start)
    killer = tables["candidates"][4]
    assert killer["formula"] == fake.KILLER
    assert (killer["status"], killer["reason"]) == ("failed", "killed its worker 2 times (exit code 7)")
    others = [row for row in tables["candidates"] if row["formula"] != fake.KILLER]
    assert not any("killed" in (row["reason"] or "") for row in others)
    assert [row["status"] for row in others[:3]] == ["evaluated"] * 3


# The end of a search


def test_a_space_without_anything_new_ends_the_campaign(tmp_path: Path) -> None:
    """With W alone and two primitives few formulas exist; the loop must stop by itself, and stay stopped."""
    few = {"operands": ("W",), "primitives": ("abs", "neg"), "start": ("abs(W)",), "max_nodes": 4, "population": 4}
    budget = {"generations": None, "evaluations": 1000}
    tables = run(tmp_path / "a", **few, **budget)
    assert 1 <= len(tables["evaluations"]) < 10
    assert run(tmp_path / "a", Mortal(0), **few, **budget, resume=True) == tables


def test_nothing_evaluable_is_a_clear_error(tmp_path: Path) -> None:
    def refuse(task: Task) -> Sequence[Any]:
        raise MaskError("8 of 8 scores are NaN or infinite")

    with pytest.raises(GpmetricError, match="no formula could be evaluated"):
        run(tmp_path / "a", Serial(refuse))
    with Ledger.read(tmp_path / "a") as ledger:
        assert {row.reason for row in ledger.candidates()} >= {"8 of 8 scores are NaN or infinite"}
        assert not ledger.evaluations()


# What is bred for


def test_merit_adds_what_is_above_the_bar() -> None:
    """By hand: mean (0.5 + 0.3) / 2 of the divergence; each second figure is 0.1 above its bar less 2 %."""
    divergence, excess = {"0.5": 0.5, "2:4": 0.3}, {"0.5": 0.55, "2:4": 0.35}
    low, high = {"0.5": 0.6, "2:4": 0.2}, {"0.5": 0.6, "2:4": 0.25}
    assert Individual(metric("abs(W)"), divergence, excess, low, high).merit == pytest.approx(0.4 + 0.104 + 0.105)
    assert Individual(metric("abs(W)"), divergence, excess, {}, high).merit == pytest.approx(0.4 + 0.105)
    assert hinge_penalty({"a": 0.5, "b": 0.495}, {"a": 0.52, "b": 0.5}) == pytest.approx(0.005)  # a is clearly below
    assert hinge_penalty({"a": -0.01}, {"a": -0.01}) == pytest.approx(0.0002)  # pruning may help a little
    assert best_of([{"a": 1.0, "b": 3.0}, {"a": 2.0, "b": math.inf}]) == {"a": 1.0, "b": 3.0}
    assert best_of([]) == {}
    assert Individual(metric("abs(W)"), divergence, excess).merit == pytest.approx(0.4)


@pytest.mark.parametrize("generations", [1, 3])
def test_the_bar_is_the_best_start_formula_at_each_target(tmp_path: Path, generations: int) -> None:
    """Also where the campaign goes on from a ledger, which has no first generation of its own."""
    for resume in (False, True):
        with Ledger.open(tmp_path / "a", {}, resume=resume) as ledger:
            campaign = Campaign(config(generations=generations), ledger, Mortal())
            campaign.run()
            places = {row.evaluation for row in ledger.candidates() if (row.generation, row.position) < (0, len(START))}
            started = [row for row in ledger.evaluations("done") if row.id in places]
            for target in TARGETS:
                lowest = min(row.losses[target] for row in started)
                assert {one.bar[target] for one in campaign.individuals()} == {lowest}


@pytest.mark.parametrize("wanted", [False, True])
def test_the_divergence_has_a_bar_where_it_is_wanted(tmp_path: Path, wanted: bool) -> None:
    with Ledger.open(tmp_path / "a", {}, resume=False) as ledger:
        campaign = Campaign(replace(config(generations=1), objective_bar=wanted), ledger, Mortal())
        campaign.run()
        lowest = min(row.figures["kl"][TARGETS[0]] for row in ledger.evaluations("done")[: len(START)])
        assert all(one.bar and bool(one.searched_bar) == wanted for one in campaign.individuals())
        assert not wanted or campaign.individuals()[0].searched_bar[TARGETS[0]] == lowest


def test_few_of_the_elite_differ_in_constants_only() -> None:
    def individual(constant: float, figure: float) -> Individual:
        return Individual(metric(f"abs(W)**{constant}*X"), {"0.5": figure}, {"0.5": figure})

    alike = [individual(1.1 + number / 10, 1 + number / 100) for number in range(8)]
    others = [Individual(metric(text), {"0.5": 2.0}, {"0.5": 2.0}) for text in ("abs(W)*G", "abs(W)*H", "abs(W)*D")]
    kept = select_survivors([*alike, *others], 10)
    assert [one.text for one in kept[:3]] == [one.text for one in alike[:3]]
    assert {one.text for one in kept[3:5]} <= {one.text for one in others}
