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


def solver(weight: Tensor, factor: Tensor, target: Target) -> Tensor:
    """SparseGPT's columns, by the launches of `fasterprune` in its sparsegpt.py; `factor` is its `Hinv`."""
    weight = weight.clone()
    for start in range(0, weight.shape[1], 128):
        end = min(start + 128, weight.shape[1])
        block, inverse = weight[:, start:end].clone(), factor[start:end, start:end]
        pruned, errors, losses = torch.zeros_like(block), torch.zeros_like(block), torch.zeros_like(block)
        mask = torch.zeros_like(block) == 1
        if not target.group:
            score = block**2 / torch.diag(inverse).reshape(1, -1) ** 2
            mask = score <= torch.sort(score.flatten())[0][int(score.numel() * target.sparsity)]
        for i in range(end - start):
            column, curvature = block[:, i], inverse[i, i]
            if target.group and i % target.group == 0:
                reach = slice(i, i + target.group)
                score = block[:, reach] ** 2 / torch.diag(inverse)[reach].reshape(1, -1) ** 2
                mask.scatter_(1, i + torch.topk(score, target.group - target.keep, dim=1, largest=False)[1], True)
            kept = column.clone()
            kept[mask[:, i]] = 0
            pruned[:, i] = kept
            losses[:, i] = (column - kept) ** 2 / curvature**2
            error = (column - kept) / curvature
            block[:, i:] -= error.unsqueeze(1).matmul(inverse[i, i:].unsqueeze(0))
            errors[:, i] = error
        weight[:, start:end] = pruned
        weight[:, end:] -= errors.matmul(factor[start:end, end:])
    return weight


# granularity -> name of the step beside the published one -> how it is made
OTHERS: dict[str, dict[str, Callable[[], Step]]] = {
    "row": {"torch.compile": compiled, "kthvalue": lambda: kthvalue},
    "n:m": {"one topk": lambda: one_topk},
    "layer": {},
}
