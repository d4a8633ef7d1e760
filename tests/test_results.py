"""Results: still the documents of --json, and tables, pictures, files, and what a notebook shows."""

from __future__ import annotations

import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import gpmetric
from gpmetric.commands import COMMANDS
from gpmetric.errors import GpmetricError, InputError
from gpmetric.notebook import progress_console
from gpmetric.results import (
    RESULTS,
    AllocateResult,
    BenchResult,
    CatalogueResult,
    DiscoverResult,
    EvaluateResult,
    Result,
    SlimResult,
    TuneResult,
    load_result,
)

HOSTILE = "<script>alert(1)</script>\x1b[31m\u202e$\\frac{"

BENCH: dict[str, Any] = {
    "model": HOSTILE, "protocol": "sequential", "dense": {"a": 10.0, HOSTILE: 20.0}, "versions": {"gpmetric": "1"},
    "results": [
        {
            "metric": name, "target": target, "update": "none", "formula": "abs(W)", "sparsity": 0.5, "seconds": 1.0,
            "error": error, "ppl": {"a": ppl, HOSTILE: ppl},
        }
        for target in ("0.5", "2:4")
        for name, ppl, error in (("wanda", 20.0, None), (HOSTILE, 40.0, None), ("ria", math.inf, "not finite"))
    ],
}  # fmt: skip
POINT = {"sparsity": 0.5, "sparsity_total": 0.4, "loss": 2.0, "perplexity": 8.0, "excess": 0.1}
ROW = {"formula": "W*X", "nodes": 3, "excess": {"0.5": 0.2}, "mean_excess": 0.2, "ppl": {"0.5": 12.0}}
DOCUMENTS: dict[type[Result], dict[str, Any]] = {
    BenchResult: BENCH,
    DiscoverResult: {
        "model": "m", "targets": ["0.5"], "best_gradient_free": None, "regrouped": None,
        "winner": ROW | {"validation": {"0.5": 0.25}},
        "front": [ROW | {"validation": {"0.5": 0.3}}, ROW | {"validation": None}],
        "baselines": {
            HOSTILE: ROW | {"mean_excess": 0.1, "validation": {"0.5": 0.4}},
            "wanda": {"excess": {}, "ppl": {}, "mean_excess": None, "validation": {"0.5": None}},
        },
    },
    AllocateResult: {
        "model": "m", "allocator": "nsga2", "picked": POINT, "front": [POINT], "hypervolume": [],
        "baselines": {"uniform": [POINT, POINT | {"loss": None, "perplexity": None, "excess": None}]},
    },
    SlimResult: {
        "model": "m", "begun": "wanda", "parameters_before": 9,
        "widths": [{"heads": 2, "channels": 4}, {"heads": 1, "channels": 3}],
    },
    TuneResult: {
        "model": "m", "recipe": {}, "pruned": {}, "texts": [{"text": "t"}],
        "table": [
            {"what": "recipe", "recipe": {"metric": HOSTILE}, "excess": 0.1, "text_excess": [0.2], "seconds": 1.0,
             "error": None},
            {"what": "without update", "recipe": {"metric": "wanda"}, "excess": None, "seconds": 1.0, "error": "no"},
        ],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def measured() -> BenchResult:
    found = gpmetric.bench(metric=["wanda", "magnitude"], samples=2, sequence_length=32, windows=2)
    assert type(found) is BenchResult
    return found


def test_a_result_is_still_its_document(measured: BenchResult) -> None:
    plain = dict(measured)
    assert measured == plain
    assert json.loads(json.dumps(measured)) == json.loads(json.dumps(plain))
    assert measured["results"][0]["metric"] == "wanda"
    assert repr(measured) == "<BenchResult of demo, 2 rows>"


def test_the_table_of_a_bench_has_the_excess_over_the_dense_model(measured: BenchResult) -> None:
    rows = measured.table()
    assert [row["metric"] for row in rows] == ["wanda", "magnitude"]
    for row in rows:
        assert row["excess"] == pytest.approx(math.log(row["ppl"] / row["dense"]))
        assert (row["model"], row["target"], row["text"], row["error"]) == ("demo", "0.5", "demo:test", None)


def test_save_and_load(measured: BenchResult, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    measured.save(path)
    assert load_result(path) == json.loads(json.dumps(measured))
    assert type(load_result(str(path))) is BenchResult
    measured.save(path)  # over one of ours
    path.write_text("mine")
    with pytest.raises(InputError, match="gpmetric did not write it"):
        measured.save(path)
    measured.save(path, force=True)
    with pytest.raises(InputError, match="does not exist"):
        measured.save(tmp_path / "none" / "bench.json")


def test_a_document_without_versions_is_known_when_it_is_read(tmp_path: Path) -> None:
    Result({"a": 1, "b": [math.nan]}).save(tmp_path / "x.json")
    found = load_result(tmp_path / "x.json")
    assert type(found) is Result
    assert found | {"gpmetric": ""} == {"gpmetric": "", "a": 1, "b": [None]}
    assert found.table()[-1] == {"name": "a", "value": 1}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is not JSON"),
        (b"[]", "holds no JSON object"),
        (b'{"a": 1}', "is no result of gpmetric"),
        (b'{"versions": ["gpmetric"]}', "is no result of gpmetric"),
        (b"[" * 100_000, "is not JSON"),
        (b"\xff", "is not JSON"),
        (None, "No such file"),
    ],
)
def test_what_is_no_result_is_refused_in_a_line(content: bytes | None, told: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=told) as caught:
        load_result(path)
    assert str(path) in str(caught.value)
    with pytest.raises(InputError, match="null"):
        load_result("a\0b")


def test_a_file_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with path.open("wb") as file:
        file.truncate(2**29 + 1)
    with pytest.raises(InputError, match="536,870,912 at most"):
        load_result(path)


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_every_kind_is_known_by_its_keys_and_survives_a_file(kind: type[Result], tmp_path: Path) -> None:
    kind(DOCUMENTS[kind]).save(tmp_path / "x.json")
    found = load_result(tmp_path / "x.json")
    assert type(found) is kind
    rows = found.table()
    assert rows
    assert all(not isinstance(value, dict | list) for row in rows for value in row.values())
    assert len(found.to_pandas()) == len(rows)


def test_no_document_is_known_as_two_kinds() -> None:
    assert len({one.command for one in RESULTS}) == len(RESULTS)
    assert {one.command for one in RESULTS} <= COMMANDS.keys()
    for kind, document in DOCUMENTS.items():
        known = [one for one in RESULTS if any(marks <= document.keys() for marks in one.marks)]
        assert known == [kind]


@pytest.mark.parametrize("kind", [*DOCUMENTS, CatalogueResult])
def test_a_document_that_lacks_something_has_no_table_and_says_so(kind: type[Result]) -> None:
    for document in ({}, dict.fromkeys(DOCUMENTS.get(kind, {"models": 0}), 3), {"models": [3], "results": 3}):
        found = kind(document)
        if kind is BenchResult and not document:
            assert found.table() == []
            continue
        with pytest.raises(GpmetricError, match="has no table"):
            found.table()
        assert repr(found).startswith(f"<{kind.__name__}")


class Page(HTMLParser):
    """The tags of a page, and the text between them."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_html_holds_what_others_wrote_as_text(kind: type[Result]) -> None:
    page = Page(kind(DOCUMENTS[kind])._repr_html_())
    assert page.tags == {"table", "caption", "thead", "tbody", "tr", "th", "td"}
    assert f"gpmetric {kind.command}" in page.text
    assert ("<script>alert(1)" in page.text) == (HOSTILE in json.dumps(DOCUMENTS[kind], ensure_ascii=False) or
                                                 "script" in json.dumps(DOCUMENTS[kind]))  # fmt: skip
    assert "\x1b" not in page.text
    assert "\u202e" not in page.text


def test_html_of_a_damaged_result_says_so() -> None:
    page = Page(BenchResult({"results": [{"metric": HOSTILE}], "dense": {}})._repr_html_())
    assert page.tags == {"p"}
    assert "has no table" in page.text


def test_html_is_bounded() -> None:
    rows = [{"part": number, "kind": "x" * 10_000} for number in range(1000)]

    class Long(Result):
        def _rows(self) -> Any:
            return rows

    page = Page(Long()._repr_html_())
    assert len(page.text) < 20_000
    assert "940 more rows are in table()" in page.text


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_pictures(kind: type[Result]) -> None:
    """Drawn whole, hostile names and missing figures included; a notebook shows them without pyplot."""
    document = DOCUMENTS[kind]
    if kind is AllocateResult:
        settings = {"metric": HOSTILE, "objective": "loss", "granularity": "row", "prunable": 4, "total": 8}
        document = document | settings | {"dense": {"loss": 1.0, "perplexity": 2.7}, "rounds": [], "reference": {}}
        document["picked"] = POINT | {"genes": {"model.layers.0.mlp": 0.5}}
    figure = kind(document).plot()
    assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]
    assert "matplotlib.pyplot" not in sys.modules or "pyplot" not in repr(type(figure))


def test_the_bars_of_a_bench_are_the_mean_excess_with_the_best_first() -> None:
    (axes,) = BenchResult(BENCH).plot().axes
    wanda, other = (math.log(20 / 10) + math.log(20 / 20)) / 2, (math.log(40 / 10) + math.log(40 / 20)) / 2
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([wanda, other] * 2)
    assert [label.get_text().split()[0] for label in axes.get_yticklabels()] == ["0.5", "0.5", "2:4", "2:4"]


def test_what_has_no_picture_says_so() -> None:
    with pytest.raises(GpmetricError, match="no picture of gpmetric evaluate; table"):
        EvaluateResult(ppl={"a": 1.0}, windows_in_all=1).plot()
    failed = [row | {"error": "no"} for row in BENCH["results"]]
    with pytest.raises(GpmetricError, match="nothing to draw"):
        BenchResult(BENCH | {"results": failed}).plot()


def test_half_a_character_goes_into_a_data_frame(tmp_path: Path) -> None:
    """JSON can hold it, and pandas cannot; found by the fuzzer."""
    (tmp_path / "x.json").write_text(json.dumps(Result(gpmetric="1", a="\udcff")))
    assert list(load_result(tmp_path / "x.json").to_pandas()["value"]) == ["1", r"\udcff"]


def test_without_pandas_the_way_to_install_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(GpmetricError, match="pip install pandas"):
        BenchResult(BENCH).to_pandas()


# Progress


class ZMQInteractiveShell:
    """What a notebook's kernel is called."""


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.get_ipython", ZMQInteractiveShell, raising=False)


def test_where_progress_goes(notebook: None) -> None:
    console = progress_console(None)
    assert console is not None
    assert console.is_jupyter
    assert progress_console(False) is None


def test_a_notebook_has_a_bar_and_the_lines_of_the_command_line(
    notebook: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a kernel's own functions, as far as they are used; a true one was looked at by hand."""
    updates: list[str] = []
    handle = SimpleNamespace(update=updates.append)
    display = SimpleNamespace(HTML=str, display=lambda content, display_id: handle)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    printed: list[str] = []
    monkeypatch.setattr("rich.jupyter.display", lambda segments, text: printed.append(text))
    monkeypatch.setattr("gpmetric.notebook._PAUSE", 0)
    asked: dict[str, Any] = {"metric": "wanda", "samples": 2, "sequence_length": 32, "windows": 1}
    gpmetric.bench(**asked)
    assert any("dense: demo:test" in text for text in printed)
    assert any(re.fullmatch(r'<progress value="\d" max="\d"></progress> [^<]+: \d of \d.*', one) for one in updates)
    assert updates[-1] == ""  # what is done has no bar
    count = len(updates), len(printed)
    gpmetric.bench(**asked, progress=False)
    assert (len(updates), len(printed)) == count


def test_outside_of_a_notebook_nothing_is_shown_unless_asked_for() -> None:
    assert progress_console(None) is None
    assert progress_console(False) is None
    console = progress_console(True)
    assert console is not None
    assert console.stderr


def test_progress_is_on_standard_error_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    asked: dict[str, Any] = {"metric": "wanda", "samples": 2, "sequence_length": 32, "windows": 1}
    quiet = gpmetric.bench(**asked)
    assert capsys.readouterr() == ("", "")
    told = gpmetric.bench(**asked, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "dense: demo:test" in err
    assert told["dense"] == quiet["dense"]
