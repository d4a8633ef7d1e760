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

# lane -> its files, and the variables of its process
LANES = {
    "interpreter": (
        ["lane_interpret.py", "lane_interpret_values.py", "lane_fused.py", "lane_export.py"],
        {"TRITON_INTERPRET": "1"},
    ),
    "compiler": (["lane_aot.py"], {}),
    "cpu": (["lane_cpu.py"], {"GPMETRIC_KERNELS": "0"}),
}


def test_every_lane_has_a_process() -> None:
    listed = [file for files, _ in LANES.values() for file in files]
    assert sorted(listed) == sorted(path.name for path in HERE.glob("lane_*.py"))


@pytest.mark.parametrize(
    "lane",
    [
        pytest.param("interpreter", marks=[NEEDS_TRITON, pytest.mark.interpret]),
        pytest.param("compiler", marks=[NEEDS_TRITON, pytest.mark.aot]),
        "cpu",
    ],
)
def test_lane(lane: str) -> None:
    """All of a lane's tests pass, and none is skipped."""
    files, variables = LANES[lane]
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider", "--color=no"]
    inherited = {name: value for name, value in os.environ.items() if name not in CHOOSING}
    done = subprocess.run(
        [*command, *(str(HERE / file) for file in files)],
        env=inherited | variables,
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
