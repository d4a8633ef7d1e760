"""Files that stand for a metric: everything that `gpmetric export` and `discover` write, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from gpmetric.errors import InputError
from gpmetric.evolution.ledger import result_of
from gpmetric.expression.parse import parse
from gpmetric.formats import export_expression
from gpmetric.formula_files import Named, is_ledger, read_formula
from gpmetric.listing import KINDS, list_names
from gpmetric.options import check_request, make_request
from gpmetric.pruning.requests import BenchRequest, PruneRequest
from gpmetric.targets import plain_granularities

GOLDEN = Path(__file__).parent / "golden"
FORMULA = "(abs(W)/rowsum(abs(W)) + abs(W)/colsum(abs(W)))*sqrt(X)"


@pytest.mark.parametrize("group", plain_granularities())
@pytest.mark.parametrize(
    ("format", "suffix"), [("python", ".py"), ("json", ".json"), ("latex", ".tex"), ("triton", ".py")]
)
def test_what_export_writes_is_read_again(format: str, suffix: str, group: str, tmp_path: Path) -> None:
    if format == "triton":
        pytest.importorskip("triton")
    path, expression = tmp_path / f"metric{suffix}", parse(FORMULA)
    export_expression(expression, "json" if format == "triton" else format, path, "1", group)
    if format == "triton":  # without the check, which runs its kernels
        from gpmetric.formats import FORMATS, Formula

        path.write_text(FORMATS["triton"].text(Formula(expression, "1", group)))
    assert read_formula(str(path)) == Named(f"{'' if group == 'row' else f'{group}:'}{expression}", {})


def test_a_campaign_names_its_winner_and_the_use_it_was_searched_in(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = tmp_path / "campaign.sqlite"
    shutil.copyfile(GOLDEN / "ledger-v4-finished.sqlite", ledger)
    winner = result_of(ledger)["winner"]["formula"]
    assert read_formula(str(ledger)) == Named(winner, {})
    result = tmp_path / "result.json"
    result.write_text(json.dumps(result_of(ledger) | {"update": "admm", "fit": "dense"}))
    assert read_formula(str(result)) == Named(winner, {"update": "admm", "fit": "dense"})
    asked = make_request(PruneRequest, {"metric": str(result), "output": "x"})
    assert (asked.metric, asked.update, asked.fit) == (winner, "admm", "dense")
    asked = make_request(PruneRequest, {"metric": str(result), "output": "x", "update": "obs", "fit": "own"})
    assert (asked.update, asked.fit) == ("obs", "own")
    several = make_request(BenchRequest, {"metric": ["wanda", str(result)]})
    assert (several.metric, several.update) == (("wanda", winner), "none")
    told = f"{result}: its formula was searched with --update admm --fit dense, which is not given here"
    assert caplog.messages == [told]
    make_request(BenchRequest, {"metric": ["wanda", str(result)], "update": "admm"})
    assert caplog.messages == [told]


def test_a_file_that_is_read_is_not_written(tmp_path: Path) -> None:
    ledger = tmp_path / "campaign.sqlite"
    shutil.copyfile(GOLDEN / "ledger-v4-finished.sqlite", ledger)
    asked = make_request(BenchRequest, {"metric": str(ledger)})
    with pytest.raises(InputError, match=r"--json .*campaign\.sqlite' is also read"):
        check_request(asked, ledger, force=True)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("no.sqlite", None, "cannot be read: No such file"),
        ("no.json", None, "cannot be read: No such file"),
        ("no.py", None, "cannot be read: No such file"),
        ("a.json", "[]", "holds no JSON object"),
        ("a.json", "{", "is not JSON"),
        ("a.json", "[" * 100_000, "is not JSON"),
        ("a.json", "{}", "names no formula; accepted is a finished campaign's ledger"),
        ("a.json", '{"formula": 3}', "names no formula"),
        ("a.json", '{"formula": "W", "group": "x"}', "names no formula"),
        ("a.json", '{"formula": "W", "group": []}', "names no formula"),
        ("a.json", '{"winner": []}', "names no formula"),
        ("a.json", '{"winner": {"formula": 3}}', "names no formula"),
        ("a.py", "print(1)", "names no formula"),
        ("a.py", "", "names no formula"),
        ("a.tex", "\\[W\\]", "names no formula"),
        ("a.sqlite", "SQLite format 3\0", "a.sqlite"),
    ],
)
def test_what_names_no_formula_is_refused(name: str, content: str | None, told: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=told):
        make_request(BenchRequest, {"metric": str(tmp_path / name)})


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    """A pipe would be waited for; one that is called like a formula is the formula."""
    (tmp_path / "a.json").mkdir()
    os.mkfifo(tmp_path / "a.py")
    os.mkfifo(tmp_path / "W")
    for name in ("a.json", "a.py"):
        with pytest.raises(InputError, match=f"{name}' is no file; accepted is"):
            make_request(BenchRequest, {"metric": str(tmp_path / name)})
    assert not is_ledger(str(tmp_path / "W"))


def test_a_formula_in_a_file_is_parsed_and_never_run(tmp_path: Path) -> None:
    path = tmp_path / "metric.py"
    path.write_text('"""Pruning score: __import__(\'os\').abort()\n"""\nimport os\nos.abort()\n')
    with pytest.raises(InputError):
        make_request(BenchRequest, {"metric": str(path)}).check()


def test_every_kind_of_name_is_listed_with_a_meaning() -> None:
    found = list_names()
    assert [kind for kind in KINDS if kind in found] == list(KINDS)
    assert all(isinstance(told, str) and told for kind in KINDS for told in found[kind].values())
    assert found["operands"]["X"].startswith("[in] root mean square")
    assert found["primitives"]["div"].startswith("a/b: ")
    assert list(list_names("updates")) == ["updates"]
