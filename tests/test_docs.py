"""The documentation: its blocks run, its command lines parse, its tables are the code's, and it builds offline."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import gpmetric
from docs.hooks.fences import MARKS, fences
from gpmetric import cli
from gpmetric.commands import COMMANDS
from gpmetric.errors import InputError
from tests.docs_runner import PAGES, ROOT, check_command, is_run, run_page, shown_commands
from tests.mixtures import save_mixture

_READ = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
_RUN = [name for name, page in _READ.items() if name != "README.md" and any(map(is_run, fences(page)))]
# Nothing that a page needs may be asked of another machine; a link to follow is none.
_OUTSIDE = re.compile(
    r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?(?:https?:)?//"
    r"|<link[^>]*rel=\"?(?:stylesheet|preconnect|preload|icon)\"?[^>]*href=\"?(?:https?:)?//"
    r"|@import|url\([\"']?(?:https?:)?//"
)
_OFFLINE = """
import socket
def refused(*arguments, **options):
    raise OSError("the documentation is built without a network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refused
"""

needs_mkdocs = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("mkdocs", "material", "mkdocstrings", "latex2mathml")),
    reason="mkdocs is not installed: pip install 'gpmetric[docs]'",
)


@pytest.mark.parametrize("name", _READ)
def test_every_command_line_parses(name: str) -> None:
    for words in shown_commands(_READ[name]):
        check_command(words)


def test_lines_that_the_command_line_refuses_are_found() -> None:
    page = """
```sh {.needs-gpu}
RAY_AUTH_MODE=token gpmetric bench --metric wanda \\
    --target 0.5 | head && gpmetric ledger check A > B
```

    gpmetric evaluate DIR
"""
    assert list(shown_commands(page)) == [
        ["bench", "--metric", "wanda", "--target", "0.5"], ["ledger", "check", "A"], ["evaluate", "DIR"],
    ]  # fmt: skip
    check_command(["prune", "--recipe", "no/recipe.toml", "-o", "pruned"])  # speaks of a file that is not there
    for wrong in ("bench --metirc wanda", "bench --metric wnada", "plan prune --target 1.5 -o p", "prune", "benhc"):
        with pytest.raises((cli._ClickException, InputError, AssertionError)):
            check_command(wrong.split())


@pytest.mark.parametrize("name", _READ)
def test_every_fence_is_read(name: str) -> None:
    """A fence that the runner does not see would neither run nor be marked."""
    opened = re.findall(r"^ *```(?=[a-z])", _READ[name], flags=re.MULTILINE)
    found = list(fences(_READ[name]))
    assert len(found) == len(opened)
    assert {block.mark for block in found} <= {None, *MARKS}


@pytest.fixture(scope="session")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ledger of a small finished campaign, which several pages look at."""
    path = tmp_path_factory.mktemp("campaign") / "campaign.sqlite"
    few = {"samples": 8, "search_windows": 4, "windows": 4, "sequence_length": 64, "calibration_seeds": 0, "workers": 1}
    gpmetric.discover(operands="W,X", target="0.5", evaluations=12, cache=path.parent / "cache", ledger=path, **few)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", _RUN)
def test_blocks_run(
    name: str,
    tmp_path: Path,
    save_model: Callable[..., Path],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = " ".join(block.text for block in fences(_READ[name]) if is_run(block))
    if " mixture " in shown:
        shutil.copytree(save_mixture(save_model, "qwen3_moe"), tmp_path / "mixture")
    if "gpmetric slim " in shown:
        request.getfixturevalue("here")
    if " campaign.sqlite" in shown:
        shutil.copy(request.getfixturevalue("campaign"), tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    run_page(_READ[name], tmp_path, monkeypatch, capsys)


@needs_mkdocs
def test_tables_have_a_row_for_every_row_of_the_code() -> None:
    tables = _tables()
    used = [name for page in _READ.values() for name in re.findall(r"^<!-- (?:table|list): ([a-z-]+) -->$", page, re.M)]
    assert set(used) == set(tables), "a table that no page shows, or a page with one that there is not"
    operands, primitives = tables["operands"](), tables["primitives"]()
    assert operands.count("\n") - 1 == 7
    assert "| `F` | [out, in] |" in operands
    assert "| `div` | `a / b` | $\\frac{a}{b}$ | a / b, with b replaced by TINY where \\|b\\| < TINY. |" in primitives
    commands = tables["commands"]()
    assert re.findall(r"^## (.*)$", commands, flags=re.MULTILINE) == list(COMMANDS)
    assert "`--output`, `-o`" in commands
    assert "`--json`" in commands


def _tables() -> dict[str, Callable[[], str]]:
    from docs.hooks.tables import TABLES

    return TABLES


@needs_mkdocs
@pytest.mark.slow
def test_site_is_built_without_a_warning_and_without_a_network(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(_OFFLINE)
    variables = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    pages = {page.name: page.read_text(encoding="utf-8") for page in (tmp_path / "site").glob("*.html")}
    assert len(pages) > 20
    assert "<math" in pages["mathematics.html"]
    assert "arithmatex" not in pages["mathematics.html"]
    assert "gpmetric.prune" in pages["api.html"]
    assert MARKS["needs-hours"] in pages["discover.html"]
    styles = [file.read_text(encoding="utf-8") for file in (tmp_path / "site").rglob("*.css")]
    assert not [found[0] for text in (*pages.values(), *styles) if (found := _OUTSIDE.search(text))]
    left = [name for name, page in pages.items() if re.search(r"<!-- (table|list): |\$[A-Za-z\\{][^<$]*\$", page)]
    assert not left, "tables or mathematics that were left as they are written"
