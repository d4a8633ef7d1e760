"""What rules of allocation go by: what weights and statistics of the dense model tell before anything is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gpmetric.allocation.levels import Numbers
from gpmetric.models import Model

__all__ = ["Evidence", "block_scores", "saliency_counts", "shares_below"]

_OUTLIER = 5.0  # times the mean score; OWL's M
_DROPPED = 19  # bits of a float32 that a bin leaves out: its exponent and 4 bits of its fraction are left
_BINS = 2 ** (31 - _DROPPED)


@dataclass(frozen=True)
class Evidence:
    """What was found of each block and layer.

    Attributes:
        outliers: by block, OWL's share of outliers in per cent; 0 where it has no layer.
        medians: by block, the median of its scores abs(W)*X; 0 where it has no layer.
        saliency: [layers, bins], as `saliency_counts` gives them; None where F was not measured.
    """

    outliers: Sequence[float]
    medians: Sequence[float]
    saliency: Numbers | None = None


@torch.no_grad()
def block_scores(model: Model, norms: Mapping[str, Tensor]) -> tuple[list[float], list[float]]:
    """By block, the share of its scores abs(W)*X that are outliers, in per cent, and their median.

    Args:
        norms: X [in] by layer name.
    """
    shares, medians = [], []
    for index, block in enumerate(model.blocks):
        entries = sum(layer.weight.numel() for layer in block.layers)
        if not entries:
            shares.append(0.0)
            medians.append(0.0)
            continue
        with model.at_hand(index):
            scores = [layer.weight.abs().float() * norms[layer.name] for layer in block.layers]
        mean = sum(score.sum(dtype=torch.float64).item() for score in scores) / entries
        shares.append(100 * sum(int((score > _OUTLIER * mean).sum()) for score in scores) / entries)
        medians.append(torch.cat([score.reshape(-1) for score in scores]).median().item())
    return shares, medians


@torch.no_grad()
def saliency_counts(weight: Tensor, fisher: Tensor) -> Numbers:
    """[bins]: the weights of a layer by their saliency W*W*F, each bin 1/16 of a power of two wide, the lowest first.

    Half of it is what the loss rises by, to second order, when that weight alone is removed: it can be compared between
    layers. Bits of floats that are not negative are in the floats' own order.

    Args:
        weight: [out, in].
        fisher: F [out, in].
    """
    saliency = (weight.float().square() * fisher.float()).contiguous()
    bins = (saliency.view(torch.int32) >> _DROPPED).reshape(-1)
    return torch.bincount(bins, minlength=_BINS).cpu().numpy()


def shares_below(counts: Numbers, share: float) -> Numbers:
    """[genes]: of each gene's weights, how many are below the threshold that so many of all weights are below.

    Args:
        counts: [genes, bins]; weights are taken to be spread evenly over a bin.
        share: 0 to 1.
    """
    below = np.cumsum(counts, axis=1)
    total = below.sum(axis=0)
    wanted = share * total[-1]
    place = int(np.searchsorted(total, wanted))
    inside = counts[:, place] * (1 - (total[place] - wanted) / max(1, counts[:, place].sum()))
    found: Numbers = (below[:, place] - counts[:, place] + inside) / below[:, -1]
    return found
