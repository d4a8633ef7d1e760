"""What mkdocs calls while it builds the documentation: tables from the code, MathML from TeX, marks as titles."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

import tables
from fences import titled
from latex2mathml.converter import convert

_MARKER = re.compile(r"^<!-- (?:table|list): ([a-z-]+) -->$", flags=re.MULTILINE)
_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', flags=re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', flags=re.DOTALL)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The page with its tables."""
    return titled(_MARKER.sub(lambda found: tables.TABLES[found[1]](), markdown))


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """The page with its formulas as MathML, which browsers show by themselves."""
    html = _INLINE.sub(lambda found: _mathml(found[1]), html)
    return _BLOCK.sub(lambda found: f"<div>{_mathml(found[1], display='block')}</div>", html)


def _mathml(escaped: str, display: str = "inline") -> str:
    """TeX as MathML; bars are fences, since others stand apart like signs of operations."""
    fenced = re.sub(r"(?<!\\left)(\\l[vV]ert)", r"\\left\1 ", unescape(escaped))
    return convert(re.sub(r"(?<!\\right)(\\r[vV]ert)", r"\\right\1 ", fenced), display=display)
