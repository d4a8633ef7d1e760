"""A page as one HTML file that asks nothing of any network; its policy allows its own script and style alone."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from gpmetric.files import finite
from gpmetric.plain import plain
from gpmetric.provenance import gpmetric_version
from gpmetric.reporting.blocks import Candidates, Page, told

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["render"]

_DATA = 2_200_000  # bytes of candidates that a page holds, so that it stays below 3 MB
_LONGEST = 400  # characters of a candidate's formula


def render(page: Page, *, live: float | None = None) -> str:
    """The HTML of a page; `live`, seconds after which one that is served looks for another."""
    script, style = _source("page.js"), _source("page.css")
    policy = f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; "
    policy += "base-uri 'none'; form-action 'none'"
    policy += "; connect-src 'self'" if live else ""
    content = _environment().get_template("page.html.jinja").render(
        page=page, policy=Markup(policy), script=Markup(script), style=Markup(style), version=gpmetric_version(),
        live=live is not None, seconds=live,
    )  # fmt: skip
    # names from elsewhere can hold anything: what would do more than be seen is shown as an escape
    return "\n".join(map(plain, content.split("\n")))


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _source(name: str) -> str:
    environment = _environment()
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("gpmetric.reporting"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.globals |= {"data": _data, "count": _count, "cell_of": told}
    return made


def _data(block: Candidates) -> Markup:
    """The rows as JSON that nothing in them ends, as many as there is room for."""
    rows, size = [], 0
    for row in block.rows:
        text = _json([_clipped(cell) for cell in row])
        size += len(text.encode()) + 1
        if size > _DATA:
            break
        rows.append(text)
    return Markup('{{"total":{},"what":{},"sorted":{},"rows":[{}]}}').format(
        block.total, Markup(_json(block.what)), block.sorted, Markup(",".join(rows))
    )


def _clipped(cell: Any) -> Any:
    if not isinstance(cell, str):
        return cell
    text = plain(cell)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}\N{HORIZONTAL ELLIPSIS}"


def _json(value: Any) -> str:
    text = json.dumps(finite(value), separators=(",", ":"), ensure_ascii=True)
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _count(block: Candidates) -> str:
    return f"{block.total:,} {block.what}"
