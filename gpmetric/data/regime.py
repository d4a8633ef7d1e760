"""What a tokenizer puts around a text by itself, and what of it windows have."""

from __future__ import annotations

from typing import Any

from gpmetric.errors import InputError

__all__ = ["leading_bos", "left_out"]


def leading_bos(tokenizer: Any, choice: str) -> int | None:
    """The id of the BOS token that every window begins with, or None.

    Args:
        tokenizer: a Hugging Face tokenizer.
        choice: "auto", where the tokenizer begins a text with it by itself; "always" or "never".

    Raises:
        InputError: always, and the tokenizer has none.
    """
    bos: int | None = getattr(tokenizer, "bos_token_id", None)
    if choice == "never" or (bos is None and choice == "auto"):
        return None
    if bos is None:
        raise InputError("--bos always: the model's tokenizer has no BOS token; accepted are auto and never")
    return bos if choice == "always" or _around(tokenizer)[0][:1] == [bos] else None


def left_out(tokenizer: Any, accepted: frozenset[str], bos: int | None) -> list[str]:
    """What the model may have been trained with and windows are without, in words.

    Args:
        tokenizer: a Hugging Face tokenizer.
        accepted: names of the arguments that the model takes.
        bos: that windows begin with.
    """
    before, after = _around(tokenizer)
    names = [str(tokenizer.convert_ids_to_tokens(one)) for one in (*before, *after) if one != bos]
    found = [f"special tokens {' '.join(names)}"] if names else []
    if "token_type_ids" in accepted and "token_type_ids" in tokenizer("a"):
        found.append("token types")
    if getattr(tokenizer, "chat_template", None):
        found.append("chat template")
    return found


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and behind a text by itself."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    start = next((place for place in range(len(full)) if full[place : place + len(plain)] == plain), len(full))
    return full[:start], full[start + len(plain) :]
