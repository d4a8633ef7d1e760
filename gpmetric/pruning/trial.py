"""A plug-in's updater tried on two tiny weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gpmetric.calibration.accumulators import LayerStatistics
from gpmetric.errors import InputError
from gpmetric.metrics import resolve_metric
from gpmetric.operands import CROSS, GRAM, OPERANDS, shape_of
from gpmetric.pruning.updaters import Updater
from gpmetric.targets import GRANULARITIES, parse_target

__all__ = ["check_updater"]

_SHAPES = ((6, 8), (3, 12))


def check_updater(name: str, row: Updater, fellows: Mapping[str, Any]) -> None:
    """Refuses a row whose function does not prune as asked.

    Raises:
        InputError: what is wrong.
    """
    if re.fullmatch(r"[a-z][a-z0-9_-]*", name) is None:
        raise InputError(f"an updater is called in small letters, but by {name!r}")
    unknown = [one for one in row.needs if one not in OPERANDS and one != GRAM]
    if unknown or row.granularity not in (None, *GRANULARITIES):
        raise InputError(f"needs {list(row.needs)}, granularity {row.granularity!r}: there is no such")
    metric, generator = resolve_metric("abs(W)*X"), torch.Generator().manual_seed(0)
    targets = [parse_target(text) for text in ("0.5", "2:4")]
    settled = [one.within(row.granularity) if row.granularity and not one.group else one.resolved("row")
               for one in targets]  # fmt: skip
    weights = [torch.randn(shape, generator=generator) for shape in _SHAPES]
    statistics = [_statistics(shape, {"X", *row.needs}, generator) for shape in _SHAPES]
    before = [weight.clone() for weight in weights]
    found = row.prune([*weights], metric, settled, statistics, None)
    if not all(map(torch.equal, weights, before)):
        raise InputError("prune writes to the weights that it is given")
    if not _is_table(found, len(targets), len(weights)):
        raise InputError(
            f"prune must give {len(targets)} lists, by target, of {len(weights)} weights, as many as given"
        )
    for target, pruned in zip(settled, found, strict=True):
        for weight, one in zip(weights, pruned, strict=True):
            removed = int((one == 0).sum()) if one.shape == weight.shape and one.isfinite().all() else -1
            if abs(removed - weight.numel() // 2) > weight.shape[0]:
                told = f"{removed} zeros" if removed >= 0 else f"{list(one.shape)}, or what is not finite"
                raise InputError(f"prune of {list(weight.shape)} to {target.text} gave {told}")


def _statistics(shape: tuple[int, int], names: set[str], generator: torch.Generator) -> LayerStatistics:
    inputs = torch.randn(64, shape[1], generator=generator)
    values = {name: torch.rand(shape_of(name, shape), generator=generator) for name in names - {GRAM, CROSS}}
    return LayerStatistics(**values, **({GRAM: inputs.t() @ inputs / 64} if GRAM in names else {}))


def _is_table(found: object, rows: int, columns: int) -> bool:
    """Whether it is so many lists of so many tensors."""
    return (
        isinstance(found, list | tuple)
        and len(found) == rows
        and all(isinstance(row, list | tuple) and len(row) == columns for row in found)
        and all(isinstance(one, Tensor) for row in found for one in row)
    )
