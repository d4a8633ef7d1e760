"""What is printed: never markup, and never what a terminal would obey."""

from __future__ import annotations

from rich import text

from gpmetric.plain import plain

__all__ = ["Text"]


class Text(text.Text):
    """Rich's text of one line, made of anything."""

    def __init__(self, content: object = "", style: str = "") -> None:
        super().__init__(plain(str(content)), style)
