"""Windows of tokens of a text, one behind the other, and what splits of windows must not share."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gpmetric.data.text import Text
from gpmetric.data.tokens import tokens_of
from gpmetric.errors import DataError, InputError, ModelError

__all__ = ["Windows", "check_count", "check_disjoint", "check_vocabulary", "cut_windows", "overlap"]

_LOG = logging.getLogger(__name__)
_NGRAM = 13


@dataclass(frozen=True)
class Windows:
    """Token windows of one text.

    Attributes:
        tokens: [windows, length], int64.
        bos: whether each begins with BOS, which is no token of the text.
        read: what was read, where that is not the whole text.
    """

    text: Text
    tokens: Tensor
    bos: bool = False
    read: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def tokens_digest(self) -> str:
        """sha256 of the windows' shape and token ids, in hexadecimal."""
        shape = "x".join(map(str, self.tokens.shape))
        return hashlib.sha256(shape.encode() + self.tokens.numpy().tobytes()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a result says of its text: name, hash of what was read, windows and tokens.

        Where a text was not read whole, `complete` is false, and `characters` or `documents` were read.
        """
        return {
            "text": self.text.name,
            "sha256": self.text.digest,
            "windows": len(self.tokens),
            "tokens": self.tokens.numel(),
            "sequence_length": self.tokens.shape[1],
            "bos": self.bos,
        } | dict(self.read)


def cut_windows(
    text: Text,
    tokenizer: Any,
    length: int,
    count: int | None,
    *,
    vocabulary: int,
    shuffle_seed: int | None = None,
    bos: int | None = None,
) -> Windows:
    """The first `count` contiguous windows of `length` tokens (all when None), or `count` drawn at random.

    Args:
        text: tokenised without special tokens, no further than needed; the incomplete last window is dropped.
        tokenizer: a Hugging Face tokenizer.
        length: tokens per window, at least 2.
        count: windows wanted; fewer are used, with a warning, when the text has fewer.
        vocabulary: rows of the model's embedding.
        shuffle_seed: draw windows of the whole text in random order from this seed instead of the first ones.
        bos: id that each window begins with; the text's tokens then are cut by `length - 1`.

    Raises:
        InputError: `count` below 1.
        DataError: the text is shorter than one window.
        ModelError: the tokenizer yields ids the model has no embedding for.
    """
    check_count(text, count)
    stride = length - (bos is not None)
    reading = _Reading(text)
    wanted = None if count is None or shuffle_seed is not None else count * stride
    tokens = _take(tokenizer, reading, wanted)
    if len(tokens) < stride:
        raise DataError(
            f"text {text.name!r} has {len(tokens)} tokens, fewer than one window of {stride} (--sequence-length)"
        )
    windows = tokens[: len(tokens) // stride * stride].view(-1, stride)  # [windows, stride]
    if shuffle_seed is not None:
        windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(shuffle_seed))]
    if count is not None and len(windows) < count:
        _LOG.warning("text %r has %d windows of %d tokens, fewer than the %d asked for: using all", text.name,
                     len(windows), length, count)  # fmt: skip
    windows = windows[:count].clone()
    if bos is not None:
        windows = torch.nn.functional.pad(windows, (1, 0), value=bos)  # [windows, length]
    check_vocabulary(text, tokens.max(), vocabulary)
    check_vocabulary(text, windows.max(), vocabulary)
    return Windows(text, windows, bos is not None, reading.told())


class _Reading:
    """The pieces of a text, and what was read of them."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._sha = hashlib.sha256()
        self._characters = 0
        self._complete = False

    def __iter__(self) -> Iterator[str]:
        for piece in self._text.pieces():
            self._characters += len(piece)
            if self._text.source is not None:
                self._sha.update(piece.encode())
            yield piece
        self._complete = True

    def told(self) -> dict[str, Any]:
        """Nothing of a text that is held whole."""
        if self._text.source is None:
            return {}
        return {"sha256": self._sha.hexdigest(), "characters": self._characters, "complete": self._complete}


def _take(tokenizer: Any, pieces: _Reading, wanted: int | None) -> Tensor:
    """[tokens], int64: the first ones of a text, at least as many as are wanted or all."""
    runs, count = [], 0
    for ids in tokens_of(tokenizer, pieces):
        runs.append(torch.tensor(ids, dtype=torch.int64))
        count += len(ids)
        if wanted is not None and count >= wanted:
            break
    return torch.cat(runs)


def check_count(text: Text, count: int | None) -> None:
    """Refuses a number of windows below 1.

    Raises:
        InputError: it is.
    """
    if count is not None and count < 1:
        raise InputError(f"at least 1 window is needed, but {count} were asked for (text {text.name!r})")


def check_vocabulary(text: Text, largest: Tensor | int, vocabulary: int) -> None:
    """Refuses token ids that the model has no embedding for.

    Raises:
        ModelError: the largest id is one.
    """
    if int(largest) >= vocabulary:
        raise ModelError(
            f"tokenizer and model do not match: text {text.name!r} holds token id {int(largest)}, "
            f"but the model's vocabulary has {vocabulary} entries"
        )


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
