"""Where texts come from, and what of them is read: formats against the rows they were made of."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpmetric.data import Text, cut_windows, read_text, sources, split_text
from gpmetric.data import hub as hub_module
from gpmetric.data.text import joined
from gpmetric.errors import DataError

ROWS = ["one", 'two, "quoted"\n\u2028 lines', "", "three", "vier \u00e4"]
WHOLE = "\n\n".join(ROWS)


def json_lines(column: str = "text") -> bytes:
    return b"\n".join(json.dumps({"id": 1, column: row}).encode() for row in ROWS) + b"\n"


def table(kind: str, column: str = "text") -> bytes:
    """The rows as a file of a kind."""
    if kind == "jsonl":
        return json_lines(column)
    if kind == "array":
        return json.dumps([{column: row} for row in ROWS], indent=1).encode()
    if kind in ("csv", "tsv"):
        written = io.StringIO()
        writer = csv.writer(written, delimiter="," if kind == "csv" else "\t")
        writer.writerows([["id", column], *([1, row] for row in ROWS)])
        return written.getvalue().encode()
    import pandas  # type: ignore[import-untyped]

    buffer = io.BytesIO()
    pandas.DataFrame({"id": range(len(ROWS)), column: ROWS}).to_parquet(buffer, row_group_size=2)
    return buffer.getvalue()


def write(folder: Path, name: str, content: bytes) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("jsonl", "a.jsonl"), ("jsonl", "a.ndjson"), ("jsonl", "a.json"), ("jsonl", "a"), ("jsonl", "a.txt"),
        ("array", "a.json"), ("array", "a.txt"), ("csv", "a.csv"), ("tsv", "a.tsv"),
    ],
)  # fmt: skip
def test_a_table_is_known_by_its_first_bytes(tmp_path: Path, kind: str, name: str, marked: bool) -> None:
    """Packed or not, and with a byte-order mark."""
    content = b"\xef\xbb\xbf" * marked + table(kind)
    assert read_text(write(tmp_path, name, content)).content == WHOLE
    assert read_text(write(tmp_path, f"{name}.gz", gzip.compress(content))).content == WHOLE
    assert read_text(write(tmp_path, "packed", gzip.compress(content)), "text").content == WHOLE


def test_parquet_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    assert read_text(write(tmp_path, "a", table("parquet"))).content == WHOLE


@pytest.mark.parametrize(
    "content", ["[one] is no array\n", "{ a brace", '{"a": 1} is a line\n', "a,text\nb,c\n", "text\n"]
)
def test_plain_text_that_begins_like_a_table(tmp_path: Path, content: str) -> None:
    assert read_text(write(tmp_path, "a.txt", content.encode())).content == content


def test_a_mark_and_line_ends_are_no_part_of_a_text(tmp_path: Path) -> None:
    assert read_text(write(tmp_path, "a.txt", b"\xef\xbb\xbfone\r\ntwo\r\n")).content == "one\ntwo\n"


@pytest.mark.parametrize("kind", ["jsonl", "array", "csv", "parquet"])
def test_a_column_of_another_name(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, f"a.{'json' if kind == 'array' else kind}", table(kind, "body"))
    assert read_text(path, "body").content == WHOLE
    with pytest.raises(DataError, match=r"no (column )?'text'; it has (id, )?body \(--text-column\)"):
        read_text(path)


def test_a_column_makes_a_csv_of_what_has_no_suffix(tmp_path: Path) -> None:
    assert read_text(write(tmp_path, "a", table("csv", "body")), "body").content == WHOLE
    assert read_text(write(tmp_path, "b.txt", b"plain words\n"), "body").content == "plain words\n"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", b'id,text\n1,"open\n', "not CSV"),
        ("a.csv", b"id,text\n1,a\n2\n", "line 3: 1 fields, but the first line has 2"),
        ("a.csv", b"", "is empty"),
        ("a.zst", b"\x28\xb5\x2f\xfd0000", "is compressed as zstd; plain and gzip are read"),
        ("a.gz", gzip.compress(b"words " * 99, mtime=0)[:-9], "is not whole as gzip"),
        ("a.txt", b"\xff\xfea\0b\0", "is not UTF-8: invalid start byte at byte 0"),
        ("a.txt", b"word\n" * 100_000 + b"\xe9t\n", "is not UTF-8: invalid continuation byte at byte 500000"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    with pytest.raises(DataError, match=told):
        read_text(write(tmp_path, name, content))


def test_shards_of_a_folder_and_of_a_pattern_are_in_the_order_of_their_names(tmp_path: Path) -> None:
    write(tmp_path, "c4/b/part-1.jsonl", b'{"text": "three"}\n')
    write(tmp_path, "c4/a.json.gz", gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    write(tmp_path, "c4/c.txt", b"plain\nfour\n")
    for other in ("c4/README.md", "c4/.hidden.txt"):
        write(tmp_path, other, b"not a shard")
    folder = read_text(str(tmp_path / "c4"))
    assert folder.content == "one\n\ntwo\n\nthree\n\nplain\nfour\n"
    assert list(folder.documents) == ["one", "two", "three", "plain\nfour\n"]
    assert read_text(str(tmp_path / "c4" / "*.json*")).content == "one\n\ntwo"
    assert read_text(str(tmp_path / "**" / "*.jsonl")).content == "three"
    with pytest.raises(DataError, match="no file is called so"):
        read_text(str(tmp_path / "*.parquet"))
    write(tmp_path, "odd[1].txt", b"brackets")
    assert read_text(str(tmp_path / "odd[1].txt")).content == "brackets"


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(gzip.compress(json_lines()))))
    assert read_text("-").content == WHOLE


# Texts that are longer than what is held


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sources, "_HELD", 8)
    return 8


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "array", "csv", "parquet", "txt"])
def test_a_long_text_is_the_same_text(tmp_path: Path, held: int, kind: str) -> None:
    """Its beginning is held; pieces are all of it, and documents are found by their number, in any order."""
    content = WHOLE.encode() if kind == "txt" else table(kind.removesuffix(".gz"))
    path = write(
        tmp_path, f"a.{'json' if kind == 'array' else kind}", gzip.compress(content) if "gz" in kind else content
    )
    text = read_text(path)
    assert text.source is not None
    assert "".join(text.pieces()) == "".join(text.pieces()) == WHOLE
    assert "".join(joined(text.source)) == WHOLE
    assert kind == "txt" or held < len(text.content) < len(WHOLE)
    documents = text.documents
    expected = [WHOLE] if kind == "txt" else ROWS
    assert len(documents) == len(expected)
    for index in (*range(len(expected)), *reversed(range(len(expected)))):
        assert documents[index] == expected[index]


def test_shards_that_are_long(tmp_path: Path, held: int) -> None:
    write(tmp_path, "a.jsonl", b'{"text": "one"}\n{"text": "two two two"}\n')
    write(tmp_path, "b.jsonl", b'{"text": "three"}')
    write(tmp_path, "c.txt", b"four")
    text = read_text(str(tmp_path))
    assert "".join(text.pieces()) == "one\n\ntwo two two\n\nthree\n\nfour"
    assert [text.documents[index] for index in (3, 0, 2, 1)] == ["four", "one", "three", "two two two"]


def test_what_was_read_of_a_long_text_is_said(tmp_path: Path, held: int) -> None:
    rows = [f"document {number}" for number in range(7)]
    path = write(tmp_path, "a.jsonl", b"".join(json.dumps({"text": row}).encode() + b"\n" for row in rows))

    def described(count: int | None) -> dict[str, Any]:
        def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": list(text.encode())}

        return cut_windows(read_text(path), tokenizer, 10, count, vocabulary=256).describe()

    whole = "\n\n".join(rows)
    assert described(None)["sha256"] == hashlib.sha256(whole.encode()).hexdigest()
    assert (described(None)["characters"], described(None)["complete"]) == (len(whole), True)
    assert described(None)["windows"] == len(whole) // 10


def test_a_text_is_read_no_further_than_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_HELD", 2**12)
    good = "".join(json.dumps({"text": f"row {number} " + "word " * 200}) + "\n" for number in range(100))
    path = write(tmp_path, "a.jsonl", good.encode() + b"this is not read\n")

    def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    windows = cut_windows(read_text(path), tokenizer, 100, 5, vocabulary=256)
    said = windows.describe()
    content = "\n\n".join(json.loads(line)["text"] for line in good.splitlines())
    assert windows.tokens.flatten().tolist() == list(content[:500].encode())
    assert not said["complete"]
    assert said["characters"] < len(content)
    assert said["sha256"] == hashlib.sha256(content[: said["characters"]].encode()).hexdigest()
    with pytest.raises(DataError, match="line 101: not JSON"):
        cut_windows(read_text(path), tokenizer, 100, None, vocabulary=256)


def test_of_a_long_text_the_beginning_is_cut(tmp_path: Path, held: int, caplog: pytest.LogCaptureFixture) -> None:
    text = read_text(write(tmp_path, "a.jsonl", json_lines()))
    with caplog.at_level(logging.WARNING):
        parts = split_text(text, ("a", "b"))
    assert "".join(part.content for part in parts.values()) == text.content
    assert [part.source for part in parts.values()] == [None, None]
    assert f"only the first {len(text.content)} characters" in caplog.text


def test_parts_have_the_documents_of_their_share() -> None:
    rows = ["aaaa aaaa", "bbbb", "cccc", "dddd"]
    spans = ((0, 9), (11, 15), (17, 21), (23, 27))
    parts = split_text(Text("t", "\n\n".join(rows), spans), ("x", "y"))
    assert parts["x"].content + parts["y"].content == "\n\n".join(rows)
    assert parts["x"].documents == ["aaaa aaaa", "bbbb"]
    assert parts["y"].documents == ["cccc", "dddd"]
    longer = split_text(Text("t", "a" * 10, ((0, 10),)), ("x", "y"))
    assert [part.documents for part in longer.values()] == [["a" * 5], ["a" * 5]]


# The Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What is asked of `datasets` and `huggingface_hub`, which answer with the rows."""
    import datasets
    import huggingface_hub

    asked: list[Any] = []

    class Rows(list[dict[str, str]]):
        column_names = ("text",)

    def load(*names: str, **options: Any) -> Rows:
        asked.append((names, options))
        return Rows({"text": row} for row in ROWS)

    def download(repository: str, file: str, **options: str) -> str:
        asked.append((repository, file, options))
        return write(tmp_path, "blob", gzip.compress(json_lines()))

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(hub_module, "_reach_hub", lambda *_: None)
    monkeypatch.setattr(hub_module, "_is_offline", lambda: False)
    return asked


def test_a_split_is_streamed(hub: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_text("hf:o/n/c:train").content == WHOLE
    assert hub == [(("o/n", "c"), {"split": "train", "streaming": True})]
    read_text("hf:n:train[:1%]")
    assert hub[-1] == (("n",), {"split": "train[:1%]", "streaming": False})
    monkeypatch.setattr(hub_module, "_is_offline", lambda: True)
    read_text("hf:o/n:test")
    assert hub[-1] == (("o/n",), {"split": "test", "streaming": False})


def test_one_file_of_a_dataset(hub: list[Any], held: int) -> None:
    """Streamed as far as it is read; downloaded where documents are drawn."""
    text = read_text("hf:allenai/c4/en/c4-train.00000-of-01024.json.gz:train")
    file = "en/c4-train.00000-of-01024.json.gz"
    assert hub == [(("allenai/c4",), {"split": "train", "data_files": {"train": file}, "streaming": True})]
    assert [text.documents[index] for index in (4, 1)] == [ROWS[4], ROWS[1]]
    assert hub[-1] == ("allenai/c4", file, {"repo_type": "dataset"})
