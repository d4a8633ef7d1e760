"""Tables of the README and the documentation, made of results.csv: `python benchmarks/figures.py` writes them anew.

A page holds `<!-- figures: NAME -->`, the table, `<!-- end of figures -->`. Rows of results.csv that a table is made of
have the benchmark `figures: NAME` and the case `row | column | seed N`; where seeds differ, the range stands beside the
median.
"""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from results import RESULTS

__all__ = ["PAGES", "TABLES", "Figure", "figures_of", "render", "write_pages"]

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md")))
_PLACE = re.compile(r"(<!-- figures: ([a-z-]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)


@dataclass(frozen=True)
class Figure:
    """A figure over its seeds: the values, in the order of the seeds."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def text(self, digits: int) -> str:
        """The median, and the range where seeds differ."""
        low, high = (f"{end(self.values):.{digits}f}" for end in (min, max))
        middle = f"{self.median:.{digits}f}"
        return middle if low == high else f"{middle} ({low} to {high})"

    def allows(self, value: float, spread: float) -> bool:
        """Whether a value lies in the range, widened by a share on either side."""
        return min(self.values) * (1 - spread) <= value <= max(self.values) * (1 + spread)


def figures_of(name: str, path: Path = RESULTS) -> dict[tuple[str, str], Figure]:
    """The newest figures of a table by row and column."""
    newest: dict[tuple[str, str, str], float] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["benchmark"] == f"figures: {name}":
                line, column, seed = row["case"].rsplit(" | ", 2)
                newest[line, column, seed] = float(row["median"])
    found: dict[tuple[str, str], dict[str, float]] = {}
    for (line, column, seed), value in newest.items():
        found.setdefault((line, column), {})[seed] = value
    return {key: Figure(tuple(seeds[seed] for seed in sorted(seeds))) for key, seeds in found.items()}


def render(figures: Mapping[tuple[str, str], Figure], head: str, digits: int = 3, bold: str = "") -> str:
    """A table of Markdown: a line for each row, a column for each column, in the order of the figures.

    Args:
        figures: by row and column.
        head: of the first column.
        digits: behind the point.
        bold: the column whose lowest median is bold, but for rows whose name says what else they do, in brackets.
    """
    lines, columns = (list(dict.fromkeys(key[place] for key in figures)) for place in (0, 1))
    plain = [line for line in lines if not line.endswith(")")]
    lowest = min((figures[line, bold].median for line in plain if (line, bold) in figures), default=None)
    rows = [[head, *columns], ["---"] * (1 + len(columns))]
    for line in lines:
        cells = []
        for column in columns:
            figure = figures.get((line, column))
            text = "-" if figure is None else figure.text(digits)
            cells.append(
                f"**{text}**" if figure and column == bold and line in plain and figure.median == lowest else text
            )
        rows.append([line.replace("|", r"\|"), *cells])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


# by name, what makes the table
TABLES: dict[str, Callable[[Mapping[tuple[str, str], Figure]], str]] = {
    "discovered": lambda figures: render(figures, "excess log-loss of the pruned demo model", bold="mean"),
    "allocated": lambda figures: render(figures, "excess at a mean sparsity of 0.6", bold="validation"),
    "slimmed": lambda figures: render(figures, "the demo model without 30 % of its blocks", 2),
    "updaters": lambda figures: render(figures, "support chosen by, `--update`, `--fit`"),
    "tuned": lambda figures: render(figures, "excess over SparseGPT's", bold=""),
}


def write_pages(pages: Iterable[Path] = PAGES, results: Path = RESULTS) -> dict[Path, str]:
    """The pages whose tables are not those that results.csv gives, with their text as it should be."""
    changed = {}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        made = _PLACE.sub(lambda found: f"{found[1]}{TABLES[found[2]](figures_of(found[2], results))}{found[3]}", text)
        if made != text:
            changed[page] = made
    return changed


if __name__ == "__main__":
    for page, text in write_pages().items():
        page.write_text(text, encoding="utf-8")
        print(f"{page.relative_to(ROOT)}: written")
