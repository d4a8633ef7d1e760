"""What a file consists of: its tensors, each with the bytes of an entry, and the bytes between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpmetric.errors import GpmetricError
from gpmetric.packing.pieces import PIECE
from gpmetric.tensor_file import TensorFile

__all__ = ["Span", "lengths", "spans_of"]


@dataclass(frozen=True)
class Span:
    """So many bytes of a file, of entries of `size` bytes; `rotated` if these are floating-point numbers."""

    bytes: int
    size: int = 1
    rotated: bool = False


def spans_of(path: Path) -> list[Span]:
    """The spans of a file, from its first byte to its last; of one that is no whole safetensors file, a single one."""
    length = path.stat().st_size
    if path.suffix != ".safetensors":
        return [Span(length)] if length else []
    try:
        places = sorted(TensorFile(path).places.values(), key=lambda place: place.start)
    except GpmetricError:
        return [Span(length)]
    found, end = [], 0
    for place in places:
        if place.start < end or place.start == place.end:  # entries that share bytes, or none
            continue
        found.append(Span(place.start - end))
        size = place.dtype.itemsize
        found.append(Span(place.end - place.start, size, place.dtype.is_floating_point and size > 1))
        end = place.end
    return [span for span in (*found, Span(length - end)) if span.bytes]


def lengths(span: Span) -> Iterator[int]:
    """Bytes of the pieces that a span is coded in."""
    for start in range(0, span.bytes, PIECE):
        yield min(PIECE, span.bytes - start)
