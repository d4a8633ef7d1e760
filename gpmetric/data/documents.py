"""Windows at random places of random documents, as the published methods take their calibration text.

The C4 loader of GPTQ, SparseGPT and Wanda (`lib/data.py`), whose draws are repeated: `random.seed(seed)`; for each
window, `random.randint` names documents until one is longer than the window, and then a place in it.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any

import torch

from gpmetric.data.text import GAP, Text
from gpmetric.data.windows import Windows, check_count, check_vocabulary
from gpmetric.errors import DataError

__all__ = ["draw_windows"]

_DRAWS = 20_000  # documents in a row that are too short: were one in 2,000 long enough, 5e-5 is the chance of so many


def draw_windows(
    text: Text, tokenizer: Any, length: int, count: int, *, vocabulary: int, seed: int, bos: int | None = None
) -> Windows:
    """`count` windows of `length` tokens, each of a document that is longer, drawn as published.

    Args:
        text: its documents are tokenised whole, with the special tokens that the tokenizer puts there by itself. In a
            text that is one document only places are drawn, as in the published WikiText-2 loader.
        tokenizer: a Hugging Face tokenizer.
        length: tokens per window, at least 2.
        count: windows wanted.
        vocabulary: rows of the model's embedding.
        seed: of Python's generator.
        bos: id that each window begins with, before length - 1 tokens of the document; None leaves windows as drawn.

    Raises:
        InputError: `count` below 1.
        DataError: no document is long enough.
        ModelError: the tokenizer yields ids the model has no embedding for.
    """
    check_count(text, count)
    documents, draw = text.documents, random.Random(seed)
    short: set[int] = set()
    known: dict[int, list[int]] = {}
    windows, sha = [], hashlib.sha256()
    for _ in range(count):
        place = 0
        for _ in range(_DRAWS):
            place = draw.randint(0, len(documents) - 1) if len(documents) > 1 else 0
            if place in known:
                break
            if place in short:
                continue
            document = documents[place]
            ids: list[int] = tokenizer(document, verbose=False)["input_ids"]
            if len(ids) > length:
                known[place] = ids
                sha.update(((GAP if len(known) > 1 else "") + document).encode())
                break
            short.add(place)
            if len(short) == len(documents):
                raise DataError(_none_longer(text, length, f"none of {len(documents)} documents"))
        else:
            raise DataError(_none_longer(text, length, f"none of {_DRAWS:,} documents drawn"))
        ids = known[place]
        start = draw.randint(0, len(ids) - length - 1)
        window = ids[start : start + length]
        windows.append(window if bos is None or window[0] == bos else [bos, *window[:-1]])
    tokens = torch.tensor(windows, dtype=torch.int64)  # [windows, length]
    check_vocabulary(text, tokens.max(), vocabulary)
    told = {"documents": {"drawn": len(known), "read": len(known) + len(short), "of": len(documents)}}
    whole = {} if text.source is None else {"sha256": sha.hexdigest(), "complete": False}
    return Windows(text, tokens, bos is not None, told | whole)


def _none_longer(text: Text, length: int, looked_at: str) -> str:
    return f"text {text.name!r}: {looked_at} is longer than {length} tokens (--sequence-length, --sampling windows)"
