"""What pruning under one of the two protocols takes of statistics, memory and passes, told beforehand."""

from __future__ import annotations

from collections.abc import Sequence

from gpmetric.metrics import Metric
from gpmetric.operands import CROSS, is_regional, needs_gradients
from gpmetric.pruning.block_fit import PASSES
from gpmetric.pruning.updaters import fit_of, needed_statistics, updater_of
from gpmetric.session.session import Session
from gpmetric.session.work import Work

__all__ = ["protocol_work", "shared_statistics"]


def shared_statistics(metrics: Sequence[Metric], update: str, *, one_shot: bool) -> frozenset[str]:
    """Names of the dense model's statistics that pruning by these metrics shares."""
    names = needed_statistics(metrics, update)
    return names if one_shot else frozenset(name for name in names if needs_gradients([name]))


def protocol_work(
    session: Session,
    metrics: Sequence[Metric],
    update: str,
    *,
    one_shot: bool,
    fit: str = "own",
    rules: int = 1,
    texts: int = 0,
    permute: bool = False,
) -> Work:
    """What pruning a session's model by so many rules of these metrics takes, measured on so many tokens each.

    The dense model is measured on them, too.
    """
    names, dense = needed_statistics(metrics, update), shared_statistics(metrics, update, one_shot=one_shot)
    updaters, size = [updater_of(metric, update) for metric in metrics], session.tokens.numel()
    fits = any(one.fits_blocks for one in updaters)
    follows = not one_shot and any(fit_of(metric, update, fit) == "dense" for metric in metrics)
    walked = 0 if one_shot else size * (1 + follows)  # the dense model passes, too
    gradients, regional = needs_gradients(dense), 3 * size * is_regional(names)
    collected = size * (not gradients) + regional if one_shot else 0
    each = 0 if one_shot else 2 * walked + regional
    return Work(
        dense=dense | {"X"} if dense or one_shot else dense,
        block=frozenset() if one_shot else names - dense | {"X", *[CROSS] * follows},
        length=session.tokens.shape[1],
        calibration=walked + size * fits * (1 + one_shot),  # what blocks are to give; and what they read
        texts=texts,
        rules=rules,
        solves=any(one.solves for one in updaters),
        fits_blocks=fits,
        permutes=permute,
        forward=texts + collected + rules * (each + PASSES * size * fits + texts),
        backward=size if gradients else 0,
        dtype=session.inputs.kept_dtype,
    )
