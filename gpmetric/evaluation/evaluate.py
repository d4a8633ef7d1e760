"""Perplexity of a model on texts: `gpmetric evaluate MODEL --text FILE`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gpmetric.evaluation.perplexity import mean_loss, perplexity
from gpmetric.evaluation.windows import check_length, default_text, read_windows
from gpmetric.models import load_model
from gpmetric.provenance import versions

__all__ = ["evaluate_model"]


def evaluate_model(
    model: str | None = None,
    *,
    text: str | Sequence[str] = (),
    sequence_length: int | None = None,
    windows: int | None = None,
    shuffle: bool = False,
    seed: int = 0,
    device: str = "auto",
    dtype: str | None = None,
    on_text: Callable[[str, float], None] = lambda name, ppl: None,
) -> dict[str, Any]:
    """Perplexity on each text, over non-overlapping windows, with everything needed to repeat it.

    Args:
        model: a directory or Hub name; None is the demo model.
        text: one source or several; the demo's test text when empty and no model is named.
        sequence_length: tokens per window; the model's context, at most 2,048, by default.
        windows: windows per text; all by default.
        shuffle: draw the windows with `seed` instead of taking the first.
        on_text: called with each text's name and perplexity as soon as it is known.

    Raises:
        InputError: before the model runs, for anything that cannot be used.
    """
    names = [text] if isinstance(text, str) else text
    sources = list(dict.fromkeys(names)) or [default_text(model, None, "--text", "test")]
    loaded = load_model(model, device=device, dtype=dtype)
    length = check_length(loaded, sequence_length)
    texts = [read_windows(loaded, source, length, windows, seed if shuffle else None) for source in sources]
    ppl: dict[str, float] = {}
    for part in texts:
        ppl[part.text.name] = perplexity(mean_loss(loaded, part.tokens))
        on_text(part.text.name, ppl[part.text.name])
    return {
        "model": loaded.name,
        "dtype": loaded.dtype,
        "device": str(loaded.device),
        "sequence_length": length,
        "seed": seed,
        "shuffle": shuffle,
        "ppl": ppl,
        "windows": sum(len(part.tokens) for part in texts),
        "tokens": sum(part.tokens.numel() for part in texts),
        "texts": [part.describe() for part in texts],
        "versions": versions(),
    }
