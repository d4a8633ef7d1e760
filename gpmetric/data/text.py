"""A text: documents joined by an empty line, of which no more is in memory than its beginning."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Protocol

__all__ = ["GAP", "Source", "Text", "joined", "split_text"]

_LOG = logging.getLogger(__name__)

GAP = "\n\n"  # between documents


class Source(Protocol):
    """Where a text comes from; it can be read again from its beginning."""

    def parts(self) -> Iterator[tuple[bool, str]]:
        """The characters in order, in parts; each with whether a document begins with it."""

    def documents(self) -> Sequence[str]:
        """Every document by its number, without all of them in memory where the format allows it."""


@dataclass(frozen=True)
class Text:
    """A text and the name it was asked for by.

    Attributes:
        content: the whole text, or its beginning where there is a `source`.
        spans: where documents begin and end in the content, in order; none is one document.
        source: of a text that is longer than what is held of it.
    """

    name: str
    content: str
    spans: tuple[tuple[int, int], ...] = field(default=(), compare=False)
    source: Source | None = field(default=None, compare=False, repr=False)

    @cached_property
    def digest(self) -> str:
        """sha256 of the content in UTF-8, in hexadecimal."""
        return hashlib.sha256(self.content.encode()).hexdigest()

    def pieces(self) -> Iterator[str]:
        """The whole text in pieces, read as far as they are asked for."""
        yield self.content
        if self.source is not None:
            known = len(self.content)
            for piece in joined(self.source):
                if len(piece) > known:
                    yield piece[known:]
                known = max(0, known - len(piece))

    @cached_property
    def documents(self) -> Sequence[str]:
        """Every document by its number."""
        if self.source is not None:
            return self.source.documents()
        return [self.content[start:end] for start, end in self.spans or [(0, len(self.content))]]


def joined(source: Source) -> Iterator[str]:
    """Pieces of which the text consists: the parts of a source with gaps between documents."""
    for number, (begins, part) in enumerate(source.parts()):
        yield GAP + part if begins and number else part


def split_text(text: Text, names: tuple[str, ...]) -> dict[str, Text]:
    """Cuts one text into consecutive parts of about equal length, at line ends, one for each name.

    Where a line is longer than a part, the cut is at a space or, without one, anywhere. Of a text that is not held
    whole, the beginning is cut.
    """
    size = len(text.content)
    if text.source is not None:
        _LOG.warning("text %r: only the first %d characters of it are cut into parts", text.name, size)
    places = [part * size // len(names) for part in range(len(names) + 1)]
    cuts = [0, *(_cut_at(text.content, *bounds) for bounds in pairwise(places[1:])), size]
    parts = {}
    for name, (start, end) in zip(names, pairwise(cuts), strict=True):
        spans = ((max(first, start) - start, min(last, end) - start) for first, last in text.spans)
        inside = tuple((first, last) for first, last in spans if first < last)
        parts[name] = Text(f"{text.name}#{name}", text.content[start:end], inside)
    return parts


def _cut_at(content: str, place: int, limit: int) -> int:
    """Where the first line, or else the first word, ending at `place` or later and before `limit` is over."""
    for mark in "\n ":
        found = content.find(mark, place, limit)
        if found >= 0:
            return found + 1
    return place
