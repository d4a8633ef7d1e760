"""The four disjoint texts of a campaign: calibration, search, validation, and test, which is read once at the end."""

from __future__ import annotations

from collections.abc import Mapping

from gpmetric.data import Text, Windows, check_disjoint, split_text
from gpmetric.errors import InputError
from gpmetric.evaluation.windows import default_text, open_text, read_windows
from gpmetric.models import Model

__all__ = ["SPLITS", "name_sources", "read_splits"]

SPLITS = ("calibration", "search", "validation", "test")


def name_sources(model: str | None, text: str | None, sources: Mapping[str, str | None]) -> dict[str, str]:
    """The source of each split; with `text`, that one text stands for all four, to be cut into parts.

    Raises:
        InputError: `text` together with a split of its own, or a split without a text.
    """
    if text is None:
        return {split: default_text(model, sources[split], f"--{split}", split) for split in SPLITS}
    named = [f"--{split}" for split in SPLITS if sources[split] is not None]
    if named:
        raise InputError(f"--text is cut into all four splits; it cannot stand beside {', '.join(named)}")
    return dict.fromkeys(SPLITS, text)


def read_splits(
    model: Model,
    sources: str | Mapping[str, str],
    length: int,
    counts: Mapping[str, int | None],
    shuffle_seed: int | None = None,
) -> dict[str, Windows]:
    """Token windows of each split, refused when two splits share their text or a window.

    Args:
        sources: a text for each split, or one text to be cut into four consecutive parts.
        counts: windows wanted of each split; None is all.

    Raises:
        DataError: a text cannot be read, is too short, or is not disjoint from another.
    """
    parts: Mapping[str, str | Text]
    parts = split_text(open_text(sources), SPLITS) if isinstance(sources, str) else sources
    windows = {split: read_windows(model, parts[split], length, counts[split], shuffle_seed) for split in SPLITS}
    check_disjoint(windows)
    return windows
