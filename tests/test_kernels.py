"""The lanes of kernels and masks, in a process for each way that Triton runs: what chooses it is read at its import."""

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

# process -> its lanes, and its variables; one for all in the interpreter, since it takes seconds to begin
PROCESSES = {
    "interpret": (
        ("interpret", "interpret_values", "fused", "export", "solver", "together"),
        {"TRITON_INTERPRET": "1"},
    ),
    "aot": (("aot",), {}),
    "cpu": (("cpu",), {"GPMETRIC_KERNELS": "0"}),
}


def test_every_lane_has_a_process() -> None:
    lanes = [f"lane_{lane}.py" for lanes, _ in PROCESSES.values() for lane in lanes]
    assert sorted(lanes) == sorted(path.name for path in HERE.glob("lane_*.py"))


def marks(process: str) -> list[pytest.MarkDecorator]:
    return [] if process == "cpu" else [NEEDS_TRITON, getattr(pytest.mark, process)]


@pytest.mark.slow
@pytest.mark.parametrize("process", [pytest.param(process, marks=marks(process)) for process in PROCESSES])
def test_lanes(process: str) -> None:
    """All of their tests pass, and none is skipped."""
    lanes, variables = PROCESSES[process]
    command = [sys.executable, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider", "--color=no"]
    if process != "cpu":  # which imports it
        command += ["-p", "no:hypothesispytest"]  # which takes seconds to import where no test needs it
    inherited = {name: value for name, value in os.environ.items() if name not in CHOOSING}
    done = subprocess.run(
        [*command, *(str(HERE / f"lane_{lane}.py") for lane in lanes)],
        env=inherited | variables,
        cwd=HERE.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    print(done.stdout)  # pytest shows it where a lane fails
    last = done.stdout.strip().rpartition("\n")[2]
    assert done.returncode == 0, f"{process}: {last}"
    assert "skipped" not in last, f"{process}: {last}"
