"""Where a checkpoint stores the experts of a mixture: fused, one tensor for each of them, gate and up apart.

transformers says how the tensors of the files became the fused ones (`core_model_loading`); what it did is followed
slice by slice, so that an expert's weight can be read from the files and written back under their names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import core_model_loading as conversion

from gpmetric.errors import ModelError
from gpmetric.experts import Fused
from gpmetric.tensor_file import TensorFile, weight_files

__all__ = ["Piece", "gathered", "map_experts", "put_back", "read_pieces", "stored_shapes"]

_Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Piece:
    """Rows of an expert's weight [out, in], and where they are stored.

    Attributes:
        tensor: its name in the files.
        expert: index along the tensor's first axis; None where the tensor is this expert's alone.
        transposed: whether it is stored as [in, out].
        rows: of the weight, [start, end) and step.
        stored: of what is stored, which rows these are.
    """

    tensor: str
    expert: int | None
    transposed: bool
    rows: tuple[int, int, int]
    stored: tuple[int, int, int]

    def of(self, stored: Tensor) -> Tensor:
        """This piece of the expert's stored matrix, a view of shape [rows, in]."""
        return (stored.t() if self.transposed else stored)[slice(*self.stored)]

    def describe(self) -> dict[str, Any]:
        """As a manifest has it."""
        return asdict(self)


def read_pieces(told: Sequence[Mapping[str, Any]]) -> tuple[Piece, ...]:
    """Pieces as a manifest has them."""
    return tuple(Piece(**{**one, "rows": _slice(one["rows"]), "stored": _slice(one["stored"])}) for one in told)


def _slice(told: Sequence[int]) -> tuple[int, int, int]:
    start, end, step = told
    return start, end, step


def gathered(pieces: Sequence[Piece], files: Mapping[str, TensorFile]) -> Tensor:
    """An expert's weight [out, in], put together from the files that hold it, by tensor."""
    parts = [(piece.rows, piece.of(files[piece.tensor].slice(piece.tensor, piece.expert))) for piece in pieces]
    weight = torch.empty(sum(len(part) for _, part in parts), parts[0][1].shape[1], dtype=parts[0][1].dtype)
    for rows, part in parts:
        weight[slice(*rows)] = part
    return weight


def put_back(pieces: Sequence[Piece], files: Mapping[str, TensorFile], weight: Tensor) -> None:
    """Puts an expert's weight [out, in] into the files that hold it."""
    for tensor, expert in dict.fromkeys((piece.tensor, piece.expert) for piece in pieces):
        stored = files[tensor].slice(tensor, expert)
        for piece in pieces:
            if piece.tensor == tensor:
                piece.of(stored).copy_(weight[slice(*piece.rows)])
        files[tensor].write(tensor, stored, expert)


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a folder's files, by name."""
    files = map(TensorFile, weight_files(folder))
    return {name: place.shape for file in files for name, place in file.places.items()}


def map_experts(
    module: Any, names: Sequence[str], fused: Mapping[str, Fused], shapes: _Shapes
) -> dict[str, tuple[Piece, ...]]:
    """By an expert's layer, the pieces that its weight is stored in.

    Args:
        module: transformers' model, as it was loaded.
        names: of its parameters and buffers before its experts were split.
        fused: what was split.
        shapes: of the tensors in its files, by name.

    Raises:
        ModelError: an expert's weight cannot be found in the files, or was put together in a way that is not known.
    """
    if not fused:
        return {}
    transforms = getattr(module, "_weight_conversions", None) or []
    renamings = [one for one in transforms if isinstance(one, conversion.WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, conversion.WeightConverter)]
    known = dict.fromkeys(names, True)
    sources: dict[str, dict[str | None, list[str]]] = {}
    for stored in sorted(shapes, key=conversion.dot_natural_key):  # the order in which transformers stacks them
        target, pattern = conversion.rename_source_key(stored, renamings, converters, module.base_model_prefix, known)
        if target not in known and stored in known:
            target, pattern = stored, None
        sources.setdefault(target, {}).setdefault(pattern, []).append(stored)
    found: dict[str, tuple[Piece, ...]] = {}
    for name, one in fused.items():
        if name not in sources:
            raise ModelError(f"{name} is not in the files of the model under any name that transformers tells")
        operations, patterns = [], list(sources[name])
        for converter in converters:
            if any(pattern in converter.source_patterns for pattern in patterns):
                operations = list(converter.operations)
                patterns = [pattern for pattern in converter.source_patterns if pattern in sources[name]]
                break
        groups = [sources[name][pattern] for pattern in patterns]
        for index, layer in enumerate(one.layers):
            found[layer] = tuple(_pieces(name, one, index, groups, operations, shapes))
    return found


@dataclass(frozen=True)
class _Part:
    """A tensor on its way: in memory's orientation, `rows` of the axis that is [out]."""

    tensor: str
    expert: int | None
    turned: bool
    rows: list[tuple[tuple[int, int, int], tuple[int, int, int]]]  # where they go, which they are


def _pieces(
    name: str, fused: Fused, index: int, groups: Sequence[Sequence[str]], operations: Sequence[Any], shapes: _Shapes
) -> Iterator[Piece]:
    """The pieces of one expert's weight, by following what was done with the tensors of each group."""
    out = 2 if fused.transposed else 1  # the axis [out] of the fused parameter
    merged = any(isinstance(one, conversion.MergeModulelist) for one in operations)
    if any(len(group) != (len(fused.layers) if merged else 1) for group in groups):
        raise ModelError(f"{name} is made of {[len(group) for group in groups]} tensors of the files, not of one each")
    parts = []
    for group in groups:
        tensor = group[index if merged else 0]
        shape = shapes[tensor] if merged else shapes[tensor][1:]
        parts.append(
            _Part(tensor, None if merged else index, False, [((0, shape[out - 1], 1), (0, shape[out - 1], 1))])
        )
    for operation in operations:
        kind, dim = type(operation).__name__, getattr(operation, "dim", None)
        if kind == "MergeModulelist" and dim == 0:
            continue
        if kind == "Concatenate" and dim == out:
            parts = list(_after_each_other(parts))
        elif kind == "Interleave" and dim == out and len(parts) == 1:
            parts = [_in_turn(parts[0], inverse=operation.inverse)]
        elif kind == "Transpose" and len(parts) == 1 and {operation.dim0, operation.dim1} == {1, 2} and not merged:
            size = shapes[parts[0].tensor][3 - out]
            parts = [replace(parts[0], turned=True, rows=[((0, size, 1), (0, size, 1))])]
        else:
            raise ModelError(f"{name} is put together from the files by {operation!r}, which is not known")
    covered = sum(len(range(*rows)) for part in parts for rows, _ in part.rows)
    if covered != fused.shape[out - 1]:
        raise ModelError(f"{name} has {fused.shape[out - 1]} outputs for each expert, its files {covered}")
    for part in parts:
        for rows, stored in part.rows:
            yield Piece(part.tensor, part.expert, fused.transposed != part.turned, rows, stored)


def _after_each_other(parts: Sequence[_Part]) -> Iterator[_Part]:
    start = 0
    for part in parts:
        (((_, size, _), stored),) = part.rows
        yield replace(part, rows=[((start, start + size, 1), stored)])
        start += size


def _in_turn(part: _Part, *, inverse: bool) -> _Part:
    """Every second row in the first half and the others in the second; or back."""
    (((_, size, _), _),) = part.rows
    halves = [(0, size // 2, 1), (size // 2, size, 1)]
    turns = [(0, size, 2), (1, size, 2)]
    return replace(part, rows=list(zip(turns, halves, strict=True) if inverse else zip(halves, turns, strict=True)))
