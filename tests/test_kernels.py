"""The kernel lanes, each in a process of its own: what chooses between them is read when Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")

HERE = Path(__file__).parent


LANES = {"lane_interpret.py": {"TRITON_INTERPRET": "1"}, "lane_aot.py": {}}


@pytest.mark.parametrize("lane", LANES)
def test_lane(lane: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / lane)]
    without = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        command, env=without | LANES[lane], cwd=HERE.parent, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
