"""Reads and runs what README.md, SKILL.md and the documentation show: one runner for all pages.

A page's blocks run in their order, in a folder that holds what the pages speak of: a model in `model`, a mixture of
experts in `mixture` where a page names it, and the texts `calibration.txt`, `search.txt`, `validation.txt`, `test.txt`.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from docs.hooks.fences import Block, fences
from gpmetric import cli
from gpmetric.commands import COMMANDS
from gpmetric.demo.text import demo_text
from gpmetric.errors import InputError
from gpmetric.formula_files import is_ledger
from gpmetric.options import Request, described, make_request

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "SKILL.md", *sorted((ROOT / "docs").glob("*.md"))]

_SPLITS = ("calibration", "search", "validation", "test")
_CHARACTERS = 150_000  # of each text
_INSTALLS = ("make ", "pip ", "python3 -m venv", ".venv/", "git ")  # which is what the suite itself began with
_PLACEHOLDERS = {"FORMULA": "abs(W)*X"}
_INDENTED = re.compile(r"^ {4}((?:\S+ )*?gpmetric (?:\\\n|[^\n])*)", flags=re.MULTILINE)


def lines_of(text: str) -> list[str]:
    """The commands of a shell block, continued lines as one."""
    joined = text.replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def shown_commands(page: str) -> Iterator[list[str]]:
    """The words of every `gpmetric ...` of a page, in fenced blocks, run or not, and in indented ones."""
    blocks = [block.text for block in fences(page) if block.language == "sh"]
    blocks += [found[1] for found in _INDENTED.finditer(re.sub(r"^```.*?^```", "", page, flags=re.M | re.S))]
    for line in (line for text in blocks for line in lines_of(text)):
        words = shlex.split(line, comments=True)
        while "gpmetric" in words:
            words = words[words.index("gpmetric") + 1 :]
            ends = (place for place, word in enumerate(words) if word in ("|", ">", "&&", ";", "&", "gpmetric"))
            yield words[: next(ends, len(words))]


def check_command(words: list[str]) -> None:
    """Fails where the command line does not know an option, or refuses a value before it reads anything."""
    command: Any = typer.main.get_command(cli.app)
    names: list[str] = []
    rest = [_PLACEHOLDERS.get(word, word) for word in words]
    if "--config" in rest:  # whose file is not there
        place = rest.index("--config")
        del rest[place : place + 2]
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"no command {rest[0]!r} in gpmetric {' '.join(words)}"
        names.append(rest[0])
        command = command.commands[rest.pop(0)]
    row = COMMANDS.get(" ".join(names).removeprefix("plan "))
    if row is None or "--help" in rest:
        assert set(rest) <= {"--help", "--version"}, f"gpmetric {' '.join(words)}"
        return
    context = command.make_context(" ".join(names), rest)  # raises what the command line prints
    fields = described(row.request)
    shown = {name: value for name, value in context.params.items() if name not in ("json", "config", "force")}
    try:
        given = cli._given(context, cli._placed(fields), shown)
        make_request(row.request, given).completed().check()
    except InputError as error:
        if not _names_what_is_missing(str(error), row.request, given):
            raise


def _names_what_is_missing(message: str, request: type[Request], given: dict[str, Any]) -> bool:
    """Whether a message is of a file or folder that a page only speaks of."""
    fields = described(request)
    named = (given.get(field.name) for field in fields if field.option.reads)
    values = [str(one) for value in named for one in (value if isinstance(value, tuple | list) else [value])]
    formulas = (given.get(field.name) or () for field in fields if field.option.formula)
    values += [one for value in formulas for one in ([value] if isinstance(value, str) else value) if is_ledger(one)]
    return any(value in message and not Path(value).exists() for value in values)


def run_page(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs a page's unmarked blocks one after the other; commands in this process, which imports torch once."""
    _furnish(folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)  # where a page's `import` finds what a page wrote
    monkeypatch.setenv("PATH", os.pathsep.join([str(folder / ".bin"), os.environ["PATH"]]))
    before = signal.getsignal(signal.SIGTERM)
    variables: dict[str, Any] = {"__name__": "__main__"}
    try:
        for block in fences(page):
            _run_block(block, folder, variables, monkeypatch, capsys)
    finally:
        signal.signal(signal.SIGTERM, before)


def is_run(block: Block) -> bool:
    """Whether a block is for the runner: a command, a program, or a file that these read."""
    return block.mark is None and (block.language in ("sh", "python") or block.title is not None)


def _run_block(
    block: Block,
    folder: Path,
    variables: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not is_run(block):
        return
    if block.title is not None:
        (folder / block.title).write_text(block.text, encoding="utf-8")
    elif block.language == "python":
        exec(compile(block.text, f"line {block.line} of the page", "exec"), variables)
    else:
        for line in lines_of(block.text):
            _run_line(line, folder, monkeypatch, capsys)


def _run_line(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if line.startswith(_INSTALLS):
        return
    if line.startswith("gpmetric ") and not re.search(r" [|>&;]+ |\$", line):
        monkeypatch.setattr(sys, "argv", shlex.split(line, comments=True))
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 0, f"{line}\n{capsys.readouterr().err}"
        return
    done = subprocess.run(["bash", "-ec", line], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


def _furnish(folder: Path) -> None:
    """Puts the demo's model and texts there as any user's, and programs called `gpmetric` and `python` for a shell."""
    shutil.copytree(ROOT / "gpmetric" / "demo" / "model", folder / "model")
    for split in _SPLITS:
        (folder / f"{split}.txt").write_text(demo_text(split)[:_CHARACTERS], encoding="utf-8")
    programs = folder / ".bin"
    programs.mkdir()
    for name, words in {"gpmetric": "-m gpmetric", "python": ""}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (programs / name).chmod(0o755)
