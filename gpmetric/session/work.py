"""What a command is going to do with a model, as far as memory, disk and time depend on it; `plan` plans by it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Work"]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a command does with a model, as far as it takes memory or time.

    Attributes:
        dense: statistics of the dense model that are measured of all layers and kept.
        block: statistics that are measured of one block at a time, and let go.
        length: tokens of a window.
        calibration: tokens of the calibration windows that pass through the blocks; 0 where none do.
        texts: tokens that are measured on while blocks are pruned.
        rules: pruned models that are measured in all.
        rule_tokens: tokens whose hidden states each of them has of its own; those of calibration and texts by default.
        copies: pruned copies of a block's weights at once, for each model that passes.
        copied: whether there is a changed copy of every weight, where they are resident.
        cached: whether statistics of the dense model are written to a file in any case.
        differentiated: whether there are backward passes through pruned models.
        one_graph: whether these keep the graph of one block at a time, also where all weights are resident.
        solves: whether a solver updates kept weights.
        solved: pruned copies of a weight that it makes at once.
        fits_blocks: whether kept weights learn to give what their dense block gives.
        permutes: whether a layer and its statistics are copied in another order.
        kept: bytes kept besides where there is room, of the dense model's predictions for instance.
        fixed: bytes kept besides in any case.
        per_weight: bytes kept of every prunable weight besides.
        database: bytes of the host's memory, or of files where it has no room, for pruned weights that are kept.
        disk: bytes that are written besides scratch files.
        forward, backward: tokens of passes through all blocks, in all.
        dtype: that matrices of statistics are kept in; None is fp32.
        resident: whether all weights must be on the device; False where blocks are read so few times that it does not
            pay, None where it does if there is room.
        after: bytes on the device once the work is done, in place of what that took.
        workers: processes that do the work at the same time, if there is memory for so many.
        models: that each of them holds at the same time, if there is memory for so many.
        devices: that they are on, one after the other.
        share: of the machine's memory that this may take.
    """

    dense: frozenset[str] = frozenset()
    block: frozenset[str] = frozenset()
    length: int = 0
    calibration: int = 0
    texts: int = 0
    rules: int = 1
    rule_tokens: int = 0
    copies: int = 1
    copied: bool = False
    cached: bool = False
    differentiated: bool = False
    one_graph: bool = False
    solves: bool = False
    solved: int = 1
    fits_blocks: bool = False
    permutes: bool = False
    kept: int = 0
    fixed: int = 0
    per_weight: int = 0
    database: int = 0
    disk: int = 0
    forward: int = 0
    backward: int = 0
    dtype: torch.dtype | None = None
    resident: bool | None = None
    after: int = 0
    workers: int = 1
    models: int = 1
    devices: int = 1
    share: float = 1.0
