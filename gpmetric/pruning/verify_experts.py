"""Experts of a mixture in a written checkpoint: several layers may be in one tensor, or one layer in several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, Field

from gpmetric.stored_experts import Piece, read_pieces
from gpmetric.tensor_file import TensorFile

__all__ = ["Count", "ExpertPiece", "StoredPiece", "are_there", "by_tensor", "expert_differences", "pieces_of"]

Count = Annotated[int, Field(ge=0, lt=2**63)]
_Slice = tuple[Count, Count, Annotated[int, Field(ge=1)]]


class StoredPiece(BaseModel):
    """Rows of an expert's weight, and where they are stored, as a manifest has them; see `stored_experts.Piece`."""

    tensor: str
    expert: Count | None
    transposed: bool
    rows: _Slice
    stored: _Slice


@dataclass(frozen=True)
class ExpertPiece:
    """A piece of a tensor, whose it is, and whether what it kept must be as in the dense model."""

    layer: str
    piece: Piece
    masked: bool


def pieces_of(told: Sequence[StoredPiece]) -> tuple[Piece, ...]:
    """As the reader of files has them."""
    return read_pieces([one.model_dump() for one in told])


def are_there(told: Sequence[StoredPiece], shape: tuple[int, int], files: Mapping[str, TensorFile]) -> bool:
    """Whether pieces make up a weight [out, in], each row once, out of what the files hold."""
    rows: list[int] = []
    for one in told:
        whole = files[one.tensor].places[one.tensor].shape if one.tensor in files else ()
        if one.expert is not None and not (len(whole) == 3 and one.expert < whole[0]):
            return False
        stored = whole if one.expert is None else whole[1:]
        if len(stored) != 2 or stored[0 if one.transposed else 1] != shape[1]:
            return False
        mine = range(stored[1 if one.transposed else 0])[slice(*one.stored)]
        taken = range(shape[0])[slice(*one.rows)]
        if len(mine) != len(taken):
            return False
        rows += taken
    return sorted(rows) == list(range(shape[0]))


def by_tensor(layers: Mapping[str, tuple[Sequence[StoredPiece], bool]]) -> dict[str, list[ExpertPiece]]:
    """By tensor, what experts have in it.

    Args:
        layers: by name, the pieces, none of a layer that is no expert's, and whether it was masked only.
    """
    found: dict[str, list[ExpertPiece]] = {}
    for name, (told, masked) in layers.items():
        for piece in pieces_of(told):
            found.setdefault(piece.tensor, []).append(ExpertPiece(name, piece, masked))
    return found


def expert_differences(file: TensorFile, dense: TensorFile, name: str, pieces: Sequence[ExpertPiece]) -> Iterator[str]:
    """What differs in a tensor that holds experts' weights, slice by slice, and should not."""
    count = file.places[name].shape[0]
    for index in range(count) if pieces[0].piece.expert is not None else (None,):
        found, was = file.slice(name, index), dense.slice(name, index)
        mine = [one for one in pieces if one.piece.expert == index]
        for one in mine:
            kept, before = one.piece.of(found), one.piece.of(was)
            before.copy_(before.masked_fill(kept == 0, 0) if one.masked else kept)
        if not found.equal(was):
            told = ", ".join(one.layer for one in mine) or "no layer"
            yield f"weights of tensor {name} ({told}) that were not pruned are not those of {str(dense.path.parent)!r}"
