"""The README's examples run as they stand; so do those of the documentation, in `test_docs.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs.hooks.fences import fences
from tests.docs_runner import ROOT, is_run, run_page


@pytest.mark.slow
def test_examples_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {"sh", "python"} <= {block.language for block in fences(readme) if is_run(block)}
    run_page(readme, tmp_path, monkeypatch, capsys)
    assert "def score(" in (tmp_path / "metric.py").read_text()
