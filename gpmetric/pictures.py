"""Text in pictures: names that others chose, as long as there is room and in signs that the font has.

Whoever draws a text also sets `parse_math=False`: a `$` in a name is no mathematics.
"""

from __future__ import annotations

__all__ = ["printable", "shortened"]


def shortened(text: str, length: int) -> str:
    """The text with its middle left out: the end of a name tells most, its beginning says whose it is."""
    return text if len(text) <= length else f"{text[: length // 3]}…{text[length // 3 + 1 - length :]}"


def printable(text: str) -> str:
    """The text with a question mark for what the font of matplotlib's settings lacks, or what is no visible sign."""
    import matplotlib  # takes half a second
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties(family=matplotlib.rcParams["font.family"])))
    return "".join(sign if sign.isprintable() and font.get_char_index(ord(sign)) else "?" for sign in text)
