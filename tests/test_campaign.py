"""The generation loop against a fake evaluator: budgets, equivalence, and resuming after a stop at any point."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from gpmetric.errors import GpmetricError, LedgerError, MaskError
from gpmetric.evolution.campaign import Campaign, Plan
from gpmetric.evolution.executors import Outcome, Serial
from gpmetric.evolution.ledger import Ledger
from gpmetric.expression import PRIMITIVES

TARGETS = ("0.5", "2:4")


def fake_evaluator(task: Mapping[str, Any]) -> dict[str, Any]:
    """Masks and losses by hash: one formula in 16 fails, and formulas of the same hash bucket have the same masks."""
    bucket = int(hashlib.sha256(task["formula"].encode()).hexdigest()[:4], 16) % 4000
    if bucket % 16 == 0:
        raise MaskError("3 of 8 scores are NaN or infinite")
    if task["kind"] == "masks":
        return {"fingerprint": str(bucket), "seconds_score": 0.001}
    excess = {target: 1 + bucket / 4000 + 0.1 * place for place, target in enumerate(TARGETS)}
    mean = sum(excess.values()) / len(excess)
    return {
        "losses": {target: 4.0 + value for target, value in excess.items()},
        "screened": mean if task["reference"] and mean > 1.5 else None,
        "seconds_loss": 0.002,
    }


class Mortal(Serial):
    """Dies, as a killed driver does, when asked for one outcome too many."""

    def __init__(self, life: int | None = None) -> None:
        super().__init__(fake_evaluator)
        self.life = life
        self.served = 0

    def map_ordered(self, candidates: Iterable[Any]) -> Iterator[Outcome]:
        for outcome in super().map_ordered(candidates):
            if self.life is not None and self.served >= self.life:
                raise KeyboardInterrupt
            self.served += 1
            yield outcome


def plan(**changes: Any) -> Plan:
    values: dict[str, Any] = {
        "targets": TARGETS,
        "operands": ("W", "X", "G"),
        "primitives": tuple(PRIMITIVES),
        "start": ("abs(W)", "abs(W)*X", "W*W*mms(G)", "abs(-W)"),
        "population": 8,
        "max_nodes": 15,
        "seed": 1,
        "generations": 4,
        "evaluations": None,
    }
    return Plan(**(values | changes))


def run(path: Path, executor: Serial, changes: Mapping[str, Any] | None = None, resume: bool = False) -> dict[str, Any]:
    """Runs a campaign; returns the tables that two equal campaigns share."""
    chosen = plan(**(changes or {}))
    with Ledger.open(path, {"seed": chosen.seed}, resume=resume) as ledger:
        Campaign(chosen, ledger, executor, dense_loss=4.0).run()
        return ledger.comparable_tables()


def test_a_campaign_finishes_its_generations(tmp_path: Path) -> None:
    tables = run(tmp_path / "a.sqlite", Mortal())
    assert [row["number"] for row in tables["generations"]] == [0, 1, 2, 3]
    statuses = {row["status"] for row in tables["candidates"]}
    assert statuses == {"evaluated", "duplicate", "failed"}
    texts = [row["formula"] for row in tables["candidates"][:4]]
    assert texts == ["abs(W)", "abs(W)*X", "W*W*mms(G)", "abs(-W)"]
    assert tables["candidates"][3]["status"] == "duplicate"  # the same canonical form as the first


def test_no_mask_is_paid_for_twice_and_no_form_drawn_as_new_twice(tmp_path: Path) -> None:
    tables = run(tmp_path / "a.sqlite", Mortal())
    masks = [row["fingerprint"] for row in tables["evaluations"]]
    assert len(masks) == len(set(masks))
    evaluated = [row["canonical"] for row in tables["candidates"] if row["status"] == "evaluated"]
    assert len(evaluated) == len(set(evaluated))


def test_excess_is_relative_to_the_dense_loss(tmp_path: Path) -> None:
    for row in run(tmp_path / "a.sqlite", Mortal())["evaluations"]:
        bucket = int(hashlib.sha256(row["formula"].encode()).hexdigest()[:4], 16) % 4000
        expected = {"0.5": 1 + bucket / 4000, "2:4": 1 + bucket / 4000 + 0.1}
        assert row["losses"] == (pytest.approx(expected) if row["status"] == "done" else {})


def test_the_hopeless_are_screened_out_after_the_first_generation(tmp_path: Path) -> None:
    rows = run(tmp_path / "a.sqlite", Mortal())["evaluations"]
    screened = [row for row in rows if row["reason"] and row["reason"].startswith("screened out: mean excess")]
    assert screened
    assert all(row["status"] == "failed" and row["generation"] > 0 for row in screened)
    assert all(float(row["reason"].split()[4]) > 1.5 for row in screened)


@pytest.mark.parametrize("evaluations", [1, 5, 17])
def test_the_budget_of_evaluations_is_met_exactly(tmp_path: Path, evaluations: int) -> None:
    tables = run(tmp_path / "a.sqlite", Mortal(), {"generations": None, "evaluations": evaluations})
    assert len(tables["evaluations"]) == evaluations


def test_more_evaluations_on_resume_equal_having_asked_for_them_at_once(tmp_path: Path) -> None:
    at_once = run(tmp_path / "a.sqlite", Mortal(), {"generations": None, "evaluations": 25})
    run(tmp_path / "b.sqlite", Mortal(), {"generations": None, "evaluations": 9})
    assert run(tmp_path / "b.sqlite", Mortal(), {"generations": None, "evaluations": 25}, resume=True) == at_once


def test_a_ledger_with_other_draws_is_a_clear_error(tmp_path: Path) -> None:
    run(tmp_path / "a.sqlite", Mortal(), {"generations": None, "evaluations": 9})
    with sqlite3.connect(tmp_path / "a.sqlite") as connection:
        connection.execute("UPDATE candidates SET formula = 'abs(W)*X*X' WHERE id = (SELECT max(id) FROM candidates)")
    with pytest.raises(LedgerError, match="but this campaign draws"):
        run(tmp_path / "a.sqlite", Mortal(), {"generations": None, "evaluations": 25}, resume=True)


def test_a_longer_budget_begins_with_what_the_shorter_found(tmp_path: Path) -> None:
    short = run(tmp_path / "a.sqlite", Mortal(), {"generations": 2})
    long = run(tmp_path / "b.sqlite", Mortal(), {"generations": 4})
    assert long["evaluations"][: len(short["evaluations"])] == short["evaluations"]
    assert run(tmp_path / "a.sqlite", Mortal(), {"generations": 4}, resume=True) == long


def test_same_seed_same_ledger_another_seed_another(tmp_path: Path) -> None:
    first, second = (run(tmp_path / name, Mortal()) for name in ("a.sqlite", "b.sqlite"))
    assert first == second
    other = run(tmp_path / "c.sqlite", Mortal(), {"seed": 2})
    assert other["candidates"] != first["candidates"]


def test_stopped_at_every_point_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole = Mortal()
    expected = run(tmp_path / "whole.sqlite", whole)
    for life in range(0, whole.served, 7):
        path = tmp_path / f"{life}.sqlite"
        with pytest.raises(KeyboardInterrupt):
            run(path, Mortal(life))
        assert run(path, Mortal(), resume=True) == expected, f"stopped after {life} outcomes"


def test_stopped_again_and_again_equals_uninterrupted(tmp_path: Path) -> None:
    expected = run(tmp_path / "whole.sqlite", Mortal())
    path, stops, tables = tmp_path / "often.sqlite", 0, None
    while tables is None:
        try:  # masks are fingerprinted again after a resume, so each life must be longer than a generation's masks
            tables = run(path, Mortal(10 + stops), resume=True)
        except KeyboardInterrupt:
            stops += 1
    assert stops > 3
    assert tables == expected


def test_out_of_time_keeps_what_was_evaluated_and_a_resume_goes_on(tmp_path: Path) -> None:
    expected = run(tmp_path / "whole.sqlite", Mortal())
    with Ledger.open(tmp_path / "a.sqlite", {"seed": 1}, resume=False) as ledger:
        late = Campaign(plan(), ledger, Mortal(), 4.0, out_of_time=lambda: len(ledger.evaluations()) >= 11)
        late.run()
        assert len(ledger.evaluations()) == 11
        assert late.front()
    assert run(tmp_path / "a.sqlite", Mortal(), resume=True) == expected


def test_the_front_holds_the_best_mean_and_nothing_dominated(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "a.sqlite", {"seed": 1}, resume=False) as ledger:
        campaign = Campaign(plan(), ledger, Mortal(), 4.0)
        campaign.run()
        front, everyone = campaign.front(), campaign.individuals()
    assert front[0].mean == min(one.mean for one in everyone)
    for one in front:
        assert not any(
            all(a <= b for a, b in zip(other.fitness.values, one.fitness.values, strict=True))
            and other.fitness.values != one.fitness.values
            for other in everyone
        )


def test_a_space_without_anything_new_ends_the_campaign(tmp_path: Path) -> None:
    """With W alone and two primitives, few distinct masks exist; the loop must stop by itself."""
    tables = run(
        tmp_path / "a.sqlite",
        Mortal(),
        {"operands": ("W",), "primitives": ("abs", "neg"), "start": ("abs(W)",), "max_nodes": 4, "generations": None,
         "evaluations": 1000, "population": 4},
    )  # fmt: skip
    assert 1 <= len(tables["evaluations"]) < 10


def test_nothing_evaluable_is_a_clear_error(tmp_path: Path) -> None:
    def refuse(task: Mapping[str, Any]) -> dict[str, Any]:
        raise MaskError("8 of 8 scores are NaN or infinite")

    with (
        Ledger.open(tmp_path / "a.sqlite", {}, resume=False) as ledger,
        pytest.raises(GpmetricError, match="no formula could be evaluated"),
    ):
        Campaign(plan(), ledger, Serial(refuse), 4.0).run()
