"""The texts behind a command's options, and their token windows for one model, disjoint where they must be."""

from __future__ import annotations

import itertools
import os.path
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gpmetric.data import (
    Text,
    Windows,
    check_disjoint,
    cut_windows,
    draw_windows,
    leading_bos,
    read_text,
    split_text,
)
from gpmetric.demo.text import SPLITS, demo_text
from gpmetric.errors import DataError, InputError
from gpmetric.models import Model
from gpmetric.session.inputs import Inputs

__all__ = ["PARTS", "Sources", "check_length", "open_sources", "open_text", "read_splits", "read_windows"]

PARTS = ("calibration", "search", "validation")  # what one text is cut into


@dataclass(frozen=True)
class Sources:
    """Texts that were opened: by split, and those that perplexity is measured on."""

    splits: Mapping[str, Text]
    evaluated: tuple[Text, ...]


def open_sources(inputs: Inputs) -> Sources:
    """Opens every text that a request names, each once, before a model is loaded.

    Raises:
        InputError: a text is not named where a model is.
        DataError: it cannot be read.
    """
    texts = inputs.texts
    opened: dict[str, Text] = {}

    def read(name: str | None, option: str, split: str) -> Text:
        if name is None and inputs.models[0] is not None:
            accepted = "a text file, JSONL, Parquet, CSV, - or hf:dataset[/config]:split"
            raise InputError(f"{option} is needed with --model: {accepted}")
        source = f"demo:{split}" if name is None else name
        if source not in opened:
            opened[source] = open_text(source, inputs.text_column)
        return opened[source]

    if texts.cut is not None:
        splits = split_text(read(texts.cut, "", ""), tuple(texts.splits))
    else:
        splits = {split: read(name, f"--{split}", split) for split, name in texts.splits.items()}
    return Sources(splits, tuple(read(name, "--text", "test") for name in dict.fromkeys(texts.evaluated)))


def open_text(source: str, column: str | None = None) -> Text:
    """A text file, a table, a Hub dataset, or a split of the demo's text; `column` is of tables.

    `c.txt#validation` is what `c.txt` cut into three has under that name, unless there is a file of such a name.

    Raises:
        DataError: it cannot be read, or there is no such split.
    """
    whole, _, part = source.rpartition("#")
    if whole and part in PARTS and not os.path.exists(source):
        return split_text(open_text(whole, column), PARTS)[part]
    if not source.startswith("demo:"):
        return read_text(source, column)
    split = source.removeprefix("demo:")
    if split not in SPLITS:
        raise DataError(f"unknown demo text {source!r}: accepted are " + ", ".join(f"demo:{name}" for name in SPLITS))
    return Text(source, demo_text(split))


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


def read_windows(
    model: Model, text: Text, length: int, count: int | None, shuffle_seed: int | None = None, *, bos: str = "auto"
) -> Windows:
    """Windows of a text for this model; see `gpmetric.data.cut_windows`, and for `bos` `gpmetric.data.leading_bos`.

    Raises:
        InputError: a BOS token that the tokenizer does not have.
        DataError: the text is shorter than one window.
        ModelError: tokenizer and model do not match.
    """
    first = leading_bos(model.tokenizer, bos)
    return cut_windows(
        text, model.tokenizer, length, count, vocabulary=model.vocabulary, shuffle_seed=shuffle_seed, bos=first
    )


def read_splits(
    model: Model,
    inputs: Inputs,
    sources: Sources,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[dict[str, Windows], list[Windows]]:
    """Windows by split, and those of each text that perplexity is measured on; told of the texts that are read.

    Raises:
        InputError: a sequence length that the model does not take.
        DataError: a text is too short, or shares windows with another that it must not.
        ModelError: tokenizer and model do not match.
    """
    texts, length = inputs.texts, check_length(model, inputs.sequence_length)

    texts_read, in_all = itertools.count(), len(sources.splits) + len(sources.evaluated)

    def tell() -> None:
        progress("reading texts", next(texts_read), in_all)

    def read(text: Text, count: int | None) -> Windows:
        tell()
        return read_windows(model, text, length, count, inputs.shuffle_seed, bos=inputs.bos)

    def sampled(text: Text) -> Windows:
        tell()
        bos = leading_bos(model.tokenizer, inputs.bos)
        return draw_windows(
            text, model.tokenizer, length, inputs.samples, vocabulary=model.vocabulary, seed=inputs.seed, bos=bos
        )

    splits = {
        split: sampled(text) if split == "calibration" and inputs.sampling == "documents"
        else read(text, texts.windows[split])
        for split, text in sources.splits.items()
    }  # fmt: skip
    if texts.disjoint:
        check_disjoint(splits)
    evaluated = [read(text, inputs.windows) for text in sources.evaluated]
    tell()
    return splits, evaluated
