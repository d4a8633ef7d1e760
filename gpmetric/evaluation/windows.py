"""Reads a text into token windows for one model; `demo:split` names a split of the embedded text."""

from __future__ import annotations

from collections.abc import Mapping

from gpmetric.data import Text, Windows, check_disjoint, cut_windows, read_text, split_text
from gpmetric.demo.text import SPLITS, demo_text
from gpmetric.errors import DataError, InputError
from gpmetric.models import Model

__all__ = ["PARTS", "check_length", "default_text", "open_text", "read_splits", "read_windows"]


PARTS = ("calibration", "search", "validation")  # what one text is cut into


def default_text(model: str | None, source: str | None, option: str, split: str) -> str:
    """The text an option names, or the demo's split when the demo model is used and nothing was named.

    Raises:
        InputError: a model was named without this text.
    """
    if source is not None:
        return source
    if model is not None:
        raise InputError(f"{option} is needed with --model: a text file, JSONL, Parquet or hf:dataset[/config]:split")
    return f"demo:{split}"


def check_length(model: Model, length: int | None) -> int:
    """The sequence length to use: the one asked for, or the model's context (at most 2,048).

    Raises:
        InputError: below 2 tokens, or more positions than the model has.
    """
    if length is None:
        return model.context
    if length < 2 or length > (model.positions or length):
        limit = f" and at most {model.positions}, the positions of {model.name!r}" if model.positions else ""
        raise InputError(f"--sequence-length must be at least 2{limit}, but got {length}")
    return length


def open_text(source: str) -> Text:
    """A text file, a table, a Hub dataset, or a split of the demo's text.

    Raises:
        DataError: it cannot be read, or there is no such split.
    """
    if not source.startswith("demo:"):
        return read_text(source)
    split = source.removeprefix("demo:")
    if split not in SPLITS:
        raise DataError(f"unknown demo text {source!r}: accepted are " + ", ".join(f"demo:{name}" for name in SPLITS))
    return Text(source, demo_text(split))


def read_windows(
    model: Model, source: str | Text, length: int, count: int | None, shuffle_seed: int | None = None
) -> Windows:
    """Windows of a text for this model; see `gpmetric.data.cut_windows`.

    Raises:
        DataError: the text cannot be read or is shorter than one window.
        ModelError: tokenizer and model do not match.
    """
    text = source if isinstance(source, Text) else open_text(source)
    return cut_windows(text, model.tokenizer, length, count, vocabulary=model.vocabulary, shuffle_seed=shuffle_seed)


def read_splits(
    model: Model,
    name: str | None,
    sources: Mapping[str, str | None],
    length: int,
    counts: Mapping[str, int],
    shuffle_seed: int | None = None,
) -> dict[str, Windows]:
    """Disjoint windows of several texts, or of one that is cut into as many parts.

    Args:
        name: the model as it was asked for; None is the demo model, which has texts of its own.
        sources: by split, the text; with the first alone, it is cut.
        counts: by split, the most windows.

    Raises:
        InputError: a text is not named.
        DataError: a text cannot be read, is too short, or shares windows with another.
    """
    first, *others = sources
    source = sources[first]
    if source is not None and all(sources[split] is None for split in others):
        texts = split_text(open_text(source), tuple(sources))
    else:
        texts = {split: open_text(default_text(name, source, f"--{split}", split)) for split, source in sources.items()}
    found = {split: read_windows(model, texts[split], length, counts[split], shuffle_seed) for split in sources}
    check_disjoint(found)
    return found
