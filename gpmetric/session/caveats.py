"""What whoever reads a result must know, in words: the `warnings` of documents are made of these."""

from __future__ import annotations

from collections.abc import Collection

from gpmetric.session.session import Session

__all__ = ["above_start", "few_tokens"]

_CLOSE = 1e-3  # of a perplexity: what the stored dtype may change


def few_tokens(session: Session, statistics: Collection[str] = ("X",)) -> list[str]:
    """That calibration has fewer tokens than a layer has inputs, in words, about the widest; nothing where it has not.

    The outputs of a layer then determine its weights only in as many directions as there are tokens: Gram matrices are
    singular but for their damping, and of metrics that are better on more text little is seen.

    Args:
        session: with windows of calibration.
        statistics: names of those that are read; without any, as for magnitude, there is nothing to say.
    """
    widest = max(session.model.layers, key=lambda layer: layer.weight.shape[1])
    tokens, width = session.tokens.numel(), widest.weight.shape[1]
    if tokens >= width or not set(statistics) - {"W"}:
        return []
    told = f"calibration has {tokens} tokens, fewer than the {width} inputs of {widest.name}"
    return [f"{told}: too few to tell its weights apart by (--samples, --sequence-length)"]


def above_start(used: bool, initial: float, found: float, written: float) -> list[str]:
    """That a search, or what was written of it, ends above its start, or no better.

    Args:
        used: whether what was found was written, and not its start.
        initial, found, written: perplexity on validation of the start, of what the search ends at, and of the files.
    """
    told = []
    if found > initial:
        told.append(
            f"the search ended above its start on validation, {found:.3f} from {initial:.3f}: the start was kept"
        )
    elif not used:
        told.append("the search found nothing better than its start, which was kept: search longer (--minutes)")
    if not written <= initial * (1 + _CLOSE):
        told.append(f"what was written is above the start on validation, {written:.3f} from {initial:.3f}")
    return told
