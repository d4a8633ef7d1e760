"""What happens to the weights that stay: one row per updater, read without torch.

An updater's function prunes several weights [out, in], of any shapes, at several targets whose comparison groups are
settled: `function(weights, metric, targets, statistics, scores)` gives the pruned copies by target and weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gpmetric.lazy import lazy
from gpmetric.metrics import Metric
from gpmetric.operands import GRAM
from gpmetric.plugins import open_table
from gpmetric.targets import Target

if TYPE_CHECKING:
    from torch import Tensor

    from gpmetric.calibration.accumulators import LayerStatistics

__all__ = [
    "FITS",
    "UPDATERS",
    "Updater",
    "fit_of",
    "needed_statistics",
    "prune_weights",
    "resolve_target",
    "updater_of",
]


@dataclass(frozen=True)
class Updater:
    """A way of choosing and updating weights once a metric scores them.

    Attributes:
        meaning: what happens to the weights that stay, for the help.
        prune: the pruned copies of weights.
        needs: statistics that it reads besides those of the metric, by name.
        granularity: where its own threshold makes scores compete, whatever target and metric say; None if it has none.
        solves: whether `prune` changes the weights that it keeps.
        rescores: whether it scores the weights that it has updated, so that scores of the dense ones are of no use.
        fits_blocks: whether rounds follow, once all layers of a block are pruned, in which the kept weights learn to
            give what the dense block gives; see `gpmetric.pruning.block_fit`.
    """

    meaning: str
    prune: Callable[..., list[list[Tensor]]]
    needs: tuple[str, ...] = ()
    granularity: str | None = None
    solves: bool = True
    rescores: bool = False
    fits_blocks: bool = False

    @property
    def changes(self) -> bool:
        """Whether kept weights change in the end, so that baselines that only mask are not its rivals."""
        return self.solves or self.fits_blocks


_OF_LAYERS: dict[str, Updater] = {
    "none": Updater("kept weights stay as they are", lazy("gpmetric.pruning.mask:prune_by_mask"), solves=False),
    "obs": Updater(
        "SparseGPT's reconstruction of the kept weights, the mask chosen from the original ones",
        lazy("gpmetric.pruning.obs:prune_obs"),
        (GRAM,),
    ),
    "obs-blockwise": Updater(
        "SparseGPT's reconstruction, the mask re-chosen in each 128-column block on the updated weights",
        lazy("gpmetric.pruning.obs:prune_blockwise"),
        (GRAM,),
        granularity="block",
        rescores=True,
    ),
    "admm": Updater(
        "ALPS: support and weights by alternating directions, then the exact fit",
        lazy("gpmetric.pruning.admm:prune_admm"),
        (GRAM,),
        rescores=True,
    ),
}


def _and_block(name: str, row: Updater) -> tuple[str, Updater]:
    """The updater with rounds behind it, under its name."""
    meaning = "rounds of gradient descent on the error of a whole block's output, the mask being fixed"
    told = f"{meaning}; takes ten to fifty times as long as choosing a mask"
    if not row.solves:
        return "block", replace(row, meaning=told, fits_blocks=True)
    return f"{name}+block", replace(row, meaning=f"{name}, then {meaning}", fits_blocks=True)


def _variants(name: str, row: Updater) -> dict[str, Updater]:
    """The row of a plug-in, and the same with rounds behind it."""
    return {name: row} if row.fits_blocks or not row.solves else dict([(name, row), _and_block(name, row)])


UPDATERS: dict[str, Updater] = _OF_LAYERS | dict(_and_block(name, row) for name, row in _OF_LAYERS.items())
open_table("updater", UPDATERS, Updater, lazy("gpmetric.pruning.trial:check_updater"), variants=_variants)

FITS = {
    "own": "a layer's own outputs, as published",
    "dense": "the dense model's outputs, on the inputs that the pruned model gives",
}


def updater_of(metric: Metric, update: str) -> Updater:
    """The updater that is part of a metric, or else the one asked for."""
    return UPDATERS[metric.update or update]


def fit_of(metric: Metric, update: str, fit: str) -> str:
    """What kept weights are fitted to: what is part of the metric, or else what is asked for, where they change."""
    return (metric.fit or fit) if updater_of(metric, update).changes else "own"


def resolve_target(target: Target, metric: Metric, update: str) -> Target:
    """A target with the comparison group it is pruned in: the updater's own, the target's, or else the metric's."""
    own = updater_of(metric, update).granularity
    return target.within(own) if own and not target.group else target.resolved(metric.granularity)


def needed_statistics(metrics: Sequence[Metric], update: str) -> frozenset[str]:
    """Names of all statistics that pruning by these metrics reads."""
    needs = {name for metric in metrics for name in (*metric.operands, *updater_of(metric, update).needs)}
    return frozenset(needs)


def prune_weights(
    weights: Sequence[Tensor],
    metric: Metric,
    targets: Sequence[Target],
    statistics: Sequence[LayerStatistics],
    update: str = "none",
    scores: Sequence[Tensor] | None = None,
) -> list[list[Tensor]]:
    """The pruned copies of several weights, by target and weight.

    Weights without their blocks: of an updater that fits blocks, this is what comes before its rounds.

    Args:
        weights: [out, in] each, of any shapes.
        targets: as asked for; comparison groups are settled here.
        statistics: one for each weight.
        update: a key of UPDATERS, unless the metric brings its own.
        scores: what the metric gives for each weight, when the caller has it already.

    Returns:
        Weights of the dtype given where kept weights stay as they are, in fp32 otherwise.

    Raises:
        MaskError: a score is not finite, or `in` is not divisible by M.
        SolverError: an update is asked for and the Gram matrix cannot be factorised.
    """
    settled = [resolve_target(target, metric, update) for target in targets]
    return updater_of(metric, update).prune(weights, metric, settled, statistics, scores)
