"""`gpmetric ledger check`, `repair`, `export`, `merge` and `free`, against every damage that we know of."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from gpmetric.errors import InputError, LedgerError
from gpmetric.evolution import sqlite_schema
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.ledger_check import check_ledger, first_problem
from gpmetric.evolution.ledger_export import export_ledger
from gpmetric.evolution.ledger_merge import merge_ledgers
from gpmetric.evolution.ledger_repair import repair_ledger
from tests.test_campaign import Mortal, Tables, run

WHOLE: dict[str, Any] = {"generations": 5, "population": 12}


def sql(path: Path, *statements: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        found = [connection.execute(statement).fetchall() for statement in statements]
        connection.commit()
    return found[-1]


def comparable(path: Path) -> Tables:
    with Ledger.read(path) as ledger:
        return ledger.comparable_tables()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "whole.sqlite"
    run(path, **WHOLE)
    return path


@pytest.fixture
def path(finished: Path, tmp_path: Path) -> Path:
    """A copy of a campaign's ledger that is whole."""
    return Path(shutil.copy(finished, tmp_path / "ledger.sqlite"))


def flip(path: Path, page: int) -> None:
    content = bytearray(path.read_bytes())
    content[4096 * page : 4096 * (page + 1)] = bytes(255 - byte for byte in content[4096 * page : 4096 * (page + 1)])
    path.write_bytes(content)


# check


def test_nothing_is_wrong_with_a_campaign_also_while_it_runs(path: Path) -> None:
    before = path.read_bytes()
    found = check_ledger(path)
    assert (found["ok"], found["problems"], found["version"]) == (True, [], sqlite_schema.VERSION)
    assert found["counts"]["candidates"] == len(comparable(path)["candidates"])
    assert first_problem(found) is None
    assert path.read_bytes() == before
    with Ledger.open(path, {"seed": 1}, resume=True):
        found = check_ledger(path)
    assert (found["ok"], found["owner"]["state"], found["owner"]["pid"]) == (True, "alive", os.getpid())


def changed(path: Path, table: str, change: str, where: str) -> None:
    """Changes cells of rows and makes their checksums right again: only what rows say of each other is wrong."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute(f"UPDATE {table} SET {change} WHERE {where}")
        connection.row_factory = sqlite3.Row
        for row in connection.execute(f"SELECT rowid AS place, * FROM {table}").fetchall():
            columns = {name: row[name] for name in row.keys() if name not in ("place", "checksum")}  # noqa: SIM118
            new = sqlite_schema.row_checksum(table, columns)
            connection.execute(f"UPDATE {table} SET checksum = ? WHERE rowid = ?", (new, row["place"]))
        connection.commit()


WRONG: list[tuple[str, str, str, str]] = [
    ("evaluations", "formula = formula || '0'", "id = 1", r"has '.*' in its population, which was not evaluated"),
    ("evaluations", "figures = '[]'", "id = 2", r"evaluations: a cell figures is '\[\]', which is no object"),
    ("evaluations", "figures = '{'", "id = 2", "evaluations: a cell figures is '{', which is no JSON"),
    ("evaluations", "nodes = 'many'", "id = 2", "evaluations: a cell nodes is 'many'"),
    ("evaluations", "generation = 4", "id = 2", "has evaluation 2, which is of generation 4"),
    ("evaluations", "id = 900", "id = 2", "evaluation 900 is of no candidate"),
    ("candidates", "evaluation = 77", "id = 1", "candidate 0 of generation 0 has evaluation 77, which is not there"),
    ("candidates", "position = 99", "id = 2", "generation 0 has no candidate 1"),
    ("candidates", "generation = 9", "generation = 4", "generation 9 has candidates, but generation 8 is not finished"),
    ("generations", "evaluations = 3", "number = 1", "generation 1 tells of 3 evaluations, but there are "),
    ("generations", "number = 9", "number = 2", "generations are numbered 0, 1, 3, 4, 9, not from 0 on"),
    ("measurements", "rung = 'r'", "generation = 0 AND position = 0 AND rung = 'reconstruction'", "has no measurement"),
    (
        "measurements",
        "position = 500",
        "generation = 1 AND position = 0",
        "candidate 500 of generation 1, which is not",
    ),
]


@pytest.mark.parametrize(("table", "change", "where", "told"), WRONG)
def test_what_rows_say_of_each_other_is_checked(path: Path, table: str, change: str, where: str, told: str) -> None:
    changed(path, table, change, where)
    found = check_ledger(path)
    assert not found["ok"]
    assert any(re.search(told, problem) for problem in found["problems"]), found["problems"]
    assert str(first_problem(found)).startswith(f"ledger {path} ")


def test_every_problem_is_told_not_just_the_first(path: Path) -> None:
    sql(
        path,
        "UPDATE candidates SET ranked = 'W' WHERE id IN (2, 5)",
        "UPDATE evaluations SET nodes = 99 WHERE id = 1",
        "DROP TABLE judgements",
        "INSERT INTO owner VALUES (1, 'h', 4194305, 'gone', 't', 0)",
        f"UPDATE owner SET host = '{os.uname().nodename}'",
    )
    problems = check_ledger(path)["problems"]
    assert "is damaged: row 2 of candidates does not match its checksum" in problems
    assert "is damaged: row 5 of candidates does not match its checksum" in problems
    assert "is damaged: row 1 of evaluations does not match its checksum" in problems
    assert any("no such table: judgements" in one for one in problems)
    assert any("of process 4194305 on host" in one and "which ended without closing it" in one for one in problems)
    assert len(problems) == 6


def test_a_result_whose_winner_is_unknown_is_told(path: Path) -> None:
    with Ledger.open(path, {"seed": 1}, resume=True) as ledger:
        ledger.save_result({"winner": {"formula": "abs(W)*nothing"}})
    (problem,) = check_ledger(path)["problems"]
    assert problem.startswith("the result's winner 'abs(W)*nothing' is neither among the evaluations")


def zero(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("formula,loss\n" * 900)


def foreign(path: Path) -> None:
    path.unlink()
    sql(path, "CREATE TABLE trials (id)")


def newer(path: Path) -> None:
    sql(path, "PRAGMA user_version = 99")


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 // 4096 * 4096 + 100)


def flipped(path: Path) -> None:
    flip(path, 6)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (zero, "holds no campaign"),
        (text, "file is not a database"),
        (foreign, "is a SQLite file of another program"),
        (newer, "has schema version 99, newer than"),
        (truncated, "damaged|malformed"),
        (flipped, "damaged|malformed"),
    ],
)
def test_a_bad_file_is_a_problem_not_a_crash(path: Path, damage: Callable[[Path], None], told: str) -> None:
    damage(path)
    before = path.read_bytes()
    found = check_ledger(path)
    assert not found["ok"]
    assert re.search(told, found["problems"][0]), found["problems"]
    assert not any("\n" in one for one in found["problems"])
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["with space", "ünïcödé 日本.sqlite", "a?mode=ro"])
def test_a_name_is_only_a_name(path: Path, name: str) -> None:
    place = path.rename(path.with_name(name))
    assert check_ledger(place)["ok"]
    assert repair_ledger(place, output=path.with_name(f"{name}2"))["next_generation"] == 5


def test_what_is_no_file_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for use in (check_ledger, lambda one: repair_ledger(one, output=tmp_path / "new.sqlite")):
        with pytest.raises(InputError, match="does not exist"):
            use(tmp_path / "none.sqlite")
        with pytest.raises(InputError, match="is a directory"):
            use(tmp_path / "folder")


# repair


def resumed(path: Path) -> tuple[Tables, int]:
    """Tables after going on, and tasks that took."""
    executor = Mortal()
    return run(path, executor, resume=True, **WHOLE), len(executor.tasks)


def test_a_repaired_whole_ledger_is_the_same(path: Path, finished: Path) -> None:
    new = path.with_name("new.sqlite")
    found = repair_ledger(path, output=new)
    assert (found["damaged"], found["dropped"], found["unreadable"], found["next_generation"]) == ({}, {}, {}, 5)
    assert comparable(new) == comparable(finished)
    with pytest.raises(InputError, match=r"--output '.*new.sqlite' exists: name another"):
        repair_ledger(path, output=new)
    with pytest.raises(InputError, match=r"--output '.*ledger.sqlite' exists: name another"):
        repair_ledger(path, output=path)


@pytest.mark.parametrize(
    ("table", "where"),
    [
        ("candidates", "id = 20"),
        ("candidates", "id = (SELECT max(id) FROM candidates)"),
        ("evaluations", "id = 3"),
        ("generations", "number = 2"),
        ("measurements", "generation = 2 AND rung = '4 windows'"),
        ("measurements", "generation = 1 AND rung = 'reconstruction'"),
    ],
)
@pytest.mark.parametrize("damage", ["UPDATE {} SET checksum = 'x' WHERE {}", "DELETE FROM {} WHERE {}"])
def test_a_repaired_campaign_ends_as_the_undisturbed_one(
    path: Path, finished: Path, table: str, where: str, damage: str
) -> None:
    """What was lost is drawn again, and no more than that is measured again."""
    if damage.startswith("DELETE") and where.startswith("id = (SELECT"):
        pytest.skip("a last candidate that was deleted leaves no trace but in what it was made of")
    lost = sql(path, f"SELECT count(*) FROM {table} WHERE {where}")[0][0]
    sql(path, "PRAGMA foreign_keys = OFF", damage.format(table, where))
    assert lost
    new = path.with_name("new.sqlite")
    told = repair_ledger(path, output=new)
    if damage.startswith("UPDATE"):
        assert told["damaged"] == {table: lost}
    assert told["next_generation"] < 5
    assert check_ledger(new)["ok"]
    tables, tasks = resumed(new)
    assert tables == comparable(finished)
    assert tasks <= (lost if table == "measurements" else 0)


def test_whatever_page_is_damaged_the_rest_is_saved(path: Path, finished: Path, tmp_path: Path) -> None:
    expected, content = comparable(finished), path.read_bytes()
    saved = 0
    for page in range(len(content) // 4096):
        path.write_bytes(content)
        flip(path, page)
        new = tmp_path / f"new{page}.sqlite"
        with suppress(LedgerError):  # of the settings' page
            repair_ledger(path, output=new)
            assert resumed(new)[0] == expected, page
            saved += 1
    assert saved == len(content) // 4096 - 1


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_ledger_goes_on(path: Path, finished: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))
    new = path.with_name("new.sqlite")
    told = repair_ledger(path, output=new)
    assert told["unreadable"]
    assert resumed(new)[0] == comparable(finished)


def test_a_lost_log_is_repaired_to_what_the_file_holds(tmp_path: Path, finished: Path) -> None:
    """-wal deleted beside a killed ledger; and with it, all of it is there."""
    path = tmp_path / "ledger.sqlite"
    with pytest.raises(KeyboardInterrupt):
        run(path, Mortal(60), **WHOLE)
    with Ledger.open(path, {"seed": 1}, resume=True) as ledger:
        ledger.measure([])
        sql(path, "DELETE FROM owner")
        copy, beside = tmp_path / "copy.sqlite", tmp_path / "beside.sqlite"
        shutil.copy(path, copy)
        shutil.copy(path, beside)
        shutil.copy(f"{path}-wal", f"{beside}-wal")
    for source in (copy, beside):
        new = source.with_name(f"new-{source.name}")
        repair_ledger(source, output=new)
        assert resumed(new)[0] == comparable(finished)


def test_a_ledger_that_is_written_is_not_repaired(path: Path) -> None:
    told = f"is in use by process {os.getpid()} on host .*, which writes it"
    with Ledger.open(path, {"seed": 1}, resume=True), pytest.raises(LedgerError, match=told):
        repair_ledger(path, output=path.with_name("new.sqlite"))
    repair_ledger(path, output=path.with_name("new.sqlite"))


def test_lost_settings_end_a_campaign_but_not_its_population(path: Path) -> None:
    Ledger.open(path, {"seed": 1, "generations": 9}, resume=True).close()
    copy = Path(shutil.copy(path, path.with_name("copy.sqlite")))
    sql(copy, "UPDATE meta SET value = '2' WHERE key = 'seed'")  # the last
    repair_ledger(copy, output=copy.with_name("new-copy.sqlite"))
    with pytest.raises(LedgerError) as caught:
        Ledger.open(copy.with_name("new-copy.sqlite"), {"seed": 1}, resume=True)
    assert caught.value.details == ("--seed: none there, 1 here",)
    sql(path, "UPDATE meta SET value = '2' WHERE key = 'generations'")
    new = path.with_name("new.sqlite")
    assert repair_ledger(path, output=new)["settings_lost"]
    with pytest.raises(LedgerError, match="has lost settings, so that it cannot be gone on with: --fork begins"):
        Ledger.open(new, {"seed": 1}, resume=True)
    with Ledger.read(new) as ledger:
        assert ledger.last_generation() is not None


def test_what_holds_nothing_is_not_repaired(path: Path) -> None:
    for damage in (zero, text, foreign, newer):
        place = path.with_name(damage.__name__)
        shutil.copy(path, place)
        damage(place)
        if damage is newer:
            continue  # its rows are those of ours: they are saved
        with pytest.raises(LedgerError, match="holds no row that is sound") as caught:
            repair_ledger(place, output=path.with_name("new.sqlite"))
        assert str(place) in str(caught.value)
    assert not path.with_name("new.sqlite").exists()


# export


def test_candidates_come_with_their_figures_in_every_format(path: Path, tmp_path: Path) -> None:
    with Ledger.read(path) as ledger:
        candidates = ledger.candidates()
        evaluations = {row.id: row for row in ledger.evaluations()}
    for suffix in ("csv", "jsonl", "parquet"):
        told = export_ledger(path, output=tmp_path / f"c.{suffix}")
        assert told["candidates"] == len(candidates)
        export_ledger(path, output=tmp_path / f"c.{suffix}")  # ours, and replaced
    with (tmp_path / "c.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert parquet.read_table(tmp_path / "c.parquet").to_pylist() == lines
    assert [row["formula"] for row in lines] == [row.formula for row in candidates]
    for row, line, candidate in zip(rows, lines, candidates, strict=True):
        given = evaluations.get(candidate.evaluation)
        assert row["status"] == line["status"] == candidate.status
        assert line["loss 0.5"] == (given and given.losses.get("0.5"))
        assert row["kl 2:4"] == ("" if line["kl 2:4"] is None else repr(line["kl 2:4"]))
        if given and given.losses:
            assert line["mean_excess"] == pytest.approx(sum(given.losses.values()) / 2)


@pytest.mark.parametrize("begin", ["=cmd()", "+1", "-W", "@x", "\t=1"])
def test_a_spreadsheet_calculates_nothing(path: Path, tmp_path: Path, begin: str) -> None:
    changed(path, "candidates", f"reason = '{begin}'", "id = 1")
    export_ledger(path, output=tmp_path / "c.csv")
    with (tmp_path / "c.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["reason"] == f"'{begin}"
    export_ledger(path, output=tmp_path / "c.jsonl")
    assert json.loads((tmp_path / "c.jsonl").read_text().splitlines()[0])["reason"] == begin


def test_standard_output_holds_the_table_alone(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export_ledger(path, output="-")
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("generation,position,formula,status,")


def test_exports_that_cannot_be_are_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must end in .csv, .jsonl or .parquet"):
        export_ledger(path, output=tmp_path / "c.xlsx")
    place = path.rename(tmp_path / "ledger.csv")
    with pytest.raises(InputError, match="is also read"):
        export_ledger(place, output=place, force=True)
    path = place
    (tmp_path / "mine.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="exists, and gpmetric did not write it"):
        export_ledger(path, output=tmp_path / "mine.csv")


# merge


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("other") / "other.sqlite"
    run(path, seed=2, generations=3, population=12)
    return path


def test_campaigns_are_put_together(finished: Path, other: Path, tmp_path: Path) -> None:
    new = tmp_path / "both.sqlite"
    told = merge_ledgers([finished, other], output=new)
    both, first, second = map(comparable, (new, finished, other))
    assert len(both["candidates"]) == len(first["candidates"]) + len(second["candidates"]) == told["candidates"]
    masks = {row["fingerprint"] for tables in (first, second) for row in tables["evaluations"]}
    assert (
        len(both["evaluations"])
        == len(masks)
        == told["evaluations"]
        < len(first["evaluations"]) + len(second["evaluations"])
    )
    assert both["evaluations"][: len(first["evaluations"])] == first["evaluations"]
    assert [part["first_generation"] for part in told["merged"]] == [0, 5]
    assert len(both["measurements"]) == len(first["measurements"]) + len(second["measurements"])
    given = {row["id"]: row for row in both["evaluations"]}
    old = {row["id"]: row for row in second["evaluations"]}
    for row, before in zip(both["candidates"][len(first["candidates"]) :], second["candidates"], strict=True):
        if before["evaluation"] is not None:
            assert given[row["evaluation"]]["figures"] == old[before["evaluation"]]["figures"]
        assert row["formula"] == before["formula"]
    assert check_ledger(new)["problems"] == []
    assert export_ledger(new, output=tmp_path / "c.csv")["candidates"] == told["candidates"]
    with Ledger.read(new) as ledger:
        last = ledger.last_generation()
        assert last is not None
        done = {row.formula for row in ledger.evaluations("done")}
    assert 12 < len(last.population) <= 24
    assert set(last.population) <= done


def test_a_merged_ledger_is_no_campaign_that_goes_on(finished: Path, other: Path, tmp_path: Path) -> None:
    new = tmp_path / "both.sqlite"
    merge_ledgers([finished, other], output=new)
    with pytest.raises(LedgerError, match="is of several campaigns: --fork begins"):
        Ledger.open(new, {"seed": 1}, resume=True)
    with pytest.raises(LedgerError, match="is merged itself"):
        merge_ledgers([new, other], output=tmp_path / "more.sqlite")
    with pytest.raises(LedgerError, match="repair these, and merge them again"):
        repair_ledger(new, output=tmp_path / "more.sqlite")


def test_campaigns_of_other_settings_are_not_merged(finished: Path, tmp_path: Path) -> None:
    Ledger.open(tmp_path / "a.sqlite", {"seed": 3, "target": ["0.5"]}, resume=False).close()
    with pytest.raises(LedgerError, match="is of another campaign than") as caught:
        merge_ledgers([finished, tmp_path / "a.sqlite"], output=tmp_path / "both.sqlite")
    assert caught.value.details == ("--target: none there, 0.5 here",)
    with pytest.raises(InputError, match="at least two ledgers are needed, but got 1"):
        merge_ledgers([finished], output=tmp_path / "both.sqlite")
    assert not (tmp_path / "both.sqlite").exists()
