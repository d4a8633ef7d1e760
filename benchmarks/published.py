"""Steps from weight to pruned weight that fused kernels are measured against.

`wanda_rows` and `wanda_pattern` are the lines of `prune_wanda` in Wanda's lib/prune.py, with their temporaries and
order; `square` is their `scaler_row`, the mean squares of the inputs [in]. All prune `weight` in place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gpmetric.targets import Target

Step = Callable[[Tensor, Tensor, Target], None]


def _metric(weight: Tensor, square: Tensor) -> Tensor:
    return torch.abs(weight) * torch.sqrt(square.reshape((1, -1)))


def row_mask(metric: Tensor, target: Target) -> Tensor:
    """What goes, by the published sort and scatter."""
    mask = torch.zeros_like(metric) == 1
    order = torch.sort(metric, dim=-1, stable=True)
    return mask.scatter_(1, order[1][:, : int(metric.shape[1] * target.sparsity)], True)


def pattern_mask(metric: Tensor, target: Target) -> Tensor:
    """What goes, by the published loop over groups of columns; of equal scores topk takes any."""
    mask = torch.zeros_like(metric) == 1
    for first in range(0, metric.shape[1], target.group):
        part = metric[:, first : first + target.group].float()
        found = torch.topk(part, target.group - target.keep, dim=1, largest=False)[1]
        mask.scatter_(1, first + found, True)
    return mask


def layer_mask(metric: Tensor, target: Target) -> Tensor:
    """What goes, by a sort of the whole matrix, as in `prune_magnitude`; without the one score more that it takes."""
    threshold = torch.sort(metric.flatten())[0][int(metric.numel() * target.sparsity) - 1]
    return metric <= threshold


MASKS = {"row": row_mask, "n:m": pattern_mask, "layer": layer_mask}


def published(weight: Tensor, square: Tensor, target: Target) -> None:
    """The published step at a target."""
    mask = MASKS[target.granularity](_metric(weight, square), target)
    weight[mask] = 0


def kthvalue(weight: Tensor, square: Tensor, target: Target) -> None:
    """Rows by the k-th value; of ties all go."""
    metric = _metric(weight, square)
    threshold = metric.kthvalue(int(metric.shape[1] * target.sparsity), dim=1, keepdim=True).values
    weight[metric <= threshold] = 0


def one_topk(weight: Tensor, square: Tensor, target: Target) -> None:
    """N:M by one topk over all groups at once."""
    groups = _metric(weight, square).view(-1, target.group)
    found = groups.topk(target.group - target.keep, dim=1, largest=False).indices
    weight.view(-1, target.group).scatter_(1, found, 0)


def compiled() -> Step:
    """The published step by torch.compile."""
    return torch.compile(published, dynamic=False)


# granularity -> name of the step beside the published one -> how it is made
OTHERS: dict[str, dict[str, Callable[[], Step]]] = {
    "row": {"torch.compile": compiled, "kthvalue": lambda: kthvalue},
    "n:m": {"one topk": lambda: one_topk},
    "layer": {},
}
