"""`discover --resume` strictly, `--fork` and `--reseed`, against a fake evaluator and on a tiny model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from gpmetric.errors import InputError, LedgerError
from gpmetric.evolution.campaign import Campaign
from gpmetric.evolution.discover import discover
from gpmetric.evolution.fork import population_of
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.request import DiscoverRequest
from gpmetric.evolution.settings import differences
from tests.test_campaign import Mortal, Tables, config, run

MODEL = {"digest": "a" * 64, "dtype": "float32", "tokens": {"search": "s" * 64, "test": "t" * 64}}
THERE: dict[str, Any] = {"models": {"m": MODEL}, "seed": 1, "operands": ["W", "X"], "generations": 3, "start": []}


# What differs


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"generations": 9, "minutes": 4}, []),
        ({"operands": ("W", "X")}, []),
        ({"operands": ["W", "X", "G"], "seed": 2}, ["--operands: W,X there, W,X,G here", "--seed: 1 there, 2 here"]),
        ({"max_nodes": 7}, ["--max-nodes: none there, 7 here"]),
        ({"start": ["abs(W)*X*" + "1" * 60]}, ["--start: without these there, also abs(W)*X*" + "1" * 43 + "... here"]),
        ({"models": {"m": MODEL | {"digest": "b" * 64}}}, [f"files of model m: {'a' * 12} there, {'b' * 12} here"]),
        ({"models": {"m": MODEL | {"dtype": "bfloat16"}}}, ["--dtype: float32 there, bfloat16 here"]),
        (
            {"models": {"m": MODEL | {"tokens": {"search": "s" * 64, "test": "u" * 64}}}},
            [f"windows of the test text: {'t' * 12} there, {'u' * 12} here"],
        ),
        ({"models": {"n": MODEL}}, ["--model: m there, n here (the same files)"]),
        ({"models": "odd"}, ["--models: {'m': {'digest': 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa... there, odd here"]),
    ],
)
def test_a_difference_is_a_line(change: dict[str, Any], told: list[str]) -> None:
    assert differences(THERE, THERE | change) == told


# Drawing anew


def reseeded(path: Path, seed: int, executor: Mortal | None = None, *, reseed: bool = True, **changes: Any) -> Tables:
    chosen = config(**changes)
    with Ledger.open(path, {"seed": seed}, resume=True, reseed=reseed) as ledger:
        Campaign(chosen, ledger, executor or Mortal()).run()
        return ledger.comparable_tables()


def test_another_seed_holds_from_the_next_generation_on(tmp_path: Path) -> None:
    """Whatever is begun is finished as it was drawn; a campaign killed anywhere after is one that was not."""
    run(tmp_path / "whole.sqlite", generations=5)
    first = run(tmp_path / "a.sqlite", generations=2)
    with pytest.raises(LedgerError) as caught:
        Ledger.open(tmp_path / "a.sqlite", {"seed": 7}, resume=True)
    assert caught.value.details == ("--seed: 1 there, 7 here",)
    other = Path(shutil.copy(tmp_path / "a.sqlite", tmp_path / "b.sqlite"))
    expected = reseeded(tmp_path / "a.sqlite", 7)
    with Ledger.read(tmp_path / "a.sqlite") as ledger:
        assert ledger.history == {"reseeded": [[0, 1], [2, 7]]}
        assert ledger.seeds == {0: 1, 2: 7}
        assert ledger.settings == {"seed": 7}
    drawn = [row["formula"] for row in expected["candidates"]]
    assert drawn[: len(first["candidates"])] == [row["formula"] for row in first["candidates"]]
    with Ledger.read(tmp_path / "whole.sqlite") as ledger:
        assert drawn != [row.formula for row in ledger.candidates()]
    for life in (0, 3, 1, 8, 5):
        with pytest.raises(KeyboardInterrupt):
            reseeded(other, 7, Mortal(life), reseed=life % 2 == 0)  # the same words again change nothing
    assert reseeded(other, 7, reseed=False) == expected


def test_what_is_begun_is_finished_as_it_was_drawn(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    run(path, generations=1)
    tasks = Mortal()
    run(tmp_path / "count.sqlite", tasks, generations=1)
    with pytest.raises(KeyboardInterrupt):
        run(path, Mortal(3), resume=True, generations=2)  # inside generation 1
    found = reseeded(path, 7, generations=4)
    whole = run(tmp_path / "whole.sqlite", generations=4)
    by_generation = [
        [row["formula"] for row in tables["candidates"] if row["generation"] == 1] for tables in (found, whole)
    ]
    assert by_generation[0] == by_generation[1]
    with Ledger.read(path) as ledger:
        assert ledger.seeds == {0: 1, 2: 7}


def test_the_first_generation_may_be_drawn_anew_before_it_begins(tmp_path: Path) -> None:
    Ledger.open(tmp_path / "a.sqlite", {"seed": 1}, resume=False).close()
    found = reseeded(tmp_path / "a.sqlite", 3)
    with Ledger.read(tmp_path / "a.sqlite") as ledger:
        assert ledger.seeds == {0: 3}
    assert [row["formula"] for row in found["candidates"]] == [
        row["formula"] for row in run(tmp_path / "b.sqlite", seed=3)["candidates"]
    ]


def test_reseed_alone_is_refused() -> None:
    with pytest.raises(InputError, match="--reseed needs --resume"):
        DiscoverRequest(reseed=True).check()


# Forks


def test_what_the_new_space_leaves_out_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.sqlite"
    run(path, generations=2)
    with Ledger.read(path) as ledger:
        last = ledger.last_generation()
    assert last is not None
    found = population_of(path, DiscoverRequest(operands=("W", "X")))
    kept = [formula for formula in last.population if "G" not in formula]
    assert found == {"ledger": str(path), "generation": 1, "formulas": kept}
    assert len(caplog.messages) == len(last.population) - len(kept) > 0
    assert all("which uses 'G', which --operands or --primitives leaves out" in one for one in caplog.messages)
    with pytest.raises(LedgerError, match="holds no formula that --operands, --primitives and --max-nodes allow"):
        population_of(path, DiscoverRequest(primitives=("neg",)))
    Ledger.open(tmp_path / "empty.sqlite", {"seed": 1}, resume=False).close()
    with pytest.raises(LedgerError, match="holds no finished generation"):
        population_of(tmp_path / "empty.sqlite", DiscoverRequest())


@pytest.mark.slow
def test_a_fork_begins_with_the_old_population_and_goes_on_without_it(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "model": str(tiny_llama), "text": str(tiny_text), "population": 6, "samples": 4, "search_windows": 2,
        "windows": 2, "calibration_seeds": 0,
        "sequence_length": 32, "include": r"\.0\.", "cache": tmp_path / "cache", "workers": 1,
        "operands": "W,X", "start": ("abs(W)*X**0.31",),
    }  # fmt: skip
    old, new, again = (tmp_path / f"{name}.sqlite" for name in ("old", "new", "again"))
    discover(**options, target="0.5", generations=2, ledger=old)
    with Ledger.read(old) as ledger:
        last = ledger.last_generation()
    assert last is not None
    options["start"] = ()
    discover(**options, target="0.6", generations=2, ledger=new, fork=old)
    with Ledger.read(new) as ledger:
        assert ledger.history["fork"]["formulas"] == last.population
        drawn = {row.formula for row in ledger.candidates(0)}
        assert set(last.population) <= drawn
        assert set(ledger.evaluations()[0].losses) == {"0.6"}
        expected = ledger.comparable_tables()
    discover(**options, target="0.6", generations=1, ledger=again, fork=old)
    old.unlink()
    discover(**options, target="0.6", generations=2, ledger=again, fork=old, resume=True)
    with Ledger.read(again) as ledger:
        found = ledger.comparable_tables()
    for table in ("candidates", "evaluations", "generations"):
        assert found[table] == expected[table]
    with pytest.raises(LedgerError, match=r"--target: 0\.6 there, 0\.5 here") as caught:
        discover(**options, target="0.5", generations=2, ledger=again, resume=True)
    assert "--fork begins one from its population" in str(caught.value)
