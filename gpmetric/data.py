"""Texts and token windows: what calibration and evaluation read.

A text source is a file (plain text, JSONL or Parquet with a `text` column) or `hf:dataset[/config]:split`. It is
tokenised once, whole, without special tokens, and cut into contiguous windows.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpmetric.errors import DataError, InputError, ModelError

__all__ = ["Text", "Windows", "check_disjoint", "cut_windows", "overlap", "read_text", "split_text"]

_LOG = logging.getLogger(__name__)
_NGRAM = 13
_HUB_SECONDS = 10  # to answer at all


@dataclass(frozen=True)
class Text:
    """A text and the name it was asked for by."""

    name: str
    content: str

    @cached_property
    def digest(self) -> str:
        """sha256 of the text in UTF-8, in hexadecimal."""
        return hashlib.sha256(self.content.encode()).hexdigest()


@dataclass(frozen=True)
class Windows:
    """Token windows of one text: `tokens` [windows, length], int64."""

    text: Text
    tokens: Tensor

    @cached_property
    def tokens_digest(self) -> str:
        """sha256 of the windows' shape and token ids, in hexadecimal."""
        shape = "x".join(map(str, self.tokens.shape))
        return hashlib.sha256(shape.encode() + self.tokens.numpy().tobytes()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a result says of its text: name, content hash, windows and tokens read."""
        return {
            "text": self.text.name,
            "sha256": self.text.digest,
            "windows": len(self.tokens),
            "tokens": self.tokens.numel(),
            "sequence_length": self.tokens.shape[1],
        }


def read_text(source: str) -> Text:
    """The text behind a source as given on the command line.

    Raises:
        DataError: nothing there, not readable as text, no `text` column, or empty.
    """
    content = _read_hub(source) if source.startswith("hf:") else _read_file(Path(source))
    if not content.strip():
        raise DataError(f"text {source!r} is empty")
    try:
        content.encode()
    except UnicodeEncodeError as error:  # JSON can spell one: no tokenizer takes it
        raise DataError(f"text {source!r} holds half of a surrogate pair at character {error.start}") from error
    return Text(source, content)


def split_text(text: Text, names: tuple[str, ...]) -> dict[str, Text]:
    """Cuts one text into consecutive parts of about equal length, at line ends, one for each name.

    Where a line is longer than a part, the cut is at a space or, without one, anywhere.
    """
    size = len(text.content)
    places = [part * size // len(names) for part in range(len(names) + 1)]
    cuts = [0, *(_cut_at(text.content, *bounds) for bounds in pairwise(places[1:])), size]
    return {
        name: Text(f"{text.name}#{name}", text.content[start:end])
        for name, (start, end) in zip(names, pairwise(cuts), strict=True)
    }


def _cut_at(content: str, place: int, limit: int) -> int:
    """Where the first line, or else the first word, ending at `place` or later and before `limit` is over."""
    for mark in "\n ":
        found = content.find(mark, place, limit)
        if found >= 0:
            return found + 1
    return place


def cut_windows(
    text: Text, tokenizer: Any, length: int, count: int | None, *, vocabulary: int, shuffle_seed: int | None = None
) -> Windows:
    """The first `count` contiguous windows of `length` tokens (all when None), or `count` drawn at random.

    Args:
        text: tokenised whole, without special tokens; the incomplete last window is dropped.
        tokenizer: a Hugging Face tokenizer.
        length: tokens per window, at least 2.
        count: windows wanted; fewer are used, with a warning, when the text has fewer.
        vocabulary: rows of the model's embedding.
        shuffle_seed: draw windows in random order from this seed instead of the first ones.

    Raises:
        InputError: `count` below 1.
        DataError: the text is shorter than one window.
        ModelError: the tokenizer yields ids the model has no embedding for.
    """
    if count is not None and count < 1:
        raise InputError(f"at least 1 window is needed, but {count} were asked for (text {text.name!r})")
    ids = tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = torch.tensor(ids, dtype=torch.int64)
    if len(tokens) < length:
        raise DataError(
            f"text {text.name!r} has {len(tokens)} tokens, fewer than one window of {length} (--sequence-length)"
        )
    if int(tokens.max()) >= vocabulary:
        raise ModelError(
            f"tokenizer and model do not match: text {text.name!r} holds token id {int(tokens.max())}, "
            f"but the model's vocabulary has {vocabulary} entries"
        )
    windows = tokens[: len(tokens) // length * length].view(-1, length)  # [windows, length]
    if shuffle_seed is not None:
        windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(shuffle_seed))]
    if count is not None and len(windows) < count:
        _LOG.warning("text %r has %d windows of %d tokens, fewer than the %d asked for: using all", text.name,
                     len(windows), length, count)  # fmt: skip
    return Windows(text, windows[:count].clone())


def overlap(splits: Mapping[str, Windows]) -> dict[str, float]:
    """Share of each split's 13-token n-grams that also stand in an earlier split; reported, never refused.

    Source: 13 tokens as in Brown et al. 2020 (GPT-3), appendix C.
    """
    seen: set[bytes] = set()
    shares: dict[str, float] = {}
    for split, windows in splits.items():
        rows = windows.tokens.unfold(1, min(_NGRAM, windows.tokens.shape[1]), 1).flatten(0, 1).numpy()  # [n-grams, 13]
        grams = [row.tobytes() for row in rows]
        shares[split] = sum(gram in seen for gram in grams) / len(grams)
        seen.update(grams)
    return shares


def check_disjoint(splits: Mapping[str, Windows]) -> None:
    """Refuses splits that share their text or a whole token window.

    Raises:
        DataError: naming the two splits.
    """
    seen: dict[bytes, str] = {}
    texts: dict[str, str] = {}
    for split, windows in splits.items():
        other = texts.setdefault(windows.text.digest, split)
        if other != split:
            raise DataError(f"--{other} and --{split} are the same text ({windows.text.name!r})")
        for index, window in enumerate(windows.tokens):
            other = seen.setdefault(window.numpy().tobytes(), split)
            if other != split:
                raise DataError(f"window {index} of --{split} ({windows.text.name!r}) also stands in --{other}")


def _read_file(path: Path) -> str:
    try:
        if path.is_dir():
            raise DataError(f"text {str(path)!r} is a directory; a text file, JSONL or Parquet file is wanted")
        if not path.is_file():
            raise DataError(f"text file {str(path)!r} does not exist")
        if path.suffix == ".parquet":
            return _join_rows(str(path), _parquet_rows(path))
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"text file {str(path)!r} is not UTF-8: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise DataError(f"text file {str(path)!r} cannot be read: {error.strerror or error}") from error
    return _join_rows(str(path), _json_rows(str(path), content)) if path.suffix in (".jsonl", ".json") else content


def _json_rows(source: str, content: str) -> Iterator[tuple[str, Any]]:
    """(place, text) for each line of a JSON Lines file, or each element of one JSON array."""
    if content.lstrip().startswith("["):
        placed = ((f"row {number}", row) for number, row in enumerate(_parse(f"{source!r}", content), start=1))
    else:
        lines = enumerate(content.split("\n"), start=1)  # not splitlines: a JSON string may hold U+2028 and the like
        placed = (
            (f"line {number}", _parse(f"{source!r}, line {number}", line)) for number, line in lines if line.strip()
        )
    for place, row in placed:
        if not isinstance(row, dict):
            raise DataError(f"text {source!r}, {place}: an object with 'text' is wanted, but got {type(row).__name__}")
        if "text" not in row:
            raise DataError(f"text {source!r}, {place}: no 'text'; it has {', '.join(row) or 'nothing'}")
        yield place, row["text"]


def _parse(place: str, content: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"text {place}: not JSON: {str(error).replace('line 1 column', 'column')}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow  # 0.3 s to import: only tables need it
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            rows = file.read(columns=["text"]).column("text").to_pylist() if "text" in names else []
    except pyarrow.ArrowException as error:
        raise DataError(f"text file {str(path)!r} is not Parquet: {_first_line(error)}") from error
    if "text" not in names:
        raise DataError(f"text {str(path)!r} has no column 'text'; it has {', '.join(names)}")
    return ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _read_hub(source: str) -> str:
    """`hf:name:split`, `hf:owner/name:split` or `hf:owner/name/config:split`."""
    name, _, split = source.removeprefix("hf:").partition(":")  # a split may hold one more: train[:1%]
    parts = name.split("/")
    if not split or not all(parts) or len(parts) > 3:
        raise DataError(f"text {source!r} is not of the form hf:owner/dataset[/config]:split")
    repository = "/".join(parts[:2])
    _reach_hub(source, repository)
    from datasets import load_dataset  # 1 s to import

    try:
        rows = load_dataset(repository, *parts[2:], split=split)
    except Exception as error:  # datasets raises its own, pyarrow's, fsspec's and the hub's errors
        raise DataError(f"text {source!r} cannot be loaded: {_first_line(error)}") from error
    if "text" not in rows.column_names:
        raise DataError(f"text {source!r} has no column 'text'; it has {', '.join(rows.column_names)}")
    return _join_rows(source, ((f"row {number}", row) for number, row in enumerate(rows["text"], start=1)))


def _reach_hub(source: str, repository: str) -> None:
    """Asks the Hub once whether it is there: `datasets` would ask for half a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        HfApi().dataset_info(repository, timeout=_HUB_SECONDS)
    except (HfHubHTTPError, OfflineModeIsEnabled):
        pass  # it answered, or is not to be asked: load_dataset says what is wrong, or reads its cache
    except Exception as error:  # the HTTP library's own, which changes between releases of huggingface_hub
        raise DataError(
            f"text {source!r}: the Hugging Face Hub cannot be reached ({_first_line(error)}); "
            "HF_HUB_OFFLINE=1 reads what was downloaded before"
        ) from error


def _join_rows(source: str, rows: Iterable[tuple[str, Any]]) -> str:
    texts = []
    for place, text in rows:
        if not isinstance(text, str):
            raise DataError(f"text {source!r}, {place}: column 'text' holds {type(text).__name__}, not a string")
        texts.append(text)
    return "\n\n".join(texts)


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]
