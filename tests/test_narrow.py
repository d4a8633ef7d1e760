"""Tables at 60 and 80 columns: every number is whole, whatever folds."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from gpmetric.pruning.requests import BenchRequest
from gpmetric.session.requests import LayersRequest
from gpmetric.terminal.bench import print_bench
from gpmetric.terminal.layers import print_layers
from gpmetric.terminal.narrow import fitted
from gpmetric.terminal.text import Text

TEXTS = ("/a/folder/of/texts/wikitext2-valid.txt", "/a/folder/of/texts/ptb-valid.txt", "/a/folder/of/texts/c4.jsonl")
FORMULAS = ("wanda", "abs(W)*X**0.5123*sqrt(X)*min(abs(W),X)")


def bench(texts: int) -> dict[str, Any]:
    """A document with numbers that occur once each."""
    rows = [
        {
            "metric": name, "target": "0.5", "update": "none", "sparsity": 0.5001 + place, "seconds": 71.2 + place,
            "error": None, "ppl": {text: 1234567.125 + 10 * place + one for one, text in enumerate(TEXTS[:texts])},
        }
        for place, name in enumerate(FORMULAS)
    ]  # fmt: skip
    dense = {text: 12345.625 + one for one, text in enumerate(TEXTS[:texts])}
    return {"model": "m", "protocol": "sequential", "dense": dense, "results": rows, "warnings": []}


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
@pytest.mark.parametrize("texts", [1, 2, 3])
def test_no_number_is_cut(texts: int, width: int) -> None:
    document = bench(texts)
    console = Console(file=io.StringIO(), width=width)
    print_bench(console, document, BenchRequest())
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, shown.splitlines())) <= width
    numbers = [f"{value:.3f}" for value in document["dense"].values()]
    for row in document["results"]:
        numbers += [
            *(f"{value:.3f}" for value in row["ppl"].values()),
            f"{row['sparsity']:.4f}",
            f"{row['seconds']:.1f}",
        ]
    words = shown.replace(",", " ").split()
    assert [words.count(number) for number in numbers] == [1] * len(numbers)
    assert "\u2026" not in shown


@pytest.mark.parametrize("width", [40, 60, 80])
def test_no_shape_is_cut(width: int) -> None:
    names = [f"model.language_model.layers.{index}.mlp.down_proj" for index in range(12)]
    layers = [{"name": name, "shape": [12288, 49152], "prunable": True, "reason": None} for name in names]
    layers.append(
        {"name": "a\x1b[31m.bias", "shape": [7], "prunable": False, "reason": "a vector that is no weight of a layer"}
    )
    document = {"layers": layers, "blocks": 12, "weights": 10, "parameters": 20, "share": 0.5}
    console = Console(file=io.StringIO(), width=width)
    print_layers(console, document, LayersRequest())
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, shown.splitlines()[:-1])) <= width
    assert shown.count("12288 x 49152") == 1
    assert "\x1b" not in shown  # which a terminal would obey
    assert "\u2026" not in shown


def table(*rows: tuple[str, ...]) -> Table:
    made = Table("metric", title="a title")
    made.add_column("mean excess", justify="right")
    for row in rows:
        made.add_row(*map(Text, row), style="bold")
    return made


def test_columns_fold_and_rows_become_lines() -> None:
    """By hand: 8 letters of a word at least and 7 digits, and 7 characters around them."""
    row = ("abcdefghijkl", "1.23456")
    assert fitted(table(row), 30) is not None
    same = table(row)
    assert fitted(same, 30) is same
    assert [column.width for column in same.columns] == [None, None]  # 12 + 11 + 7 fit
    narrow = table(row)
    assert fitted(narrow, 24) is narrow
    assert [column.width for column in narrow.columns] == [9, 8]
    console = Console(file=io.StringIO(), width=21)
    console.print(fitted(table(row, ("", "2")), 21))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines == ["a title", "metric abcdefghijkl, ", "mean excess 1.23456", "mean excess 2"]
