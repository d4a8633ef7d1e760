"""Text from elsewhere, as a terminal may show it: file names, tensor names and cells of ledgers can hold anything."""

from __future__ import annotations

__all__ = ["plain"]


def plain(text: str) -> str:
    r"""The text in one line, with escapes such as \x1b and \n for whatever would do more than be seen."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
