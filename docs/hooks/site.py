"""What mkdocs calls while it builds the documentation: tables from the code, MathML from TeX, marks as titles."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from typing import Any

import tables
from fences import titled
from latex2mathml.converter import convert

ELSEWHERE = ("plugins.md", "python.md")  # pages that a tree may not hold yet: neither linked nor in the contents then

_MARKER = re.compile(r"^<!-- (?:table|list): ([a-z-]+) -->$", flags=re.MULTILINE)
_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', flags=re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', flags=re.DOTALL)


def on_config(config: Any) -> Any:
    """Leaves out of the contents what is not there."""
    missing = _missing(config)
    config.nav = [_without(entry, missing) for entry in config.nav]
    return config


def _missing(config: Any) -> set[str]:
    return {name for name in ELSEWHERE if not Path(config.docs_dir, name).exists()}


def _without(entry: Any, missing: set[str]) -> Any:
    if not isinstance(entry, dict):
        return entry
    return {title: [one for one in pages if one not in missing] for title, pages in entry.items()}


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The page with its tables."""
    for name in _missing(config):
        markdown = re.sub(rf"\[([^\]]+)\]\({re.escape(name)}(?:#[a-z-]+)?\)", r"\1", markdown)
    return titled(_MARKER.sub(lambda found: tables.TABLES[found[1]](), markdown))


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """The page with its formulas as MathML, which browsers show by themselves."""
    html = _INLINE.sub(lambda found: _mathml(found[1]), html)
    return _BLOCK.sub(lambda found: f"<div>{_mathml(found[1], display='block')}</div>", html)


def _mathml(escaped: str, display: str = "inline") -> str:
    """TeX as MathML; bars are fences, since others stand apart like signs of operations."""
    fenced = re.sub(r"(?<!\\left)(\\l[vV]ert)", r"\\left\1 ", unescape(escaped))
    return convert(re.sub(r"(?<!\\right)(\\r[vV]ert)", r"\\right\1 ", fenced), display=display)
