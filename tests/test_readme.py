"""The README's examples run as they stand, in an empty folder."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gpmetric import cli

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.slow
def test_shell_examples_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All in this process, which imports torch once; `test_cli.py` starts the command as a user does."""
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("gpmetric ")]
    assert len(commands) >= 4
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    try:
        for command in commands:
            monkeypatch.setattr(sys, "argv", shlex.split(command, comments=True))
            with pytest.raises(SystemExit) as left:
                cli.main()
            assert left.value.code == 0, f"{command}\n{capsys.readouterr().err}"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "def score(" in (tmp_path / "metric.py").read_text()


@pytest.mark.slow
def test_python_examples_run(tmp_path: Path) -> None:
    (example,) = blocks("python")
    file = tmp_path / "example.py"
    file.write_text(example)
    run = subprocess.run([sys.executable, str(file)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
