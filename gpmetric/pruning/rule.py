"""How a model is pruned, and one of its layers by that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from gpmetric.blockwise.couplings import Coupling
from gpmetric.calibration.accumulators import LayerStatistics
from gpmetric.errors import METRIC_ERRORS
from gpmetric.metrics import Metric
from gpmetric.models import Layer
from gpmetric.pruning.allocation import Allocation
from gpmetric.pruning.permutation import best_channels, in_this_order
from gpmetric.pruning.updaters import Updater, fit_of, resolve_target, updater_of
from gpmetric.targets import Target

__all__ = ["Rule", "prune_layer", "told_where"]


@dataclass(frozen=True)
class Rule:
    """How a model is pruned.

    Attributes:
        metric: what scores the weights.
        plan: a target of all layers, or an allocation that names each; a layer whose sparsity is 0 is left alone.
        update: what happens to the weights that stay, unless that is part of the metric.
        fit: a key of FITS: what they are fitted to, where they change and unless that is part of the metric; one-shot,
            it makes no difference.
        permute: whether inputs are put in an order in which N:M keeps more of the scores, where they can be.
    """

    metric: Metric
    plan: Target | Allocation
    update: str = "none"
    fit: str = "own"
    permute: bool = False

    @property
    def follows_dense(self) -> bool:
        """Whether kept weights are fitted to what the dense model gives."""
        return fit_of(self.metric, self.update, self.fit) == "dense"

    @property
    def updater(self) -> Updater:
        """What prunes the layers, and what follows it."""
        return updater_of(self.metric, self.update)

    def target(self, layer: str) -> Target:
        """What a layer is pruned to, comparison group included."""
        asked = self.plan.targets[layer] if isinstance(self.plan, Allocation) else self.plan
        return resolve_target(asked, self.metric, self.update)


def prune_layer(
    layer: Layer, weight: Tensor, rule: Rule, statistics: LayerStatistics, coupling: Coupling | None = None
) -> tuple[Tensor, Tensor | None]:
    """The pruned weight [out, in] of a layer, in its dtype, and the order of its channels in which N:M holds.

    Args:
        layer: of the model.
        weight: [out, in], what is pruned in place of its own.
        rule: how.
        statistics: of its inputs, as the weight in the order of the model.
        coupling: of the channels that it reads, where they can be put in another order.

    Returns:
        The weight is in the order of the model; without another order [groups, size] of the channels, N:M holds there.

    Raises:
        MaskError, SolverError: as `prune_weights`, with metric, target and layer.
    """
    target, updater = rule.target(layer.name), rule.updater
    channels, order = None, None
    with told_where(rule, layer):
        if rule.permute and target.group and coupling is not None:
            channels = best_channels(weight, rule.metric, target, statistics, coupling)
        if channels is not None and coupling is not None:
            order = coupling.order(channels).to(weight.device)
            weight, statistics = weight.index_select(1, order), in_this_order(statistics, order)
        ((pruned,),) = updater.prune([weight], rule.metric, [target], [statistics])
    if order is not None:
        pruned = torch.empty_like(pruned).index_copy_(1, order, pruned)
    return pruned.to(layer.weight.dtype), channels


@contextmanager
def told_where(rule: Rule, layer: Layer) -> Iterator[None]:
    """Adds metric, target and layer to what is raised."""
    try:
        yield
    except METRIC_ERRORS as error:
        told = f"metric {rule.metric.name} at {rule.target(layer.name).text}: {error} (layer {layer.name})"
        raise type(error)(told) from error
