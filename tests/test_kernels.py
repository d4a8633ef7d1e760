"""The lanes of kernels and masks, each in a process of its own: what chooses how Triton runs is read at its import."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which is for Linux")
# Variables that would change what a lane tests; each lane sets its own.
CHOOSING = ("TRITON_INTERPRET", "TRITON_CACHE_DIR", "TRITON_ALWAYS_COMPILE", "GPMETRIC_KERNELS", "PYTEST_ADDOPTS")

# lane -> the variables of its process
LANES = {
    "interpret": {"TRITON_INTERPRET": "1"},
    "interpret_values": {"TRITON_INTERPRET": "1"},
    "fused": {"TRITON_INTERPRET": "1"},
    "export": {"TRITON_INTERPRET": "1"},
    "aot": {},
    "cpu": {"GPMETRIC_KERNELS": "0"},
}


def test_every_lane_has_a_process() -> None:
    assert sorted(f"lane_{lane}.py" for lane in LANES) == sorted(path.name for path in HERE.glob("lane_*.py"))


def marks(lane: str) -> list[pytest.MarkDecorator]:
    kind = pytest.mark.interpret if "TRITON_INTERPRET" in LANES[lane] else pytest.mark.aot
    return [] if lane == "cpu" else [NEEDS_TRITON, kind]


@pytest.mark.slow
@pytest.mark.parametrize("lane", [pytest.param(lane, marks=marks(lane)) for lane in LANES])
def test_lane(lane: str) -> None:
    """All of a lane's tests pass, and none is skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider", "--color=no"]
    inherited = {name: value for name, value in os.environ.items() if name not in CHOOSING}
    done = subprocess.run(
        [*command, str(HERE / f"lane_{lane}.py")],
        env=inherited | LANES[lane],
        cwd=HERE.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    print(done.stdout)  # pytest shows it where the lane fails
    last = done.stdout.strip().rpartition("\n")[2]
    assert done.returncode == 0, f"{lane}: {last}"
    assert "skipped" not in last, f"{lane}: {last}"
