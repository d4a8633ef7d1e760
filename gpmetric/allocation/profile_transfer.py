"""Profiles of one model on another: by the place of a block in its model, and the name of a layer in its block."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from gpmetric.allocation.levels import LevelTable
from gpmetric.pruning.allocation import Allocation

__all__ = ["transferred"]


def transferred(profile: Allocation, table: LevelTable, blocks: int) -> list[float]:
    """The sparsity of each gene by an allocation of the same model, or of another with other blocks.

    A layer takes the sparsity of its namesakes in the other model, between blocks at the same relative depth; where
    there are none, that of the layers of any name there.

    Args:
        blocks: of the model that the table is of, those without a pruned layer among them.
    """
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for name, target in profile.targets.items():
        block, inside = _place(name)
        curves[inside].append((block, target.sparsity))
        curves[""].append((block, target.sparsity))
    stretch = max(block for block, _ in curves[""]) / max(1, blocks - 1)
    by_layer = [_read(curves[inside] or curves[""], block * stretch) for block, inside in map(_place, table.layers)]
    sizes = [rows * columns for rows, columns in table.shapes]
    return [
        float(np.average([by_layer[one] for one in members], weights=[sizes[one] for one in members]))
        for members in table.genes
    ]


def _place(name: str) -> tuple[int, str]:
    """Index of the block, and the name within it: (3, "mlp.up_proj") of model.layers.3.mlp.up_proj."""
    parts = name.split(".")
    index = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
    return (0, name) if index is None else (int(parts[index]), ".".join(parts[index + 1 :]))


def _read(curve: list[tuple[int, float]], place: float) -> float:
    """The curve of sparsities over blocks, at a block or between two."""
    blocks = sorted({block for block, _ in curve})
    means = [float(np.mean([sparsity for other, sparsity in curve if other == block])) for block in blocks]
    return float(np.interp(place, blocks, means))
