"""Updater rescale: every output row of the pruned weight is multiplied by the number that brings it nearest.

gpmetric bench --plugin examples/plugins/rescale.py --update rescale --metric wanda --target 0.6

Of a row w and its pruned copy p, with the inputs' Gram matrix M, |X w - s X p|^2 is least at s = p M w / p M p.
"""

from collections.abc import Sequence

from torch import Tensor

from gpmetric.calibration.accumulators import LayerStatistics
from gpmetric.metrics import Metric
from gpmetric.operands import GRAM
from gpmetric.pruning.mask import prune_by_mask
from gpmetric.pruning.updaters import Updater
from gpmetric.targets import Target


def rescale(
    weights: Sequence[Tensor],
    metric: Metric,
    targets: Sequence[Target],
    statistics: Sequence[LayerStatistics],
    scores: Sequence[Tensor] | None = None,
) -> list[list[Tensor]]:
    """The pruned copies [out, in] by target and weight."""
    masked = prune_by_mask(weights, metric, targets, statistics, scores)
    grams = [known[GRAM] for known in statistics]
    return [[*map(_rescaled, weights, pruned, grams)] for pruned in masked]


def _rescaled(weight: Tensor, pruned: Tensor, gram: Tensor) -> Tensor:
    weight, pruned = weight.float(), pruned.float()
    products = pruned @ gram  # [out, in]
    scale = (products * weight).sum(dim=1) / (products * pruned).sum(dim=1).clamp(min=1e-30)
    return pruned * scale[:, None]


PLUGIN = {"rescale": Updater("every row is multiplied by what brings its output nearest", rescale, needs=(GRAM,))}
