"""Texts and windows against hand-made files and counts; unless said otherwise, every character is a token."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gpmetric.data import Text, Windows, check_disjoint, cut_windows, read_text, split_text
from gpmetric.errors import DataError, InputError, ModelError


def by_character(text: str, **_: Any) -> dict[str, list[int]]:
    return {"input_ids": [ord(character) for character in text]}


def cut(content: str, length: int, count: int | None = None, seed: int | None = None) -> Windows:
    return cut_windows(Text("t", content), by_character, length, count, vocabulary=128, shuffle_seed=seed)


def decode(windows: Windows) -> list[str]:
    return ["".join(map(chr, window)) for window in windows.tokens.tolist()]


def test_windows_are_contiguous_and_the_incomplete_last_is_dropped() -> None:
    windows = cut("abcdefghijk", 3)
    assert decode(windows) == ["abc", "def", "ghi"]
    assert windows.tokens.dtype == torch.int64
    assert windows.describe() == {
        "text": "t",
        "sha256": hashlib.sha256(b"abcdefghijk").hexdigest(),
        "windows": 3,
        "tokens": 9,
        "sequence_length": 3,
        "bos": False,
    }


def test_the_first_windows_are_taken() -> None:
    assert decode(cut("abcdefgh", 2, 3)) == ["ab", "cd", "ef"]
    assert decode(cut("abcd", 4, 1)) == ["abcd"]


def test_shuffle_draws_from_all_windows_by_seed() -> None:
    content = "".join(chr(33 + index) * 2 for index in range(40))  # 40 distinct windows of 2
    drawn = [decode(cut(content, 2, 8, seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 8
    assert sorted(decode(cut(content, 2, None, 3))) == sorted(decode(cut(content, 2)))
    assert any(window not in decode(cut(content, 2, 8)) for window in drawn[0])


def test_fewer_windows_than_asked_are_all_used_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert decode(cut("abcdef", 3, 7)) == ["abc", "def"]
    assert [record.getMessage() for record in caplog.records] == [
        "text 't' has 2 windows of 3 tokens, fewer than the 7 asked for: using all"
    ]
    caplog.clear()
    cut("abcdef", 3, 2)
    assert not caplog.records


@pytest.mark.parametrize(
    ("content", "length", "count", "error", "message"),
    [
        ("ab", 3, 1, DataError, "text 't' has 2 tokens, fewer than one window of 3"),
        ("", 3, 1, DataError, "has 0 tokens"),
        ("abcdef", 3, 0, InputError, "at least 1 window is needed, but 0 were asked for"),
        ("abcdef", 3, -1, InputError, "but -1 were asked for"),
        ("ab\x80d", 2, 1, ModelError, "token id 128, but the model's vocabulary has 128 entries"),
    ],
)
def test_windows_that_cannot_be_cut(content: str, length: int, count: int, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        cut(content, length, count)


def test_no_special_tokens(tiny_tokenizer: Any) -> None:
    """A tokenizer that begins every text with its end token, as Llama's does, is asked not to."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer.__class__(tokenizer_object=tiny_tokenizer._tokenizer, bos_token="<|endoftext|>")
    single = "<|endoftext|> $A"
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[("<|endoftext|>", 0)])
    content = "The old model reads the weight of a layer in the metric."
    assert tokenizer(content)["input_ids"][0] == 0
    windows = cut_windows(Text("t", content), tokenizer, 4, None, vocabulary=300)
    plain = tiny_tokenizer(content, add_special_tokens=False)["input_ids"]
    assert windows.tokens.flatten().tolist() == plain[: windows.tokens.numel()]
    assert 0 not in plain


# Files


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_plain_text(tmp_path: Path) -> None:
    source = write(tmp_path, "a.txt", "één\nzwei\n")
    text = read_text(source)
    assert text == Text(source, "één\nzwei\n")
    assert text.digest == hashlib.sha256("één\nzwei\n".encode()).hexdigest()
    assert read_text(write(tmp_path, "crlf.txt", "één\r\nzwei\r\n")).digest == text.digest


def test_tables_join_their_text_column(tmp_path: Path) -> None:
    import pandas  # type: ignore[import-untyped]

    rows = ["one", "two\n\u2028 lines", "", "three"]
    table = pandas.DataFrame({"id": range(4), "text": rows})
    table.to_parquet(tmp_path / "a.parquet")
    table.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    table.to_json(tmp_path / "a.json", orient="records")
    crlf = "\r\n\r\n".join(json.dumps({"text": row}, ensure_ascii=False) for row in rows) + "\r\n"
    write(tmp_path, "crlf.jsonl", crlf)
    table.assign(text=table["text"].astype("category")).to_parquet(tmp_path / "category.parquet")
    for name in ("a.parquet", "a.jsonl", "a.json", "crlf.jsonl", "category.parquet"):
        assert read_text(str(tmp_path / name)).content == "one\n\ntwo\n\u2028 lines\n\n\n\nthree", name


def test_a_table_is_read_anew_when_it_changed(tmp_path: Path) -> None:
    """`datasets` caches by path and time: a file rewritten at once could be answered from its cache."""
    for word in ("one", "two"):
        assert read_text(write(tmp_path, "a.jsonl", json.dumps({"text": word}))).content == word


BAD_FILES = {
    "empty.txt": (b"", "is empty"),
    "blank.txt": (b" \r\n\t\n", "is empty"),
    "latin.txt": (b"abc\xe9def", "is not UTF-8: invalid continuation byte at byte 3"),
    "gzip.jsonl.gz": (b"\x1f\x8b\x08\x00", "is not whole as gzip: Compressed file ended"),
    "empty.jsonl": (b"", "is empty"),
    "latin.jsonl": (b'{"text": "\xe9"}', "is not UTF-8"),
    "malformed.jsonl": (b'{"text": "a"}\n' * 6 + b'{"text": "b"\n{"text": "c"}\n', "line 7: not JSON: Expecting"),
    "digits.jsonl": (b'{"text": ' + b"9" * 5000 + b"}", "line 1: not JSON: Exceeds the limit"),
    "deep.jsonl": (b'{"text": ' + b"[" * 100_000, "line 1: not JSON: maximum recursion"),
    "deep.json": (b"[" * 100_000, "not JSON: maximum recursion"),
    "array.json": (b'[{"text": "a"},\n {"text"}]', "not JSON: Expecting ':' delimiter: line 2"),
    "column.jsonl": (b'{"text": "a"}\n\n{"body": "a", "id": 1}\n', "line 3: no 'text'; it has body, id"),
    "nothing.jsonl": (b"{}\n", "line 1: no 'text'; it has nothing"),
    "list.jsonl": (b'{"text": "a"}\n["text"]\n', "line 2: an object with 'text' is wanted, but got list"),
    "number.jsonl": (b'{"text": "a"}\n{"text": 7}\n', "line 2: column 'text' holds int, not a string"),
    "null.json": (b'[{"text": "a"}, {"text": null}]', "row 2: column 'text' holds NoneType, not a string"),
    "surrogate.jsonl": (b'{"text": "ab\\ud800"}', "half of a surrogate pair at character 2"),
    "magic.parquet": (b"PAR0 this is no table", "is not Parquet: "),
    "empty.parquet": (b"", "is not Parquet: "),
    "truncated.parquet": (b"PAR1\x00\x00\x00PAR1", "is not Parquet: "),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(name: str, tmp_path: Path) -> None:
    content, message = BAD_FILES[name]
    expect_error(write(tmp_path, name, content), message, name)


def test_bad_parquet_columns(tmp_path: Path) -> None:
    import pandas  # type: ignore[import-untyped]

    pandas.DataFrame({"body": ["a"], "id": [1]}).to_parquet(tmp_path / "column.parquet")
    expect_error(str(tmp_path / "column.parquet"), "has no column 'text'; it has body, id", "column.parquet")
    pandas.DataFrame({"text": ["a", None]}).to_parquet(tmp_path / "null.parquet")
    expect_error(str(tmp_path / "null.parquet"), "row 2: column 'text' holds NoneType", "null.parquet")
    pandas.DataFrame({"text": []}).to_parquet(tmp_path / "rows.parquet")
    expect_error(str(tmp_path / "rows.parquet"), "is empty", "rows.parquet")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.txt", "does not exist"),
        ("missing.parquet", "does not exist"),
        ("folder", "is a folder without a shard"),
        ("x" * 300, "cannot be read: File name too long"),
        ("nul\0", "does not exist"),
    ],
)
def test_paths_without_a_file(source: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    expect_error(str(tmp_path / source), message, "")


@pytest.mark.parametrize("source", ["hf:", "hf:name", "hf:name:", "hf::train", "hf:a/b/c/d:train", "hf:a//b:train"])
def test_hub_names_of_another_form(source: str) -> None:
    expect_error(source, r"is not of the form hf:owner/dataset\[/config\]:split", "")


def test_a_hub_dataset_that_was_not_downloaded() -> None:
    expect_error("hf:no-such-org/no-such-data:train[:1%]", "cannot be loaded: ", "no-such-data")  # HF_HUB_OFFLINE=1


def test_an_unreachable_hub_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    start = time.monotonic()
    expect_error("hf:no-such-org/no-such-data:train", "the Hugging Face Hub cannot be reached", "no-such-data")
    assert time.monotonic() - start < 5


def expect_error(source: str, message: str, name: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_text(source)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 1000
    assert name in line


# Splits


@pytest.mark.parametrize("lengths", [[5] * 40, [1, 30, 2, 2, 90, 3], [400], [0] * 9, [3, 3, 300]])
def test_split_parts_are_the_text_in_order(lengths: list[int]) -> None:
    content = "\n".join(" ".join(["word"] * length) for length in lengths)
    parts = split_text(Text("t", content), ("a", "b", "c", "d"))
    assert [part.name for part in parts.values()] == ["t#a", "t#b", "t#c", "t#d"]
    assert "".join(part.content for part in parts.values()) == content
    assert all(part.content for part in parts.values())


def test_split_cuts_at_lines_then_spaces_then_anywhere() -> None:
    def contents(text: str) -> list[str]:
        return [part.content for part in split_text(Text("t", text), ("a", "b")).values()]

    assert contents("12\n34 5\n78\n") == ["12\n34 5\n", "78\n"]  # half is at 5: the line that it is in goes to the end
    assert contents("12 34 6 8 0") == ["12 34 ", "6 8 0"]
    assert contents("1234567") == ["123", "4567"]
    assert contents("") == ["", ""]


def windows_of(name: str, rows: list[list[int]]) -> Windows:
    return Windows(Text(name, name), torch.tensor(rows))


def test_disjoint_splits_pass() -> None:
    """A window may stand twice in one split, and two splits may share tokens that are not a whole window."""
    check_disjoint({"search": windows_of("a", [[1, 2], [3, 4], [1, 2]]), "test": windows_of("b", [[2, 3], [4, 1]])})


def test_the_same_text_under_two_names_is_refused(tmp_path: Path) -> None:
    texts = [read_text(write(tmp_path, name, "same words")) for name in ("a.txt", "b.txt")]
    splits = {"search": Windows(texts[0], torch.tensor([[1]])), "test": Windows(texts[1], torch.tensor([[2]]))}
    with pytest.raises(DataError, match=r"^--search and --test are the same text \('.*b.txt'\)$"):
        check_disjoint(splits)


def test_a_shared_window_is_refused() -> None:
    with pytest.raises(DataError, match=r"^window 1 of --test \('b'\) also stands in --search$"):
        check_disjoint({"search": windows_of("a", [[1, 2], [3, 4]]), "test": windows_of("b", [[5, 6], [3, 4]])})
