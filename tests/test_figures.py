"""Tables of the pages: made of results.csv, with the range over seeds; what is measured again is compared with them."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
CASES = (("wanda | 0.5 | seed 0", 0.5), ("wanda | 2:4 | seed 0", 1.0), ("ours | 0.5 | seed 0", 0.4),
         ("ours | 0.5 | seed 1", 0.3), ("ours | 0.5 | seed 2", 0.2), ("ours | 0.5 | seed 2", 0.45))  # fmt: skip


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import figures

    return figures


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "results.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["benchmark", "case", "median"])
        writer.writerows([["figures: discovered", case, value] for case, value in CASES])
        writer.writerow(["figures: slimmed", "a | b | seed 0", 7])
    return path


def test_pages_have_the_tables_of_results_csv(figures: Any) -> None:
    assert figures.write_pages() == {}
    marked = [page for page in figures.PAGES if "<!-- figures: " in page.read_text(encoding="utf-8")]
    assert marked
    tables = [found[0] for page in marked for found in figures._PLACE.finditer(page.read_text(encoding="utf-8"))]
    assert all(table.count("\n|") > 3 for table in tables), "a table without rows"


def test_the_newest_figure_of_every_seed_counts(figures: Any, results: Path) -> None:
    found = figures.figures_of("discovered", results)
    assert found[("ours", "0.5")].values == (0.4, 0.3, 0.45)
    assert found[("ours", "0.5")].text(2) == "0.40 (0.30 to 0.45)"
    assert found[("wanda", "2:4")].text(3) == "1.000"
    table = figures.render(found, "metric", 2, bold="0.5")
    assert table.splitlines() == [
        "| metric | 0.5 | 2:4 |",
        "| --- | --- | --- |",
        "| wanda | 0.50 | 1.00 |",
        "| ours | **0.40 (0.30 to 0.45)** | - |",
    ]


def test_a_figure_is_allowed_near_its_range(figures: Any, results: Path) -> None:
    figure = figures.figures_of("discovered", results)[("ours", "0.5")]
    assert figure.allows(0.3, 0)
    assert figure.allows(0.45 * 1.09, 0.1)
    assert not figure.allows(0.5, 0.1)
    assert not figure.allows(0.26, 0.1)


def test_a_page_is_written_anew_between_its_marks(figures: Any, results: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- figures: discovered -->\nold\n<!-- end of figures -->\nafter\n")
    made = figures.write_pages([page], results)[page]
    assert made.startswith("before\n<!-- figures: discovered -->\n| excess")
    assert made.endswith("-->\nafter\n")
    page.write_text(made)
    assert figures.write_pages([page], results) == {}


def test_measured_figures_are_compared_and_kept(
    figures: Any, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import benchmark

    def found(bench: Any, seed: int) -> Iterator[tuple[str, str, float]]:
        yield "ours", "0.5", 0.31
        yield "wanda", "0.5", 0.6
        yield "other", "0.5", 1.0

    monkeypatch.setattr(benchmark, "RESULTS", results)
    monkeypatch.setattr(benchmark, "figures_of", lambda name: figures.figures_of(name, results))
    monkeypatch.setitem(benchmark.EXPERIMENTS, "discovered", benchmark.Experiment("told", found, 1))
    assert not benchmark.measure("discovered", benchmark.Bench(tmp_path, None, None, seeds=1))
    told = capsys.readouterr().out
    assert "ours, 0.5: 0.3100 (table: 0.400 (0.300 to 0.450))" in told
    assert "wanda, 0.5: 0.6000 (table: 0.500: OUTSIDE)" in told
    assert "other, 0.5: 1.0000 (table: new)" in told
    assert sys.path[0] == str(ROOT / "benchmarks")
