"""docs/python.md runs as it stands, from above to below, in an empty folder."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gpmetric import cli
from gpmetric.codegen.loading import load_module

PAGE = Path(__file__).parents[1] / "docs" / "python.md"


@pytest.mark.slow
def test_the_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    program = []
    for language, text in re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        program.append(text if language == "python" else f"run({text.strip()!r})\n")
    assert len(program) == 10
    (tmp_path / "page.py").write_text(f"from {run.__module__} import run\n" + "".join(program))
    module = load_module(tmp_path / "page.py")
    assert (tmp_path / "bench.png").stat().st_size > 1000
    assert module.score.shape == module.weights["model.layers.0.mlp.up_proj.weight"].shape


def run(line: str) -> None:
    done = CliRunner().invoke(cli.app, shlex.split(line)[1:], catch_exceptions=False)
    assert done.exit_code == 0, done.output
